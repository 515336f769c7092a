"""The arithmetic of pgd_step.py in plain PyTorch: the truth for the tests, and the path on a CPU."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retemper.kernels.pixels import grid, named_norm, overlap, rows_or_pixels, spread

Number = float | Tensor

# How many pixels a thread of a CPU works on at a time: what it computes of them stays in its cache.
PART = 2**18
MANY = 2**20  # pixels that are worth it
SQUARED = (1e-12, 1e18)  # lengths whose square keeps its digits in float32, and so does that of what matters to them
ONE = torch.ones(())  # times a number: one alone is made a tensor at each call, which takes as long as the sum


class Step(NamedTuple):
    """The arguments of a step, checked: `mask` like `adv`, and tensors of numbers as `pixels.grid` makes them."""

    adv: Tensor
    grad: Tensor
    clean: Tensor
    step: Number
    eps: Number
    lower: Number
    upper: Number
    norm: str
    mask: Tensor | None
    momentum: Tensor | None
    decay: float
    previous: Tensor | None
    inertia: float
    clip_first: bool

    def parts(self, size: int) -> Iterator["Step"]:
        """Cut the step into steps of at most `size` samples."""
        batch = self.adv.shape[0]
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            part: Any = (v[rows] if isinstance(v, Tensor) and v.shape[:1] == (batch,) else v for v in self)
            yield Step(*part)


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
    """Take the step in place, in plain PyTorch, on a CPU a few samples at a time."""
    adv, clean, grad = given.adv, given.clean, given.grad
    size = max(1, PART * torch.get_num_threads() * adv.shape[0] // adv.numel())
    whole = adv.numel() < MANY or size >= adv.shape[0] or adv.is_cuda or overlap(clean, adv) or overlap(grad, adv)
    for part in (given,) if whole else given.parts(size):
        _ascend(part)


def _ascend(given: Step) -> None:
    adv, grad, clean, *numbers, norm, mask, momentum, decay, previous, inertia, clip_first = given
    compute = torch.float64 if torch.float64 in (adv.dtype, grad.dtype, clean.dtype) else torch.float32
    if not adv.dtype == grad.dtype == clean.dtype == compute:
        adv, grad, clean = adv.to(compute), grad.to(compute), clean.to(compute)
    if overlap(clean, adv):  # one tensor as both, say: what is overwritten must not be the centre
        clean = clean.clone()
    room = None if grad is given.grad else grad  # a copy, to be overwritten
    old = adv if mask is None and previous is None else adv.clone()
    if momentum is not None:
        grad = _gather(momentum, grad, decay, mask)
    if Tensor in map(type, numbers):
        numbers = [spread(one, adv, compute) if isinstance(one, Tensor) else one for one in numbers]
    step, eps, lower, upper = numbers
    project = _into_cube if norm == "linf" else _into_ball
    room = (_move_by_sign if norm == "linf" else _move_along)(adv, grad, step, mask, room)
    project(adv, clean, eps, lower, upper, room, mask, clip_first)
    if previous is not None:
        go_on(adv, old, previous, inertia)
        project(adv, clean, eps, lower, upper, room, mask, clip_first)
        previous.copy_(old)
    if mask is not None:
        adv = torch.where(mask, adv, old)
    if adv is not given.adv:
        given.adv.copy_(adv)


def go_on(adv: Tensor, old: Tensor, before: Tensor, inertia: float) -> None:
    """Weigh, in place, the move from `old` to `adv` with that from the iterate before to `old`."""
    adv.sub_(old).mul_(inertia).add_(old).add_((old - before.to(old.dtype)).mul_(1 - inertia))


def _gather(momentum: Tensor, grad: Tensor, decay: float, mask: Tensor | None) -> Tensor:
    """Decay the momentum, in place, add the gradient divided by its L1 norm, and return it in the dtype of `grad`."""
    grad = _finite(grad, mask)
    momentum.copy_(torch.addcmul(momentum.to(grad.dtype).mul(decay), grad, _inverse_norm(grad, 1)))
    return momentum.to(grad.dtype)


def _move_by_sign(adv: Tensor, grad: Tensor, step: Number, _: Tensor | None, room: Tensor | None) -> Tensor:
    """Move by the step, in place, and return memory that may be overwritten: `room`, if there is some."""
    sign = torch.sign(grad, out=room)  # of NaN it is 0: such a pixel stays
    adv.addcmul_(sign, step) if isinstance(step, Tensor) else adv.add_(sign, alpha=step)
    return sign


def _move_along(adv: Tensor, grad: Tensor, step: Number, mask: Tensor | None, room: Tensor | None) -> Tensor:
    """Move along the gradient by the step, in place, and return memory that may be overwritten, as above."""
    grad = _finite(grad, mask, room)
    factor = _inverse_norm(grad, 2)
    adv.addcmul_(grad, factor * step) if isinstance(step, Tensor) else adv.addcmul_(grad, factor, value=step)
    return grad


def _finite(grad: Tensor, mask: Tensor | None, room: Tensor | None = None) -> Tensor:
    """Return a copy of the gradient, or `room`, with 0 where it is not finite or not asked for."""
    grad = torch.nan_to_num(grad, 0.0, 0.0, 0.0, out=room)
    return grad if mask is None else grad.mul_(mask)


def _norm(image: Tensor, order: int, dtype: torch.dtype) -> Tensor:
    """Return the norm of each sample, computed in a dtype, as (B, 1, ...)."""
    if image.dim() == 1:
        return image.abs().to(dtype)
    return torch.linalg.vector_norm(image, order, tuple(range(1, image.dim())), True, dtype=dtype)


def _inverse_norm(grad: Tensor, order: int) -> Tensor:
    """Return 1 / norm of each sample, and a finite number for a sample of zeros.

    It is computed in float64, which holds the square of any float32; on a CPU only for samples that need it.
    """
    if grad.dtype == torch.float32 and grad.is_cpu and not torch._C._are_functorch_transforms_active():
        length = _norm(grad, order, grad.dtype)
        near = (length > SQUARED[0]) & (length < SQUARED[1])
        if not _all_hold(near):
            length = torch.where(near, length.double(), _norm(grad, order, torch.float64))
    else:
        length = _norm(grad, order, torch.float64)
    return length.reciprocal_().clamp_max_(torch.finfo(grad.dtype).max).to(grad.dtype)


def _all_hold(near: Tensor) -> bool:
    """Say whether all of a CPU's numbers are true."""
    assert near.is_cpu
    return bool(near.all().item())


def _clip(adv: Tensor, lower: Number, upper: Number) -> None:
    if isinstance(lower, Tensor) or isinstance(upper, Tensor):
        torch.clamp(torch.clamp(adv, min=lower, out=adv), max=upper, out=adv)
    else:
        adv.clamp_(lower, upper)


def _into_cube(adv: Tensor, clean: Tensor, eps: Number, lower: Number, upper: Number, room: Tensor, *_: object) -> None:
    """Project to the L-inf ball and clip, in place. `room` is overwritten: new memory takes longer than the sums."""
    if isinstance(eps, Tensor):
        eps = eps.clamp(min=0)
        adv.clamp_(torch.sub(clean, eps, out=room), clean + eps)
    else:
        adv.clamp_(torch.add(clean, ONE, alpha=-eps, out=room), torch.add(clean, ONE, alpha=eps))
    _clip(adv, lower, upper)


def _into_ball(
    adv: Tensor,
    clean: Tensor,
    eps: Number,
    lower: Number,
    upper: Number,
    room: Tensor,
    mask: Tensor | None,
    clip_first: bool,
) -> None:
    """Project to the L2 ball and clip, in place; a sample inside the ball is not rescaled. `room` is overwritten."""
    if clip_first:
        _clip(adv, lower, upper)
    delta = torch.sub(adv, clean, out=room)
    if mask is not None:
        delta.masked_fill_(~mask, 0)
    length = _norm(delta, 2, delta.dtype)
    eps = eps.clamp(min=0) if isinstance(eps, Tensor) else torch.full_like(length, eps)
    shrink = (eps / length).nan_to_num_(1.0).clamp_max_(1)  # 0 / 0 is inside
    projected = torch.addcmul(clean, delta, shrink, out=delta)
    torch.lerp(projected, adv, shrink.floor_(), out=adv)  # 1 inside the ball, 0 outside
    if not clip_first:
        _clip(adv, lower, upper)
