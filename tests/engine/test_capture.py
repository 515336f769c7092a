"""A captured step equals the eager one, bit for bit.

Where there is no GPU, a recorder of operations stands in for the CUDA graph: it runs the recorded operations again on
the recorded tensors, so that a step with a tensor that moves, or a number read on the host, replays wrongly here too.
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.engine import KlObjective, Recipe, State, create_model, train_step
from retemper.engine.attack import ascend
from retemper.engine.attack_plan import Plan
from retemper.engine.catalogue import find_setting, method_module, methods
from retemper.engine.distributed.ranks import ALONE
from retemper.engine.kept import Kept
from retemper.engine.models import channels_last
from retemper.engine.speed.capture import WARM_UP, Captured, captured
from retemper.engine.state import clean_images
from retemper.kernels import num_views

Recorder = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("stand_in.py")))).Recorder  # no package
OPTIONS: dict[str, dict[str, Any]] = {  # of the engine, beside the methods
    "absld, averaged": dict(average="ema", ema_decay=0.9, ema_warmup=True),
    "absld, by AdamW": dict(optimizer="adamw", decay_norms=False),
    "absld, weights perturbed": dict(awp_gamma=0.01),
    "rslad, in bf16": dict(precision="bf16"),
    "peeraid, weights perturbed": dict(awp_gamma=0.01),
    "absld, in one step": dict(attack="nfgsm"),
    "rslad, in one step from what is kept": dict(attack="pgi"),
    "sat, in one step from what is kept on disk": dict(attack="pgi", kept="disk"),
}
# those whose steps are others, or change where IAD begins
RELEASED = "sat trades cfa fair_tat frl faal iad fair_iad adaiad mtard b_mtard bat peeraid rebat".split()
OPTIONS |= {f"{method}, released": dict(variant="released") for method in RELEASED}
METHODS = [*(name for name in methods() if "digits" in method_module(name).SETTINGS), *OPTIONS]
STEPS = 20


def record(state: State) -> Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]:
    """Record as CudaGraphs does. A graph does not run while it is recorded, so the effects of this run are undone."""

    def recorded(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        held = tensors(state)
        before = [tensor.clone() for tensor in held]
        with Recorder() as recorder:
            result = work()
        with torch.no_grad():
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)
        return recorder.replay, result

    return recorded


def tensors(state: State) -> list[Tensor]:
    """Return all tensors that a step changes in place."""
    found = [*state.trained.state_dict(keep_vars=True).values(), state.noise_seed, state.loss_sum]
    found += [moment for moments in state.optimizer.state.values() for moment in moments.values()]
    found += list(state.class_state.values())
    for sums in state.sums.values():
        found += [sums.loss_K, sums.correct_K, sums.count_K]
    for means in state.measured.values():
        found += [means.total_KD, means.count_K]
    if state.prior is not None:
        found += [*state.prior.places.values(), *state.prior.window.values()]
    if state.average is not None:
        found += [*state.average.network.state_dict(keep_vars=True).values(), state.average.count]
    return [tensor.detach() for tensor in found]


def make(name: str, device: torch.device) -> tuple[State, Recipe]:
    torch.manual_seed(0)
    method, _, _ = name.partition(",")
    recipe = find_setting(f"{method}:digits")[2].recipe.replace(attack_steps=2, lr=0.05, precision="fp32")
    recipe = recipe.replace(**OPTIONS.get(name, {}))
    teachers = [channels_last(create_model("tiny_resnet", 10), device).eval().requires_grad_(False) for _ in range(2)]
    teacher = teachers[0] if recipe.networks.teacher_model else None
    clean_teacher = teachers[1] if recipe.networks.clean_teacher_model else None
    student = create_model("tiny_resnet", 10)
    peer = create_model("tiny_resnet", 10) if recipe.method.trains_peer else None
    state = State(recipe, student, teacher, 10, device, clean_teacher, peer=peer)
    if recipe.attack.kind == "pgi":
        file = Path(gettempdir()) / "captured" if recipe.execution.kept == "disk" else None
        padding = recipe.data.padding
        state.prior = Kept(32, (8, 8, 1), padding, eps=recipe.attack.eps, reset=20, rows=16, device=device, file=file)
    if device.type == "cpu":  # there the rate is a number, as nothing is captured; here it is
        for group in state.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    return state, recipe


def run(name: str, device: torch.device, capture: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Run STEPS steps in two epochs that differ in rate and class state; return losses and state."""
    state, recipe = make(name, device)

    def step(image: Tensor, view: Tensor, label: Tensor, teacher_BK: Tensor | None, index: Tensor) -> Tensor:
        return train_step(state, recipe, clean_images(recipe, image, view), label, teacher_BK, index, view)

    if capture:
        step = captured(step, state.phase) if device.type == "cuda" else Captured(step, record(state), state.phase)
    gen, losses = torch.Generator().manual_seed(1), []
    for epoch in range(2):
        state.start_epoch(recipe.replace(lr=0.05 / (1 + epoch), lr_drops=()), 1 + 19 * epoch, 1000 * epoch)
        for number in range(STEPS // 2):
            size = 8 if number in (4, 9) else 16
            image = torch.randint(256, (size, 8, 8, 1), dtype=torch.uint8, generator=gen)
            view = torch.randint(num_views(recipe.data.padding), (size,), generator=gen)
            label = torch.randint(10, (size,), generator=gen)
            known = torch.randn(size, 10, generator=gen) if recipe.method.teacher_sees == ("clean",) else None
            asked = known.to(device) if known is not None and state.teacher is not None else None
            index = torch.arange(size) + 16 * (number % 2)
            if state.prior is not None:
                state.prior.begin_step(index.numpy())
            losses.append(step(image.to(device), view.to(device), label.to(device), asked, index.to(device)))
            if state.prior is not None:
                state.prior.end_step(index.numpy())
        if state.prior is not None:
            state.prior.merge(ALONE)
        moved = {}
        for key, value in state.class_state.items():
            moved[key] = value + 0.1 * torch.rand(value.shape, generator=gen).to(device)
        state.move_classes(moved)
    return losses, tensors(state)


@pytest.mark.parametrize("method", METHODS)
def test_replay_equals_eager_bit_for_bit(method: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    eager, replayed = run(method, device, False), run(method, device, True)
    for kind in (0, 1):
        for one, other in zip(eager[kind], replayed[kind], strict=True):
            assert torch.equal(one, other)
    assert len(set(map(float, eager[0]))) == STEPS


def test_the_recorder_would_notice_a_tensor_that_moves() -> None:
    held = {"x": torch.zeros(1)}

    def step(add: Tensor) -> Tensor:
        held["x"] = held["x"] + add  # a new tensor: the next replay starts from the old one
        return held["x"].clone()

    def recorded(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with Recorder() as recorder:
            result = work()
        return recorder.replay, result

    replay = Captured(step, recorded)
    found = [float(replay(torch.ones(1))) for _ in range(WARM_UP + 3)]
    assert found != [float(i + 1) for i in range(WARM_UP + 3)]


def test_each_shape_is_recorded_once() -> None:
    recorded = []

    def keep(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recorded.append(work())
        return lambda: None, recorded[-1]

    step = Captured(lambda x, y: x.sum(), keep)
    for _ in range(WARM_UP + 2):
        step(torch.ones(4), None)
        step(torch.ones(3), None)
    assert [float(value) for value in recorded] == [4, 3]


def test_each_phase_has_its_own_recording() -> None:
    phase, total = [1], torch.zeros(1)

    def step(add: Tensor) -> Tensor:
        for _ in range(phase[0]):  # what a recording cannot know
            total.add_(add)
        return total.clone()

    def recorded(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        before = total.clone()
        with Recorder() as recorder:
            result = work()
        total.copy_(before)
        return recorder.replay, result

    replay, found = Captured(step, recorded, lambda: phase[0]), []
    for phase[0] in (1, 2):
        found += [float(replay(torch.ones(1))) for _ in range(WARM_UP + 2)]
    assert found == [1, 2, 3, 4, 5, 7, 9, 11, 13, 15]


def test_an_attack_with_every_choice_is_replayed() -> None:
    torch.manual_seed(0)
    net = create_model("tiny_resnet", 10).eval()
    image, label, seed = torch.rand(4, 1, 8, 8), torch.arange(4), torch.tensor([3])
    plan = Plan(
        steps=3,
        step=torch.tensor([0.05, -0.05, 0.02, 0.03]),
        eps=torch.full((4, 1, 1, 1), 0.1),
        seed=seed,
        lower=torch.zeros(1),
        upper=torch.ones(1, 1, 1),
        mask=torch.rand(1, 1, 8, 8) < 0.8,
        momentum=0.9,
        restarts=2,
        keep="best",
    )
    objective = KlObjective(torch.randn(4, 10), label)
    with Recorder() as recorder:
        adv = ascend(net, image, plan, objective=objective)
    image.copy_(torch.rand(4, 1, 8, 8))
    seed.add_(5)
    recorder.replay()
    assert torch.equal(adv, ascend(net, image, plan, objective=objective))
    assert (adv - image).abs().amax() > 0.09
