"""Label smoothing in every method: in the loss's cross-entropy against labels, where there is one, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from retemper.cli import run
from retemper.engine import State, create_model, train_step
from retemper.engine.catalogue import find_setting, method_module, methods

NAMES = [
    f"{method}:{name}"
    for method in methods()
    for name, setting in method_module(method).SETTINGS.items()
    if setting.recipe.data.dataset == "digits"
]
OTHERS = [
    ("ard:digits", dict(soft_weight=0.5)),
    ("adaiad:digits", dict(adv_weight=0.5)),
    ("iad:digits_ii", dict(clean_teacher_weight=0.5)),
]
CPU = torch.device("cpu")


def loss_of(name: str, **options: Any) -> float:
    """Return the loss of a step in float64."""
    options = dict(precision="fp32", fold=False, attack_steps=2) | options
    recipe = find_setting(name)[2].recipe.replace(**options)
    networks = recipe.networks
    torch.manual_seed(0)
    student, peer, *teachers = (create_model("tiny_resnet", 10).double() for _ in range(4))
    teacher, clean_teacher = (one.eval().requires_grad_(False) for one in teachers)
    state = State(
        recipe, student, teacher if networks.teacher_model else None, 10, CPU,
        clean_teacher if networks.clean_teacher_model else None,
        peer=peer if recipe.method.trains_peer else None,
    )  # fmt: skip
    state.start_epoch(recipe, 1, 0)
    gen = torch.Generator().manual_seed(1)
    image, label = torch.rand(12, 1, 8, 8, generator=gen, dtype=torch.float64), torch.arange(12) % 10
    return float(train_step(state, recipe, image, label))


MOVED_BY_LOSS = ("group_dro:digits",)  # the loss has moved its weights before they weigh it


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), *OTHERS])
def test_smoothing_moves_the_cross_entropy_of_the_loss_in_proportion(name: str, options: dict[str, Any]) -> None:
    """An attack along smoothed labels would find other images, and the loss would not move in proportion."""
    recipe = find_setting(name)[2].recipe.replace(**options)
    none, some, double = (loss_of(name, label_smoothing=part, **options) for part in (0.0, 0.2, 0.4))
    if name not in MOVED_BY_LOSS:
        assert double - none == pytest.approx(2 * (some - none), rel=1e-6, abs=1e-9)
    assert (abs(some - none) > 1e-5) == recipe.method.smooths_labels()


def test_smoothed_labels_are_those_of_torch() -> None:
    recipe = find_setting("sat:digits")[2].recipe.replace(
        label_smoothing=0.3, precision="fp32", attack_steps=0, attack_start="none"
    )
    torch.manual_seed(0)
    student = create_model("tiny_resnet", 10).double()
    state = State(recipe, student, None, 10, CPU)
    image, label = torch.rand(12, 1, 8, 8, dtype=torch.float64), torch.arange(12) % 10
    student.train()
    expected = F.cross_entropy(student(image), label, label_smoothing=0.3)
    torch.testing.assert_close(train_step(state, recipe, image, label), expected.detach())


@pytest.mark.parametrize(("name", "noted"), [("rslad:digits", True), ("sat:digits", False)])
def test_a_method_without_hard_labels_says_so(
    name: str, noted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", name, "--label-smoothing", "0.1", "--show"]) == 0
    assert ("no labels in its loss" in capsys.readouterr().err) == noted
    assert run(["train", name, "--show"]) == 0
    assert "in its loss" not in capsys.readouterr().err
