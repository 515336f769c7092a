"""How an attack goes, whatever the network: its choices, where it starts, and the checks of both beside the images."""

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retemper.engine.losses import Claim
from retemper.kernels import random_start_
from retemper.kernels.pixels import grid, rows_or_pixels, split, spread
from retemper.kernels.runtime import FLOATS, compute_dtype, is_dense_batch_first, require_pixel_units

ROUNDED = 1e-6  # by how much of their range pixels that were resized or scaled may pass its ends


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The choices of an attack by projected gradient descent: the arguments of `pgd` of the same names."""

    steps: int
    step: float | Tensor
    eps: float | Tensor
    start: str | Tensor = "uniform"
    bn_mode: str = "eval"
    seed: int | Tensor | None = None
    clip_start: bool = True
    rows: tuple[int, int] = (0, 1)
    norm: str = "linf"
    lower: float | Tensor = 0.0
    upper: float | Tensor = 1.0
    mask: Tensor | None = None
    momentum: float | None = None
    restarts: int = 1
    keep: str = "last"
    start_eps: float | Tensor | None = None

    @property
    def picks(self) -> bool:
        """True where the value of each image decides which of several iterates is returned."""
        return self.restarts > 1 or self.keep == "best"

    @property
    def ball(self) -> dict[str, Any]:
        """Return where iterates may lie, as `random_start_` and `pgd_step_` take it beside the radius."""
        return dict(norm=self.norm, lower=self.lower, upper=self.upper)


def first_iterate(clean: Tensor, plan: Plan, restart: int = 0) -> Tensor:
    """Return where an attack starts: a fresh tensor in the memory format of `clean`. Each restart draws anew.

    Raises:
        ValueError: the start is unknown, or a tensor of another shape or dtype.
    """
    adv, start = torch.empty_like(clean), plan.start
    if isinstance(start, Tensor):
        if start.shape != clean.shape or start.dtype != clean.dtype:
            shapes = (f"{tuple(one.shape)} of {one.dtype}" for one in (start, clean))
            raise ValueError("start has shape {}, clean {}: they must agree".format(*shapes))
        adv.copy_(start)
    elif start == "none":
        adv.copy_(clean)
    elif start in ("normal", "uniform"):
        options: dict[str, Any] = dict(noise=start, clip=plan.clip_start, rows=plan.rows, **plan.ball)
        radius = plan.eps if plan.start_eps is None else plan.start_eps
        random_start_(adv, clean, radius, seed=_seed(plan.seed, clean.device, restart), **options)
    else:
        raise ValueError(f"start = {start!r}: it must be 'uniform', 'normal', 'none' or a tensor like clean")
    if plan.mask is not None:
        adv = torch.where(rows_or_pixels(plan.mask, clean), adv, clean)
    return adv


def _seed(seed: int | Tensor | None, device: torch.device, restart: int) -> int | Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if restart == 0:
        return seed
    if not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, device=device)
    return seed + restart  # which wraps around


def step_options(clean: Tensor, plan: Plan) -> dict[str, Any]:
    """Return the options of the steps of one attack from its start, as `pgd_step_` takes them."""
    options = plan.ball
    if plan.mask is not None:
        options["mask"] = plan.mask
    if plan.momentum is not None:
        options |= dict(momentum=torch.zeros_like(clean, dtype=compute_dtype(clean)), decay=plan.momentum)
    return options


def direction(clean: Tensor, plan: Plan) -> float | Tensor:
    """Return 1 where steps raise the objective, -1 where negative steps lower it: a number, or (B,)."""
    if not isinstance(plan.step, Tensor):
        return -1.0 if plan.step < 0 else 1.0
    step_B = per_pixel("step", plan.step, clean).expand_as(clean).flatten(1)[:, 0]
    return torch.where(step_B < 0, -1.0, 1.0)


def checked_images(clean: Tensor) -> Tensor:
    """Return images side by side in memory, the batch outermost: a copy where they lie otherwise."""
    if not isinstance(clean, Tensor):
        raise TypeError(f"clean: it is a {type(clean).__name__}, and must be a tensor")
    if clean.dim() < 2 or clean.dtype not in FLOATS:
        raise ValueError(f"clean: {clean.dtype} of shape {tuple(clean.shape)}; needs floats (B, C, H, W): image / 255")
    clean = clean.detach()
    return clean if is_dense_batch_first(clean) else clean.contiguous()


def require_fits(plan: Plan, clean: Tensor) -> None:
    """Raise TypeError or ValueError where what the host knows of the plan does not fit, alone or beside the images."""
    choices = {"bn_mode": ("eval", "train", "keep"), "keep": ("last", "best")}
    for name, known in choices.items():
        if getattr(plan, name) not in known:
            raise ValueError(f"{name} = {getattr(plan, name)!r}: it must be one of {', '.join(known)}")
    for name, least in (("steps", 0), ("restarts", 1)):
        if operator.index(getattr(plan, name)) < least:
            raise ValueError(f"{name} = {getattr(plan, name)}: it must be at least {least}")
    if plan.restarts > 1 and (isinstance(plan.start, Tensor) or plan.start == "none"):
        raise ValueError(f"restarts = {plan.restarts}: each would be the same; needs start = 'uniform' or 'normal'")
    if plan.momentum is not None and not 0 <= plan.momentum < math.inf:
        raise ValueError(f"momentum = {plan.momentum}: it must be finite and at least 0")
    given = [name for name in ("step", "eps", "start_eps", "lower", "upper") if getattr(plan, name) is not None]
    lengths = {name: per_pixel(name, getattr(plan, name), clean) for name in given}
    known = {name: abs(one) if name == "step" else one for name, one in lengths.items() if not isinstance(one, Tensor)}
    if "lower" in known and "upper" in known:
        require_pixel_units(known.pop("lower"), known.pop("upper"), _pixels(plan, clean), **known)


def claims(plan: Plan, clean: Tensor) -> list[Claim]:
    """Return what must hold of the values of the images and of the plan's tensors."""
    if not clean.numel():
        return []
    step, eps, lower, upper = (
        per_pixel(name, getattr(plan, name), clean) for name in ("step", "eps", "lower", "upper")
    )
    width: Any = upper - lower
    inside = (clean >= lower - ROUNDED * width) & (clean <= upper + ROUNDED * width)
    shown = "[lower, upper]" if isinstance(width, Tensor) else f"[{lower}, {upper}]"
    found = [(inside.all(), f"clean: pixels outside {shown}, or not finite; scale the images, or give lower, upper")]
    if isinstance(width, Tensor):
        found.insert(0, ((width > 0).all(), "lower, upper: the range of a pixel is empty"))
    longest = width * math.sqrt(_pixels(plan, clean))
    checked = [("step", abs(step)), ("eps", eps)]
    if plan.start_eps is not None:
        checked.append(("start_eps", per_pixel("start_eps", plan.start_eps, clean)))
    for name, value in checked:
        fits: Any = (value >= 0) & (value <= longest)
        if isinstance(fits, Tensor):
            words = "for each image, as pixels have a range (8/255, not 8)"
            most = "the longest in the ball" if isinstance(longest, Tensor) else f"{longest:g}"
            found.append((fits.all(), f"{name}: it must lie in 0 .. {most} {words}"))
    return found + (finite("start", plan.start) if isinstance(plan.start, Tensor) else [])


def finite(name: str, value: Any) -> list[Claim]:
    """Return the claim that no value is NaN or +inf; -inf is the logit of a class that is ruled out."""
    known = isinstance(value, Tensor) and value.is_floating_point()
    return [((value < torch.inf).all(), f"{name}: not finite")] if known else []


def per_pixel(name: str, value: float | Tensor, clean: Tensor) -> Any:
    """Return a number as it is, and a tensor of numbers so that it broadcasts to the images.

    Args:
        name: "step", "eps" or "start_eps", which may differ by image or by channel; "lower" or "upper", by channel.
    Raises:
        TypeError: it is neither.
        ValueError: it is a tensor of another shape or dtype.
    """
    number, tensor = split(name, value)
    if tensor is None:
        return number
    of_images = name in ("step", "eps", "start_eps")
    return spread(grid(name, tensor.detach(), clean, by_sample=of_images), clean, compute_dtype(clean))


def _pixels(plan: Plan, clean: Tensor) -> int:
    """Return over how many pixels the lengths of steps and radii are measured."""
    return clean[:1].numel() if plan.norm == "l2" and clean.numel() else 1
