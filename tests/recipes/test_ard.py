"""ARD: the loss by its formula in float64, the attack's, and the schedule of the authors' code."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import Targets
from retemper.recipes import ard, fair_ard
from retemper.recipes.ard import SETTINGS, Ard

GEN = torch.Generator().manual_seed(0)
TEACHER, ADV, CLEAN = (4 * torch.randn(7, 10, generator=GEN, dtype=torch.float64) for _ in range(3))
LABEL = torch.arange(7)
TARGETS = Targets(label_B=LABEL, teacher_BK=TEACHER, state={})
LOGITS = {"adv": ADV, "clean": CLEAN}


def tempered_kl(logits: Tensor, temperature: float) -> Tensor:
    """The mean over images and the sum over classes, written out."""
    p = (TEACHER / temperature).softmax(1)
    return (p * (p.log() - (logits / temperature).log_softmax(1))).sum() / 7


def test_the_loss_is_the_formula() -> None:
    authors = 30 * 30 * tempered_kl(ADV, 30) / 10  # their mean over classes too
    torch.testing.assert_close(Ard().loss(LOGITS, TARGETS), authors, rtol=1e-10, atol=0)
    hard = F.cross_entropy(CLEAN, LABEL)
    mixed = 0.7 * 5 * 5 * tempered_kl(ADV, 5) / 10 + 0.3 * hard
    loss = Ard(soft_weight=0.7, temperature=5).loss(LOGITS, TARGETS)
    torch.testing.assert_close(loss, mixed, rtol=1e-10, atol=0)


def test_the_scale_is_a_tenth_of_the_sum_for_any_number_of_classes() -> None:
    teacher, adv = TEACHER[:, :4], ADV[:, :4]
    targets = Targets(label_B=LABEL % 4, teacher_BK=teacher, state={})
    loss = Ard(temperature=1).loss({"adv": adv, "clean": adv}, targets)
    expected = F.kl_div(adv.log_softmax(1), teacher.softmax(1), reduction="batchmean") / 10
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_the_attack_raises_the_cross_entropy() -> None:
    expected = F.cross_entropy(ADV, LABEL, reduction="sum")
    torch.testing.assert_close(Ard().objective(TARGETS)(ADV), expected, rtol=1e-10, atol=0)


def test_the_second_drop_changes_nothing_in_the_released_code_alone() -> None:
    paper = SETTINGS["cifar10_resnet18"].recipe
    epochs = (1, 100, 101, 150, 151, 200)
    assert [round(paper.optim.lr_at(e), 9) for e in epochs] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    released = paper.as_variant("released")
    assert [round(released.optim.lr_at(e), 9) for e in epochs] == [0.1, 0.1, 0.01, 0.01, 0.01, 0.01]
    assert not paper.optim.nesterov and not released.optim.nesterov
    assert (released.selection.holdout_per_class, released.execution.precision) == (0, "fp32")
    same = Ard(variant="released").loss(LOGITS, TARGETS)
    assert torch.equal(same, Ard().loss(LOGITS, TARGETS))


def test_the_full_setting_is_the_authors() -> None:
    recipe = SETTINGS["cifar10_resnet18"].recipe
    method = recipe.method
    assert isinstance(method, Ard)
    assert (recipe.optim.epochs, recipe.optim.lr_drops, recipe.optim.batch_size) == (200, (100, 150), 128)
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.optim.weight_decay) == (0.1, 0.9, 2e-4)
    assert (recipe.attack.bn_mode, recipe.attack.start, recipe.attack.clip_start) == ("train", "uniform", False)
    assert (method.temperature, method.soft_weight, method.kl_scale) == (30, 1, 0.1)
    assert method.forwards == ("adv", "clean")  # the clean one too moves the batch-norm statistics
    assert SETTINGS["cifar100_resnet18"].recipe.optim.batch_size == 256


@pytest.mark.parametrize("module", [ard, fair_ard], ids=["ard", "fair_ard"])
def test_the_loss_is_a_mean_over_the_classes_of_each_data_set(module: ModuleType) -> None:
    for name, classes in (("cifar10_resnet18", 10), ("cifar100_resnet18", 100), ("tiny_imagenet_preact_resnet18", 200)):
        method = module.SETTINGS[name].recipe.method
        assert isinstance(method, Ard) and method.kl_scale == 1 / classes
