"""The arithmetic of pgd_step.py in Triton."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.ascent import Number, Step, go_on
from retemper.kernels.language import tl, triton
from retemper.kernels.launch import Launch, launch_prepared
from retemper.kernels.pixels import (
    MOST_DIMENSIONS,
    apart,
    channel_of,
    channels_of,
    differs_by,
    laid_out,
    number,
    overlap,
    place,
    radius,
    strides_beside,
)
from retemper.kernels.runtime import clamp, locate, pixel_runs, require_one_layout

# The pixels of a program: 8 for each thread of 4 warps, so two loads of 16 bytes of each fp32 tensor. Chosen from the
# code for sm_90, not yet measured on a GPU. It takes 17 instructions a pixel, where the memory leaves time for 110, and
# 32 registers, so that 64 warps fit. With 512 pixels it takes 20 instructions a pixel, with 2048 it takes 16.
BLOCK = 1024
STRIDED_BLOCK = 512  # where tensors of other layouts take registers for their places


@triton.jit
def _linf_kernel(
    adv_ptr,
    grad_ptr,
    clean_ptr,
    mask_ptr,
    previous_ptr,
    step,
    eps,
    lower,
    upper,
    inertia,
    rest,
    pixels,
    blocks,
    CHANNELS: tl.constexpr,
    STEP_BY: tl.constexpr,
    EPS_BY: tl.constexpr,
    LOWER_BY: tl.constexpr,
    UPPER_BY: tl.constexpr,
    GRAD: tl.constexpr,
    CLEAN: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offset, inside = locate(pixels, blocks, BLOCK)
    pixel = offset - sample * pixels
    channel = channel_of(pixel, CHANNELS)
    step = number(step, sample, channel, CHANNELS, STEP_BY)
    eps = radius(eps, sample, channel, CHANNELS, EPS_BY)
    lower = number(lower, sample, channel, CHANNELS, LOWER_BY)
    upper = number(upper, sample, channel, CHANNELS, UPPER_BY)
    adv = tl.load(adv_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place(offset, sample, pixel, GRAD), mask=inside, other=0.0).to(tl.float32)
    clean = tl.load(clean_ptr + place(offset, sample, pixel, CLEAN), mask=inside, other=0.0).to(tl.float32)
    moved = adv + tl.where(grad > 0, step, tl.where(grad < 0, -step, 0.0))
    moved = clamp(clamp(moved, clean - eps, clean + eps), lower, upper)
    if previous_ptr is not None:
        before = tl.load(previous_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        moved = (adv + (moved - adv) * inertia) + (adv - before) * rest
        moved = clamp(clamp(moved, clean - eps, clean + eps), lower, upper)
        tl.store(previous_ptr + offset, adv.to(previous_ptr.dtype.element_ty), mask=inside)
    if mask_ptr is not None:
        inside &= tl.load(mask_ptr + place(offset, sample, pixel, MASK), mask=inside, other=0) != 0
    tl.store(adv_ptr + offset, moved.to(adv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _kept(mask_ptr, sample, pixel, PIXELS: tl.constexpr, MASK: tl.constexpr):
    """Return which pixels exist and are not masked."""
    kept = pixel < PIXELS
    if mask_ptr is not None:
        kept &= tl.load(mask_ptr + place(sample * PIXELS + pixel, sample, pixel, MASK), mask=kept, other=0) != 0
    return kept


@triton.jit
def _finite(grad_ptr, sample, pixel, kept, PIXELS: tl.constexpr, GRAD: tl.constexpr):
    """Load the gradient as float32, with 0 for entries that are not finite."""
    at = place(sample * PIXELS + pixel, sample, pixel, GRAD)
    grad = tl.load(grad_ptr + at, mask=kept, other=0.0).to(tl.float32)
    return tl.where(tl.abs(grad) < float("inf"), grad, 0.0)


@triton.jit
def _unit_and_length(
    grad_ptr,
    mask_ptr,
    sample,
    squared,
    PIXELS: tl.constexpr,
    GRAD: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the largest entry of a sample's gradient, and the L2 or L1 norm of the gradient divided by it; never 0."""
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        kept = _kept(mask_ptr, sample, pixel, PIXELS, MASK)
        peak = tl.maximum(peak, tl.abs(_finite(grad_ptr, sample, pixel, kept, PIXELS, GRAD)))
    unit = tl.max(peak, 0)  # divides the gradient, since float32 cannot hold the square of 1e-30 or 1e30
    unit = tl.where(unit == 0, 1.0, unit)

    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        kept = _kept(mask_ptr, sample, pixel, PIXELS, MASK)
        grad = tl.math.div_rn(_finite(grad_ptr, sample, pixel, kept, PIXELS, GRAD), unit)
        total += grad * grad if squared else tl.abs(grad)
    length = tl.sum(total, 0)
    if squared:
        length = tl.math.sqrt_rn(length)
    return unit, tl.where(length == 0, 1.0, length)


@triton.jit
def _momentum_kernel(
    momentum_ptr,
    grad_ptr,
    mask_ptr,
    decay,
    GRAD: tl.constexpr,
    MASK: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    unit, length = _unit_and_length(grad_ptr, mask_ptr, sample, False, PIXELS, GRAD, MASK, BLOCK)
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        kept = _kept(mask_ptr, sample, pixel, PIXELS, MASK)
        at = momentum_ptr + sample * PIXELS + pixel
        grad = tl.math.div_rn(tl.math.div_rn(_finite(grad_ptr, sample, pixel, kept, PIXELS, GRAD), unit), length)
        total = tl.load(at, mask=pixel < PIXELS, other=0.0).to(tl.float32) * decay + grad
        tl.store(at, total.to(momentum_ptr.dtype.element_ty), mask=pixel < PIXELS)


@triton.jit
def _l2_kernel(
    adv_ptr,
    grad_ptr,
    clean_ptr,
    mask_ptr,
    step,
    eps,
    lower,
    upper,
    CLIP_FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP_BY: tl.constexpr,
    EPS_BY: tl.constexpr,
    LOWER_BY: tl.constexpr,
    UPPER_BY: tl.constexpr,
    GRAD: tl.constexpr,
    CLEAN: tl.constexpr,
    MASK: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    unit, length = 1.0, 1.0
    if grad_ptr is not None:
        unit, length = _unit_and_length(grad_ptr, mask_ptr, sample, True, PIXELS, GRAD, MASK, BLOCK)
    step = number(step, sample, 0, CHANNELS, STEP_BY)
    eps = radius(eps, sample, 0, CHANNELS, EPS_BY)

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        kept = _kept(mask_ptr, sample, pixel, PIXELS, MASK)
        moved, clean = _moved(
            adv_ptr, grad_ptr, clean_ptr, sample, pixel, kept, unit, length, step, PIXELS, GRAD, CLEAN
        )
        if CLIP_FIRST:
            channel = channel_of(pixel, CHANNELS)
            least = number(lower, sample, channel, CHANNELS, LOWER_BY)
            moved = tl.where(kept, clamp(moved, least, number(upper, sample, channel, CHANNELS, UPPER_BY)), 0.0)
        squares += (moved - clean) * (moved - clean)
    distance = tl.math.sqrt_rn(tl.sum(squares, 0))
    shrink = eps / tl.where(distance > eps, distance, 1.0)

    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        kept = _kept(mask_ptr, sample, pixel, PIXELS, MASK)
        moved, clean = _moved(
            adv_ptr, grad_ptr, clean_ptr, sample, pixel, kept, unit, length, step, PIXELS, GRAD, CLEAN
        )
        channel = channel_of(pixel, CHANNELS)
        least = number(lower, sample, channel, CHANNELS, LOWER_BY)
        most = number(upper, sample, channel, CHANNELS, UPPER_BY)
        if CLIP_FIRST:
            moved = clamp(moved, least, most)
        moved = tl.where(distance > eps, clean + (moved - clean) * shrink, moved)  # inside the ball nothing changes
        if not CLIP_FIRST:
            moved = clamp(moved, least, most)
        tl.store(adv_ptr + sample * PIXELS + pixel, moved.to(adv_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _moved(
    adv_ptr,
    grad_ptr,
    clean_ptr,
    sample,
    pixel,
    kept,
    unit,
    length,
    step,
    PIXELS: tl.constexpr,
    GRAD: tl.constexpr,
    CLEAN: tl.constexpr,
):
    """Load pixels, and return them moved along the gradient but not projected, and the clean ones."""
    offset = sample * PIXELS + pixel
    moved = tl.load(adv_ptr + offset, mask=kept, other=0.0).to(tl.float32)
    clean = tl.load(clean_ptr + place(offset, sample, pixel, CLEAN), mask=kept, other=0.0).to(tl.float32)
    if grad_ptr is not None:
        grad = _finite(grad_ptr, sample, pixel, kept, PIXELS, GRAD)
        moved += step * tl.math.div_rn(tl.math.div_rn(grad, unit), length)
    return moved, clean


def launch(given: Step) -> None:
    """Take the step in place, in Triton: in one launch, with momentum in two, in L2 with `previous` in some more."""
    adv, grad, clean = given.adv, given.grad, given.clean
    if overlap(grad, adv) or overlap(clean, adv):
        given = given._replace(grad=apart(grad, adv), clean=apart(clean, adv))
    if given.momentum is not None:
        given = given._replace(grad=_gather(given, given.momentum), momentum=None)
    if given.norm == "linf":
        _launch_linf(given)
    elif given.previous is None:
        _launch_l2(given, adv, given.grad)
    else:
        _launch_l2_twice(given, given.previous)


def _gather(given: Step, momentum: Tensor) -> Tensor:
    """Update the momentum in place, and return it in the layout of `adv`."""
    require_one_layout(adv=given.adv)
    total = laid_out(momentum, given.adv)
    launch_prepared(_prepared_momentum, total, *_readable(given.adv, given.grad, given.mask), given.decay)
    if total is not momentum:
        momentum.copy_(total)
    return total


def _launch_linf(given: Step) -> None:
    adv, previous = given.adv, given.previous
    before = previous if previous is None else laid_out(previous, adv)
    weights: Any = (None, None) if previous is None else (given.inertia, 1 - given.inertia)
    read = _readable(adv, given.grad, given.clean, given.mask)
    launch_prepared(_prepared_linf, adv, *read, before, given.step, given.eps, given.lower, given.upper, *weights)
    if previous is not None and before is not None and before is not previous:
        previous.copy_(before)


def _launch_l2(given: Step, adv: Tensor, grad: Tensor | None) -> None:
    """Take one step of `adv` in place; without a gradient, project it."""
    read = _readable(adv, grad, given.clean, given.mask)
    launch_prepared(_prepared_l2, adv, *read, given.step, given.eps, given.lower, given.upper, given.clip_first)


def _launch_l2_twice(given: Step, previous: Tensor) -> None:
    """Take a step, go on along the last one, and project: two launches, and those of PyTorch between them."""
    adv = given.adv
    new = adv.to(torch.float32, copy=True)  # rounded once, at the end
    old = new.clone()
    _launch_l2(given, new, given.grad)
    go_on(new, old, previous, given.inertia)
    _launch_l2(given, new, None)
    previous.copy_(adv)
    adv.copy_(new if given.mask is None else torch.where(given.mask, new, old))


def _readable(adv: Tensor, *tensors: Tensor | None) -> Sequence[Tensor | None]:
    """Return tensors of the shape of `adv` as a kernel can read them: of many dimensions in the layout of `adv`."""
    if adv.dim() <= MOST_DIMENSIONS:
        return tensors
    return [None if tensor is None else laid_out(tensor, adv) for tensor in tensors]


def _prepared_momentum(total: Tensor, grad: Tensor, mask: Tensor | None, decay: float) -> Launch:
    """Return the launch that updates the momentum."""
    named = _layouts(total, GRAD=grad, MASK=mask)
    pixels, _, block, _ = pixel_runs(total, _most_pixels(named), True)
    return Launch(_momentum_kernel, (total.shape[0],), {**named, "PIXELS": pixels, "BLOCK": block})


def _prepared_linf(
    adv: Tensor, grad: Tensor, clean: Tensor, mask: Tensor | None, before: Tensor | None, *numbers: Number | None
) -> Launch:
    """Return the launch of a step in L-inf."""
    named, by = _layouts(adv, GRAD=grad, CLEAN=clean, MASK=mask), _differences(adv, *numbers[:4])
    most = _most_pixels(named)
    by_sample = most < BLOCK or not {"sample", "both"}.isdisjoint(by.values())
    pixels, blocks, block, programs = pixel_runs(adv, most, by_sample)
    return Launch(_linf_kernel, (programs,), {**named, **by, "pixels": pixels, "blocks": blocks, "BLOCK": block})


def _prepared_l2(
    adv: Tensor,
    grad: Tensor | None,
    clean: Tensor,
    mask: Tensor | None,
    step: Number,
    eps: Number,
    lower: Number,
    upper: Number,
    clip_first: bool,
) -> Launch:
    """Return the launch of a step in L2, or without a gradient of a projection."""
    named, by = _layouts(adv, GRAD=grad, CLEAN=clean, MASK=mask), _differences(adv, step, eps, lower, upper)
    pixels, _, block, _ = pixel_runs(adv, _most_pixels(named), True)
    return Launch(_l2_kernel, (adv.shape[0],), {**named, **by, "PIXELS": pixels, "BLOCK": block})


def _layouts(adv: Tensor, **tensors: Tensor | None) -> dict[str, Any]:
    """Return how tensors lie beside `adv`, by the names of the kernels, if it is dense with the batch outermost."""
    require_one_layout(adv=adv)
    return {name: None if one is None else strides_beside(one, adv) for name, one in tensors.items()}


def _most_pixels(layouts: dict[str, Any]) -> int:
    """Return the most pixels of a program, of tensors that lie as `adv` does, or otherwise."""
    return BLOCK if all(layout is None for layout in layouts.values()) else STRIDED_BLOCK


def _differences(adv: Tensor, *numbers: Number | None) -> dict[str, Any]:
    """Return how step, eps, lower and upper differ, by the names of the kernels."""
    by = [differs_by(value) if isinstance(value, Tensor) else "none" for value in numbers]
    names = ("STEP_BY", "EPS_BY", "LOWER_BY", "UPPER_BY")
    return {"CHANNELS": channels_of(adv, *by), **dict(zip(names, by, strict=True))}
