"""The arithmetic of class_sums.py in Triton.

Up to WIDEST classes a program adds up its own rows, class by class, and where there are several programs a second
launch adds up what they wrote. With more classes, the first launch writes the cross-entropy and the hit of each row.
In the second, each program takes a block of classes and a slice of rows. A third launch adds up the slices of a batch
that has several. No program holds, and no launch writes, a number for each pair of a row and a class.
"""

# pyright: reportGeneralTypeIssues=false
# (Triton declares that static_range never returns, so pyright lets no loop go over it.)

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import cdiv, next_power_of_2, tl, triton
from retemper.kernels.launch import Launch, launch_prepared
from retemper.kernels.logit_rows import row_logits, row_tiles
from retemper.kernels.numerics import LN2, LOG2E
from retemper.kernels.rows import LABELS, require_dense, require_each, require_logits
from retemper.kernels.runtime import access_width, compute_dtype

# Chosen from the code for sm_90, not yet measured on a GPU.
WIDEST = 16  # classes whose sums a program can hold beside its rows
PARTS = 1024  # the most programs of that kind: about as many as a GPU runs at once, and a second launch adds up quickly
SLICE = 1024  # rows of a program that goes through rows for its block of classes
BLOCK, TILE = 32, 2048  # classes of that block, and how many rows times classes a program looks at at once


def sum_tiles(classes: int) -> dict[str, int]:
    """Return the constants of a kernel that goes through rows, or parts, for a block of classes: K, BLOCK and TALL."""
    block = min(next_power_of_2(classes), BLOCK)
    return {"K": classes, "BLOCK": block, "TALL": TILE // block}


@triton.jit
def _row_losses(
    logits_ptr,
    label_ptr,
    row,
    B,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Return the class of each row, -1 where it has none, its cross-entropy, and whether it is predicted: (ROWS,)."""
    label = tl.load(label_ptr + row, mask=row < B, other=0).to(tl.int64)
    known = (row < B) & (label >= 0) & (label < K)
    label = tl.where(known, label, -1).to(tl.int32)
    row_ptr = logits_ptr + tl.minimum(row, B - 1) * STRIDE
    own = tl.load(row_ptr + label, mask=known, other=0.0).to(tl.float32)

    peak = tl.full((ROWS, LANES), float("-inf"), tl.float32)
    earlier = tl.full((ROWS, LANES), float("-inf"), tl.float32)  # the highest of the classes before the label
    total = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        logits = row_logits(row_ptr, start, K, LANES, STEPS)
        higher = peak
        for step in tl.static_range(STEPS):
            higher = tl.maximum(higher, logits[step])
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # while all are -inf: -inf - -inf is NaN
        total *= tl.exp2((peak - shift) * LOG2E)
        for step in tl.static_range(STEPS):
            total += tl.exp2((logits[step] - shift) * LOG2E)
            cls = start + step * LANES + tl.arange(0, LANES)
            before = tl.where(cls[None, :] < label[:, None], logits[step], float("-inf"))
            earlier = tl.maximum(earlier, before)
        peak = higher
    top = tl.max(peak, 1)
    total = tl.sum(total * tl.exp2((peak - tl.expand_dims(top, 1)) * LOG2E), 1)
    cross_entropy = tl.log2(total) * LN2 - (own - top)
    first = (own == top) & (tl.max(earlier, 1) < own)
    return label, cross_entropy, first & (cross_entropy == cross_entropy)  # a row with NaN predicts nothing


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
    ADD: tl.constexpr,
    B,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the sums of the program's rows: every so many tiles one, from all over the batch."""
    part = tl.program_id(0).to(tl.int64)
    cls = tl.arange(0, WIDTH)
    loss = tl.zeros((WIDTH,), tl.float32)
    correct = tl.zeros((WIDTH,), tl.int32)
    count = tl.zeros((WIDTH,), tl.int32)
    for first in range(part * ROWS, B, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        label, cross_entropy, hit = _row_losses(logits_ptr, label_ptr, row, B, STRIDE, K, ROWS, LANES, STEPS)
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
    _, cross_entropy, hit = _row_losses(logits_ptr, label_ptr, row, B, STRIDE, K, ROWS, LANES, STEPS)
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
    ADD: tl.constexpr,
    B,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    TALL: tl.constexpr,
    SLICE: tl.constexpr,
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
    ADD: tl.constexpr,
    parts,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    TALL: tl.constexpr,
):
    """Write the sums of a block of classes over all parts."""
    cls = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    loss = _column_total(part_loss_ptr, parts, cls, K, BLOCK, TALL)
    correct = _column_total(part_correct_ptr, parts, cls, K, BLOCK, TALL)
    count = _column_total(part_count_ptr, parts, cls, K, BLOCK, TALL)
    _store(loss_ptr, correct_ptr, count_ptr, cls, loss, correct, count, cls < K, ADD)


def room(logits: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for sums of losses, hits and rows."""
    loss = logits.new_empty(shape, dtype=compute_dtype(logits))
    return loss, logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.int64)


def require_fitting(logits: Tensor, label: Tensor) -> None:
    """Raise ValueError where a shape, dtype, device or stride does not fit."""
    require_logits(logits=logits)
    require_each("label", label, logits.shape[0], LABELS, logits.device)
    require_dense("label", label)


def launch(logits: Tensor, label: Tensor, sums: tuple[Tensor, ...], add: bool = False) -> None:
    """Fill the three (K,) of `sums` by one, two or three launches, or add to them."""
    batch, classes = logits.shape
    by_tile = classes <= WIDEST
    parts = min(cdiv(batch, _tiles(logits)["ROWS"]), PARTS) if by_tile else cdiv(batch, SLICE)
    to = sums if parts <= 1 else room(logits, (parts, classes))
    first = add and to is sums
    if by_tile:
        launch_prepared(_prepared_sums, logits, label, *to, first)
    else:
        cross_entropy = logits.new_empty(batch, dtype=torch.float32)
        hit = logits.new_empty(batch, dtype=torch.int8)
        launch_prepared(_prepared_rows, logits, label, cross_entropy, hit)
        launch_prepared(_prepared_slices, label, cross_entropy, hit, *to, first)
    if to is not sums:
        launch_prepared(_prepared_total, *to, *sums, add)


def _tiles(logits: Tensor) -> dict[str, Any]:
    """Return the constants of a kernel over the rows of logits."""
    classes = logits.shape[1]
    stride = logits.stride(0) if logits.shape[0] > 1 else classes
    return row_tiles(classes, access_width(classes, logits)) | {"STRIDE": stride}


def _prepared_sums(logits: Tensor, label: Tensor, to: Tensor, *_: Any) -> Launch:
    """Check the arguments, and return the launch that sums up by tiles of rows, into one part or several."""
    require_fitting(logits, label)
    batch, classes = logits.shape
    parts = to.shape[0] if to.dim() > 1 else 1
    named = {**_tiles(logits), "B": batch, "WIDTH": next_power_of_2(classes)}
    return Launch(_class_sums_kernel, (parts,), named)


def _prepared_rows(logits: Tensor, label: Tensor, *_: Tensor) -> Launch | None:
    """Check the arguments, and return the launch over the rows."""
    require_fitting(logits, label)
    batch, tiles = logits.shape[0], _tiles(logits)
    return Launch(_row_losses_kernel, (cdiv(batch, tiles["ROWS"]),), {**tiles, "B": batch}) if batch else None


def _prepared_slices(label: Tensor, cross_entropy: Tensor, hit: Tensor, to: Tensor, *_: Any) -> Launch:
    """Return the launch that sums up by blocks of classes, into one part or several."""
    parts, blocks = to.shape[0] if to.dim() > 1 else 1, sum_tiles(to.shape[-1])
    grid = (cdiv(blocks["K"], blocks["BLOCK"]), parts)
    return Launch(_slice_sums_kernel, grid, {**blocks, "B": label.shape[0], "SLICE": SLICE})


def _prepared_total(part_loss: Tensor, *_: Any) -> Launch:
    """Return the launch that adds up the parts."""
    parts, classes = part_loss.shape
    blocks = sum_tiles(classes)
    return Launch(_total_kernel, (cdiv(classes, blocks["BLOCK"]),), {**blocks, "parts": parts})
