"""Inputs and answers computed in float64 by independent code: both paths must give them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.kernels import class_sums, class_temperature_kl, class_temperature_kl_grad_, pgd_step_

CASES: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parent.parent / "golden/kernels.json").read_text())
# of the largest value of an answer: exponents of a few hundred to 2**-23 each; float64 takes the reference path
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PLAIN = 2**-20  # what float32 in plain PyTorch may be off by: it has the digits of 1 beside a small loss

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def assert_close(out: Tensor, answer: Any) -> None:
    expected = torch.tensor(answer, dtype=torch.float64)
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(
        out.double().cpu(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )


def assert_each_row_close(out: Tensor, answer: Any, floor: float) -> None:
    """Compare each row by its own size: a sure student's loss of 3e-5 has as many digits as a loss of 200."""
    expected = torch.tensor(answer, dtype=torch.float64)
    size = expected[:, None].flatten(1).abs().amax(1)
    error = (out.double().cpu() - expected)[:, None].flatten(1).abs().amax(1)
    assert (error <= TOLERANCE[out.dtype] * size + floor).all(), (error / size).max()


@each_dtype
@pytest.mark.parametrize(
    "case", CASES["class_temperature_kl"], ids=lambda c: f"{len(c['label'])}x{len(c['temperature'])}"
)
def test_class_temperature_kl(case: dict[str, Any], dtype: torch.dtype, path: str, device: torch.device) -> None:
    def tensor(name: str) -> Tensor:
        return torch.tensor(case[name], device=device, dtype=dtype)

    floor = PLAIN if path == "reference" and dtype == torch.float32 else 0
    args = tensor("student"), tensor("teacher"), torch.tensor(case["label"], device=device), tensor("temperature")
    options = {"student_temperature": case["student_temperature"], "class_weight": tensor("class_weight")}
    assert_each_row_close(class_temperature_kl(*args, **options, reduction="none"), case["none"], floor)
    for reduction in ("sum", "batchmean", "mean"):
        assert_close(class_temperature_kl(*args, **options, reduction=reduction), case[reduction])
    for reduction in ("sum", "batchmean"):
        student = args[0].clone().requires_grad_()
        class_temperature_kl(student, *args[1:], **options, reduction=reduction).backward()
        assert student.grad is not None
        assert_close(student.grad, case[f"student_grad_of_{reduction}"])
    assert_each_row_close(class_temperature_kl_grad_(*args, **options), case["student_grad_of_sum"], floor)


@each_dtype
@pytest.mark.parametrize("case", CASES["pgd_step"], ids=lambda c: f"batch{len(c['eps'])}")
def test_pgd_step(case: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    clean, adv, grads, step, eps = (
        torch.tensor(case[name], device=device, dtype=dtype) for name in ("clean", "start", "grads", "step", "eps")
    )
    for grad in grads:
        pgd_step_(adv, grad, clean, step, eps)
    assert_close(adv, case["final"])


@each_dtype
@pytest.mark.parametrize("case", CASES["class_sums"], ids=lambda c: f"{len(c['label'])}x{len(c['count'])}")
def test_class_sums(case: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    logits, label = torch.tensor(case["logits"], device=device, dtype=dtype), torch.tensor(case["label"], device=device)
    loss_sum, correct, count = class_sums(logits, label, logits.shape[1])
    assert_close(loss_sum, case["loss_sum"])
    assert correct.tolist() == case["correct"] and count.tolist() == case["count"]
