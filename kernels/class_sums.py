"""The sums, by class, of cross-entropy, correct predictions and samples, from which class-wise methods adapt.

    loss_sum[k] = sum over y_i = k of log sum_j exp(logit_ij) - logit_ik
    correct[k]  = number of i with y_i = k whose first largest logit is at k
    count[k]    = number of i with y_i = k

The temperatures of ABSLD (Zhao et al., 2023) and the class weights of other methods follow from them.
Bound by memory: one pass over the logits, where eager PyTorch takes a log-softmax, an argmax, two gathers and three
scatters. Deterministic, without atomics: whatever is added is added in a fixed order.

Up to WIDEST classes a program adds up its own rows, class by class, and where there are several programs a second
launch adds up what they wrote. With more classes, the first launch writes the cross-entropy and the hit of each row.
In the second, each program takes a block of classes and a slice of rows. A third launch adds up the slices of a batch
that has several. No program holds, and no launch writes, a number for each pair of a row and a class.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels.language import cdiv, next_power_of_2, tl, triton
from retemper.kernels.logit_rows import row_losses, row_tiles
from retemper.kernels.operators import operator
from retemper.kernels.rows import LABELS, require_dense, require_each, require_logits
from retemper.kernels.runtime import (
    EXACT,
    access_width,
    compute_dtype,
    launching,
    require_no_grad,
    require_vector,
    runs_triton,
)

# Chosen from the code for sm_90, not yet measured on a GPU.
WIDEST = 16  # classes whose sums a program can hold beside its rows
PARTS = 1024  # the most programs of that kind: about as many as a GPU runs at once, and a second launch adds up quickly
SLICE = 1024  # rows of a program that goes through rows for its block of classes
BLOCK, TILE = 32, 2048  # classes of that block, and how many rows times classes a program looks at at once
FEW = 16  # classes; rows shorter than PyTorch's vectors are slow on a CPU, so that it gets them as columns


def sum_tiles(classes: int) -> dict[str, int]:
    """Return the constants of a kernel that goes through rows, or parts, for a block of classes: K, BLOCK and TALL."""
    block = min(next_power_of_2(classes), BLOCK)
    return {"K": classes, "BLOCK": block, "TALL": TILE // block}


def class_sums_reference(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sums in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args and Returns: as for `class_sums`. Nothing is checked. Differentiable in `logits`.
    """
    wide, label = logits.to(compute_dtype(logits)), label.long()
    classes, known = wide.shape[1], None
    if not _all_known(label, classes):
        given, label = label, label.clamp(0, classes - 1)
        known = label == given
    log_softmax = wide.log_softmax(1) if classes >= FEW else wide.t().log_softmax(0).t()
    cross_entropy = F.nll_loss(log_softmax, label, reduction="none")
    hit = (wide.max(1)[1] == label).logical_and_(cross_entropy == cross_entropy)  # a row with NaN predicts nothing
    if known is not None:
        cross_entropy, hit = cross_entropy.masked_fill(~known, 0), hit & known
    loss, none = wide.new_zeros(classes), label.new_zeros(classes)
    counted = torch.ones_like(label) if known is None else known.long()
    return (
        loss.index_add_(0, label, cross_entropy),
        none.index_add(0, label, hit.long()),
        none.index_add_(0, label, counted),
    )


def _all_known(label: Tensor, classes: int) -> bool:
    """Say whether each label is a class, as far as it is told: on a CPU a look costs less than care for all rows."""
    if not label.is_cpu or label.numel() == 0 or type(label) is not Tensor or torch.compiler.is_compiling():
        return False
    lowest, highest = label.aminmax()
    return lowest.item() >= 0 and highest.item() < classes


@triton.jit
def _of_classes(cls, label, cross_entropy, hit):
    """Return the sums of the classes `cls` over the rows: three of (BLOCK,)."""
    member = label[:, None] == cls[None, :]
    loss = tl.sum(tl.where(member, cross_entropy[:, None], 0.0), 0)
    correct = tl.sum((member & hit[:, None]).to(tl.int32), 0)
    return loss, correct, tl.sum(member.to(tl.int32), 0)


@triton.jit
def _store(loss_ptr, correct_ptr, count_ptr, place, loss, correct, count, inside, ADD: tl.constexpr):
    """Write the three sums, (BLOCK,) each, to their places, or add them to what is there."""
    if ADD:
        loss += tl.load(loss_ptr + place, mask=inside, other=0.0)
        correct += tl.load(correct_ptr + place, mask=inside, other=0)
        count += tl.load(count_ptr + place, mask=inside, other=0)
    tl.store(loss_ptr + place, loss, mask=inside)
    tl.store(correct_ptr + place, correct, mask=inside)
    tl.store(count_ptr + place, count, mask=inside)


@triton.jit
def _class_sums_kernel(
    logits_ptr,
    label_ptr,
    loss_ptr,
    correct_ptr,
    count_ptr,
    B,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
):
    """Write the sums of the program's rows: every so many tiles one, from all over the batch."""
    part = tl.program_id(0).to(tl.int64)
    cls = tl.arange(0, WIDTH)
    loss = tl.zeros((WIDTH,), tl.float32)
    correct = tl.zeros((WIDTH,), tl.int32)
    count = tl.zeros((WIDTH,), tl.int32)
    for first in range(part * ROWS, B, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        label, cross_entropy, hit = row_losses(logits_ptr, label_ptr, row, B, STRIDE, K, ROWS, LANES, STEPS)
        more_loss, more_correct, more = _of_classes(cls, label, cross_entropy, hit)
        loss += more_loss
        correct += more_correct
        count += more
    _store(loss_ptr, correct_ptr, count_ptr, part * K + cls, loss, correct, count, cls < K, ADD)


@triton.jit
def _row_losses_kernel(
    logits_ptr,
    label_ptr,
    cross_entropy_ptr,
    hit_ptr,
    B,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the cross-entropy of each row and whether it is predicted: (B,) each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    _, cross_entropy, hit = row_losses(logits_ptr, label_ptr, row, B, STRIDE, K, ROWS, LANES, STEPS)
    tl.store(cross_entropy_ptr + row, cross_entropy, mask=row < B)
    tl.store(hit_ptr + row, hit, mask=row < B)


@triton.jit
def _slice_sums_kernel(
    label_ptr,
    cross_entropy_ptr,
    hit_ptr,
    loss_ptr,
    correct_ptr,
    count_ptr,
    B,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    TALL: tl.constexpr,
    SLICE: tl.constexpr,
    ADD: tl.constexpr,
):
    """Write the sums of a block of classes over a slice of the rows."""
    block, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cls = block * BLOCK + tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float32)
    correct = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    every = part * SLICE + tl.arange(0, SLICE)
    label = tl.load(label_ptr + every, mask=every < B, other=0).to(tl.int64)
    if tl.sum((label // BLOCK == block).to(tl.int32), 0) != 0:  # of many classes, most blocks have no row
        for first in range(part * SLICE, tl.minimum(part * SLICE + SLICE, B), TALL):
            row = first + tl.arange(0, TALL)
            own = tl.load(label_ptr + row, mask=row < B, other=0).to(tl.int64)
            own = tl.where(row < B, own, -1)
            cross_entropy = tl.load(cross_entropy_ptr + row, mask=row < B, other=0.0)
            hit = tl.load(hit_ptr + row, mask=row < B, other=0) != 0
            more_loss, more_correct, more = _of_classes(cls, own, cross_entropy, hit)
            loss += more_loss
            correct += more_correct
            count += more
    _store(loss_ptr, correct_ptr, count_ptr, part * K + cls, loss, correct, count, cls < K, ADD)


@triton.jit
def _column_total(ptr, parts, cls, K: tl.constexpr, BLOCK: tl.constexpr, TALL: tl.constexpr):
    """Return the sums over the parts of a block of columns of (parts, K): (BLOCK,)."""
    total = tl.zeros((TALL, BLOCK), ptr.dtype.element_ty)
    for start in range(0, parts, TALL):
        part = start + tl.arange(0, TALL)
        inside = (part < parts)[:, None] & (cls < K)[None, :]
        total += tl.load(ptr + part.to(tl.int64)[:, None] * K + cls, mask=inside, other=0)
    return tl.sum(total, 0)


@triton.jit
def _total_kernel(
    part_loss_ptr,
    part_correct_ptr,
    part_count_ptr,
    loss_ptr,
    correct_ptr,
    count_ptr,
    parts,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    TALL: tl.constexpr,
    ADD: tl.constexpr,
):
    """Write the sums of a block of classes over all parts."""
    cls = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    loss = _column_total(part_loss_ptr, parts, cls, K, BLOCK, TALL)
    correct = _column_total(part_correct_ptr, parts, cls, K, BLOCK, TALL)
    count = _column_total(part_count_ptr, parts, cls, K, BLOCK, TALL)
    _store(loss_ptr, correct_ptr, count_ptr, cls, loss, correct, count, cls < K, ADD)


def _launch(logits: Tensor, label: Tensor, sums: tuple[Tensor, ...], add: bool = False) -> None:
    """Fill the three (K,) of `sums` by one, two or three launches, or add to them."""
    batch, classes = logits.shape
    tiles: dict[str, Any] = row_tiles(classes, access_width(classes, logits))
    tiles |= {"STRIDE": logits.stride(0) if batch > 1 else classes, **EXACT}
    blocks: dict[str, Any] = {**sum_tiles(classes), **EXACT}
    programs, grid = cdiv(batch, tiles["ROWS"]), cdiv(classes, blocks["BLOCK"])
    by_tile = classes <= WIDEST
    parts = max(1, min(programs, PARTS) if by_tile else cdiv(batch, SLICE))
    to: Any = sums if parts == 1 else _empty(logits, (parts, classes))
    last = {"ADD": add}
    first = last if parts == 1 else {"ADD": False}
    if by_tile:
        tiles |= {"WIDTH": next_power_of_2(classes), **first}
        _class_sums_kernel[(parts,)](logits, label, *to, B=batch, **tiles)
    else:
        cross_entropy = logits.new_empty(batch, dtype=torch.float32)
        hit = logits.new_empty(batch, dtype=torch.int8)
        if batch:
            _row_losses_kernel[(programs,)](logits, label, cross_entropy, hit, batch, **tiles)
        slices = blocks | {"SLICE": SLICE, **first}
        _slice_sums_kernel[(grid, parts)](label, cross_entropy, hit, *to, B=batch, **slices)
    if parts > 1:
        _total_kernel[(grid,)](*to, *sums, parts=parts, **blocks, **last)


def _empty(logits: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for sums of losses, hits and rows."""
    loss = logits.new_empty(shape, dtype=compute_dtype(logits))
    return loss, logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.int64)


def _check(logits: Tensor, label: Tensor) -> None:
    """Raise ValueError where a shape, dtype, device or stride does not fit."""
    require_logits(logits=logits)
    require_each("label", label, logits.shape[0], LABELS, logits.device)
    require_dense("label", label)


def _fake(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(logits, logits.shape[1:])


@operator("class_sums(Tensor logits, Tensor label) -> (Tensor, Tensor, Tensor)", fake=_fake)
def _class_sums_op(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(logits, label)
    if not runs_triton(logits):
        return class_sums_reference(logits, label)
    sums = _fake(logits, label)
    with launching(logits):
        _launch(logits, label, sums)
    return sums


@operator(
    "add_class_sums_(Tensor logits, Tensor label, Tensor(a!) loss, Tensor(b!) correct, Tensor(c!) count) -> ()",
    fake=lambda *_: None,
)
def _add_class_sums_op(logits: Tensor, label: Tensor, loss: Tensor, correct: Tensor, count: Tensor) -> None:
    _check(logits, label)
    if runs_triton(logits, loss):
        with launching(logits):
            _launch(logits, label, (loss, correct, count), add=True)
        return
    for total, more in zip((loss, correct, count), class_sums_reference(logits, label), strict=True):
        total += more


def add_class_sums_(logits: Tensor, label: Tensor, loss: Tensor, correct: Tensor, count: Tensor) -> None:
    """Add what `class_sums` returns to totals, in its launches: to the bit what adding afterwards gives.

    Args:
        logits, label: as for `class_sums`; K is the length of the totals.
        loss: (K,) float32, or float64, contiguous; overwritten.
        correct, count: (K,) int64, contiguous; overwritten.

    Raises:
        ValueError: as `class_sums`.
    """
    _require_classes(logits, loss.numel())
    require_vector("loss", loss, logits.shape[1], torch.float32, torch.float64)
    for name, total in (("correct", correct), ("count", count)):
        require_vector(name, total, logits.shape[1], torch.int64)
    require_no_grad(logits=logits)
    _add_class_sums_op(logits, label, loss, correct, count)


def class_sums(logits: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the cross-entropy, the correct predictions and the samples of each class. Not differentiable.

    A row with NaN makes the loss of its own class NaN, no other, and is not correct. A row whose label is no class
    adds nothing. Of equal logits the first is the prediction. The formula is in the module docstring.

    Args:
        logits: (B, K), any float dtype, the K of a row side by side in memory; detached, where autograd is on.
        label: (B,), any integer dtype.
        num_classes: K; a model with more outputs than the data has classes is refused.

    Returns:
        loss_sum: (K,) in nats, float32, or float64 for float64 logits.
        correct, count: (K,) int64.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; K is not `num_classes`; `logits` requires a gradient
            while autograd is on.
    """
    _require_classes(logits, num_classes)
    require_no_grad(logits=logits)
    if _in_plain_pytorch(logits):
        _check(logits, label)
        return class_sums_reference(logits, label)
    return _class_sums_op(logits, label)


def _require_classes(logits: Tensor, num_classes: int) -> None:
    if logits.dim() != 2 or logits.shape[1] != num_classes:
        raise ValueError(f"logits: shape {tuple(logits.shape)}; needs (B, {num_classes}), as num_classes says")


def _in_plain_pytorch(logits: Tensor) -> bool:
    """Say whether the reference is called as it is: an operator around it would take longer than many a batch."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return type(logits) is Tensor and not (traced or runs_triton(logits))
