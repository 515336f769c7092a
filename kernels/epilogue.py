"""Scale, shift, shortcut and activation after a convolution whose batch norm was folded (Jacob et al., CVPR 2018).

    y = act(scale[c] x + shift[c] + residual),   act = ReLU or identity
    d y / d residual = [y > 0],   d y / d x = scale[c] [y > 0]   (with ReLU; without, [y > 0] is 1)

c is the channel. The gradient needs y alone, so x is not kept. Bound by memory: one launch reads x and the residual and
writes y, where eager PyTorch takes three launches. The gradient reads two tensors and writes one.
"""

import math
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import cdiv, tl, triton
from retemper.kernels.launch import Launch, launch_prepared
from retemper.kernels.operators import differentiable, keep, operator
from retemper.kernels.runtime import (
    access_width,
    compute_dtype,
    require_float,
    require_no_grad,
    require_one_device,
    require_one_layout,
    require_vector,
    runs_triton,
)

# How many words of 16 bytes a program reads of each tensor: two for each thread of 4 warps. Chosen from the code for
# sm_90, not yet measured on a GPU. It takes 11 instructions a value in fp32 and 8 in bf16, 13 and 11 with a residual, 6
# and 5 for the gradient, and at most 40 registers. A tile of pixels by channels takes 12, 8, 15 and 12, and leaves
# lanes idle where C is no power of two. The memory leaves time for 55, 28, 83 and 41.
WORDS = 256

# How many values in half precision a CPU widens at a time: they stay in its cache, and memory is asked for once.
PART = 2**18


def epilogue_reference(
    x: Tensor, shift: Tensor, *, scale: Tensor | None = None, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """Compute the operation in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args and Returns: as for `epilogue`. Nothing is checked.
    """
    compute = compute_dtype(x)
    y = x.to(compute)
    shift = _of_channel(shift, y)
    y = y + shift if scale is None else (y * _of_channel(scale, y)).add_(shift)
    if residual is not None:
        y = y.add_(residual)
    return (y.relu_() if relu else y).to(x.dtype)


def _halved(x: Tensor, shift: Tensor, scale: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """Return what the reference does of x in half precision, without a copy of x in float32."""
    size = max(1, PART // max(1, x[:1].numel()))
    if not x.numel():
        return torch.empty_like(x)
    if residual is None:  # batch norm of mean 0 and variance 1 is this formula, in float32, in one pass
        zero, one = torch.zeros_like(shift, dtype=torch.float32), torch.ones_like(shift, dtype=torch.float32)
        y = torch.batch_norm(x, one if scale is None else scale.float(), shift.float(), zero, one, False, 0, 0, False)
        return y.relu_() if relu else y
    y, room = torch.empty_like(x), torch.empty_like(x[:size], dtype=torch.float32)
    for start in range(0, len(x), size):
        rows, wide = slice(start, start + size), room[: len(x) - start]
        if scale is None:
            torch.add(x[rows], _of_channel(shift, wide), out=wide)
        else:
            torch.mul(x[rows], _of_channel(scale, wide), out=wide).add_(_of_channel(shift, wide))
        part = y[rows].copy_(wide.add_(residual[rows]))
        if relu:
            part.relu_()
    return y


def _of_channel(vector: Tensor, like: Tensor) -> Tensor:
    """Return the (C,) vector as (C, 1, 1) of the dtype of `like`."""
    return vector.to(like.dtype)[:, None, None]


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """Return grad times the scale of its channel, rounded once."""
    wide = grad.to(compute_dtype(grad))
    return (wide * _of_channel(scale, wide)).to(grad.dtype)


@triton.jit
def _places(words, plane, channels, WORD: tl.constexpr, SPAN: tl.constexpr, WORDS: tl.constexpr, INDEX: tl.constexpr):
    """Return the offsets of a program's values (WORDS, WORD), their channels (WORDS, SPAN), and a mask of real words.

    A word is WORD values side by side: either SPAN = WORD channels of one pixel, or one channel (SPAN = 1) of WORD
    pixels. So one division finds the channels of a whole word, and one access loads its scale.
    """
    word = tl.program_id(0).to(INDEX) * WORDS + tl.arange(0, WORDS)
    channel = (word // plane % channels * SPAN)[:, None] + tl.arange(0, SPAN)[None, :]
    place = word.to(tl.int64)[:, None] * WORD + tl.arange(0, WORD)[None, :]
    return place, channel, (word < words)[:, None]


@triton.jit
def _epilogue_kernel(
    x_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    RELU: tl.constexpr,
    words,
    plane,
    channels,
    WORD: tl.constexpr,
    SPAN: tl.constexpr,
    WORDS: tl.constexpr,
    INDEX: tl.constexpr,
):
    place, channel, inside = _places(words, plane, channels, WORD, SPAN, WORDS, INDEX)
    y = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + channel).to(tl.float32)
    y += tl.load(shift_ptr + channel).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _epilogue_grad_kernel(
    grad_ptr,
    y_ptr,
    scale_ptr,
    x_grad_ptr,
    residual_grad_ptr,
    words,
    plane,
    channels,
    WORD: tl.constexpr,
    SPAN: tl.constexpr,
    WORDS: tl.constexpr,
    INDEX: tl.constexpr,
):
    place, channel, inside = _places(words, plane, channels, WORD, SPAN, WORDS, INDEX)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    grad = tl.where(tl.load(y_ptr + place, mask=inside, other=0.0) <= 0, 0.0, grad)  # <= 0, so that NaN stays
    if residual_grad_ptr is not None:
        tl.store(residual_grad_ptr + place, grad, mask=inside)
    if scale_ptr is not None:
        grad = (grad.to(tl.float32) * tl.load(scale_ptr + channel).to(tl.float32)).to(x_grad_ptr.dtype.element_ty)
    tl.store(x_grad_ptr + place, grad, mask=inside)


def word_sizes(x: Tensor, other: Tensor | None) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the arguments (words, plane, channels) of a kernel over x and `other`, and its constants.

    x is (B, C, H, W), contiguous or channels-last; `other` has its shape and layout.
    """
    _, channels, height, width = x.shape
    plane = height * width if x.is_contiguous() else 1  # from one channel to the next, in memory
    starts = [t.data_ptr() // t.element_size() for t in (x, other) if t is not None]  # a slice may start anywhere
    word = math.gcd(access_width(channels if plane == 1 else plane, x), *starts)
    words = x.numel() // word
    constants = {"WORD": word, "WORDS": WORDS, "INDEX": tl.int32 if words < 2**31 - WORDS else tl.int64}
    if plane == 1:
        return (words, 1, channels // word), {**constants, "SPAN": word}
    return (words, plane // word, channels), {**constants, "SPAN": 1}


@operator(
    "epilogue(Tensor x, Tensor shift, Tensor? scale, Tensor? residual, bool relu) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x),
)
def _epilogue_op(x: Tensor, shift: Tensor, scale: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    if not runs_triton(x):
        _check(x, shift, scale, residual)
        if x.dtype in (torch.bfloat16, torch.float16):
            return _halved(x, shift, scale, residual, relu)
        return epilogue_reference(x, shift, scale=scale, residual=residual, relu=relu)
    y = torch.empty_like(x)
    launch_prepared(_prepared, x, residual, scale, shift, y, relu)
    return y


def _prepared(
    x: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor, y: Tensor, relu: bool
) -> Launch | None:
    """Check the arguments, and return the launch of the forward pass."""
    _check(x, shift, scale, residual)
    return _over_words(_epilogue_kernel, x, residual)


def _over_words(kernel: Any, x: Tensor, other: Tensor | None) -> Launch | None:
    """Return the launch of a kernel over x and `other`, or None if they are empty."""
    if not x.numel():
        return None
    (words, plane, channels), constants = word_sizes(x, other)
    return Launch(kernel, (cdiv(words, WORDS),), {"words": words, "plane": plane, "channels": channels, **constants})


@operator(
    "epilogue_backward(Tensor grad, Tensor y, Tensor? scale, bool both) -> Tensor[]",
    fake=lambda grad, y, scale, both: [torch.empty_like(y) for _ in range(1 + both)],
)
def _backward_op(grad: Tensor, y: Tensor, scale: Tensor | None, both: bool) -> list[Tensor]:
    """Return the gradient of x and, with `both`, that of the residual. Without a scale the two are the same."""
    if grad.stride() != y.stride():
        grad = torch.empty_like(y).copy_(grad)
    if not runs_triton(y):
        masked = torch.ops.aten.threshold_backward.default(grad, y, 0)
        return [masked] if scale is None else [_scaled(masked, scale), masked][: 1 + both]
    grads = [torch.empty_like(y) for _ in range(1 + both)]
    launch_prepared(_prepared_grad, grad, y, scale, grads[0], grads[1] if both else None)
    return grads


def _prepared_grad(grad: Tensor, y: Tensor, *_: Tensor | None) -> Launch | None:
    """Return the launch of the backward pass."""
    return _over_words(_epilogue_grad_kernel, y, grad)


def _check(x: Tensor, shift: Tensor, scale: Tensor | None, residual: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: shape {tuple(x.shape)}; needs (B, C, H, W)")
    usual = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    if usual and residual is None:
        require_float(x=x)
    else:
        require_one_layout(**({"x": x} if residual is None else {"x": x, "residual": residual}))
    if not usual:
        raise ValueError(f"x: strides {x.stride()}; needs contiguous or channels-last memory")
    require_one_device(x=x, shift=shift, scale=scale)
    for name, vector in (("shift", shift), ("scale", scale)):
        require_vector(name, vector, x.shape[1], torch.float32, x.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, scale, _, ctx.relu = inputs
    keep(ctx, output if ctx.relu else None, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and of the residual. Shift and scale are constants, as in every folded network."""
    y, scale = ctx.saved_tensors
    for_residual = ctx.needs_input_grad[3]
    if ctx.relu:
        x_grad, *rest = _backward_op(grad, y, scale, for_residual and scale is not None)
        residual_grad = rest[0] if rest else x_grad
    else:
        x_grad, residual_grad = grad if scale is None else _scaled(grad, scale), grad
    return x_grad, None, None, residual_grad if for_residual else None, None


differentiable(_epilogue_op, _backward, _setup)


def epilogue(
    x: Tensor, shift: Tensor, *, scale: Tensor | None = None, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """Scale and shift the channels of a convolution's output, add the shortcut and apply the ReLU, in one pass.

    Computes in float32 (float64 for float64) and rounds once. NaN stays. Differentiable, once, in `x` and `residual`;
    shift and scale are constants, as in a folded network, and differentiating the gradient is an error. The formula and
    its source are in the module docstring.

    Args:
        x: (B, C, H, W), any float dtype, contiguous or channels-last.
        shift: (C,), float32 or of x's dtype.
        scale: (C,), float32 or of x's dtype; 1 when left out.
        residual: of x's shape, dtype and layout; 0 when left out.
        relu: whether to apply the ReLU.

    Returns:
        A tensor of x's shape, dtype and layout.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; shift or scale requires a gradient.
    """
    require_no_grad(shift=shift, scale=scale)
    return _epilogue_op(x, shift, scale, residual, relu)
