"""Classes of unequal size: a rule goes by the mean of each class, so that its number of images changes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import ClassMeans, ClassSums, EpochStats, HeldOut, Recipe, Targets, is_label
from retemper.engine.catalogue import find_setting
from retemper.engine.run.metrics import epoch_line
from retemper.recipes.faal import class_margin
from retemper.recipes.fair import class_weight

CPU, K, EPOCH = torch.device("cpu"), 10, 12  # DAFA's weights are made after the twelfth epoch
GEN = torch.Generator().manual_seed(0)
LABEL = torch.arange(40) % K
LOGITS = {name: 2 * torch.randn(40, K, generator=GEN, dtype=torch.float64) for name in ("adv", "clean")}
KAPPA = torch.randint(0, 11, (40,), generator=GEN).double()
LONG = torch.cat([torch.arange(40), *[torch.arange(40)[LABEL == k] for k in (0, 0, 0, 3)]])  # more of two classes


def shown(row_B: Tensor) -> EpochStats:
    """Return what an epoch shows of some rows, each sum in float64, added in two batches."""
    sums = {name: ClassSums.zeros(K, CPU, torch.float64) for name in LOGITS}
    wrong = is_label(LOGITS["adv"], LOGITS["adv"].argmax(1)) & ~is_label(LOGITS["adv"], LABEL)
    values = {"kappa": KAPPA, "probability": LOGITS["adv"].softmax(1), "error": wrong, "given": wrong}
    values["prediction"] = LOGITS["clean"].softmax(1)
    means = {name: ClassMeans.zeros(K, 1 if v.dim() == 1 else K, CPU, torch.float64) for name, v in values.items()}
    for rows in row_B.split(25):
        for name, of in sums.items():
            of.add(LOGITS[name][rows], LABEL[rows])
        for name, of in means.items():
            of.add(values[name][rows], LABEL[rows])
    adv, clean = sums["adv"], sums["clean"]
    held = HeldOut(
        clean_accuracy_K=clean.accuracy_K,
        robust_accuracy_K=adv.accuracy_K,
        clean_loss_K=clean.mean_loss_K,
        boundary_loss_K=adv.mean_loss_K,
    )
    return EpochStats(forwards=sums, measured=means, held=held, surveyed=means["given"])


def test_the_sums_of_unequal_classes_give_their_means() -> None:
    stats = shown(LONG)
    rows = F.cross_entropy(LOGITS["adv"], LABEL, reduction="none")
    right = (LOGITS["adv"].argmax(1) == LABEL).double()
    for k in range(K):
        own = LABEL == k
        torch.testing.assert_close(stats.forwards["adv"].mean_loss_K[k], rows[own].mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.forwards["adv"].accuracy_K[k], right[own].mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.measured["kappa"].mean_K[k], KAPPA[own].mean(), rtol=1e-12, atol=0)
    assert stats.forwards["adv"].count_K.tolist() == [16, 4, 4, 8, 4, 4, 4, 4, 4, 4]


def test_a_line_of_metrics_has_no_number_for_a_class_without_images() -> None:
    recipe = find_setting("sat:digits")[2].recipe
    sums = shown(torch.arange(40)[LABEL != 7]).forwards
    told: Any = SimpleNamespace(loss_sum=36.0, sums=sums, forwards=SimpleNamespace(before=("adv",)), class_state={})
    line = epoch_line(1, recipe, told, 36)
    for name in ("class_loss", "class_accuracy"):
        assert [value is None for value in line[name]] == [k == 7 for k in range(K)]
    assert "class_loss_clean" not in line


RULES = ("absld", "cfa", "csr", "dafa", "fair_rslad", "fair_tat", "frl", "gkl", "label_trust", "wat")


def next_state(recipe: Recipe, stats: EpochStats) -> dict[str, Tensor]:
    state: dict[str, Any] = {name: of.double() for name, of in recipe.method.class_state(K, recipe).items()}
    return recipe.method.next_class_state(state, stats, EPOCH, recipe)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_does_not_take_a_larger_class_for_another(name: str) -> None:
    recipe = find_setting(f"{name}:digits")[2].recipe
    balanced, unbalanced = next_state(recipe, shown(torch.arange(40))), next_state(recipe, shown(LONG))
    moved = False
    for key, before in recipe.method.class_state(K, recipe).items():
        torch.testing.assert_close(unbalanced[key].double(), balanced[key].double(), rtol=1e-9, atol=1e-12, msg=key)
        moved |= not torch.equal(balanced[key].double(), before.double())
    assert moved


def test_the_rules_of_a_step_go_by_the_class_means_of_the_batch() -> None:
    method = find_setting("group_dro:digits")[2].recipe.method
    state = {"class_weight": torch.full((K,), 1 / K, dtype=torch.float64)}
    found, margins = [], []
    for rows in (torch.arange(40), LONG):
        targets = Targets(label_B=LABEL[rows], state=dict(state))
        weights = {"class_weight": state["class_weight"].clone()}
        method.after_step(weights, {"adv": LOGITS["adv"][rows]}, targets)
        found.append((weights["class_weight"], method.loss({"adv": LOGITS["adv"][rows]}, targets)))
        margins.append(class_margin(LOGITS["adv"][rows], LABEL[rows])[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(*margins, rtol=1e-12, atol=0)


def test_a_class_without_images_counts_in_no_mean() -> None:
    there = torch.arange(40)[LABEL != 7]
    stats, without = shown(there), torch.arange(K) != 7
    recipe = find_setting("absld:digits")[2].recipe
    moved = next_state(recipe, stats)["temperature_adv"]
    loss_K = F.cross_entropy(LOGITS["adv"], LABEL, reduction="none").view(4, K).mean(0)[without]
    gap_K = loss_K - loss_K.mean()
    assert moved[7] == 1  # it stays
    rate = recipe.flat()["temperature_rate"] * recipe.optim.decay(EPOCH)
    torch.testing.assert_close(moved[without], 1 - rate * gap_K / gap_K.abs().max())
    weight = next_state(find_setting("fair_rslad:digits")[2].recipe, stats)["class_weight"]
    kappa_K = KAPPA.view(4, K).mean(0)
    torch.testing.assert_close(weight[without], class_weight(kappa_K[without]))
    assert weight[7] == 1
