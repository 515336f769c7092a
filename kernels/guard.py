"""The look of a training step at its loss and gradients before the update, and what it counts, in one launch.

    bad   = the loss or the norm of all gradients is not finite
    first = bad, and no step before was:   seed <- next_seed,  loss_at <- loss
    found <- 1, poison <- NaN              from the first bad step on
    total <- total + rows loss;   next_seed <- next_seed + 1

Every number stays on the device: plain PyTorch takes twenty launches to move them there.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import next_power_of_2, tl, triton
from retemper.kernels.operators import operator
from retemper.kernels.runtime import EXACT, launching, runs_triton

BLOCK = 1024  # the most norms that are squared at once


def guard_reference(
    loss: Tensor,
    norms: Tensor | None,
    rows: int,
    next_seed: Tensor,
    seed: Tensor,
    loss_at: Tensor,
    found: Tensor,
    poison: Tensor,
    total: Tensor,
) -> None:
    """Do it in plain PyTorch: the truth for the tests, and the path on a CPU. Args: as for `guard_`."""
    finite = loss.isfinite()
    if norms is not None:
        finite = finite & torch.linalg.vector_norm(norms).isfinite()
    first = ~finite & (seed < 0).view(())
    seed.copy_(torch.where(first, next_seed, seed))
    loss_at.copy_(torch.where(first, loss, loss_at))
    found.copy_((seed >= 0).view(()))
    poison.masked_fill_(found > 0, torch.nan)
    total += loss * rows
    next_seed += 1


@triton.jit
def _guard_kernel(
    loss_ptr,
    norms_ptr,
    next_seed_ptr,
    seed_ptr,
    loss_at_ptr,
    found_ptr,
    poison_ptr,
    total_ptr,
    norms,
    rows,
    BLOCK: tl.constexpr,
):
    loss = tl.load(loss_ptr).to(tl.float32)
    fine = loss - loss == 0.0  # of infinity and NaN it is NaN
    if norms_ptr is not None:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, norms, BLOCK):
            place = start + tl.arange(0, BLOCK)
            norm = tl.load(norms_ptr + place, mask=place < norms, other=0.0).to(tl.float32)
            squares += norm * norm
        norm = tl.sqrt(tl.sum(squares, 0))
        fine = fine & (norm - norm == 0.0)
    step, seed = tl.load(next_seed_ptr), tl.load(seed_ptr)
    first = (fine == 0) & (seed < 0)
    seed = tl.where(first, step, seed)
    tl.store(seed_ptr, seed)
    tl.store(loss_at_ptr, tl.where(first, loss, tl.load(loss_at_ptr)))
    tl.store(found_ptr, tl.where(seed >= 0, 1.0, 0.0))
    tl.store(poison_ptr, tl.where(seed >= 0, float("nan"), tl.load(poison_ptr)))
    tl.store(total_ptr, tl.load(total_ptr) + loss * rows)
    tl.store(next_seed_ptr, step + 1)


@operator(
    "guard_(Tensor loss, Tensor? norms, SymInt rows, Tensor(a!) next_seed, Tensor(b!) seed, Tensor(c!) loss_at,"
    " Tensor(d!) found, Tensor(e!) poison, Tensor(f!) total) -> ()",
    fake=lambda *_: None,
)
def _guard_op(loss: Tensor, norms: Tensor | None, rows: int, *written: Tensor) -> None:
    if not runs_triton(loss, norms, *written):
        guard_reference(loss, norms, rows, *written)
        return
    count = 0 if norms is None else norms.numel()
    options: dict[str, Any] = {"BLOCK": min(BLOCK, next_power_of_2(max(1, count))), "num_warps": 1, **EXACT}
    with launching(loss):
        _guard_kernel[(1,)](loss, norms, *written, norms=count, rows=rows, **options)


def guard_(
    loss: Tensor,
    norms: Tensor | None,
    rows: int,
    *,
    next_seed: Tensor,
    seed: Tensor,
    loss_at: Tensor,
    found: Tensor,
    poison: Tensor,
    total: Tensor,
) -> None:
    """Look at a step before its update, and count it, as in the module docstring.

    Args:
        loss: 0-dim, float32 or float64, without gradient.
        norms: (N,) float32 or float64, the norm of each gradient; None where gradients are not looked at.
        rows: of the batch.
        next_seed: (1,) int64, the noise seed of this step; one is added.
        seed: (1,) int64, the noise seed of the first bad step, and -1 before it.
        loss_at, found, poison: 0-dim float32.
        total: 0-dim, of the dtype of `loss`.
    """
    _guard_op(loss, norms, rows, next_seed, seed, loss_at, found, poison, total)
