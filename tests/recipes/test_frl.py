"""FRL: the loss in float64, the multipliers over epochs by hand, the margins, and what the variants change."""

from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.engine import EpochStats, HeldOut, Recipe, Targets, TrainingAttack
from retemper.recipes.frl import AUTHORS, SETTINGS, Frl, loss_weight, simplex


def frl(**options: Any) -> Recipe:
    return Recipe.of(Frl, **AUTHORS, dataset="digits", student="tiny_resnet", **options)


def after(recipe: Recipe, state: dict[str, Tensor], stats: EpochStats, epoch: int) -> dict[str, Tensor]:
    return recipe.method.next_class_state(state, stats, epoch, recipe)


def held(clean: list[float], robust: list[float]) -> EpochStats:
    zeros = torch.zeros(len(clean))
    return EpochStats(
        held=HeldOut(
            clean_accuracy_K=torch.tensor(clean),
            robust_accuracy_K=torch.tensor(robust),
            clean_loss_K=zeros,
            boundary_loss_K=zeros,
        )
    )


def state(**known: list[float]) -> dict[str, Tensor]:
    blank = {name: [0.0] * 4 for name in ("clean", "boundary", "margin")}
    return {f"multiplier_{name}": torch.tensor(value) for name, value in (blank | known).items()}


def targets(moved: dict[str, Tensor], label: list[int]) -> Targets:
    return Targets(label_B=torch.tensor(label), own_BK=torch.zeros(len(label), 4), state=moved)


def test_loss_is_the_formula() -> None:
    gen = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(6, 4, generator=gen, dtype=torch.float64) for name in ("clean", "adv")}
    label, clean, boundary = [0, 1, 2, 3, 3, 0], [0.3, 0.0, 0.1, 0.0], [0.0, 0.5, 0.0, 0.0]
    p, q = (logits[name].softmax(1) for name in ("clean", "adv"))
    weight = {}
    for name, lam in (("clean", clean), ("boundary", boundary)):
        weight[name] = [1 / 4 + 3 / 4 * lam[k] - sum(lam[j] for j in range(4) if j != k) / 4 for k in range(4)]
        assert sum(weight[name]) == pytest.approx(1)
    ce = sum(weight["clean"][y] * -p[i, y].log() for i, y in enumerate(label))
    kl = sum(weight["boundary"][y] * (p[i] * (p[i] / q[i]).log()).sum() for i, y in enumerate(label))
    expected = ce / sum(weight["clean"][y] for y in label) + 1.5 * kl / sum(weight["boundary"][y] for y in label)
    loss = Frl().loss(logits, targets(state(clean=clean, boundary=boundary), label))
    torch.testing.assert_close(loss.double(), torch.as_tensor(expected), rtol=1e-6, atol=0)


def test_multipliers_move_by_what_exceeds_the_bound() -> None:
    # errors .1 .1 .3 .3, mean .2; boundary errors .2 .6 .4 .4, mean .4
    seen = held([0.9, 0.9, 0.7, 0.7], [0.7, 0.3, 0.3, 0.3])
    moved = after(frl(delta=0.05), state(clean=[0.0, 0.1, 0.1, 0.0]), seen, epoch=0)
    expected = [0, 0.1 + 0.05 * (-0.1 - 0.05), 0.1 + 0.05 * (0.1 - 0.05), 0.05 * (0.1 - 0.05)]
    torch.testing.assert_close(moved["multiplier_clean"], torch.tensor(expected))
    torch.testing.assert_close(moved["multiplier_boundary"], torch.tensor([0, 2 * 0.05 * (0.2 - 0.05), 0, 0]))
    margin = [0.2 * (-0.2 - 0.05), 0.2 * (0.2 - 0.05), 0.2 * -0.05, 0.2 * -0.05]
    torch.testing.assert_close(moved["multiplier_margin"], torch.tensor(margin))


def test_the_rate_is_halved_for_the_fortieth_epoch() -> None:
    seen = held([0.9, 0.9, 0.9, 0.1], [0.5, 0.5, 0.5, 0.1])
    recipe = frl(delta=0.0)
    full, halved = (after(recipe, state(), seen, epoch)["multiplier_clean"] for epoch in (38, 39))
    torch.testing.assert_close(halved, full / 2)
    assert full[3] > 0


def test_multipliers_are_scaled_back_to_the_limit() -> None:
    torch.testing.assert_close(simplex(torch.tensor([0.6, -1.0, 0.4]), 0.5), torch.tensor([0.3, 0.0, 0.2]))
    torch.testing.assert_close(simplex(torch.tensor([0.2, -1.0, 0.1]), 0.5), torch.tensor([0.2, 0.0, 0.1]))
    assert simplex(torch.zeros(3), 0.5).tolist() == [0, 0, 0]
    assert loss_weight(torch.tensor([0.0, 0.5])).tolist() == [0.25, 0.75]


def test_margins_are_the_classes_and_the_step_a_quarter_of_the_largest() -> None:
    moved = state(margin=[0.0, 0.1, -3.0, 5.0])
    attack = TrainingAttack(eps=0.1)
    eps, step = Frl().margins(targets(moved, [0, 1, 2, 3]), attack)
    torch.testing.assert_close(eps, 0.1 * torch.tensor([1.0, 1.2214, 0.98, 3.0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(step, torch.full((4,), 0.3 / 4))
    eps, step = Frl().margins(targets(moved, [0, 1]), attack)  # of this batch
    torch.testing.assert_close(step, torch.full((2,), 0.12214 / 4), rtol=1e-4, atol=0)


def test_reweighting_alone_differs_in_two_constants_and_moves_no_margin() -> None:
    remargin, reweight = frl(), frl().as_variant("reweight")
    one, other = remargin.flat(), reweight.flat()
    assert {name for name in one if one[name] != other[name]} == {"variant", "delta", "margin_rate"}
    assert (one["delta"], one["margin_rate"], other["delta"]) == (0.07, 0.2, 0.1)
    moved = after(reweight, state(), held([0.9, 0.9, 0.7, 0.7], [0.7, 0.3, 0.3, 0.3]), 1)
    assert not moved["multiplier_margin"].any()
    eps, step = reweight.method.margins(targets(moved, [0, 1]), reweight.attack)
    torch.testing.assert_close((eps, step), (torch.full((2,), 8 / 255), torch.full((2,), 2 / 255)))


def test_the_full_setting_is_the_authors() -> None:
    recipe = SETTINGS["cifar10_preact_resnet18"].recipe
    assert (recipe.optim.lr, recipe.optim.momentum) == (0.001, 0.9)
    assert (recipe.optim.weight_decay, recipe.optim.epochs) == (5e-4, 40)
    assert (recipe.networks.start_recipe, recipe.selection.holdout_per_class) == ("sat:cifar10_preact_resnet18", 300)
    assert (recipe.selection.select_steps, recipe.attack.steps, recipe.attack.eps) == (20, 10, 8 / 255)
    assert SETTINGS["digits"].recipe.networks.start_recipe == "sat:digits_student"
