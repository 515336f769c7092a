"""Label trust: the loss and the attack's objective by formula, its rules by hand, and RSLAD where nothing is on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import ClassSums, EpochStats, Recipe, Targets, TrainingAttack
from retemper.engine.catalogue import override
from retemper.errors import UsageError
from retemper.recipes.absld import class_gap
from retemper.recipes.label_trust import SETTINGS, LabelTrust, next_trust, next_weight
from retemper.recipes.rslad import Rslad


def label_trust(**options: Any) -> tuple[Recipe, dict[str, Tensor]]:
    """A recipe of the method, and the state that its three classes begin with."""
    recipe = Recipe.of(LabelTrust, dataset="digits", student="tiny_resnet", **options)
    return recipe, recipe.method.class_state(3, recipe)


def batch(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Targets]:
    gen = torch.Generator().manual_seed(0)
    teacher, adv, clean = (3 * torch.randn(7, 5, generator=gen, dtype=torch.float64) for _ in range(3))
    label = torch.randint(5, (7,), generator=gen)
    return {"adv": adv, "clean": clean}, Targets(label_B=label, teacher_BK=teacher, state=state)


def one_epoch(loss: list[float], correct: list[int], count: list[int]) -> EpochStats:
    adv = ClassSums(loss_K=torch.tensor(loss), correct_K=torch.tensor(correct), count_K=torch.tensor(count))
    return EpochStats(forwards={"adv": adv, "clean": ClassSums.zeros(len(loss), torch.device("cpu"))})


def test_loss_equals_the_formula_by_hand() -> None:
    targets = Targets(
        label_B=torch.tensor([1]),
        teacher_BK=torch.tensor([[0.75, 0.25]]).log(),
        state={"label_trust": torch.tensor([0.0, 1 / 3]), "class_weight": torch.tensor([1.0, 3.0])},
    )
    logits = {"adv": torch.tensor([[0.5, 0.5]]).log(), "clean": torch.tensor([[0.25, 0.75]]).log()}
    # the target is (1/2, 1/2): two thirds of (3/4, 1/4) and one of (0, 1)
    by_hand = 3 * (5 / 6 * 0 + 1 / 6 * math.log(2 / math.sqrt(3))) / 10
    torch.testing.assert_close(LabelTrust().loss(logits, targets).item(), by_hand, rtol=1e-5, atol=0)


def test_loss_and_attack_equal_the_formula_in_pytorch() -> None:
    trust_K, weight_K = (torch.linspace(*ends, 5) for ends in ((0, 0.8), (4, 0.5)))
    logits, targets = batch({"label_trust": trust_K, "class_weight": weight_K})
    label = targets.label_B
    trust = trust_K.double()[label, None]
    target = (1 - trust) * targets.teacher.softmax(1) + trust * F.one_hot(label, 5)

    adv_B, clean_B = (F.kl_div(logits[name].log_softmax(1), target, reduction="none").sum(1) for name in logits)
    expected = 0.1 * (weight_K[label] * (5 / 6 * adv_B + 1 / 6 * clean_B)).mean()
    torch.testing.assert_close(LabelTrust().loss(logits, targets), expected, rtol=1e-10, atol=0)
    objective = LabelTrust().objective(targets)
    torch.testing.assert_close(objective(logits["adv"]), adv_B.sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(objective.gradient(logits["adv"]), logits["adv"].softmax(1) - target)


def test_no_trust_and_no_weight_is_rslad() -> None:
    for state in ({}, {"label_trust": torch.zeros(5), "class_weight": torch.ones(5)}):
        logits, targets = batch(state)
        ours, rslad, attack = LabelTrust(), Rslad(), TrainingAttack()
        assert torch.equal(ours.loss(logits, targets), rslad.loss(logits, targets))
        raised = [method.objective(targets).gradient(logits["adv"]) for method in (ours, rslad)]
        assert torch.equal(*raised)
        assert ours.margins(targets, attack) == rslad.margins(targets, attack)


def test_a_run_with_all_parts_off_is_rslads(train: Callable[..., int], tmp_path: Path) -> None:
    ours, rslad = tmp_path / "ours", tmp_path / "rslad"
    off = ("--trust-rate", "0", "--weight-rate", "0", "--joint", "false", "--average", "none")
    assert train("label_trust:digits", ours, *off) == 0
    assert train("rslad:digits", rslad) == 0
    losses = [
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (ours, rslad)
    ]
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    weights, others = (load_file(out / "last.safetensors") for out in (ours, rslad))
    assert weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


def test_the_rules_are_those_by_hand() -> None:
    loss = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(class_gap(loss), torch.tensor([-2 / 3, -1 / 3, 1]))
    trust = next_trust(torch.tensor([0.0, 0.2, 0.75]), loss, 0.1)
    torch.testing.assert_close(trust, torch.tensor([0, 0.2 - 0.1 / 3, 0.8]))
    error = torch.tensor([0.2, 0.4, 0.4])
    weight = next_weight(torch.ones(3), error, 0.4)  # softmax: 1, e^2, e^2
    near = 3 * math.exp(2) / (1 + 2 * math.exp(2))
    torch.testing.assert_close(weight[1:], torch.full((2,), 1 + 0.4 * (near - 1) / 2))
    torch.testing.assert_close(weight.mean(), torch.tensor(1.0))
    # without softness the worst class takes all
    weight = next_weight(torch.tensor([0.55, 1.0, 3.9]), torch.tensor([0.2, 0.4, 0.7]), 0.4, softness=1e-3)
    torch.testing.assert_close(weight, torch.tensor([0.5, 0.8, 4]))


def test_equal_losses_move_nothing() -> None:
    value, loss = torch.tensor([0.5, 0.6, 0.7]), torch.full((3,), 5.0)
    assert torch.equal(next_trust(value, loss, 0.1), value)


def test_an_epoch_moves_what_is_on_by_the_mean_adversarial_losses() -> None:
    seen = one_epoch([10.0, 60.0, 20.0], [8, 12, 8], [10, 20, 10])  # means 1, 3 and 2, errors 0.2, 0.4 and 0.2
    recipe, start = label_trust(lr_drops=(5,))
    moved = recipe.method.next_class_state(start, seen, 5, recipe)  # the rates do not fall with the learning rate
    assert moved.keys() == start.keys() == {"label_trust", "class_weight"}
    # errors 0.2 apart are e^2 apart in what they share
    share = torch.tensor([1, math.exp(2), 1]) / (2 + math.exp(2))
    torch.testing.assert_close(moved["class_weight"], 1 + 0.4 * (3 * share - 1) / 2)
    torch.testing.assert_close(moved["label_trust"], torch.tensor([0, 0.1, 0]))


def test_what_is_off_has_no_state() -> None:
    assert label_trust()[1].keys() == {"label_trust", "class_weight"}
    assert label_trust(trust_rate=0)[1].keys() == {"class_weight"}
    assert label_trust(trust_rate=0, weight_rate=0)[1] == {}
    recipe, start = label_trust(trust_rate=0, weight_rate=0, trust_start=0.25)
    moved = recipe.method.next_class_state(start, one_epoch([1.0, 3.0, 2.0], [1, 1, 1], [1, 1, 1]), 1, recipe)
    assert moved["label_trust"].tolist() == [0.25, 0.25, 0.25] and len(moved) == 1


@pytest.mark.parametrize("name", ["trust_start=0.9", "trust_upper=1.5", "weight_lower=2"])
def test_refuses_what_makes_no_sense(name: str) -> None:
    field, value = name.split("=")
    with pytest.raises(UsageError, match=field):
        override(SETTINGS["digits"].recipe, {field: value})


def test_it_is_joint_and_averaged_unless_told_otherwise() -> None:
    found = {name: setting.recipe for name, setting in SETTINGS.items()}
    assert all(recipe.optim.joint and recipe.optim.average == "ema" for recipe in found.values())
    decays = {name: found[name].optim.ema_decay for name in ("digits", "fashion_mnist_small", "cifar10_resnet18")}
    assert decays == {"digits": 0.99, "fashion_mnist_small": 0.99, "cifar10_resnet18": 0.999}


def test_the_bounds_of_the_recipe_hold() -> None:
    recipe, start = label_trust(trust_upper=0.05, weight_lower=0.9, weight_upper=1.1, weight_rate=1.0)
    stats = one_epoch([10.0, 20.0, 90.0], [9, 5, 0], [10, 10, 10])
    moved = recipe.method.next_class_state(start, stats, 1, recipe)
    torch.testing.assert_close(moved["label_trust"], torch.tensor([0.0, 0.0, 0.05]))
    torch.testing.assert_close(moved["class_weight"], torch.tensor([0.9, 0.9, 1.1]))


def test_a_class_that_was_not_met_is_not_the_worst() -> None:
    recipe, start = label_trust()
    moved = recipe.method.next_class_state(start, one_epoch([10.0, 30.0, 0.0], [9, 2, 0], [10, 10, 0]), 1, recipe)
    torch.testing.assert_close(moved["label_trust"], torch.tensor([0.0, 0.1, 0.0]))
    assert moved["class_weight"].argmax() == 1 and moved["class_weight"][2] < 1
