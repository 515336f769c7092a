"""The arithmetic of pgd_step.py in plain PyTorch: the truth for the tests, and the path on a CPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from retemper.kernels.pixels import grid, named_norm, rows_or_pixels, spread
from retemper.kernels.runtime import compute_dtype

Number = float | Tensor


class Step(NamedTuple):
    """The arguments of a step, checked: `mask` like `adv`, and tensors of numbers as `pixels.grid` makes them."""

    adv: Tensor
    grad: Tensor
    clean: Tensor
    step: Number
    eps: Number
    norm: str
    lower: Number
    upper: Number
    mask: Tensor | None
    momentum: Tensor | None
    decay: float
    previous: Tensor | None
    inertia: float
    clip_first: bool


def pgd_step_reference(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step: float | Tensor,
    eps: float | Tensor,
    *,
    norm: str | float = "linf",
    lower: float | Tensor = 0.0,
    upper: float | Tensor = 1.0,
    mask: Tensor | None = None,
    momentum: Tensor | None = None,
    decay: float = 1.0,
    previous: Tensor | None = None,
    inertia: float = 0.75,
    clip_first: bool = False,
) -> Tensor:
    """Compute the step in plain PyTorch. `adv` stays as it is; `momentum` and `previous` are overwritten.

    Args: as for `pgd_step_`, but only shapes are checked.

    Returns:
        A new tensor of the shape and dtype of `adv`.
    """
    out = adv.detach().clone()
    numbers = {"step": step, "eps": eps, "lower": lower, "upper": upper}
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            numbers[name] = grid(name, value, adv, by_sample=name in ("step", "eps"))
    mask = mask if mask is None else rows_or_pixels(mask, adv)
    rest: Any = dict(mask=mask, momentum=momentum, decay=decay, previous=previous, inertia=inertia)
    ascend(Step(out, grad, clean, norm=named_norm(norm), **numbers, **rest, clip_first=clip_first))
    return out


def ascend(given: Step) -> None:
    """Take the step in place, in plain PyTorch."""
    adv, grad, clean, step, eps, norm, lower, upper, mask, momentum, _, previous, *_ = given
    compute = compute_dtype(adv, grad, clean)
    adv, grad, clean = adv.to(compute), grad.to(compute), clean.to(compute)
    if clean.data_ptr() == adv.data_ptr():  # one tensor as both: what is overwritten must not be the centre
        clean = clean.clone()
    old = adv.clone() if mask is not None or previous is not None else None
    if momentum is not None:
        grad = gather(momentum, grad, given.decay, mask)
    step, eps, lower, upper = (_wide(number, adv) for number in (step, eps, lower, upper))
    ball = (clean, eps.clamp(min=0) if isinstance(eps, Tensor) else eps, lower, upper)
    if norm == "linf":
        sign = grad.sign()  # of NaN it is 0: such a pixel stays
        adv.addcmul_(sign, step) if isinstance(step, Tensor) else adv.add_(sign, alpha=step)
        _into_cube(adv, *ball, room=sign)
    else:
        adv.add_(_scaled(_finite(grad, mask), step, 2))
        _into_ball(adv, *ball, mask, given.clip_first)
    if previous is not None and old is not None:
        go_on(adv, old, previous, given.inertia)
        _into_cube(adv, *ball, room=None) if norm == "linf" else _into_ball(adv, *ball, mask, given.clip_first)
        previous.copy_(old)
    if mask is not None and old is not None:
        adv = torch.where(mask, adv, old)
    if adv is not given.adv:
        given.adv.copy_(adv)


def go_on(adv: Tensor, old: Tensor, before: Tensor, inertia: float) -> None:
    """Weigh, in place, the move from `old` to `adv` with that from the iterate before to `old`."""
    adv.sub_(old).mul_(inertia).add_(old).add_((old - before.to(old.dtype)).mul_(1 - inertia))


def gather(momentum: Tensor, grad: Tensor, decay: float, mask: Tensor | None) -> Tensor:
    """Decay the momentum and add the gradient to it, divided by its L1 norm; return it in the dtype of `grad`."""
    unit = _scaled(_finite(grad, mask), 1.0, 1)
    momentum.copy_(unit.add_(momentum.to(grad.dtype) * decay))
    return momentum.to(grad.dtype)


def _wide(number: Number, image: Tensor) -> Number:
    return spread(number, image, image.dtype) if isinstance(number, Tensor) else number


def _finite(grad: Tensor, mask: Tensor | None) -> Tensor:
    """Return a copy of the gradient, with 0 where it is not finite or not asked for."""
    grad = grad.nan_to_num(0.0, 0.0, 0.0)
    return grad if mask is None else grad.mul_(mask)


def _norm(image: Tensor, order: int) -> Tensor:
    """Return the norm of each sample as (B, 1, ...): in float64, which holds the square of any float32."""
    if image.dim() == 1:
        return image.abs().double()
    return torch.linalg.vector_norm(image, order, tuple(range(1, image.dim())), keepdim=True, dtype=torch.float64)


def _scaled(image: Tensor, length: Number, order: int) -> Tensor:
    """Bring the norm of each sample to `length`, in place; a sample of zeros stays."""
    most = torch.finfo(image.dtype).max
    factor = (length / _norm(image, order).clamp_(min=1e-300)).clamp_(-most, most)
    return image.mul_(factor.to(image.dtype))


def _clip(adv: Tensor, lower: Number, upper: Number) -> None:
    if isinstance(lower, Tensor) or isinstance(upper, Tensor):
        adv.clamp_(min=lower).clamp_(max=upper)  # pyright: ignore[reportCallIssue, reportArgumentType]
    else:
        adv.clamp_(lower, upper)


def _into_cube(adv: Tensor, clean: Tensor, eps: Number, lower: Number, upper: Number, room: Tensor | None) -> None:
    """Project to the L-inf ball and to valid pixels, in place; `room` is overwritten."""
    least = torch.sub(clean, eps, out=room)  # on a CPU, new memory takes ten times as long as the arithmetic
    adv.clamp_(least, clean + eps)
    _clip(adv, lower, upper)


def _into_ball(
    adv: Tensor, clean: Tensor, eps: Number, lower: Number, upper: Number, mask: Tensor | None, clip_first: bool
) -> None:
    """Project to the L2 ball and to valid pixels, in place, in either order."""
    if clip_first:
        _clip(adv, lower, upper)
    delta = adv - clean
    if mask is not None:
        delta.masked_fill_(~mask, 0)
    length = _norm(delta, 2)
    outside = length > eps
    shrink = torch.where(outside, eps / length, 1).to(adv.dtype)
    torch.lerp(adv, delta.mul_(shrink).add_(clean), outside.to(adv.dtype), out=adv)  # inside, nothing changes
    if not clip_first:
        _clip(adv, lower, upper)
