"""Batch norm of several groups of images at once, with the shortcut and the ReLU behind it (Ioffe and Szegedy, 2015).

    y = act(weight[c] (x - mean[g, c]) rstd[g, c] + bias[c] + residual),   act = ReLU or identity
    rstd = 1 / sqrt(var + eps);   mean and var over the images and pixels of group g
    running <- (1 - momentum) running + momentum (mean, unbiased var), for each group of `moves` in its order

c is the channel. Each group has its own statistics, as if every one were a batch of its own: the convolutions of two
forwards may be one batch, and their batch norms are still those of two. Bound by memory: two launches read x twice and
the residual once and write y; the gradient, two launches too, reads x and the gradient of y twice, and y.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.batch_norm_kernels import launch_backward, launch_forward
from retemper.kernels.operators import differentiable, differentiated_once, keep, operator, overwritten
from retemper.kernels.runtime import (
    compute_dtype,
    require_float,
    require_no_grad,
    require_one_device,
    require_one_layout,
    require_vector,
    runs_triton,
)

Three = tuple[Tensor, Tensor, Tensor]


def batch_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Sequence[Tensor] | None = None,
    *,
    groups: int = 1,
    moves: Sequence[int] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Three:
    """Compute the operation in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args: as for `batch_norm`. Nothing is checked.

    Returns:
        y; the groups' means and their 1 / sqrt(var + eps), (groups, C) each.
    """
    wide, found = x.to(compute_dtype(x)), []
    weight, bias = weight.to(wide.dtype), bias.to(wide.dtype)
    order = [*(range(groups) if moves is None else moves)]
    own, share, new = [(None, None)] * groups, momentum, []
    if statistics is not None and order == [*range(groups)]:
        own = [(statistics[0], statistics[1])] * groups
    elif statistics is not None:  # with momentum 1 each group's statistics are written here
        new = [torch.zeros(2, x.shape[1], dtype=wide.dtype, device=x.device) for _ in range(groups)]
        own, share = [(mean, var) for mean, var in new], 1.0
    for part, (mean, var) in zip(wide.chunk(groups), own, strict=True):
        found.append(torch.native_batch_norm(part, weight, bias, mean, var, True, share, eps))
    y, mean, rstd = (torch.cat(each) if groups > 1 else each[0] for each in zip(*found, strict=True))
    if statistics is not None:
        for group in order if new else ():
            for value, now in zip(statistics, new[group], strict=False):
                value.mul_(1 - momentum).add_(now, alpha=momentum)
        statistics[2].add_(len(order))
    y = y if residual is None else y.add_(residual)
    y = y.relu_() if relu else y
    return y.to(x.dtype), mean.view(groups, -1), rstd.view(groups, -1)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> list[Tensor]:
    """Return the gradients of x, weight and bias in plain PyTorch, given that of what the ReLU takes in."""
    wide = compute_dtype(x)
    given = zip(*(t.chunk(len(mean)) for t in (grad.to(wide), x.to(wide))), mean, rstd, strict=True)
    scale = weight.to(wide)
    back, all_three = torch.ops.aten.native_batch_norm_backward.default, [True, True, True]
    found = [back(grad, x, scale, None, None, mean, rstd, True, 0.0, all_three) for grad, x, mean, rstd in given]
    of_x, of_weight, of_bias = zip(*found, strict=True)
    totals = [torch.stack(each).sum(0).to(weight.dtype) for each in (of_weight, of_bias)]
    return [torch.cat(of_x).to(x.dtype), *totals]


def _launches(x: Tensor) -> bool:
    """Say whether the kernels take x: they read channels-last memory."""
    return runs_triton(x) and x.is_contiguous(memory_format=torch.channels_last)


def _fake(x: Tensor, *rest: Any) -> Three:
    statistics = x.new_empty((rest[6], x.shape[1]), dtype=compute_dtype(x))
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


@operator(
    "batch_norm_(Tensor x, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? batches, Tensor? residual, int groups, int[] moves, float momentum, float eps, bool relu)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)
def _batch_norm_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    residual: Tensor | None,
    groups: int,
    moves: list[int],
    momentum: float,
    eps: float,
    relu: bool,
) -> Three:
    _check(x, weight, bias, residual, groups, moves, (running_mean, running_var, batches))
    running = [one for one in (running_mean, running_var, batches) if one is not None]
    for statistic in running:
        overwritten(statistic)
    if not _launches(x):
        how: dict[str, Any] = {"groups": groups, "moves": moves, "momentum": momentum, "eps": eps}
        return batch_norm_reference(x, weight, bias, running or None, **how, residual=residual, relu=relu)
    out = _fake(x, weight, bias, running_mean, running_var, batches, residual, groups)
    launch_forward(x, weight, bias, (running_mean, running_var, batches), residual, moves, momentum, eps, relu, out)
    return out


@operator(
    "batch_norm_backward(Tensor grad, Tensor? other, Tensor? y, Tensor x, Tensor weight, Tensor mean, Tensor rstd,"
    " bool passed) -> Tensor[]",
    fake=lambda grad, other, y, x, weight, *rest: [
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(weight),
        *([torch.empty_like(x)] if rest[-1] else []),
    ],
)
def _backward_op(
    grad: Tensor,
    other: Tensor | None,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    passed: bool,
) -> list[Tensor]:
    """Return the gradients of x, weight and bias, and with `passed` also what passes the ReLU.

    Args:
        other: another gradient of y, which is added to the first.
        y: the result, where a ReLU is in it.
    """
    grad, other = _laid_out(grad, x), None if other is None else _laid_out(other, x)
    if not _launches(x):
        grad = grad if other is None else grad + other
        grad = grad if y is None else torch.ops.aten.threshold_backward.default(grad, y, 0)
        return [*_gradients(grad, x, weight, mean, rstd), *([grad] if passed else [])]
    x_grad, weight_grad, bias_grad = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    rest = [torch.empty_like(x)] if passed else []
    out = x_grad, weight_grad, bias_grad
    launch_backward(grad, other, y, x, weight, mean, rstd, rest[0] if rest else None, out)
    return [*out, *rest]


def _laid_out(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient in the memory layout of x."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    moves: list[int],
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: shape {tuple(x.shape)}; needs (B, C, H, W)")
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"x: strides {x.stride()}; needs contiguous or channels-last memory")
    if residual is None:
        require_float(x=x)
    else:
        require_one_layout(x=x, residual=residual)
    if groups < 1 or len(x) % groups:
        raise ValueError(f"groups: {groups}; needs a number that divides the {len(x)} images")
    if len(x) // groups * x.shape[2] * x.shape[3] < 2:
        raise ValueError(f"x: shape {tuple(x.shape)} in {groups} groups; needs 2 values a channel in each")
    if not all(0 <= group < groups for group in moves):
        raise ValueError(f"moves: {moves}; needs numbers of groups, 0 to {groups - 1}")
    running_mean, running_var, batches = running
    require_one_device(x=x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    wide = compute_dtype(x)
    for name, vector in (("weight", weight), ("bias", bias)):
        require_vector(name, vector, x.shape[1], wide, x.dtype)
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
        require_vector(name, vector, x.shape[1], wide)
    if batches is not None and (batches.dtype != torch.int64 or batches.numel() != 1):
        raise ValueError(f"num_batches_tracked: {batches.dtype} of shape {tuple(batches.shape)}; needs one int64")


def _save(ctx: Any, inputs: Sequence[Any], output: Three) -> None:
    """Keep what the gradient reads: y where a ReLU is in it, x, the weight, and the statistics."""
    x, weight, *_, ctx.relu = inputs
    y, mean, rstd = output
    ctx.set_materialize_grads(False)  # mean and rstd have none
    keep(ctx, y if ctx.relu else None, x, weight, mean, rstd)


def _setup(ctx: Any, inputs: Sequence[Any], output: Three) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output)


def _backward(ctx: Any, grad: Tensor | None, other: Tensor | None = None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and the residual, given one of y or two."""
    if grad is None:
        grad, other = other, None
    nothing = [None] * 3
    if grad is None:
        return *nothing, *nothing, *nothing, *nothing
    y, x, weight, mean, rstd = ctx.saved_tensors
    for_residual = ctx.needs_input_grad[6]
    passed = for_residual and (y is not None or other is not None)
    of_x, of_weight, of_bias, *rest = _backward_op(grad, other, y, x, weight, mean, rstd, passed)
    of_residual = (rest[0] if rest else grad) if for_residual else None
    return of_x, of_weight, of_bias, *nothing, of_residual, *nothing, None, None


differentiable(_batch_norm_op, _backward, _setup)


class _Twice(torch.autograd.Function):
    """The operation with its result given twice: both gradients of it come to one backward, which adds them up."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _batch_norm_op(*inputs)
        _save(ctx, inputs, output)
        return output[0], output[0].view_as(output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return differentiated_once(_backward, ctx, *grads)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Sequence[Tensor] | None = None,
    *,
    groups: int = 1,
    moves: Sequence[int] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Normalise each group of images by its own statistics, add the shortcut and apply the ReLU.

    Computes in float32 (float64 for float64) and rounds once. Differentiable, once, in `x`, `weight`, `bias` and
    `residual`; differentiating the gradient is an error. The formula and its source are in the module docstring.

    Args:
        x: (B, C, H, W), any float dtype, contiguous or channels-last; on a GPU, only channels-last is the fast way.
            Group g is the g-th of `groups` equal parts of the B images.
        weight, bias: (C,), float32 (float64 for float64) or of x's dtype.
        statistics: running_mean and running_var, (C,) float32 (float64), and num_batches_tracked, 0-dim int64;
            overwritten. None keeps none.
        groups: a divisor of B.
        moves: the groups that `statistics` take in, one after the other; all in their order when left out.
        momentum: the share of a group in the running statistics, a fraction.
        eps: is added to the variance.
        residual: of x's shape, dtype and layout; 0 when left out.
        relu: whether to apply the ReLU.

    Returns:
        A tensor of x's shape, dtype and layout.

    Raises:
        ValueError: a shape, dtype, device, stride or number does not fit; a group has one value a channel; a running
            statistic requires a gradient.
    """
    return _batch_norm_op(*_inputs(x, weight, bias, statistics, groups, moves, momentum, eps, residual, relu))[0]


def batch_norm_twice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Sequence[Tensor] | None = None,
    *,
    groups: int = 1,
    moves: Sequence[int] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the result of `batch_norm` twice, for two readers: the backward adds up their gradients without a launch.

    Args and Raises: as for `batch_norm`.

    Returns:
        Two tensors of one memory, neither of which may be overwritten.
    """
    return _Twice.apply(*_inputs(x, weight, bias, statistics, groups, moves, momentum, eps, residual, relu))


def _inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Sequence[Tensor] | None,
    groups: int,
    moves: Sequence[int] | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> tuple[Any, ...]:
    """Return the arguments of the operator."""
    running = (None, None, None) if statistics is None else tuple(statistics)
    require_no_grad(running_mean=running[0], running_var=running[1])
    moves = list(range(groups) if moves is None else moves)
    return x, weight, bias, *running, residual, groups, moves, momentum, eps, relu
