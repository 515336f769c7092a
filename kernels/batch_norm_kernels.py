"""The Triton kernels of batch_norm.py: each pass over the images is one launch.

An image's memory is channels-last, so a group of images is a matrix: a row for each pixel, a column for each channel.
The rows of a group are cut into `parts` slices. A program has one slice and a block of channels. The first launch of a
direction writes what each slice adds up to; each program of the second adds up the slices of its channels again, which
are few, and goes through its own rows. Nothing is added by atomics, so the result is the same in every run.

Squared deviations are taken from a value of their own column, and the slices are put together by the deviations of
their means (Chan et al., 1983). A mean far from zero costs no digits of the variance then.
"""

# pyright: reportGeneralTypeIssues=false
# (Triton declares that static_range never returns, so pyright lets no loop go over it.)

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import cdiv, next_power_of_2, tl, triton
from retemper.kernels.runtime import EXACT, access_width, launching

# Chosen from the code for sm_90, not yet measured on a GPU.
BLOCK = 32  # channels of a program: 64 bytes of a row in bf16, and few sums of slices to read again
WARPS = 8
TILE, NARROW = 4096, 1024  # values that a program looks at at once: two words of 16 bytes of bf16 a thread, or 4 values
PARTS = 128  # the most slices of a group
TILES = 4  # of a slice, at least, where there is more than one


@triton.jit
def _own(rows, words, part, group, slice, WORD: tl.constexpr, TALL: tl.constexpr, BLOCK: tl.constexpr):
    """Return a program's channels, how many there are, its rows, its first value, and a tile's offsets from there."""
    channels = words * WORD  # so that the compiler knows what divides a row
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = tl.minimum(rows - part * slice, slice)  # below 1 where the slices before hold all rows
    first = (group.to(tl.int64) * rows + part * slice) * channels
    return channel, channels, here, first, tl.arange(0, TALL)[:, None] * channels + channel[None, :]


@triton.jit
def _inside(start, here, channel, channels, TALL: tl.constexpr):
    """Return the mask of a tile's values that exist."""
    return (start + tl.arange(0, TALL) < here)[:, None] & (channel < channels)[None, :]


@triton.jit
def _base(x_ptr, group, channel, channels, rows):
    """Return the first value of each channel in a group: what is measured from there keeps its digits."""
    return tl.load(x_ptr + rows.to(tl.int64) * group * channels + channel, mask=channel < channels, other=0.0).to(
        tl.float32
    )


@triton.jit
def _moments_kernel(
    x_ptr,
    part_mean_ptr,
    part_square_ptr,
    rows,
    words,
    slice,
    WORD: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the mean over the program's rows, less the group's first value, and the sum of squared deviations."""
    part, group = tl.program_id(0), tl.program_id(2)
    channel, channels, here, first, tile = _own(rows, words, part, group, slice, WORD, TALL, BLOCK)
    base = _base(x_ptr, group, channel, channels, rows)[None, :]
    x_ptr += first
    anchor = tl.load(x_ptr + tile, mask=_inside(0, here, channel, channels, TALL), other=0.0).to(tl.float32)
    total = tl.zeros((TALL, BLOCK), tl.float32)
    square = tl.zeros((TALL, BLOCK), tl.float32)
    for start in range(TALL, here, TALL):
        x_ptr += TALL * channels
        inside = _inside(start, here, channel, channels, TALL)
        away = tl.where(inside, tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32) - anchor, 0.0)
        total += away
        square += away * away
    count = (tl.maximum(here - tl.arange(0, TALL) + TALL - 1, 0) // TALL).to(tl.float32)[:, None]
    mean = total / tl.maximum(count, 1.0)
    square -= mean * total
    mean = tl.where(count > 0, anchor - base + mean, 0.0)
    middle = tl.sum(mean * count, 0) / tl.maximum(here, 1)
    mean -= middle[None, :]
    square += count * mean * mean
    place = (group.to(tl.int64) * tl.num_programs(0) + part) * channels + channel
    tl.store(part_mean_ptr + place, middle, mask=channel < channels)
    tl.store(part_square_ptr + place, tl.sum(square, 0), mask=channel < channels)


@triton.jit
def _of_parts(ptr, group, channel, channels, PARTS: tl.constexpr):
    """Return what the slices of a group have written: (PARTS, BLOCK)."""
    place = (group * PARTS + tl.arange(0, PARTS))[:, None] * channels + channel[None, :]
    return tl.load(ptr + place, mask=(channel < channels)[None, :], other=0.0)


@triton.jit
def _group_moments(x_ptr, mean_ptr, square_ptr, group, channel, channels, rows, slice, PARTS: tl.constexpr):
    """Return the mean and the sum of squared deviations of a group, (BLOCK,) each."""
    count = tl.minimum(tl.maximum(rows - tl.arange(0, PARTS) * slice, 0), slice).to(tl.float32)[:, None]
    away = _of_parts(mean_ptr, group, channel, channels, PARTS)
    middle = tl.sum(away * count, 0) / rows
    away -= middle[None, :]
    square = _of_parts(square_ptr, group, channel, channels, PARTS) + count * away * away
    return _base(x_ptr, group, channel, channels, rows) + middle, tl.sum(square, 0)


@triton.jit
def _batch_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    part_mean_ptr,
    part_square_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    rows,
    words,
    slice,
    momentum,
    eps,
    MOVES: tl.constexpr,
    MOVED: tl.constexpr,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
    WORD: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise the program's rows. The first program of a channel writes the statistics, and moves the running ones.

    MOVES are the groups whose statistics the running ones take in, one after the other, and MOVED is how many.
    """
    part, group = tl.program_id(0), tl.program_id(2)
    channel, channels, here, first, tile = _own(rows, words, part, group, slice, WORD, TALL, BLOCK)
    known = channel < channels
    mean, square = _group_moments(x_ptr, part_mean_ptr, part_square_ptr, group, channel, channels, rows, slice, PARTS)
    rstd = tl.rsqrt(square / rows + eps)
    if part == 0:
        tl.store(mean_ptr + group * channels + channel, mean, mask=known)
        tl.store(rstd_ptr + group * channels + channel, rstd, mask=known)
    if running_mean_ptr is not None:
        if (part == 0) & (group == 0):
            running_mean = tl.load(running_mean_ptr + channel, mask=known, other=0.0)
            running_var = tl.load(running_var_ptr + channel, mask=known, other=0.0)
            for move in tl.static_range(MOVED):
                of_group, squares = _group_moments(
                    x_ptr, part_mean_ptr, part_square_ptr, MOVES[move], channel, channels, rows, slice, PARTS
                )
                running_mean = momentum * of_group + (1 - momentum) * running_mean
                running_var = momentum * (squares / (rows - 1)) + (1 - momentum) * running_var
            tl.store(running_mean_ptr + channel, running_mean, mask=known)
            tl.store(running_var_ptr + channel, running_var, mask=known)
            if tl.program_id(1) == 0:
                tl.store(batches_ptr, tl.load(batches_ptr) + MOVED)
    scale = (tl.load(weight_ptr + channel, mask=known, other=0.0).to(tl.float32) * rstd)[None, :]
    shift = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for start in range(0, here, TALL):
        inside = _inside(start, here, channel, channels, TALL)
        place = first + tile
        y = (tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale + shift
        if residual_ptr is not None:
            y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
        first += TALL * channels


@triton.jit
def _passed(grad_ptr, other_ptr, y_ptr, place, inside):
    """Return what passes the ReLU of one gradient of y, or of the sum of two."""
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if other_ptr is not None:
        grad += tl.load(other_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        grad = tl.where(tl.load(y_ptr + place, mask=inside, other=0.0) <= 0, 0.0, grad)  # <= 0, so that NaN stays
    return grad


@triton.jit
def _batch_norm_sums_kernel(
    grad_ptr,
    other_ptr,
    y_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    passed_ptr,
    part_bias_ptr,
    part_weight_ptr,
    rows,
    words,
    slice,
    WORD: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sums of the gradient, and of it times the normalised x, over the program's rows; and the gradient."""
    part, group = tl.program_id(0), tl.program_id(2)
    channel, channels, here, first, tile = _own(rows, words, part, group, slice, WORD, TALL, BLOCK)
    known = channel < channels
    mean = tl.load(mean_ptr + group * channels + channel, mask=known, other=0.0)
    rstd = tl.load(rstd_ptr + group * channels + channel, mask=known, other=0.0)
    bias = tl.zeros((TALL, BLOCK), tl.float32)
    weight = tl.zeros((TALL, BLOCK), tl.float32)
    for start in range(0, here, TALL):
        inside = _inside(start, here, channel, channels, TALL)
        place = first + tile
        grad = _passed(grad_ptr, other_ptr, y_ptr, place, inside)
        if passed_ptr is not None:
            rounded = grad.to(passed_ptr.dtype.element_ty)
            tl.store(passed_ptr + place, rounded, mask=inside)
            grad = rounded.to(tl.float32)
        bias += grad
        weight += grad * (tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :])
        first += TALL * channels
    place = (group.to(tl.int64) * tl.num_programs(0) + part) * channels + channel
    tl.store(part_bias_ptr + place, tl.sum(bias, 0), mask=known)
    tl.store(part_weight_ptr + place, tl.sum(weight, 0) * rstd, mask=known)


@triton.jit
def _batch_norm_grad_kernel(
    grad_ptr,
    other_ptr,
    y_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    part_bias_ptr,
    part_weight_ptr,
    x_grad_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    rows,
    words,
    slice,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    WORD: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of the program's rows of x. The first program of a channel writes those of weight and bias."""
    part, group = tl.program_id(0), tl.program_id(2)
    channel, channels, here, first, tile = _own(rows, words, part, group, slice, WORD, TALL, BLOCK)
    known = channel < channels
    if (part == 0) & (group == 0):
        bias_grad = tl.zeros((BLOCK,), tl.float32)
        weight_grad = tl.zeros((BLOCK,), tl.float32)
        for one in tl.static_range(GROUPS):
            bias_grad += tl.sum(_of_parts(part_bias_ptr, one, channel, channels, PARTS), 0)
            weight_grad += tl.sum(_of_parts(part_weight_ptr, one, channel, channels, PARTS), 0)
        tl.store(bias_grad_ptr + channel, bias_grad.to(bias_grad_ptr.dtype.element_ty), mask=known)
        tl.store(weight_grad_ptr + channel, weight_grad.to(weight_grad_ptr.dtype.element_ty), mask=known)
    mean = tl.load(mean_ptr + group * channels + channel, mask=known, other=0.0)[None, :]
    rstd = tl.load(rstd_ptr + group * channels + channel, mask=known, other=0.0)[None, :]
    scale = rstd * tl.load(weight_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    bias = (tl.sum(_of_parts(part_bias_ptr, group, channel, channels, PARTS), 0) / rows)[None, :]
    slope = rstd * (tl.sum(_of_parts(part_weight_ptr, group, channel, channels, PARTS), 0) / rows)[None, :]
    for start in range(0, here, TALL):
        inside = _inside(start, here, channel, channels, TALL)
        place = first + tile
        grad = _passed(grad_ptr, other_ptr, y_ptr, place, inside)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean
        grad = scale * (grad - bias - x * slope)
        tl.store(x_grad_ptr + place, grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
        first += TALL * channels


def norm_tile(channels: int, word: int, size: int) -> dict[str, int]:
    """Return the constants of a program, for words of so many values of `size` bytes; narrow ones take registers."""
    block = min(BLOCK, next_power_of_2(channels))
    return {"WORD": word, "TALL": (TILE if word * size == 16 else NARROW) // block, "BLOCK": block, "num_warps": WARPS}


def _cut(x: Tensor, groups: int) -> tuple[tuple[int, int, int], tuple[int, int, int], dict[str, Any]]:
    """Return the grid, the sizes (rows of a group, words of a row, rows of a slice), and the constants."""
    channels = x.shape[1]
    rows = x.numel() // (channels * groups)
    word = access_width(channels, x)
    tile = norm_tile(channels, word, x.element_size())
    tiles = cdiv(rows, tile["TALL"])
    parts = min(PARTS, next_power_of_2(cdiv(tiles, TILES)))
    sizes = rows, channels // word, cdiv(tiles, parts) * tile["TALL"]
    return (parts, cdiv(channels, tile["BLOCK"]), groups), sizes, {**tile, **EXACT}


def _of_slices(x: Tensor, groups: int, parts: int) -> tuple[Tensor, Tensor]:
    """Return room for two numbers of each slice and channel."""
    shape = groups, parts, x.shape[1]
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    residual: Tensor | None,
    moves: list[int],
    momentum: float,
    eps: float,
    relu: bool,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill y, mean and rstd of `out`, and move the running statistics, in two launches."""
    y, mean, rstd = out
    grid, sizes, constants = _cut(x, len(mean))
    parts = _of_slices(x, len(mean), grid[0])
    running = running if moves else (None, None, None)
    options: dict[str, Any] = {"MOVES": tuple(moves), "MOVED": len(moves), "RELU": relu, "PARTS": grid[0], **constants}
    with launching(x):
        _moments_kernel[grid](x, *parts, *sizes, **constants)
        _batch_norm_kernel[grid](
            x, residual, weight, bias, *parts, y, mean, rstd, *running, *sizes, momentum, eps, **options
        )


def launch_backward(
    grad: Tensor,
    other: Tensor | None,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    passed: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill the gradients of x, weight and bias of `out`, and in `passed` what passes the ReLU, in two launches."""
    grid, sizes, constants = _cut(x, len(mean))
    parts = _of_slices(x, len(mean), grid[0])
    options: dict[str, Any] = {"GROUPS": len(mean), "PARTS": grid[0], **constants}
    with launching(x):
        _batch_norm_sums_kernel[grid](grad, other, y, x, mean, rstd, passed, *parts, *sizes, **constants)
        if passed is not None:  # it is the sum, and behind the ReLU
            grad, other, y = passed, None, None
        images = grad, other, y, x, weight, mean, rstd, *parts, *out
        _batch_norm_grad_kernel[grid](*images, *sizes, **options)
