"""A depthwise convolution whose batch norm was folded, with its shift and ReLU, and its input gradient.

    y[b, c, h, w] = act(sum_ij weight[c, i, j] x[b, c, s h + i - p, s w + j - p] + shift[c]),   act = ReLU or identity
    d / d x[b, c, h, w] = [x > 0] sum_ij weight[c, i, j] ([y > 0] grad)[b, c, (h + p - i) / s, (w + p - j) / s]

s is the stride, p the padding; a place that is not there counts 0. [x > 0] is the mask of the ReLU that x came from.
Bound by memory: one launch reads x and writes y, where a convolution and what follows it read two tensors and write
two. The gradient reads grad, y and x and writes one; in three launches that is five and three. Channels-last alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels.language import cdiv, next_power_of_2, tl, triton
from retemper.kernels.operators import operator
from retemper.kernels.runtime import compute_dtype, launching, require_one_device, require_vector, runs_triton

# How many values a program computes: 16 for each thread of 4 warps. A thread has 8 channels side by side (in bf16) and
# loads their weights one by one, for 2 pixels. Chosen from the code for sm_90, not yet measured on a GPU: a value takes
# about 60 instructions of a thread and its gradient 85, and 80 and 115 registers. Twice the values take a seventh less,
# and leave half the threads.
VALUES = 2048
FEW = 16  # channels: of fewer side by side an access would read less than a sector of 32 bytes in bf16
FUSED = {"enable_fp_fusion": True}  # a product is added without a rounding of its own, as in cuDNN


@triton.jit
def _pixel(pixels, height, width, PIXELS: tl.constexpr, INDEX: tl.constexpr):
    """Return a program's pixels (PIXELS, 1), the image, row and column of each, and which of them exist."""
    pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)[:, None]
    return pixel, pixel // width // height, pixel // width % height, pixel % width, pixel < pixels


@triton.jit
def _depthwise_kernel(
    x_ptr,
    weight_ptr,
    shift_ptr,
    y_ptr,
    pixels,
    height,
    width,
    y_height,
    y_width,
    channels,
    RELU: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether CHANNELS divides the channels
    INDEX: tl.constexpr,
):
    pixel, image, row, column, real = _pixel(pixels, y_height, y_width, PIXELS, INDEX)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for i in range(SIZE):  # as a loop: unrolled, all loads come first, and need more registers than there are
        for j in tl.static_range(SIZE):  # pyright: ignore[reportGeneralTypeIssues]
            h, w = row * STRIDE + i - PADDING, column * STRIDE + j - PADDING
            inside = real & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            place = ((image * height + h) * width + w) * channels + channel
            value = tl.load(x_ptr + place, mask=inside if WHOLE else inside & known, other=0.0)
            weight = tl.load(weight_ptr + channel * (SIZE * SIZE) + i * SIZE + j, mask=known, other=0.0)
            total += value.to(tl.float32) * weight.to(tl.float32)
    total += tl.load(shift_ptr + channel, mask=known, other=0.0).to(tl.float32)
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    inside = real if WHOLE else real & known
    tl.store(y_ptr + pixel * channels + channel, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _depthwise_grad_kernel(
    grad_ptr,
    y_ptr,
    weight_ptr,
    x_ptr,
    x_grad_ptr,
    pixels,
    height,
    width,
    y_height,
    y_width,
    channels,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
):
    pixel, image, row, column, real = _pixel(pixels, height, width, PIXELS, INDEX)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for i in range(SIZE):
        for j in tl.static_range(SIZE):  # pyright: ignore[reportGeneralTypeIssues]
            h, w = row + PADDING - i, column + PADDING - j
            inside = real & (h >= 0) & (w >= 0)
            if STRIDE > 1:
                inside = inside & (h % STRIDE == 0) & (w % STRIDE == 0)
                h, w = h // STRIDE, w // STRIDE
            inside = inside & (h < y_height) & (w < y_width)
            inside = inside if WHOLE else inside & known
            place = ((image * y_height + h) * y_width + w) * channels + channel
            grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if y_ptr is not None:
                grad = tl.where(tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, grad)
            weight = tl.load(weight_ptr + channel * (SIZE * SIZE) + i * SIZE + j, mask=known, other=0.0)
            total += grad * weight.to(tl.float32)
    inside = real if WHOLE else real & known
    place = pixel * channels + channel
    if x_ptr is not None:
        total = tl.where(tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, total)
    tl.store(x_grad_ptr + place, total.to(x_grad_ptr.dtype.element_ty), mask=inside)


def tile(channels: int) -> dict[str, Any]:
    """Return how many pixels and channels a program takes, and whether the channels are a multiple of that."""
    width = math.gcd(channels, 64)
    if width < FEW:
        width = min(64, next_power_of_2(channels))
    whole = channels % width == 0
    values = VALUES if whole and width > FEW else VALUES // 2  # more would not fit into the registers of every GPU
    return {"PIXELS": values // width, "CHANNELS": width, "WHOLE": whole}


def _launch(
    kernel: Any, written: Tensor, tensors: Sequence[Tensor | None], x: Tensor, y: Tensor, **constants: Any
) -> None:
    """Run a kernel that writes each pixel of `written`; x and y have the shapes of the convolution's two sides."""
    if not written.numel():
        return
    batch, channels, height, width = written.shape
    index = tl.int32 if max(x.numel(), y.numel()) < 2**30 else tl.int64
    tiles = tile(channels)
    grid = cdiv(batch * height * width, tiles["PIXELS"]), cdiv(channels, tiles["CHANNELS"])
    with launching(written):
        sizes = batch * height * width, *x.shape[2:], *y.shape[2:], channels
        kernel[grid](*tensors, *sizes, **constants, **tiles, INDEX=index, **FUSED)


def _like(x: Tensor, height: int, width: int) -> Tensor:
    shape = x.shape[0], x.shape[1], height, width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _result(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Return the tensor that a convolution of x fills."""
    height, width = ((pixels + 2 * padding - weight.shape[-1]) // stride + 1 for pixels in x.shape[2:])
    return _like(x, height, width)


@operator(
    "depthwise(Tensor x, Tensor weight, Tensor shift, int stride, int padding, bool relu) -> Tensor",
    fake=lambda x, weight, shift, stride, padding, relu: _result(x, weight, stride, padding),
)
def depthwise(x: Tensor, weight: Tensor, shift: Tensor, stride: int, padding: int, relu: bool) -> Tensor:
    """Return the convolution of each channel with its shift and ReLU. Not differentiable; `depthwise_grad` is.

    Computes in float32 (float64 for float64) and rounds once.

    Args:
        x: (B, C, H, W), any float dtype, channels-last.
        weight: (C, 1, K, K) of x's dtype, contiguous.
        shift: (C,), float32 or of x's dtype.
        stride, padding: in pixels, the same for rows and columns.
    Raises:
        ValueError: a shape, dtype, device or stride does not fit.
    """
    _check(x, weight, shift)
    if not runs_triton(x):
        compute = compute_dtype(x)
        y = F.conv2d(x.to(compute), weight.to(compute), shift.to(compute), stride, padding, groups=x.shape[1])
        y = (y.relu_() if relu else y).to(x.dtype)
        return y.contiguous(memory_format=torch.channels_last)
    y = _result(x, weight, stride, padding)
    constants = {"RELU": relu, "SIZE": weight.shape[-1], "STRIDE": stride, "PADDING": padding}
    _launch(_depthwise_kernel, y, (x, weight, shift, y), x, y, **constants)
    return y


@operator(
    "depthwise_backward(Tensor grad, Tensor? y, Tensor weight, Tensor x, int stride, int padding, bool masked)"
    " -> Tensor",
    fake=lambda grad, y, weight, x, stride, padding, masked: _like(x, *x.shape[2:]),
)
def depthwise_grad(
    grad: Tensor, y: Tensor | None, weight: Tensor, x: Tensor, stride: int, padding: int, masked: bool
) -> Tensor:
    """Return the gradient of x, given that of y.

    Args:
        grad: of y's shape, in any layout.
        y: what the operation returned, with its ReLU; None without one.
        masked: whether x came from a ReLU, whose mask is applied too.
    """
    _check(x, weight)
    if not runs_triton(x):
        return _grad_reference(grad, y, weight, x, stride, padding, masked)
    grad = grad.contiguous(memory_format=torch.channels_last)
    x_grad = _like(x, *x.shape[2:])
    constants = {"SIZE": weight.shape[-1], "STRIDE": stride, "PADDING": padding}
    _launch(_depthwise_grad_kernel, x_grad, (grad, y, weight, x if masked else None, x_grad), x, grad, **constants)
    return x_grad


def _grad_reference(
    grad: Tensor, y: Tensor | None, weight: Tensor, x: Tensor, stride: int, padding: int, masked: bool
) -> Tensor:
    threshold, compute = torch.ops.aten.threshold_backward.default, compute_dtype(x)
    wide = (grad if y is None else threshold(grad, y, 0)).to(compute)
    geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], x.shape[1]
    only_x = [True, False, False]
    found = torch.ops.aten.convolution_backward(wide, x.to(compute), weight.to(compute), None, *geometry, only_x)[0]
    found = threshold(found, x, 0) if masked else found
    return found.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _check(x: Tensor, weight: Tensor, shift: Tensor | None = None) -> None:
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x: shape {tuple(x.shape)}, strides {x.stride()}; needs (B, C, H, W), channels-last")
    channels, size = x.shape[1], weight.shape[-1]
    if weight.shape != (channels, 1, size, size) or weight.dtype != x.dtype or not weight.is_contiguous():
        found = f"{weight.dtype} of shape {tuple(weight.shape)}, strides {weight.stride()}"
        raise ValueError(f"weight: {found}; needs {x.dtype} ({channels}, 1, K, K), contiguous")
    require_one_device(x=x, weight=weight, shift=shift)
    require_vector("shift", shift, channels, torch.float32, x.dtype)
