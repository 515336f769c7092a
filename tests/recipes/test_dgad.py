"""DGAD: the corrected teacher row by row, and the loss by the authors' two groups of images, in float64."""

import pytest
import torch
from torch import Tensor

from retemper.engine import Recipe, Targets
from retemper.recipes.adaad import disagreement
from retemper.recipes.dgad import SETTINGS, Dgad, corrected

LABEL = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of two softmaxes, (B,), written out."""
    return (p.softmax(1) * (p.softmax(1).log() - q.softmax(1).log())).sum(1)


def drawn() -> list[Tensor]:
    """The teacher's logits on clean and attacked images, right at four of eight and at two, and the student's."""
    gen = torch.Generator().manual_seed(0)
    values = [2 * torch.randn(8, 5, generator=gen, dtype=torch.float64) for _ in range(4)]
    for logits, right in zip(values, (4, 2), strict=False):
        for row, label in enumerate(LABEL.tolist()):
            logits[row, label] = logits[row].abs().max() + 1 if row < right else -9
    return [*values[:2], *(value.requires_grad_() for value in values[2:])]


def by_hand(logits: Tensor) -> Tensor:
    logits = logits.clone()
    for row, label in enumerate(LABEL.tolist()):
        top = int(logits[row].argmax())
        logits[row, [label, top]] = logits[row, [top, label]]
    return logits


def test_the_label_and_the_largest_logit_change_places_where_the_teacher_is_wrong() -> None:
    teacher = drawn()[0]
    found = corrected(teacher, LABEL)
    assert torch.equal(found, by_hand(teacher)) and torch.equal(found.argmax(1), LABEL)
    assert torch.equal(found[:4], teacher[:4]) and not torch.equal(found[4:], teacher[4:])
    assert torch.equal(found.sort(1).values, teacher.sort(1).values)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_loss_and_its_gradients_are_the_authors(weight: float) -> None:
    teacher, teacher_adv, clean, adv = drawn()
    targets = Targets(label_B=LABEL, teacher_BK=teacher, teacher_adv_BK=teacher_adv, state={})
    loss = Dgad(consistency_weight=weight).loss({"clean": clean, "adv": adv}, targets)
    ours = torch.autograd.grad(loss, (clean, adv))
    wrong, rest = slice(4, 8), slice(0, 4)  # clean images of the first four are known to the teacher
    on_clean = kl(by_hand(teacher), clean)[wrong].mean()
    on_adv = kl(by_hand(teacher_adv), adv)[rest].mean()
    pull = ((adv.softmax(1) - clean.softmax(1)) ** 2).sum() / 40
    expected = 4 / 8 * on_clean + (1 - 4 / 8) * on_adv + weight * pull
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for found, wanted in zip(ours, torch.autograd.grad(expected, (clean, adv)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_the_attack_and_the_schedule_are_adaads() -> None:
    recipe: Recipe = SETTINGS["cifar10_resnet18"].recipe
    assert recipe.method.objective(Targets(label_B=LABEL, state={})) is disagreement and recipe.method.attacks_teacher
    assert (recipe.optim.epochs, recipe.optim.lr_drops, recipe.optim.weight_decay) == (200, (100, 150), 5e-4)
    assert recipe.as_variant("released").selection.select_on == "test"
    assert recipe.method.forwards == ("clean", "adv")
