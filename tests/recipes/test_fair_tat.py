"""FAIR-TAT: the law of its draw, the loss, the radii, and what an epoch's errors do to the next one's targets."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import ClassMeans, ClassSums, EpochStats, Recipe, Targets
from retemper.recipes.fair_tat import AUTHORS, SETTINGS, FairTat, drawn_target


def fair_tat(**options: Any) -> Recipe:
    return Recipe.of(FairTat, **AUTHORS, dataset="digits", student="tiny_resnet", **options)


def random_logits() -> tuple[dict[str, Tensor], Tensor]:
    gen = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(40, 4, generator=gen, dtype=torch.float64) for name in ("clean", "adv")}
    return logits, torch.arange(40) % 4


def test_the_draw_is_the_authors_without_their_loop() -> None:
    """They draw from the softmax until the class is another; the chances of what is left are those of the rest."""
    rows, share = 200_000, torch.tensor([0.1, 0.6, 0.0, 0.3])
    label = torch.arange(rows) % 4
    uniform = torch.rand(rows, 4, generator=torch.Generator().manual_seed(0))
    drawn = drawn_target(2 * share, label, uniform)
    for k in range(4):
        chance = (2 * share).softmax(0)
        chance[k] = 0
        found = drawn[label == k].bincount(minlength=4) / (rows / 4)
        torch.testing.assert_close(found, chance / chance.sum(), rtol=0, atol=0.01)  # 4 deviations are 0.009
        assert found[k] == 0
    ends = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])  # as the noise may be
    assert (drawn_target(2 * share, torch.tensor([1, 0]), ends) != torch.tensor([1, 0])).all()


def test_the_attack_goes_down_the_cross_entropy_of_the_target() -> None:
    logits, label = random_logits()
    recipe = fair_tat()
    state = {"margin": torch.tensor([0.02, 0.03, 0.04, 0.05]), "error_share": torch.tensor([0.7, 0.0, 0.1, 0.2])}
    uniform = torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    targets = Targets(label_B=label, uniform_BK=uniform, state=state)
    goal = drawn_target(2 * state["error_share"], label, uniform)
    value = recipe.method.objective(targets)(logits["adv"])
    torch.testing.assert_close(value, F.cross_entropy(logits["adv"], goal, reduction="sum"))
    eps, step = recipe.method.margins(targets, recipe.attack)
    torch.testing.assert_close(eps, state["margin"][label])
    assert step == -2 / 255


def test_loss_is_the_cross_entropy_under_attack() -> None:
    logits, label = random_logits()
    loss = FairTat().loss(logits, Targets(label_B=label, state={}))
    torch.testing.assert_close(loss, -logits["adv"].softmax(1)[torch.arange(40), label].log().mean())
    smoothed = FairTat().loss(logits, Targets(label_B=label, label_smoothing=0.3, state={}))
    torch.testing.assert_close(smoothed, F.cross_entropy(logits["adv"], label, label_smoothing=0.3))


def test_the_next_targets_are_where_the_errors_went_and_the_radii_cfas() -> None:
    logits, label = random_logits()
    recipe = fair_tat()
    method = recipe.method
    first = method.class_state(4, recipe)
    torch.testing.assert_close(first["error_share"], torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(first["margin"], torch.full((4,), 8 / 255, dtype=torch.float64))
    means, answer = ClassMeans.zeros(4, 4, torch.device("cpu"), torch.float64), logits["adv"].argmax(1)
    for rows in (slice(0, 25), slice(25, 40)):
        part = {"adv": logits["adv"][rows]}
        means.add(method.measured(part, Targets(label_B=label[rows], state=first))["error"], label[rows])
    hits = torch.stack([(answer == label)[label == k].sum() for k in range(4)])
    sums = ClassSums(loss_K=torch.zeros(4), correct_K=hits, count_K=torch.full((4,), 10))
    stats = EpochStats(forwards={"adv": sums}, measured={"error": means})
    state = method.next_class_state(first, stats, 1, recipe)
    landed = torch.tensor([sum(a == k and a != y for a, y in zip(answer, label, strict=True)) for k in range(4)])
    assert 0 < landed.sum() < 40
    torch.testing.assert_close(state["error_share"], landed.double() / landed.sum())
    torch.testing.assert_close(state["margin"], (0.5 + hits / 10) * 8 / 255)
    none = EpochStats(
        forwards={"adv": sums}, measured={"error": ClassMeans.zeros(4, 4, torch.device("cpu"))}
    )  # no image was wrong
    assert (method.next_class_state(state, none, 2, recipe)["error_share"] == 0).all()


def test_variants_differ_as_stated() -> None:
    paper = SETTINGS["cifar10_preact_resnet18"].recipe
    released = paper.as_variant("released")
    one, other = paper.flat(), released.flat()
    changed = {name: (one[name], other[name]) for name in one if one[name] != other[name]}
    assert changed == {
        "variant": ("paper", "released"),
        "select_on": ("holdout", "test"),
        "holdout_from": ("random", "start"),
        "normalise": (False, True),
        "padding_mode": ("zeros", "reflect"),
        "precision": ("auto", "fp32"),
    }
    assert released.method.forwards_in(1, released).before == ("adv", "clean")
    assert released.method.forwards_in(1, released).after == ("clean",)
    attack, optim = paper.attack, paper.optim
    assert (attack.eps, attack.step, attack.steps, attack.start, attack.bn_mode) == (
        8 / 255, 2 / 255, 10, "uniform", "train",
    )  # fmt: skip
    assert (optim.average, optim.average_every, optim.average_from) == ("ema", "epoch", 1)
    assert (optim.average_above, optim.ema_decay, optim.lr_drops) == (0.2, 0.85, (100, 150))
