"""Batch norms folded into the convolutions before them, all of a network in two launches (Jacob et al., CVPR 2018).

    scale[c] = gamma[c] / sqrt(var[c] + eps)
    shift[c] = beta[c] - scale[c] mean[c]   (+ that of the shortcut's norm, where one is added behind both)
    folded[c, ...] = scale[c] weight[c, ...]

c is the output channel. `fold_norms_` computes the first two for every norm, `scale_rows_` the third for every layer.
Plain PyTorch takes ten launches for the first two, and one a layer for the third. Bound by memory: a weight is read
once and its folded copy written once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import tl, triton
from retemper.kernels.operators import operator
from retemper.kernels.runtime import EXACT, launching
from retemper.kernels.tables import Row, Tables, lie_alike

# Chosen from the code for sm_90, not yet measured on a GPU: a thread of 4 warps computes one channel of a norm, and 32
# values of a weight. A program has rows and columns of one weight, so that no value's channel takes a division.
CHANNELS = 128
ROWS, COLS = 8, 512


def fold_norms_reference(
    gamma: Sequence[Tensor], beta: Sequence[Tensor], mean: Sequence[Tensor], var: Sequence[Tensor], eps: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute scale and shift in plain PyTorch, before any shift is handed over: the truth for the tests.

    Args and Returns: as `fold_norms_` takes and writes them.
    """
    scale = torch.cat([*gamma]) * torch.rsqrt(torch.cat([*var]) + eps)
    return scale, torch.cat([*beta]) - scale * torch.cat([*mean])


@triton.jit
def _folded(row_ptr, gamma_ptr, mean_ptr, eps_ptr, channel, inside):
    """Return scale and shift of a program's channels, (CHANNELS,), and their place in all; a row has five integers."""
    place = tl.load(row_ptr + 4) + channel
    gamma = tl.load(tl.load(row_ptr).to(gamma_ptr.dtype) + channel, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(tl.load(row_ptr + 1).to(gamma_ptr.dtype) + channel, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(tl.load(row_ptr + 2).to(mean_ptr.dtype) + channel, mask=inside, other=0.0).to(tl.float32)
    var = tl.load(tl.load(row_ptr + 3).to(mean_ptr.dtype) + channel, mask=inside, other=1.0).to(tl.float32)
    eps = tl.load(eps_ptr + place, mask=inside, other=1.0).to(tl.float32)
    scale = gamma * tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    return scale, beta - scale * mean, place


@triton.jit
def _fold_norms_kernel(table_ptr, gamma_ptr, mean_ptr, eps_ptr, scale_ptr, shift_ptr, CHANNELS: tl.constexpr):
    row_ptr = table_ptr + tl.program_id(0) * 11
    channel = tl.arange(0, CHANNELS)
    inside = channel < tl.load(row_ptr)
    scale, shift, place = _folded(row_ptr + 1, gamma_ptr, mean_ptr, eps_ptr, channel, inside)
    if tl.load(row_ptr + 6) != 0:
        _, more, _ = _folded(row_ptr + 6, gamma_ptr, mean_ptr, eps_ptr, channel, inside)
        shift += more
    tl.store(scale_ptr + place, scale.to(scale_ptr.dtype.element_ty), mask=inside)
    tl.store(shift_ptr + place, shift.to(shift_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_rows_kernel(table_ptr, source_ptr, scale_ptr, to_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row_ptr = table_ptr + tl.program_id(0) * 6
    source_ptr = tl.load(row_ptr).to(source_ptr.dtype)
    scale_ptr = tl.load(row_ptr + 1).to(scale_ptr.dtype)
    to_ptr = tl.load(row_ptr + 2).to(to_ptr.dtype)
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    real = row < tl.load(row_ptr + 3)
    inside = real[:, None] & (col < tl.load(row_ptr + 4))[None, :]
    place = row[:, None] * tl.load(row_ptr + 5) + col[None, :]
    scale = tl.load(scale_ptr + row, mask=real, other=0.0).to(tl.float32)
    value = tl.load(source_ptr + place, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
    tl.store(to_ptr + place, value.to(to_ptr.dtype.element_ty), mask=inside)


def _norm_rows(
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    shortcuts: tuple[int, ...],
) -> list[Row]:
    """Return for each block of channels how many there are; four addresses and the place; those of the shortcut."""
    sizes = [one.numel() for one in gamma]
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]

    def source(number: int, channel: int) -> Row:
        given = (one[number] for one in (gamma, beta, mean, var))
        return *(t.data_ptr() + channel * t.element_size() for t in given), firsts[number] + channel

    return [
        (
            min(CHANNELS, size - channel),
            *source(number, channel),
            *(source(shortcut, channel) if shortcut >= 0 else (0,) * 5),
        )
        for number, (size, shortcut) in enumerate(zip(sizes, shortcuts, strict=True))
        for channel in range(0, size, CHANNELS)
    ]


def _weight_rows(source: Sequence[Tensor], scale: Sequence[Tensor], to: Sequence[Tensor]) -> list[Row] | None:
    """Return for each tile of a weight three addresses; how many rows and columns are left; and the columns of all."""
    rows = []
    for one in zip(source, scale, to, strict=True):
        if not lie_alike(one[0], one[2]):
            return None
        many = one[1].numel()
        cols = one[0].numel() // many
        for row in range(0, many, ROWS):
            for col in range(0, cols, COLS):
                steps = (row * cols + col, row, row * cols + col)
                places = (t.data_ptr() + step * t.element_size() for t, step in zip(one, steps, strict=True))
                rows.append((*places, many - row, cols - col, cols))
    return rows


_NORMS, _WEIGHTS = Tables(_norm_rows), Tables(_weight_rows)


@operator(
    "fold_norms_(Tensor[] gamma, Tensor[] beta, Tensor[] mean, Tensor[] var, Tensor eps, SymInt[] shortcuts,"
    " Tensor(a!) scale, Tensor(b!) shift) -> ()",
    fake=lambda *_: None,
)
def _fold_norms_op(
    gamma: list[Tensor],
    beta: list[Tensor],
    mean: list[Tensor],
    var: list[Tensor],
    eps: Tensor,
    shortcuts: list[int],
    scale: Tensor,
    shift: Tensor,
) -> None:
    table = _NORMS(gamma, beta, mean, var, also=(*shortcuts,))
    if table is not None:
        options: dict[str, Any] = {"CHANNELS": CHANNELS, **EXACT}
        with launching(scale):
            _fold_norms_kernel[(len(table),)](table, gamma[0], mean[0], eps, scale, shift, **options)
        return
    every_scale, every_shift = fold_norms_reference(gamma, beta, mean, var, eps)
    scale.copy_(every_scale)
    shift.copy_(every_shift)
    shifts = shift.split([one.numel() for one in gamma])
    for own, shortcut in zip(shifts, shortcuts, strict=True):
        if shortcut >= 0:
            own += shifts[shortcut]


@operator("scale_rows_(Tensor[] source, Tensor[] scale, Tensor(a!)[] to) -> ()", fake=lambda *_: None)
def _scale_rows_op(source: list[Tensor], scale: list[Tensor], to: list[Tensor]) -> None:
    table = _WEIGHTS(source, scale, to)
    if table is not None:
        options: dict[str, Any] = {"ROWS": ROWS, "COLS": COLS, **EXACT}
        with launching(to[0]):
            _scale_rows_kernel[(len(table),)](table, source[0], scale[0], to[0], **options)
        return
    for weight, of_row, folded in zip(source, scale, to, strict=True):
        torch.mul(weight, of_row.view(-1, *[1] * (weight.dim() - 1)), out=folded)


def fold_norms_(
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    eps: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcuts: Sequence[int],
) -> None:
    """Write scale and shift of every norm, one after the other, as in the module docstring.

    Computes in float32 (float64 for float64) and rounds once. What is read keeps its place from call to call.

    Args:
        gamma, beta: (C,) each, a pair for each norm, contiguous, of one float dtype.
        mean, var: (C,) each, contiguous, of one float dtype.
        eps, scale, shift: (the sum of all C,), any float dtype.
        shortcuts: for each norm the number of another one with as many channels, whose shift is added to its own, or
            -1. One that is handed over so has none itself.
    """
    _fold_norms_op([*gamma], [*beta], [*mean], [*var], eps, [*shortcuts], scale, shift)


def scale_rows_(source: Sequence[Tensor], scale: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    """Write each weight, times the scale of its row, into another tensor of its shape and strides.

    Computes in float32 (float64 for float64) and rounds once. All tensors keep their places from call to call.

    Args:
        source: any float tensors.
        scale: (rows,) of each.
        to: of the shapes of `source`. Overwritten. One launch does where each list is of one dtype, and a pair lies in
            one order without holes, row after row; otherwise there is one for each weight.
    """
    if source:
        _scale_rows_op([*source], [*scale], [*to])
