"""The kernel of the class-pair term, launched alone: what it writes, and what it leaves."""

import math

import pytest
import torch
from torch import Tensor

from retemper import kernels
from retemper.kernels import class_pair_kernels

pytestmark = pytest.mark.triton


def batch(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    gen = torch.Generator().manual_seed(0)
    clean, adv = (3 * torch.randn(shape, generator=gen).to(device) for _ in range(2))
    table = torch.rand(shape[1], shape[1], generator=gen).to(device)
    return clean, adv, table, torch.randint(shape[1], shape[:1], generator=gen).to(device), -100


@pytest.mark.parametrize("shape", [(5, 10), (2, 1501)], ids=str)  # in one pass, and in several
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_writes_the_gradients_that_are_wanted(
    wanted: tuple[bool, bool], shape: tuple[int, int], device: torch.device
) -> None:
    clean, adv, table, label, ignored = batch(shape, device)
    leaves = [one.double().requires_grad_() for one in (clean, adv)]
    truth = kernels.class_pair_reference(leaves[0], leaves[1], table, label)
    row_grad = torch.linspace(-1, 2, 2 * len(clean), device=device)[::2]
    truths = torch.autograd.grad(truth, leaves, row_grad.double())
    loss = clean.new_empty(len(clean))
    class_pair_kernels.launch(clean, adv, table, label, ignored, loss=loss)
    torch.testing.assert_close(loss.double(), truth, rtol=2**-19, atol=0)
    grads = [torch.empty_like(one) if want else None for one, want in zip((clean, adv), wanted, strict=True)]
    class_pair_kernels.launch(clean, adv, table, label, ignored, row_grad, clean_grad=grads[0], adv_grad=grads[1])
    for grad, own in zip(grads, truths, strict=True):
        if grad is not None:
            torch.testing.assert_close(grad.double(), own, rtol=2**-19, atol=2**-19 * own.abs().max().item())


def test_writes_no_row_beyond_the_last(device: torch.device) -> None:
    given = batch((5, 10), device)
    memory = torch.full((8, 10), math.pi, device=device)  # a program has more rows than these
    loss, row_grad = memory.clone()[:, 0].contiguous(), torch.ones(5, device=device)
    class_pair_kernels.launch(*given, loss=loss)
    class_pair_kernels.launch(*given, row_grad, clean_grad=memory)
    assert (memory[5:] == math.pi).all() and (loss[5:] == math.pi).all()
    assert (memory[:5] != math.pi).all() and (loss[:5] != math.pi).all()


def test_a_batch_without_rows_is_not_launched(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(class_pair_kernels, "_pair_kernel")
    given = batch((0, 10), device)
    class_pair_kernels.launch(*given, loss=given[0].new_empty(0))
