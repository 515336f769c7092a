"""What the Fair-ARD family shares: kappa, the class weights, and that each method's loss is its base's, weighed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine import ClassMeans, EpochStats, Method, Recipe, Targets, pgd
from retemper.recipes import fair_ard, fair_iad, fair_mtard, fair_rslad
from retemper.recipes.ard import Ard
from retemper.recipes.fair import Fair, Kappa, class_weight
from retemper.recipes.fair_ard import FairArd
from retemper.recipes.fair_iad import FairIad
from retemper.recipes.fair_mtard import FairMtard
from retemper.recipes.fair_rslad import FairRslad
from retemper.recipes.iad import Iad
from retemper.recipes.mtard import Mtard
from retemper.recipes.rslad import Rslad

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/recipes.json").read_text())["class_weight"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"K={len(case['kappa'])}")
def test_weights_are_the_known_ones(case: dict) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        weight = class_weight(torch.tensor(case["kappa"], dtype=dtype), case["beta"])
        torch.testing.assert_close(weight.double().tolist(), case["weight"], rtol=tolerance, atol=0)


def test_a_class_never_classified_correctly_weighs_most_and_finitely() -> None:
    weight = class_weight(torch.tensor([0.0, 5.0, 9.0]))
    assert weight.tolist() == pytest.approx([2.5, 5 / 6, 5 / 6])


def test_refuses_a_batch_of_difficulties() -> None:
    with pytest.raises(ValueError, match="kappa_K"):
        class_weight(torch.ones(2, 3))


LABEL = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
WEIGHT = torch.tensor([0.9, 1.7, 2.4], dtype=torch.float64)
PAIRS = [(FairArd, Ard), (FairIad, Iad), (FairRslad, Rslad), (FairMtard, Mtard)]
MODULES = [fair_ard, fair_iad, fair_rslad, fair_mtard]


def batch(weight_K: Tensor, rows: slice = slice(None)) -> tuple[dict[str, Tensor], Targets]:
    """Return logits and targets in float64, of the chosen rows alone."""
    gen = torch.Generator().manual_seed(0)
    adv, clean, *taught = (2 * torch.randn(8, 3, generator=gen, dtype=torch.float64)[rows] for _ in range(6))
    targets = Targets(
        label_B=LABEL[rows],
        teacher_BK=taught[0],
        teacher_adv_BK=taught[1],
        clean_teacher_BK=taught[2],
        state={
            "class_weight": weight_K,
            "begun": torch.ones(1),
            "clean_task_weight": torch.full((1,), 0.5, dtype=torch.float64),
            "task_rate": torch.zeros(1),
            "first_adv_loss": torch.ones(1),
            "first_clean_loss": torch.ones(1),
        },
    )
    return {"adv": adv, "clean": clean}, targets


@pytest.mark.parametrize(("fair", "base"), PAIRS)
def test_each_image_of_the_base_loss_is_weighed_and_the_sum_divided_by_the_batch(
    fair: type[Method], base: type[Method]
) -> None:
    method, plain = fair(), base()
    each = [plain.loss(*batch(WEIGHT, slice(i, i + 1))) for i in range(8)]
    expected = (WEIGHT[LABEL] * torch.stack(each)).sum() / 8
    torch.testing.assert_close(method.loss(*batch(WEIGHT)), expected, rtol=1e-10, atol=0)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(method.loss(*batch(ones)), plain.loss(*batch(ones)), rtol=1e-10, atol=0)


def test_the_attack_of_fair_rslad_is_not_weighed() -> None:
    logits, targets = batch(WEIGHT)
    method = FairRslad()
    expected = F.kl_div(logits["adv"].log_softmax(1), targets.teacher.softmax(1), reduction="sum")
    torch.testing.assert_close(method.objective(targets)(logits["adv"]), expected, rtol=1e-10, atol=0)


def test_fair_mtards_released_code_asks_the_wrong_teacher() -> None:
    logits, targets = batch(WEIGHT)
    for variant, teacher in (("paper", targets.clean_teacher_BK), ("released", targets.teacher_adv_BK)):
        method = FairMtard(variant=variant)
        adv, clean = method.task_losses(logits, targets)
        for loss, name, taught in ((adv, "adv", targets.teacher_adv_BK), (clean, "clean", teacher)):
            assert taught is not None
            p_BK, floor = taught.softmax(1), 1e-5 if variant == "released" else 0
            kl_BK = p_BK * ((p_BK + floor).log() - logits[name].log_softmax(1))
            expected = (WEIGHT[LABEL] * kl_BK.sum(1)).sum() / 8 / 10
            torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_fair_rslads_released_code_adds_nothing_to_kappa() -> None:
    means = ClassMeans.zeros(3, 1, torch.device("cpu"))
    means.add(torch.tensor([4.0, 2, 0]), torch.arange(3))
    stats = EpochStats(measured={"kappa": means})
    for variant, kappa in (("paper", [4.0, 2, 0]), ("released", [4 - 1e-5, 2 - 1e-5, 0])):  # class_weight adds 1e-5
        torch.testing.assert_close(FairRslad(variant=variant).kappa(stats), torch.tensor(kappa), rtol=1e-6, atol=1e-9)


def test_kappa_counts_the_iterates_before_each_step_that_are_still_correct() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    clean = torch.rand(8, 1, 2, 2)
    method = FairArd()
    targets = Targets(label_B=LABEL, state={})
    watch = method.watcher(clean, targets)
    common: dict[str, Any] = dict(objective=method.objective(targets), step=0.1, eps=0.3, start=clean.clone())
    pgd(net, clean, steps=4, watch=watch, **common)
    iterates = [pgd(net, clean, steps=steps, **common) for steps in range(4)]  # the start, and not the last one
    with torch.no_grad():
        expected = sum((net(image).argmax(1) == LABEL).float() for image in iterates)
    assert torch.equal(watch.count_B, torch.as_tensor(expected))
    assert 0 < watch.count_B.sum() < 4 * 8


def test_an_epoch_weighs_by_the_class_means_of_kappa() -> None:
    targets = Targets(label_B=LABEL, state={}, watched=Kappa(LABEL))
    targets.watched.count_B += torch.tensor([4.0, 1, 10, 6, 2, 9, 8, 10])
    for method in (FairArd, FairIad, FairRslad, FairMtard):
        constants = dict(beta=0.5, weight_lower=0.7, weight_upper=1.5)
        recipe = Recipe.of(method, dataset="digits", student="tiny_resnet", **constants)
        state = recipe.method.class_state(3, recipe)
        assert state["class_weight"].tolist() == [1, 1, 1]
        means = ClassMeans.zeros(3, 1, torch.device("cpu"))
        means.add(recipe.method.measured({}, targets)["kappa"], LABEL)
        moved = recipe.method.next_class_state(state, EpochStats(measured={"kappa": means}), 1, recipe)
        assert moved.keys() == state.keys()
        expected = class_weight(torch.tensor([7.0, 1.5, 9.5]), 0.5, 0.7, 1.5)  # classes of four, two and two images
        torch.testing.assert_close(moved["class_weight"], expected)


def test_the_released_kappa_is_a_sum_over_the_mean_size_of_a_class() -> None:
    label_B = torch.tensor([0, 0, 0, 1, 2, 2])
    means = ClassMeans.zeros(3, 1, torch.device("cpu"))
    means.add(torch.tensor([5.0, 7, 6, 4, 9, 9]), label_B)
    for variant, kappa in (("paper", [6.0, 4, 9]), ("released", [9.0, 2, 9])):
        recipe = Recipe.of(FairArd, dataset="digits", student="tiny_resnet", variant=variant)
        state = recipe.method.class_state(3, recipe)
        moved = recipe.method.next_class_state(state, EpochStats(measured={"kappa": means}), 1, recipe)
        torch.testing.assert_close(moved["class_weight"], class_weight(torch.tensor(kappa)))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_full_settings_are_the_authors(module) -> None:
    paper: Recipe = module.SETTINGS["cifar10_resnet18"].recipe
    released = paper.as_variant("released")
    method = paper.method
    assert isinstance(method, Fair)
    assert (method.beta, method.weight_lower, method.weight_upper) == (2, 5 / 6, 5 / 2)
    assert paper.optim.batch_size == 128
    assert (paper.optim.weight_decay, paper.optim.nesterov, released.optim.nesterov) == (2e-4, False, True)
    by_ard = module in (fair_ard, fair_iad)
    assert (paper.optim.epochs, paper.optim.lr_drops) == ((200, (100, 150)) if by_ard else (300, (215, 260, 285)))
    assert (paper.attack.bn_mode, paper.attack.start) == (("train", "uniform") if by_ard else ("eval", "normal"))
    rates = [round(recipe.optim.lr_at(recipe.optim.epochs), 9) for recipe in (paper, released)]
    assert rates == ([0.001, 0.01] if by_ard else [0.0001, 0.0001])
