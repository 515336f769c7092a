"""Group DRO: the weights' rule and the loss by hand in float64, classes that are absent, and batches in parts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import Part, Recipe, Targets
from retemper.recipes.group_dro import SETTINGS, GroupDro, next_weight


def dro(**options: Any) -> GroupDro:
    method = Recipe.of(GroupDro, dataset="digits", student="tiny_resnet", **options).method
    assert isinstance(method, GroupDro)
    return method


def batch() -> tuple[Tensor, Targets]:
    gen = torch.Generator().manual_seed(0)
    adv = (2 * torch.randn(9, 4, generator=gen, dtype=torch.float64)).requires_grad_()
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    return adv, Targets(label_B=torch.tensor([0, 0, 0, 0, 1, 1, 3, 3, 3]), state={"class_weight": weight})


def by_hand(adv: Tensor, targets: Targets, eta: float, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The loss and q by the formulas, class by class; class 2 has no image."""
    loss_B = F.cross_entropy(adv, targets.label_B, reduction="none", label_smoothing=smoothing)
    means = [loss_B[targets.label_B == k].mean() if k != 2 else loss_B.new_zeros(()) for k in range(4)]
    raised = [q * (eta * mean.detach()).exp() for q, mean in zip(targets.state["class_weight"], means, strict=True)]
    weight = [q / sum(raised) for q in raised]
    total = sum(q * mean for q, mean in zip(weight, means, strict=True))
    assert isinstance(total, Tensor)
    return total, torch.stack([torch.as_tensor(q) for q in weight])


@pytest.mark.parametrize(("eta", "smoothing"), [(0.0, 0.0), (0.01, 0.0), (2.0, 0.3)])
def test_loss_and_weights_are_those_of_the_formula(eta: float, smoothing: float) -> None:
    adv, targets = batch()
    targets = replace(targets, label_smoothing=smoothing)
    expected, weight = by_hand(adv, targets, eta, smoothing)
    method, before = dro(eta=eta), targets.state["class_weight"].clone()
    loss = method.loss({"adv": adv}, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, adv), torch.autograd.grad(expected, adv))
    assert torch.equal(targets.state["class_weight"], before)  # it moves after the step, once
    method.after_step(targets.state, {"adv": adv.detach()}, targets)
    torch.testing.assert_close(targets.state["class_weight"], weight)
    if eta:  # the absent class falls by what the others rise
        assert targets.state["class_weight"][2] < 0.3


def test_the_costliest_class_comes_to_weigh_most() -> None:
    weight = torch.full((3,), 1 / 3)
    for _ in range(2000):
        weight = next_weight(weight, torch.tensor([1.0, 2.0, 0.5]), 0.01)
    assert weight[1] > 0.99 and weight.sum() == pytest.approx(1) and weight.isfinite().all()
    assert next_weight(weight, torch.tensor([3.0, 1e5, 0.0]), 10.0).isfinite().all()


def test_it_starts_with_all_alike_which_is_sat_on_classes_of_one_size() -> None:
    method = dro(eta=0.0)
    state = method.class_state(4, SETTINGS["digits"].recipe)
    adv, label = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 4
    loss = method.loss({"adv": adv}, Targets(label_B=label, state=state))
    torch.testing.assert_close(loss.float(), F.cross_entropy(adv, label).float())


class Halves(Part):
    """A part whose mean over the batch is known: that of both parts."""

    whole: Tensor

    def mean(self, mean: Tensor) -> Tensor:
        return self.whole


@pytest.mark.parametrize("cut", [3, 5])  # the first part has one class, and two
def test_the_parts_of_a_batch_have_the_loss_of_the_whole(cut: int) -> None:
    adv, targets = batch()
    expected, weight = by_hand(adv, targets, 0.5)
    method, parts = dro(eta=0.5), [slice(0, cut), slice(cut, 9)]
    asked: list[Tensor] = []

    class Asks(Part):
        def mean(self, mean: Tensor) -> Tensor:
            asked.append(mean)
            return mean

    for rows in parts:
        method.loss({"adv": adv[rows]}, replace(targets, label_B=targets.label_B[rows], part=Asks()))
    both = Halves()
    both.whole = cut / 9 * asked[0] + (1 - cut / 9) * asked[1]
    shares = []
    for rows in parts:
        part = replace(targets, label_B=targets.label_B[rows], part=both)
        shares.append((rows.stop - rows.start) / 9 * method.loss({"adv": adv[rows]}, part))
        torch.testing.assert_close(method.weighed(adv[rows], part)[1], weight)
    torch.testing.assert_close(shares[0] + shares[1], expected)
    # a process without rows computes with an image of class 0, which may be none of the batch's
    lone = replace(targets, label_B=torch.tensor([2]), part=both)
    assert method.loss({"adv": adv[:1]}, lone).isfinite()
