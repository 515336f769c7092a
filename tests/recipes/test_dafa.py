"""DAFA: the weights against the known ones, the loss in float64, and when and where the weights take effect."""

import json
from pathlib import Path

import torch

from retemper.engine import ClassMeans, EpochStats, Recipe, Targets
from retemper.recipes.dafa import AUTHORS, SETTINGS, Dafa, traded_weight

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/recipes.json").read_text())["dafa_weight"]


def dafa() -> Recipe:
    return Recipe.of(Dafa, **AUTHORS, dataset="digits", student="tiny_resnet")


def test_weights_are_the_known_ones() -> None:
    for case in GOLDEN:
        weight = traded_weight(torch.tensor(case["mean_probability"], dtype=torch.float64), case["lam"])
        torch.testing.assert_close(weight.tolist(), case["weight"], rtol=1e-12, atol=0)
    by_hand = traded_weight(torch.tensor([[0.6, 0.3, 0.1], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    torch.testing.assert_close(by_hand, torch.tensor([0.93, 1.35, 0.72]))


def test_what_one_class_gains_another_gives() -> None:
    gen = torch.Generator().manual_seed(0)
    for scale in (1.0, 1.5):
        mean = (2 * torch.randn(20, 20, generator=gen, dtype=torch.float64)).softmax(1)
        torch.testing.assert_close(traded_weight(mean, scale).sum().item(), 20.0)


def test_loss_weighs_the_cross_entropy_and_not_the_kl() -> None:
    gen = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(7, 3, generator=gen, dtype=torch.float64) for name in ("clean", "adv")}
    label, weight = torch.arange(7) % 3, torch.tensor([0.93, 1.35, 0.72])
    p, q = (logits[name].softmax(1) for name in ("clean", "adv"))
    ce, kl = -p[torch.arange(7), label].log(), (p * (p / q).log()).sum(1)
    targets = Targets(label_B=label, own_BK=p, state={"class_weight": weight})
    recipe = dafa()
    expected = (weight.double()[label] * ce + 6 * kl).mean()
    torch.testing.assert_close(recipe.method.loss(logits, targets).double(), expected, rtol=1e-6, atol=0)
    eps, step = recipe.method.margins(targets, recipe.attack)
    torch.testing.assert_close(eps, 0.031 * weight[label])
    torch.testing.assert_close(step, 0.007 * weight[label])
    assert not torch.allclose(q.float(), p.float())
    torch.testing.assert_close(recipe.method.measured(logits, targets)["probability"], q)


def seen(mean: torch.Tensor) -> EpochStats:
    probability = ClassMeans.zeros(3, 3, mean.device)
    for k, row in enumerate(mean):
        probability.add(row.expand(k + 1, 3), torch.full((k + 1,), k))
    return EpochStats(measured={"probability": probability})


def test_weights_are_set_once_after_the_warm_up() -> None:
    mean = torch.tensor([[0.6, 0.3, 0.1], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    recipe = dafa()
    ones = recipe.method.class_state(3, recipe)
    for epoch in (1, 69, 71, 110):
        assert recipe.method.next_class_state(ones, seen(mean), epoch, recipe) == ones
    after = recipe.method.next_class_state(ones, seen(mean), 70, recipe)
    torch.testing.assert_close(after["class_weight"], torch.tensor([0.93, 1.35, 0.72]))


def test_no_weight_is_negative() -> None:
    one_answer = torch.tensor([[0.9, 0.05, 0.05], [0.89, 0.06, 0.05], [0.88, 0.06, 0.06]])
    assert traded_weight(one_answer).min() < 0
    recipe = dafa()
    moved = recipe.method.next_class_state(recipe.method.class_state(3, recipe), seen(one_answer), 70, recipe)
    assert moved["class_weight"].min() == 0


def test_variants_differ_as_stated() -> None:
    paper = SETTINGS["cifar10_resnet18"].recipe
    one, other = paper.flat(), paper.as_variant("released").flat()
    changed = {name: other[name] for name in one if one[name] != other[name]}
    assert changed == {"variant": "released", "nesterov": True, "holdout_per_class": 0, "precision": "fp32"}


def test_the_full_setting_is_the_authors() -> None:
    recipe = SETTINGS["cifar10_resnet18"].recipe
    assert (recipe.attack.eps, recipe.attack.step, recipe.attack.steps) == (0.031, 0.007, 10)
    assert recipe.optim.weight_decay == 5e-4
    assert [round(recipe.optim.lr_at(epoch), 9) for epoch in (99, 100, 104, 105, 110)] == [
        0.1,
        0.01,
        0.01,
        0.001,
        0.001,
    ]
    cifar100 = SETTINGS["cifar100_resnet18"].recipe.method
    assert isinstance(cifar100, Dafa) and cifar100.scale == 1.5
