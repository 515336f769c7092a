"""The schedules of the learning rate: against torch's own, in a run's steps and files, and across a resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from retemper.cli import run
from retemper.engine import Recipe, State, create_model
from retemper.engine.catalogue import find_setting
from retemper.engine.groups import Optimisation
from retemper.engine.run.steps import Steps

EPOCHS, STEPS, PEAK = 5, 7, 0.4


def rates(optim: Optimisation) -> list[float]:
    return [optim.lr_at(epoch, step, STEPS) for epoch in range(1, EPOCHS + 1) for step in range(STEPS)]


def torchs(make: Callable[[torch.optim.Optimizer], LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler, found = make(optimizer), []
    for _ in range(EPOCHS * STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(found) < EPOCHS * STEPS else None
    return found


def warmed(optimizer: torch.optim.Optimizer) -> LRScheduler:
    warm = STEPS
    rise = LinearLR(optimizer, start_factor=1 / warm, total_iters=warm - 1)
    return SequentialLR(optimizer, [rise, CosineAnnealingLR(optimizer, EPOCHS * STEPS - warm)], [warm])


@pytest.mark.parametrize(
    ("options", "make"),
    [
        (dict(lr_schedule="cosine"), lambda one: CosineAnnealingLR(one, EPOCHS * STEPS)),
        (dict(lr_schedule="cosine", lr_warmup=1.0), warmed),
        *(
            (
                dict(lr_schedule="onecycle", lr_peak=peak),
                lambda one, peak=peak: OneCycleLR(
                    one, PEAK, total_steps=EPOCHS * STEPS, pct_start=peak, cycle_momentum=False
                ),
            )
            for peak in (0.3, 0.25, 0.1)
        ),
    ],
)
def test_a_schedule_is_that_of_torch(options: dict[str, Any], make: Callable[..., LRScheduler]) -> None:
    ours = rates(Optimisation(epochs=EPOCHS, lr=PEAK, lr_drops=(), **options))
    np.testing.assert_allclose(ours, torchs(make), rtol=1e-9, atol=1e-12)


def test_a_triangle_is_the_two_lines_of_the_script() -> None:
    ours = rates(Optimisation(epochs=EPOCHS, lr=PEAK, lr_schedule="triangle", lr_peak=0.4))
    after = [epoch + (step + 1) / STEPS for epoch in range(EPOCHS) for step in range(STEPS)]
    np.testing.assert_allclose(ours, np.interp(after, [0, 0.4 * EPOCHS, EPOCHS], [0, PEAK, 0]), atol=1e-12)


def test_drops_are_warmed_up_by_parts_of_an_epoch() -> None:
    options: dict[str, Any] = dict(epochs=EPOCHS, lr=PEAK, lr_drops=(3,))
    flat, warm = rates(Optimisation(**options)), rates(Optimisation(**options, lr_warmup=0.5))
    assert flat == [PEAK] * 3 * STEPS + [PEAK * 0.1] * 2 * STEPS
    rise = [min(1.0, (step + 1) / (0.5 * STEPS)) for step in range(EPOCHS * STEPS)]
    np.testing.assert_allclose(warm, np.multiply(flat, rise), rtol=1e-12)
    assert warm[4:] == flat[4:]


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "triangle"])
@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_what_methods_scale_by_is_the_rate_after_the_epoch(schedule: Any, epochs: int) -> None:
    optim = Optimisation(epochs=epochs, lr=PEAK, lr_schedule=schedule)
    found = [optim.decay(epoch) for epoch in range(1, epochs + 1)]
    starts = [optim.lr_at(epoch, 0, 1000) / PEAK for epoch in range(2, epochs + 1)]
    np.testing.assert_allclose(found[:-1], starts, atol=2e-3)
    assert 0 <= found[-1] < 1e-4
    assert max(found[:-1], default=1.0) <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(lr_schedule="onecycle", lr_warmup=1.0), "lr_warmup = 1.0"),
        (dict(lr_schedule="cosine", lr_peak=0.2), "lr_peak = 0.2"),
        (dict(lr_peak=0.2), "lr_peak = 0.2"),
        (dict(epochs=2, lr_warmup=2.0), "lr_warmup = 2.0"),
        (dict(lr_schedule="linear"), "lr_schedule = 'linear'"),
    ],
)
def test_what_a_schedule_has_no_use_for_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        Optimisation(**options)


def test_each_step_has_its_own_rate_in_the_optimizer() -> None:
    recipe: Recipe = find_setting("sat:digits_student")[2].recipe.replace(lr_schedule="cosine", epochs=2)
    state = State(recipe, create_model("tiny_resnet", 10), None, 10, torch.device("cpu"))
    state.start_epoch(recipe, 2, 0)
    for step in range(3):
        state.begin_step(recipe, 2, step, 3)
        assert state.optimizer.param_groups[0]["lr"] == state.rate == recipe.optim.lr_at(2, step, 3)


WORDS = (
    "train sat:digits_student --epochs 2 --lr-schedule onecycle --attack-steps 1 --holdout-per-class 5 "
    "--select-steps 1 --batch-size 256 --select-every 1 --select-from 1 --save-every 0 --out"
).split()


def test_a_run_cut_within_an_epoch_goes_on_with_the_rate_of_its_next_step(tmp_path: Path) -> None:
    assert run([*WORDS, str(tmp_path / "whole")]) == 0
    assert run([*WORDS, str(tmp_path / "cut"), "--max-steps", "3"]) == 0
    assert run([*WORDS, str(tmp_path / "cut")]) == 0
    whole, cut = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_metrics_show_the_rate_of_the_middle_of_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, float]] = []
    begin = State.begin_step

    def noting(self: State, recipe: Recipe, epoch: int, step: int, steps: int) -> None:
        begin(self, recipe, epoch, step, steps)
        used.append((epoch, self.rate))

    said = []
    words = Steps._words
    monkeypatch.setattr(State, "begin_step", noting)
    monkeypatch.setattr(Steps, "_words", lambda self, loss: said.append(words(self, loss)) or said[-1])
    assert run([*WORDS, str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        of_epoch = [rate for epoch, rate in used if epoch == line["epoch"]]
        assert len(set(of_epoch)) == len(of_epoch) > 2
        assert line["lr"] == of_epoch[(len(of_epoch) - 1) // 2]
    assert f"lr {used[-1][1]:.3g}" in said[-1]
