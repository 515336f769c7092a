"""Scale, shift, shortcut and activation after a convolution whose batch norm was folded (Jacob et al., CVPR 2018).

    y = act(scale[c] x + shift[c] + residual),   act = ReLU or identity
    d y / d residual = [y > 0],   d y / d x = scale[c] [y > 0]   (with ReLU; without, [y > 0] is 1)

c is the channel. The gradient needs y alone, so x is not kept. Bound by memory: one launch reads x and the residual and
writes y, where eager PyTorch takes three launches. The gradient reads two tensors and writes one.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.epilogue_kernels import epilogue_grad_kernel, epilogue_kernel, over_words
from retemper.kernels.launch import Launch, launch_prepared
from retemper.kernels.operators import differentiable, keep, operator
from retemper.kernels.runtime import (
    compute_dtype,
    require_float,
    require_no_grad,
    require_one_device,
    require_one_layout,
    require_vector,
    runs_triton,
)

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


def _launch(
    x: Tensor, shift: Tensor, scale: Tensor | None, residual: Tensor | None, relu: bool, total: Tensor | None = None
) -> Tensor:
    """Return the operation's result; with `total`, x and the residual are added first, and it is filled with that."""
    y = torch.empty_like(x)
    launch_prepared(_prepared, x, residual, scale, shift, total, y, relu)
    return y


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
    return _launch(x, shift, scale, residual, relu)


def _prepared(
    x: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor, *_: Tensor | bool | None
) -> Launch | None:
    """Check the arguments, and return the launch of the forward pass."""
    _check(x, shift, scale, residual)
    return over_words(epilogue_kernel, x, residual)


@operator(
    "epilogue_of_sum(Tensor x, Tensor residual, Tensor shift, Tensor? scale, bool relu) -> (Tensor, Tensor)",
    fake=lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
)
def epilogue_of_sum(
    x: Tensor, residual: Tensor, shift: Tensor, scale: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """Return x + residual, and act(scale * (x + residual) + shift): a block of a pre-activation network begins so.

    The sum is rounded before it is scaled, as it is returned. Not differentiable; `epilogue_grad` has the gradient.
    """
    if not runs_triton(x):
        _check(x, shift, scale, residual)
        total = x + residual
        return total, epilogue_reference(total, shift, scale=scale, relu=relu)
    total = torch.empty_like(x)
    return total, _launch(x, shift, scale, residual, relu, total)


@operator(
    "epilogue_backward(Tensor grad, Tensor y, Tensor? scale, bool both, Tensor? second=None, Tensor? sum_grad=None)"
    " -> Tensor[]",
    fake=lambda grad, y, scale, both, *_: [torch.empty_like(y) for _ in range(1 + both)],
)
def epilogue_grad(
    grad: Tensor, y: Tensor, scale: Tensor | None, both: bool, second: Tensor | None = None, sum_grad: Any = None
) -> list[Tensor]:
    """Return the gradient of x and, with `both`, that of the residual. Without a scale the two are the same.

    Args:
        grad: that of y; or (B, C), that of y's mean over the pixels.
        y: what the operation returned, with its ReLU.
        second: another gradient of y, which is added to the first: y went to two places.
        sum_grad: that of the sum which `epilogue_of_sum` returned; it is added to the gradient of x.
    """
    pixels = y.shape[2] * y.shape[3] if grad.dim() == 2 else None
    if not runs_triton(y):
        return _backward_reference(grad, y, scale, both, second, sum_grad)
    second, sum_grad = (None if t is None else _laid_out(t, y) for t in (second, sum_grad))
    grad = grad.contiguous() if pixels else _laid_out(grad, y)
    grads = [torch.empty_like(y) for _ in range(1 + both)]
    tensors = grad, second, y, scale, sum_grad, grads[0], grads[1] if both else None
    launch_prepared(_prepared_grad, *tensors, pixels)
    return grads


def _backward_reference(
    grad: Tensor, y: Tensor, scale: Tensor | None, both: bool, second: Tensor | None, sum_grad: Tensor | None
) -> list[Tensor]:
    if grad.dim() == 2:
        grad = (grad / (y.shape[2] * y.shape[3]))[:, :, None, None].expand_as(y)
    grad = grad if second is None else grad + second
    masked = torch.ops.aten.threshold_backward.default(_laid_out(grad, y), y, 0)
    x_grad = masked if scale is None else _scaled(masked, scale)
    return [x_grad if sum_grad is None else x_grad + _laid_out(sum_grad, y), masked][: 1 + both]


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor in the layout of another one of its shape."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _prepared_grad(
    grad: Tensor, second: Tensor | None, y: Tensor, scale: Tensor | None, sum_grad: Tensor | None, *rest: Any
) -> Launch | None:
    """Return the launch of the backward pass."""
    return over_words(epilogue_grad_kernel, y, None if grad.dim() == 2 else grad, second, sum_grad)


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
        x_grad, *rest = epilogue_grad(grad, y, scale, for_residual and scale is not None)
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
