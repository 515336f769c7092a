"""The random start of an attack (Madry et al., ICLR 2018; TRADES, Zhang et al., ICML 2019), in place.

    adv <- clip(clean + u, lower, upper),   u uniform in the eps ball of L-inf or of L2, or normal and kept inside

The formulas are in noise.py. The numbers come from Philox-4x64-10 (philox.py): one counter for 8 pixels that lie side
by side in memory, and the seed as the key. A draw depends on nothing else, so a CPU draws what a GPU draws: uniform
noise in L-inf to the bit, the other to rounding. A process that has some rows of a larger batch counts from their
places in that batch, so its rows get the same draws.

The papers do not project the normal noise to the ball. With eps > 7 scale, as in all of them, projecting changes
nothing in L-inf, since no draw is above 6.7 standard deviations.

Bound by memory: 1 tensor read and 1 written.
"""

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.noise import fill
from retemper.kernels.noise_kernels import launch
from retemper.kernels.operators import is_symbol, operator, overwritten, rewritten
from retemper.kernels.pixels import apart, grid, laid_out, named_norm, split
from retemper.kernels.runtime import (
    FLOATS,
    compute_dtype,
    is_dense_batch_first,
    require_float,
    require_no_grad,
    require_one_device,
    require_one_layout,
    require_pixel_units,
    require_writable,
    runs_triton,
)

Number = float | Tensor
NOISES = ("uniform", "normal")


def random_start_reference(
    clean: Tensor,
    eps: Number,
    *,
    seed: Tensor,
    noise: str = "uniform",
    scale: float = 0.001,
    clip: bool = True,
    rows: tuple[int, int] = (0, 1),
    norm: str = "linf",
    lower: Number = 0.0,
    upper: Number = 1.0,
) -> Tensor:
    """Compute the start in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args: as for `random_start_`, but nothing is checked, and the seed is a tensor of one int64.

    Returns:
        A new tensor of the shape, dtype and layout of `clean`.
    """
    adv = torch.empty_like(clean)
    if not adv.numel():
        return adv
    return fill(adv, clean, seed, noise, scale, clip, rows, norm, *_numbers(adv, norm, eps, lower, upper))


_TENSORS = "Tensor(a!) adv, Tensor clean, Tensor seed"
_DRAW = "str noise, float scale, bool clip, SymInt first_row=0, SymInt rows_apart=1"
_BY = "Tensor? lower_by=None, Tensor? upper_by=None, str norm='linf'"


@operator(
    f"random_start_({_TENSORS}, float eps, Tensor? eps_by, {_DRAW}, float lower=0.0, float upper=1.0, {_BY}) -> ()",
    fake=lambda *_: None,
)
def _random_start_op(
    adv: Tensor,
    clean: Tensor,
    seed: Tensor,
    eps: float,
    eps_by: Tensor | None,
    noise: str,
    scale: float,
    clip: bool,
    first_row: int = 0,
    rows_apart: int = 1,
    lower: float = 0.0,
    upper: float = 1.0,
    lower_by: Tensor | None = None,
    upper_by: Tensor | None = None,
    norm: str = "linf",
) -> None:
    _check(adv, clean, seed, noise, scale, first_row, rows_apart)
    numbers: tuple[Number, Number, Number] = (eps, lower, upper)
    if not (eps_by is None and lower_by is None and upper_by is None):
        require_one_device(adv=adv, eps=eps_by, lower=lower_by, upper=upper_by)
        given = ((eps, eps_by), (lower, lower_by), (upper, upper_by))
        numbers = _numbers(adv, norm, *(number if by is None else by for number, by in given))
    if adv.numel() == 0:
        return
    rows, clean = (first_row, rows_apart), apart(clean, adv)
    if runs_triton(adv, clean):
        launch(adv, laid_out(clean, adv), seed, noise, scale, clip, rows, norm, *numbers)
        overwritten(adv)
    else:
        if not (adv.is_contiguous() or is_dense_batch_first(adv)):
            require_one_layout(adv=adv)
        fill(adv, clean, seed, noise, scale, clip, rows, norm, *numbers)


def _check(adv: Tensor, clean: Tensor, seed: Tensor, noise: str, scale: float, first_row: int, rows_apart: int) -> None:
    if adv.dtype not in FLOATS or clean.dtype not in FLOATS:
        require_float(adv=adv, clean=clean)
    if clean.shape != adv.shape:
        raise ValueError(f"clean: shape {tuple(clean.shape)}, but adv has {tuple(adv.shape)}")
    if not adv.shape:
        require_one_layout(adv=adv)
    if not adv.device == clean.device == seed.device:
        require_one_device(adv=adv, clean=clean, seed=seed)
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"seed: {seed.dtype} of shape {tuple(seed.shape)}; needs an int, or one int64 in a tensor")
    if noise not in NOISES:
        raise ValueError(f"noise: {noise!r}; needs one of {', '.join(NOISES)}")
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale: {scale}; needs a finite number, 0 or more")
    if first_row < 0 or rows_apart < 1:
        raise ValueError(f"rows: ({first_row}, {rows_apart}); needs a row from 0 on, and a distance of 1 or more")


def _numbers(adv: Tensor, norm: str, eps: Number, lower: Number, upper: Number) -> tuple[Number, Number, Number]:
    """Return the radius and the bounds, tensors as `grid` makes them."""
    if isinstance(eps, Tensor):
        eps = grid("eps", eps, adv)
        if norm == "l2" and eps.shape[1] > 1:
            raise ValueError(
                "eps: differs by channel; a ball in L2 has one radius, so it needs a number, or one a sample"
            )
    lower = grid("lower", lower, adv, by_sample=False) if isinstance(lower, Tensor) else lower
    upper = grid("upper", upper, adv, by_sample=False) if isinstance(upper, Tensor) else upper
    return eps, lower, upper


def _require_seed(seed: int) -> None:
    """Raise TypeError or ValueError unless the seed is a whole number of 64 bits."""
    if not isinstance(seed, Integral | torch.SymInt):
        raise TypeError(f"seed: a {type(seed).__name__}; needs an int, or one int64 in a tensor")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: {seed} does not fit 64 bits")


@rewritten(
    f"random_start_number_({_TENSORS}, Scalar eps, Tensor? eps_by, {_DRAW},"
    f" Scalar lower=0, Scalar upper=1, {_BY}) -> ()"
)
def _of_symbols(
    adv: Tensor,
    clean: Tensor,
    seed: Tensor,
    eps: Any,
    eps_by: Tensor | None,
    noise: str,
    scale: float,
    clip: bool,
    first_row: int = 0,
    rows_apart: int = 1,
    lower: Any = 0.0,
    upper: Any = 1.0,
    lower_by: Tensor | None = None,
    upper_by: Tensor | None = None,
    norm: str = "linf",
) -> None:
    """Take numbers that are symbols of torch.compile too."""
    (eps, eps_by), (lower, lower_by), (upper, upper_by) = (
        (0.0, adv.new_ones(1, dtype=compute_dtype(adv)) * number) if is_symbol(number) else (number, by)
        for number, by in ((eps, eps_by), (lower, lower_by), (upper, upper_by))
    )
    draw = (noise, scale, clip, first_row, rows_apart)
    _random_start_op(adv, clean, seed, eps, eps_by, *draw, lower, upper, lower_by, upper_by, norm)


def random_start_(
    adv: Tensor,
    clean: Tensor,
    eps: Number,
    *,
    noise: str = "uniform",
    scale: float = 0.001,
    seed: int | Tensor,
    clip: bool = True,
    rows: tuple[int, int] = (0, 1),
    norm: str | float = "linf",
    lower: Number = 0.0,
    upper: Number = 1.0,
) -> Tensor:
    """Fill `adv`, in place, with `clean` plus random noise inside the eps ball. What `adv` held before is not read.

    **Pixels are clipped to [0, 1] unless `lower` and `upper` say otherwise**: images in [-1, 1], and images normalised
    by a mean and a deviation, need both, or `clip=False`. The values are not looked at, so no error tells of it.
    The formulas are in noise.py, and their sources in the module docstring.

    Args:
        adv: (B, ...), any float dtype, dense in any order of dimensions with the batch outermost.
        clean: of the shape and on the device of `adv`, any float dtype, any strides. One that does not lie in memory as
            `adv` does is copied once on a GPU.
        eps: the radius, in pixel units (8/255, not 8). A number >= 0, not above the width of the range (or 1) in L-inf,
            nor its sqrt(pixels)-fold in L2; or floats, of which those below 0 count as 0: one, (B,) by sample, or in
            L-inf (C,) or (C, 1, 1) by channel. (B,) where B = C is by sample.
        noise: "uniform" in the ball, or "normal" with standard deviation `scale`.
        scale: the standard deviation of normal noise, in pixel units.
        seed: an int of 64 bits, or a tensor of one int64 on the device. With a tensor that a captured CUDA graph also
            advances, each replay of the graph draws anew. On a GPU its value is not read by the host.
        clip: whether to clip to [lower, upper]. The released code of TRADES, RSLAD and ABSLD does not; its first step
            does.
        rows: (first, apart), where `adv` is the rows first, first + apart, ... of a larger batch: it gets their draws.
        norm: "linf" (or math.inf), or "l2" (or 2).
        lower, upper: the range of a valid pixel: numbers, or floats, one or (C,) or (C, 1, 1) by channel.

    Returns:
        `adv` itself.

    Raises:
        TypeError: an argument is neither a tensor nor a number where it must be one.
        ValueError: a shape, dtype, device or stride does not fit; autograd is tracking `adv`, or another tensor
            requires a gradient, which is not computed; unknown noise or norm; the seed does not fit; rows that cannot
            be; eps is a number below 0 or above the range of a pixel; the range is empty.
    """
    if not (isinstance(adv, Tensor) and isinstance(clean, Tensor)):
        raise TypeError("adv, clean: they must be tensors")
    norm = named_norm(norm)
    eps, eps_by = split("eps", eps)
    lower, lower_by = split("lower", lower, -math.inf)
    upper, upper_by = split("upper", upper, math.inf)
    constants = (clean, eps_by, lower_by, upper_by)
    if torch.is_grad_enabled() and True in [one.requires_grad for one in (adv, *constants) if one is not None]:
        require_writable("adv", adv)
        require_no_grad(**dict(zip(("clean", "eps", "lower", "upper"), constants, strict=True)))
    pixels = 1 if norm == "linf" or not adv.numel() else adv.numel() // adv.shape[0]
    require_pixel_units(lower, upper, pixels, eps=eps)
    if not isinstance(seed, Tensor):
        _require_seed(seed)
        seed = torch.full((1,), seed, dtype=torch.int64, device=adv.device)
    take = _of_symbols if torch.compiler.is_compiling() else _random_start_op
    take(adv, clean, seed, eps, eps_by, noise, scale, clip, *rows, lower, upper, lower_by, upper_by, norm)
    return adv
