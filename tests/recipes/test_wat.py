"""WAT: the weights against the known ones, the loss in float64, and what held-out losses do to the state."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retemper.engine import MOST_EPOCHS, EpochStats, HeldOut, Recipe, Targets
from retemper.recipes.wat import AUTHORS, SETTINGS, Wat, hedge_weight

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/recipes.json").read_text())["wat_weight"]


def wat(**options: Any) -> Recipe:
    return Recipe.of(Wat, **AUTHORS | options, dataset="digits", student="tiny_resnet")


def test_weights_are_the_known_ones() -> None:
    for case in GOLDEN:
        history = torch.tensor(case["loss"], dtype=torch.float64)
        for rows in (history, history.sum(0, keepdim=True)):
            weight = hedge_weight(rows, case["eta"])
            torch.testing.assert_close(weight.tolist(), case["weight"], rtol=1e-12, atol=0)
        assert len(case["weight"]) == history.shape[1] and abs(sum(case["weight"]) - history.shape[1] + 1) < 1e-9


def test_loss_is_the_formula() -> None:
    gen = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(7, 3, generator=gen, dtype=torch.float64) for name in ("clean", "adv")}
    label = torch.arange(7) % 3
    p, q = (logits[name].softmax(1) for name in ("clean", "adv"))
    each = -p[torch.arange(7), label].log() + 6 * (p * (p / q).log()).sum(1)
    recipe = wat()
    state = recipe.method.class_state(3, recipe)

    def loss() -> torch.Tensor:
        return recipe.method.loss(logits, Targets(label_B=label, state=state)).double()

    torch.testing.assert_close(loss(), 2 * each.mean(), rtol=1e-6, atol=0)  # of the first epoch: twice TRADES
    state = {"class_weight": torch.tensor([0.5, 1.5, 0.25]), "mean_weight": torch.tensor([0.75])}
    expected = (state["class_weight"].double()[label] * each).sum() / 7 + 0.75 * each.mean()
    torch.testing.assert_close(loss(), expected, rtol=1e-6, atol=0)


def test_costs_add_up_from_the_first_epoch_on() -> None:
    recipe = wat()
    state = recipe.method.class_state(3, recipe)
    history = []
    for epoch in range(3):
        clean, boundary = torch.rand(3), torch.rand(3)
        held = HeldOut(clean_accuracy_K=clean, robust_accuracy_K=clean, clean_loss_K=clean, boundary_loss_K=boundary)
        before = state
        state = recipe.method.next_class_state(state, EpochStats(held=held), epoch, recipe)
        if epoch == 0:
            assert state == before
            continue
        cost = clean + 6 * boundary
        history.append(torch.cat([cost, cost.mean()[None]]))
        factor = (0.1 * torch.stack(history).sum(0)).exp()
        expected = 3 * factor / factor.sum()
        torch.testing.assert_close(torch.cat([state["class_weight"], state["mean_weight"]]), expected)
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in recipe.method.class_state(3, recipe).items()
    }


@pytest.mark.parametrize(("held", "batch_size", "images"), [(300, 128, 1024), (4, 4, 12), (1, 128, 128)])
def test_the_code_divides_by_full_batches(held: int, batch_size: int, images: int) -> None:
    recipe = wat(variant="released", holdout_per_class=held, batch_size=batch_size)
    cost = torch.rand(3)
    stats = EpochStats(
        held=HeldOut(clean_accuracy_K=cost, robust_accuracy_K=cost, clean_loss_K=cost, boundary_loss_K=cost)
    )
    state = recipe.method.next_class_state(recipe.method.class_state(3, recipe), stats, 1, recipe)
    torch.testing.assert_close(state["loss_so_far"], 7 * cost * 3 * held / images)


def test_variants_differ_as_stated() -> None:
    paper = SETTINGS["cifar10_resnet18"].recipe
    released = paper.as_variant("released")
    one, other = paper.flat(), released.flat()
    changed = {name: other[name] for name in one if one[name] != other[name]}
    never = {name: MOST_EPOCHS for name in ("select_every", "select_always_from", "select_from")}
    assert changed == {"variant": "released", "holdout_from": "end", "precision": "fp32"} | never
    assert not any(released.selection.is_due(epoch, 100) for epoch in range(1, 100))
    assert released.selection.is_due(100, 100)


def test_the_full_setting_is_the_authors() -> None:
    recipe = SETTINGS["cifar10_resnet18"].recipe
    assert (recipe.attack.eps, recipe.attack.step, recipe.attack.steps) == (0.031, 0.007, 10)
    assert recipe.optim.weight_decay == 2e-4
    assert (recipe.optim.epochs, recipe.optim.lr_drops, recipe.selection.holdout_per_class) == (100, (74, 89, 99), 300)
    assert recipe.method.validates_by == "training attack"
