"""The kernel of the Jensen-Shannon divergence, launched alone: what it writes, and what it leaves."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper import kernels
from retemper.kernels import js_kernel
from retemper.kernels.kl_arguments import arguments

pytestmark = pytest.mark.triton
BETA = 0.3

reference: Any = kernels.class_temperature_js_reference  # Any: pyright would match options with every parameter


def batch(shape: tuple[int, int], device: torch.device) -> tuple[list[Tensor], dict[str, Any]]:
    """Return student and teacher, and the rest of the arguments."""
    gen = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(shape, generator=gen).to(device) for _ in range(2)]
    by_class, by_row = (torch.linspace(0.5, 2, size, device=device) for size in reversed(shape))
    label = torch.randint(shape[1], shape[:1], generator=gen).to(device)
    rest = {"label": label, "temperature": by_class, "student_temperature": 1.5}
    return logits, rest | {"class_weight": by_class, "row_weight": by_row}


@pytest.mark.parametrize("shape", [(5, 10), (2, 1501)], ids=str)  # in one pass, and in several
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_writes_the_gradients_that_are_wanted(
    wanted: tuple[bool, bool], shape: tuple[int, int], device: torch.device
) -> None:
    (student, teacher), rest = batch(shape, device)
    leaves = [one.double().requires_grad_() for one in (student, teacher)]
    truth = reference(*leaves, beta=BETA, **rest)
    row_grad = torch.linspace(-1, 2, 2 * len(student), device=device)[::2]
    truths = torch.autograd.grad(truth, leaves, row_grad.double())
    inputs, loss = arguments(student, teacher, **rest), student.new_empty(len(student))
    js_kernel.launch(inputs, BETA, loss=loss)
    torch.testing.assert_close(loss.double(), truth, rtol=2**-19, atol=2**-19)
    grads = [torch.empty_like(one) if want else None for one, want in zip((student, teacher), wanted, strict=True)]
    js_kernel.launch(inputs, BETA, row_grad, student_grad=grads[0], teacher_grad=grads[1])
    for grad, own in zip(grads, truths, strict=True):
        if grad is not None:
            torch.testing.assert_close(grad.double(), own, rtol=2**-19, atol=2**-19)


def test_writes_no_row_beyond_the_last(device: torch.device) -> None:
    (student, teacher), rest = batch((5, 10), device)
    memory = torch.full((8, 10), math.pi, device=device)  # a program has more rows than these
    loss, row_grad = memory.clone()[:, 0].contiguous(), torch.ones(5, device=device)
    inputs = arguments(student, teacher, **rest)
    js_kernel.launch(inputs, BETA, loss=loss)
    js_kernel.launch(inputs, BETA, row_grad, student_grad=memory)
    assert (memory[5:] == math.pi).all() and (loss[5:] == math.pi).all()
    assert (memory[:5] != math.pi).all() and (loss[:5] != math.pi).all()


def test_a_batch_without_rows_is_not_launched(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(js_kernel, "_js_kernel")
    (student, teacher), _ = batch((0, 10), device)
    js_kernel.launch(arguments(student, teacher), BETA, loss=student.new_empty(0))
