"""`train --max-steps`: a run that is cut can be evaluated, says so everywhere, and goes on as if it had not been."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retemper.cli import run
from retemper.console import Progress
from retemper.engine.export.export import export
from retemper.engine.recipe import Recipe
from retemper.engine.report.read import read_run
from retemper.engine.run import pace as module
from retemper.engine.run.pace import Pace

SHORT = "--epochs 2 --attack-steps 1 --holdout-per-class 5 --select-steps 1 --batch-size 512 --cpu-threads 1".split()


def train(out: Path, *options: str) -> None:
    assert run(["train", "sat:digits", "--out", str(out), *SHORT, *options]) == 0


def test_a_cut_run_is_evaluated_says_so_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    train(cut, "--max-steps", "2")
    assert "cut after 2 steps, in epoch 1 of 2, so this is no full run" in capsys.readouterr().err
    assert run(["evaluate", str(cut), "--attacks", "clean"]) == 0
    words = "training was cut after 2 steps, in epoch 1 of 2"
    assert words in capsys.readouterr().out
    assert any(words in note.text for note in read_run(cut).notes)
    assert words in export(cut, tmp_path / "card", "safetensors").read_text()
    train(cut, "--max-steps", "3")  # an epoch has three: it is cut between two
    assert "cut after 3 steps, in epoch 2 of 2" in capsys.readouterr().err
    train(cut, "--max-steps", "3")
    train(cut)
    assert not any("cut" in note.text for note in read_run(whole).notes)
    for name in ("best.safetensors", "last.safetensors"):
        one, two = (load_file(folder / name) for folder in (whole, cut))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_time_left_counts_steps_and_ends(monkeypatch: pytest.MonkeyPatch, digits_recipe: Recipe) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    pace = Pace(digits_recipe, steps=10)
    pace.begin()
    for _ in range(module.WARM_UP):
        now += 60  # compiling
        pace.step()
    assert pace.left_s(1, 2) is None
    now += 2
    pace.step()
    assert pace.left_s(1, 3) == 2 * 37
    with pace.ending(1):
        now += 5
    assert pace.left_s(2, 0) == 2 * 30 + 5 * 2  # the last epoch's end is of another kind
    assert [Pace(digits_recipe, 10, 25).allowed(epoch) for epoch in (1, 2, 3, 4)] == [10, 10, 5, 0]


@pytest.fixture
def digits_recipe() -> Recipe:
    """Four epochs, the last of which is looked at."""
    from retemper.engine.catalogue import find_setting

    return find_setting("sat:digits")[2].recipe.replace(epochs=4, select_every=10, select_always_from=10)


def test_the_bar_of_a_cut_run_ends_at_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[int] = []

    class Noting(Progress):
        def __init__(self, what: str, total: int, **options: Any) -> None:
            totals.append(total)
            super().__init__(what, total, **options)

    monkeypatch.setattr("retemper.engine.run.steps.Progress", Noting)
    train(tmp_path / "cut", "--max-steps", "1")
    assert totals == [512]
