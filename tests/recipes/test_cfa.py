"""CFA: margins and weights against the known ones, the loss in float64, and what the variants change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.engine import ClassSums, EpochStats, Recipe, Targets
from retemper.recipes.cfa import AUTHORS, AUTHORS_AT, SETTINGS, Cfa, CfaAt, class_radius, loss_weights

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/recipes.json").read_text())["cfa_margin"]


def cfa(**options: Any) -> Recipe:
    return Recipe.of(Cfa, **AUTHORS, dataset="digits", student="tiny_resnet", **options)


def test_margins_and_weights_are_the_known_ones() -> None:
    for case in GOLDEN:
        robust = torch.tensor(case["train_robust_accuracy"], dtype=torch.float64)
        margin = class_radius(robust, case["eps"], case["margin_offset"])
        ce, kl = loss_weights(robust, case["beta"], case["beta_offset"])
        for ours, name in ((margin, "eps_class"), (ce, "ce_weight"), (kl, "kl_weight")):
            torch.testing.assert_close(ours.tolist(), case[name], rtol=1e-12, atol=0)


def random_logits() -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(7, 3, generator=gen, dtype=torch.float64) for name in ("clean", "adv")}
    label = torch.arange(7) % 3
    p, q = (logits[name].softmax(1) for name in ("clean", "adv"))
    return logits, label, -p[torch.arange(7), label].log(), (p * (p / q).log()).sum(1)


def targets(state: dict[str, Tensor], label: Tensor) -> Targets:
    return Targets(label_B=label, own_BK=torch.zeros(len(label), 3), state=state)


@pytest.mark.parametrize(("variant", "scale"), [("paper", 1), ("released", 7)])
def test_the_first_epochs_are_trades_which_the_code_divides_by_seven(variant: str, scale: int) -> None:
    logits, label, ce, kl = random_logits()
    recipe = cfa(variant=variant)
    state = recipe.method.class_state(3, recipe)
    loss = recipe.method.loss(logits, targets(state, label))
    torch.testing.assert_close(loss.double(), (ce + 6 * kl).mean() / scale, rtol=1e-6, atol=0)
    assert recipe.method.next_class_state(state, EpochStats(), 9, recipe) == state
    eps, step = recipe.method.margins(targets(state, label), recipe.attack)
    torch.testing.assert_close(eps, torch.full((7,), 8 / 255, dtype=torch.float64))
    assert step == 2 / 255


def test_from_then_on_each_class_has_its_own() -> None:
    recipe = cfa()
    count = torch.tensor([10, 20, 10])
    sums = ClassSums(loss_K=torch.zeros(3), correct_K=torch.tensor([1, 10, 9]), count_K=count)
    other = ClassSums(loss_K=torch.zeros(3), correct_K=count, count_K=count)
    stats = EpochStats(forwards={"adv": sums, "clean": other})
    state = recipe.method.next_class_state(recipe.method.class_state(3, recipe), stats, 10, recipe)
    robust = torch.tensor([0.1, 0.5, 0.9])
    logits, label, ce, kl = random_logits()
    eps, step = recipe.method.margins(targets(state, label), recipe.attack)
    torch.testing.assert_close(eps, ((0.3 + robust) * 8 / 255)[label])
    assert step == 2 / 255
    beta = ((0.5 + robust) * 6).double()[label]
    expected = (ce / (1 + beta) + kl * beta / (1 + beta)).mean()
    loss = recipe.method.loss(logits, targets(state, label))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


WHOLE_SCRIPT = {
    "variant": ("paper", "released"),
    "ema_decay": (0.85, 0.88),
    "average_from": (50, 1),
    "select_on": ("holdout", "test"),
    "holdout_from": ("random", "start"),
    "normalise": (False, True),
    "padding_mode": ("zeros", "reflect"),
    "precision": ("auto", "fp32"),
}
CONSTANTS = {"margin_offset": (0.3, 0.5), "average_above": (0.2, 0.24)}


@pytest.mark.parametrize(("name", "constants"), [("", CONSTANTS), ("_at", {})])
def test_variants_differ_as_stated(name: str, constants: dict[str, tuple[float, float]]) -> None:
    paper = SETTINGS[f"cifar10_preact_resnet18{name}"].recipe
    released = paper.as_variant("released")
    one, other = paper.flat(), released.flat()
    changed = {name: (one[name], other[name]) for name in one if one[name] != other[name]}
    assert changed == WHOLE_SCRIPT | constants
    assert (paper.optim.average, paper.optim.average_every, paper.optim.nesterov) == ("ema", "epoch", False)


@pytest.mark.parametrize("name", ["", "_at"])
def test_the_full_setting_is_the_authors(name: str) -> None:
    setting = SETTINGS[f"cifar10_preact_resnet18{name}"]
    recipe, selection = setting.recipe, setting.recipe.selection
    assert (recipe.optim.epochs, recipe.optim.lr_drops, recipe.optim.weight_decay) == (200, (100, 150), 5e-4)
    assert (recipe.attack.eps, recipe.attack.step, recipe.attack.steps) == (8 / 255, 2 / 255, 10)
    # epochs count from 1, and theirs from 0: the first that may be kept is number 100 there
    assert (selection.holdout_per_class, selection.select_from, selection.select_steps) == (100, 101, 10)
    assert setting.note.startswith("AT + CFA: ") == bool(name)


def test_at_has_the_radii_alone_and_the_attack_of_its_script() -> None:
    recipe = Recipe.of(CfaAt, **AUTHORS_AT, dataset="digits", student="tiny_resnet")
    attack, method = recipe.attack, recipe.method
    assert (attack.start, attack.clip_start, attack.bn_mode) == ("uniform", True, "train")
    sums = ClassSums(loss_K=torch.zeros(2), correct_K=torch.tensor([1, 9]), count_K=torch.tensor([10, 10]))
    state = method.class_state(2, recipe)
    assert method.next_class_state(state, EpochStats(), 9, recipe) == state
    state = method.next_class_state(state, EpochStats(forwards={"adv": sums}), 10, recipe)
    torch.testing.assert_close(state, {"margin": torch.tensor([0.6, 1.4]) * 8 / 255})
    logits, label, _, _ = random_logits()
    q = logits["adv"].softmax(1)
    loss = method.loss(logits, targets(state, label))
    torch.testing.assert_close(loss, -q[torch.arange(7), label].log().mean())
