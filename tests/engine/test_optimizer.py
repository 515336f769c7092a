"""The optimizers and what decays: against torch's own on a plain loop, in a run's files, and across a resume."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.cli import run
from retemper.engine import LabelAttack, Recipe, State, Targets, create_model, train_step
from retemper.engine.groups import Optimisation
from retemper.engine.optim import decay_groups, make_optimizer
from retemper.engine.run.saving import restore
from retemper.engine.step import update

CPU = torch.device("cpu")
STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Plain(LabelAttack):
    forwards: ClassVar[tuple[str, ...]] = ("adv",)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return F.cross_entropy(logits["adv"], targets.label_B)


def begun(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[State, Recipe]:
    """Return the state of a run without an attack, and its recipe."""
    given = dict(attack_steps=0, attack_start="none", precision="fp32", epochs=2, weight_decay=0.1) | options
    recipe = Recipe.of(Plain, dataset="digits", student="tiny_resnet", **given)
    torch.manual_seed(0)
    return State(recipe, create_model("tiny_resnet", 10).to(dtype), None, 10, CPU), recipe


def batch(number: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(number)
    return torch.rand(6, 1, 8, 8, generator=gen, dtype=dtype), torch.randint(10, (6,), generator=gen)


def trained(state: State, recipe: Recipe) -> dict[str, Tensor]:
    state.start_epoch(recipe, 1, 0)
    for step in range(STEPS):
        state.begin_step(recipe, 1, step, STEPS)
        train_step(state, recipe, *batch(step, next(state.student.parameters()).dtype))
    return state.student.state_dict()


def by_hand(optimizer_of: Any, recipe: Recipe) -> dict[str, Tensor]:
    """Return the weights after the same steps of a plain loop."""
    torch.manual_seed(0)
    student = create_model("tiny_resnet", 10).double().train()
    optimizer = optimizer_of(student)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = recipe.optim.lr_at(1, step, STEPS)
        image, label = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(student(image), label).backward()
        optimizer.step()
    return student.state_dict()


def apart(student: nn.Module) -> list[dict[str, Any]]:
    norms = [w for module in student.modules() if isinstance(module, nn.BatchNorm2d) for w in module.parameters()]
    norms += [weight for name, weight in student.named_parameters() if name == "linear.bias" or name == "fc.bias"]
    decaying = [weight for weight in student.parameters() if not any(weight is one for one in norms)]
    return [{"params": decaying, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_adamw_is_that_of_torch(fused: bool, decay_norms: bool) -> None:
    state, recipe = begun(
        optimizer="adamw", adam_betas=(0.8, 0.95), lr=0.01, lr_schedule="cosine", fused_sgd=fused,
        decay_norms=decay_norms,
    )  # fmt: skip

    def optimizer_of(student: nn.Module) -> torch.optim.Optimizer:
        weights = student.parameters() if decay_norms else apart(student)
        return torch.optim.AdamW(weights, betas=(0.8, 0.95), weight_decay=0.1, foreach=False)

    theirs = by_hand(optimizer_of, recipe)
    for name, value in trained(state, recipe).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decay_norms", [True, False])
def test_sgd_decays_what_it_is_told_to(decay_norms: bool) -> None:
    state, recipe = begun(lr=0.05, decay_norms=decay_norms)

    def optimizer_of(student: nn.Module) -> torch.optim.Optimizer:
        weights = student.parameters() if decay_norms else apart(student)
        return torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=False)

    theirs = by_hand(optimizer_of, recipe)
    for name, value in trained(state, recipe).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-11)


def test_what_does_not_decay_is_all_of_one_dimension_and_nothing_is_left_out() -> None:
    student = create_model("resnet18", 10)
    decaying, others = decay_groups(student, decay_norms=False)
    kinds = {
        id(weight): (type(module), name) for module in student.modules() for name, weight in module._parameters.items()
    }
    assert {kinds[id(w)] for w in decaying["params"]} == {(nn.Conv2d, "weight"), (nn.Linear, "weight")}
    found = {kinds[id(w)] for w in others["params"]}
    assert found == {(nn.BatchNorm2d, "weight"), (nn.BatchNorm2d, "bias"), (nn.Linear, "bias")}
    assert len(decaying["params"]) + len(others["params"]) == len([*student.parameters()])
    assert others["weight_decay"] == 0 and "weight_decay" not in decaying
    assert len(decay_groups(student, decay_norms=True)) == 1


def test_an_update_that_is_not_finite_moves_no_moment_of_the_fused_optimizer() -> None:
    state, _ = begun(torch.float32, optimizer="adamw", lr=0.01)
    weights = [*state.student.parameters()]

    def step(gradient: float) -> list[Tensor]:
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient)
        update(state, torch.tensor(1.0))
        moments = [value.clone() for of_weight in state.optimizer.state.values() for value in of_weight.values()]
        return [*(weight.detach().clone() for weight in weights), *moments]

    first, held = step(1.0), step(torch.inf)
    assert len(first) == 4 * len(weights) and all(map(torch.equal, first, held))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(optimizer="adamw", nesterov=True), "nesterov = True"),
        (dict(optimizer="adamw", momentum=0.8), "momentum = 0.8"),
        (dict(optimizer="adamw", awp_decay="perturbed"), "awp_decay = 'perturbed'"),
        (dict(adam_betas=(0.5, 0.9)), r"adam_betas = \(0.5, 0.9\): SGD"),
        (dict(optimizer="adamw", adam_betas=(0.5, 1.0)), "adam_betas"),
        (dict(optimizer="adamw", adam_betas=(0.5,)), "adam_betas"),
        (dict(optimizer="adam"), "optimizer = 'adam'"),
    ],
)
def test_what_an_optimizer_has_no_use_for_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Optimisation(**options)


def test_on_a_gpu_a_captured_step_may_hold_adamw() -> None:
    """torch refuses to record one that is not capturable, and its rate must lie on the device."""
    gpu = torch.device("cuda")
    student = nn.Linear(2, 2)
    made: list[dict[str, Any]] = []

    class Noting(torch.optim.AdamW):
        def __init__(self, params: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(params, lr=options["lr"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Noting)
        patch.setattr(torch, "tensor", lambda value, device: ("tensor", value, device))
        options = Optimisation(optimizer="adamw", lr=0.1, decay_norms=False)
        rates = [
            [group["lr"] for group in make_optimizer(options, student, gpu, fused).param_groups]
            for fused in (True, False)
        ]
    assert [one["capturable"] for one in made] == [True, False]
    assert [one["fused"] for one in made] == [True, None]
    assert rates == [[("tensor", 0.1, gpu)] * 2, [0.1] * 2]


WORDS = (
    "train sat:digits_student --epochs 2 --optimizer adamw --lr 0.01 --decay-norms false --attack-steps 1 "
    "--holdout-per-class 5 --select-steps 1 --batch-size 256 --select-every 1 --select-from 1 --out"
).split()


def test_a_run_of_adamw_that_is_cut_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    assert run([*WORDS, str(tmp_path / "whole")]) == 0
    assert run([*WORDS, str(tmp_path / "cut"), "--max-steps", "3"]) == 0
    assert run([*WORDS, str(tmp_path / "cut")]) == 0
    whole, cut = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    saved = torch.load(tmp_path / "cut" / "last.state", weights_only=True)
    assert {name for of in saved["optimizer"]["state"].values() for name in of} == {"step", "exp_avg", "exp_avg_sq"}


def test_the_state_of_a_run_from_before_there_was_a_choice_is_taken_up() -> None:
    """One group, as it has always been, with the parameters in their order."""
    state, _ = begun(torch.float32)
    trained_state = {name: value.clone() for name, value in trained(*begun(torch.float32)).items()}
    optimizer = torch.optim.SGD(state.student.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    buffers = [torch.full_like(weight, 3) for weight in state.student.parameters()]
    for weight, buffer in zip(state.student.parameters(), buffers, strict=True):
        optimizer.state[weight] = {"momentum_buffer": buffer}
    saved = {"student": trained_state, "optimizer": optimizer.state_dict(), "scaler": {}, "class_state": {}}
    restore(state, saved, {"generators": {"cpu": torch.get_rng_state()}}, running=False)
    for weight in state.student.parameters():
        assert torch.equal(state.optimizer.state[weight]["momentum_buffer"], torch.full_like(weight, 3))
