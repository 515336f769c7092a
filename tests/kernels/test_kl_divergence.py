"""The reference against PyTorch's own losses and autograd, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import class_temperature_kl_grad_reference, class_temperature_kl_reference

TOLERANCE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def inputs(batch: int = 12, classes: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, batch, classes, generator=gen, dtype=torch.float64)
    label = torch.randint(classes, (batch,), generator=gen)
    return student, teacher, label, torch.linspace(0.3, 4, classes, dtype=torch.float64)


def by_hand(
    student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor, weight: Tensor, trust: Tensor, own: float
) -> Tensor:
    """The formula, in the functions that PyTorch offers."""
    share = trust[label, None]
    soft = (teacher / temperature[label, None]).softmax(1)
    target = (1 - share) * soft + share * F.one_hot(label, student.shape[1])
    return weight[label] * F.kl_div((student / own).log_softmax(1), target, reduction="none").sum(1)


@pytest.mark.parametrize("own", [1.0, 2.5])
def test_is_pytorchs_divergence_to_the_target(own: float) -> None:
    student, teacher, label, temperature = inputs()
    weight, trust = torch.linspace(0, 2, 5).double(), torch.linspace(0, 1, 5).double()
    options: dict[str, Any] = {"student_temperature": own, "class_weight": weight, "label_trust": trust}
    student.requires_grad_()
    expected = by_hand(student, teacher, label, temperature, weight, trust, own)
    loss = class_temperature_kl_reference(student, teacher, label, temperature, **options)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    row_grad = torch.linspace(-1, 1, len(label)).double()
    (expected_grad,) = torch.autograd.grad(expected, student, row_grad)
    grad = class_temperature_kl_grad_reference(student, teacher, label, temperature, **options, row_grad=row_grad)
    torch.testing.assert_close(grad, expected_grad, **TOLERANCE)


def test_the_label_of_each_row_is_trusted_by_its_own_share() -> None:
    student, teacher, label, _ = inputs()
    share, tau = torch.linspace(0, 1, len(label)).double(), torch.tensor(2.5).double()
    target = (1 - share[:, None]) * (teacher / tau).softmax(1) + share[:, None] * F.one_hot(label, 5)
    expected = F.kl_div(student.requires_grad_().log_softmax(1), target, reduction="none").sum(1)
    loss = class_temperature_kl_reference(student, teacher, label, tau, row_trust=share)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    grad = class_temperature_kl_grad_reference(student, teacher, label, tau, row_trust=share)
    torch.testing.assert_close(grad, expected_grad, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_number_has_the_bits_of_a_tensor_filled_with_it(dtype: torch.dtype) -> None:
    student, teacher, label, _ = inputs()
    student, teacher = student.to(dtype), teacher.to(dtype)
    filled = torch.full((5,), 0.3, dtype=dtype)
    for reference in (class_temperature_kl_reference, class_temperature_kl_grad_reference):
        assert torch.equal(reference(student, teacher, label, 0.3), reference(student, teacher, label, filled))
        assert torch.equal(reference(student, teacher, label), reference(student, teacher, label, torch.ones(5)))


def test_large_logits_at_a_low_temperature_keep_their_differences() -> None:
    logits = torch.tensor([[1e4, 1e4 - 0.05]])  # float32 holds the difference to 2**-11
    gap = (logits[0, 0].double() - logits[0, 1].double()).item() / 0.05
    label, flat = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2)
    loss = class_temperature_kl_reference(flat, logits, label, torch.tensor([0.05, 0.05], dtype=torch.float64))
    p = 1 / (1 + math.exp(-gap))
    assert loss.item() == pytest.approx(math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p), rel=1e-6)


def test_a_divergence_that_rounding_makes_negative_keeps_its_gradient() -> None:
    gen = torch.Generator().manual_seed(0)
    teacher = torch.randn(200, 10, generator=gen)
    student = (teacher + 1e-5 * torch.randn(200, 10, generator=gen)).requires_grad_()  # a divergence of about 1e-10
    loss = class_temperature_kl_reference(student, teacher)
    assert (loss >= 0).all() and (loss == 0).any()
    (grad,) = torch.autograd.grad(loss.sum(), student)
    expected = class_temperature_kl_grad_reference(student.detach().double(), teacher.double())
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=3e-7)
    assert (grad.abs().amax(1) > 0).all()
