"""The random start of an attack (Madry et al., ICLR 2018; TRADES, Zhang et al., ICML 2019), in place.

    uniform:  adv <- clean + u,  u ~ U(-eps, eps)
    normal:   adv <- clean + u,  u ~ scale N(0, 1), kept inside [-eps, eps]

The numbers come from Philox-4x32-10 (Salmon et al., SC 2011). The counter is the pixel's place in memory, the key is
the seed. A draw depends on nothing else, so a CPU draws what a GPU draws: uniform noise to the bit, normal noise to
rounding. A process that has some rows of a larger batch counts places in that batch, so its rows get the same draws.

Normal noise is made by the formula of Box and Muller, with one change. In place of the cosine of an angle from the
whole circle it takes the sine of an angle from the right half. The distribution is the same, and a short series
computes it.
The papers do not project the normal noise to the ball. With eps > 6 scale, as in all of them, projecting changes
nothing: draws of 24 bits are at most sqrt(-2 ln 2^-24) = 5.8 standard deviations.

Bound by memory: 1 tensor read and 1 written. The ten rounds of Philox take less time than that.
"""

import math
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import tl, triton
from retemper.kernels.operators import operator, overwritten
from retemper.kernels.runtime import (
    EXACT,
    FLOATS,
    clamp,
    compute_dtype,
    launching,
    locate,
    per_sample,
    pixel_runs,
    require_one_device,
    require_one_layout,
    require_pixel_units,
    require_vector,
    require_writable,
    runs_triton,
)

NOISES = ("uniform", "normal")
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of Philox-4x32, for words 0 and 2
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, in 32 bits
ROUNDS = 10
LOW = 0xFFFFFFFF  # the lower 32 bits of an int64
UNIT = tl.constexpr(2.0**-24)  # a draw has 24 bits, as many as a float32 holds
HALF_TURN = tl.constexpr(math.pi * 2.0**-24)
BLOCK = 1024  # the pixels of a program, as in pgd_step.py; not yet measured on a GPU


def philox_reference(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox-4x32-10 (Salmon et al., SC 2011), ten rounds on four words of 32 bits.

    Args:
        counter, key: int64 tensors of one shape, or of shapes that broadcast, each with words in [0, 2**32).

    Returns:
        Four int64 tensors of random words in [0, 2**32).
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(word0, MULTIPLIERS[0])
        high2, low2 = _multiply(word2, MULTIPLIERS[1])
        high2 ^= word1
        high2 ^= key0
        high0 ^= word3
        high0 ^= key1
        word0, word1, word2, word3 = high2, low2, high0, low0
        key0, key1 = (key0 + KEY_STEPS[0]) & LOW, (key1 + KEY_STEPS[1]) & LOW
    return word0, word1, word2, word3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of a 64-bit product. int64 wraps around to the bits of an unsigned one."""
    low = word * factor
    high = low >> 32
    high &= LOW  # in place, here and in the rounds: twice as fast on a CPU
    low &= LOW
    return high, low


def random_start_reference(
    clean: Tensor,
    eps: float | Tensor,
    *,
    seed: Tensor,
    noise: str = "uniform",
    scale: float = 0.001,
    clip: bool = True,
    rows: tuple[int, int] = (0, 1),
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """Compute the start in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args: as for `random_start_`, but nothing is checked, and the seed is a tensor of one int64.

    Returns:
        A new tensor of the shape, dtype and layout of `clean`.
    """
    offset = torch.arange(clean.numel(), device=clean.device)
    if rows != (0, 1):
        offset += (rows[0] + offset // clean[:1].numel() * (rows[1] - 1)) * clean[:1].numel()
    zero = torch.zeros_like(offset)
    seed = seed.reshape(())
    bits = philox_reference((offset & LOW, offset >> 32, zero, zero), (seed & LOW, (seed >> 32) & LOW))

    start = torch.empty_like(clean, dtype=compute_dtype(clean))
    in_memory = start.as_strided((clean.shape[0], clean[:1].numel()), (clean[:1].numel(), 1))
    eps = eps.to(start.dtype)[:, None] if isinstance(eps, Tensor) else eps
    first, second = ((word >> 8).to(start.dtype).view(in_memory.shape) for word in bits[:2])
    if noise == "uniform":
        draw = (first * (2 * UNIT.value) - 1) * eps
    else:
        draw = (-2 * ((first + 1) * UNIT.value).log()).sqrt() * ((second - 2**23) * HALF_TURN.value).sin() * scale
    start.copy_(clean)
    centre = in_memory.clone()
    in_memory.copy_(torch.minimum(torch.maximum(centre + draw, centre - eps), centre + eps))
    return (start.clamp_(lower, upper) if clip else start).to(clean.dtype)


@triton.jit
def _sine(angle):
    """Return sin(angle) for |angle| <= pi/2, to 2**-22, by its Taylor series.

    tl.sin takes any angle, and may need stack memory for the large ones.
    """
    square = angle * angle
    tail = 1 - square * (1 / 72) * (1 - square * (1 / 110) * (1 - square * (1 / 156)))
    return angle * (1 - square * (1 / 6) * (1 - square * (1 / 20) * (1 - square * (1 / 42) * tail)))


@triton.jit
def _random_start_kernel(
    adv_ptr,
    clean_ptr,
    seed_ptr,
    eps_ptr,
    eps,
    scale,
    lower,
    upper,
    pixels,
    blocks,
    first_row,
    rows_apart,
    UNIFORM: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offset, inside = locate(pixels, blocks, BLOCK)
    if eps_ptr is not None:
        eps = tl.load(eps_ptr + sample).to(tl.float32)
    place = offset
    if rows_apart is not None:
        place += (first_row + sample * (rows_apart - 1)) * pixels
    counter = place.to(tl.uint32)
    zero = counter * 0
    word0, word1, _, _ = tl.philox(tl.load(seed_ptr), counter, (place >> 32).to(tl.uint32), zero, zero)
    first = (word0 >> 8).to(tl.int32).to(tl.float32)
    if UNIFORM:
        draw = (first * (2 * UNIT) - 1) * eps
    else:
        second = (word1 >> 8).to(tl.int32).to(tl.float32)
        draw = tl.sqrt(-2 * tl.log((first + 1) * UNIT)) * _sine((second - 2**23) * HALF_TURN) * scale
    clean = tl.load(clean_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    start = clamp(clean + draw, clean - eps, clean + eps)
    if CLIP:
        start = clamp(start, lower, upper)
    tl.store(adv_ptr + offset, start.to(adv_ptr.dtype.element_ty), mask=inside)


@operator(
    "random_start_(Tensor(a!) adv, Tensor clean, Tensor seed, float eps, Tensor? eps_per_sample, str noise,"
    " float scale, bool clip, SymInt first_row=0, SymInt rows_apart=1, float lower=0.0, float upper=1.0) -> ()",
    fake=lambda *_: None,
)
def _random_start_op(
    adv: Tensor,
    clean: Tensor,
    seed: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    noise: str,
    scale: float,
    clip: bool,
    first_row: int = 0,
    rows_apart: int = 1,
    lower: float = 0.0,
    upper: float = 1.0,
) -> None:
    require_one_layout(adv=adv, clean=clean)
    require_one_device(adv=adv, seed=seed, eps=eps_per_sample)
    require_vector("eps", eps_per_sample, adv.shape[0], *FLOATS)
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"seed: {seed.dtype} of shape {tuple(seed.shape)}; needs an int, or one int64 in a tensor")
    if noise not in NOISES:
        raise ValueError(f"noise: {noise!r}; needs one of {', '.join(NOISES)}")
    if first_row < 0 or rows_apart < 1:
        raise ValueError(f"rows: ({first_row}, {rows_apart}); needs a row from 0 on, and a distance of 1 or more")
    if adv.numel() == 0:
        return
    rows = (first_row, rows_apart)
    if not runs_triton(adv):
        eps_or_epses = eps if eps_per_sample is None else eps_per_sample
        chosen: dict[str, Any] = dict(noise=noise, scale=scale, clip=clip, rows=rows, lower=lower, upper=upper)
        adv.copy_(random_start_reference(clean, eps_or_epses, seed=seed, **chosen))
        return
    whole = rows == (0, 1)
    pixels, blocks, block, programs = pixel_runs(adv, BLOCK, eps_per_sample is not None or not whole)
    scalars: tuple[Any, ...] = (eps_per_sample, eps, scale, lower, upper, pixels, blocks)
    scalars += (None, None) if whole else rows
    options: dict[str, Any] = {"UNIFORM": noise == "uniform", "CLIP": clip, "BLOCK": block, **EXACT}
    with launching(adv):
        _random_start_kernel[(programs,)](adv, clean, seed, *scalars, **options)
    overwritten(adv)


def random_start_(
    adv: Tensor,
    clean: Tensor,
    eps: float | Tensor,
    *,
    noise: str = "uniform",
    scale: float = 0.001,
    seed: int | Tensor,
    clip: bool = True,
    rows: tuple[int, int] = (0, 1),
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """Fill `adv`, in place, with `clean` plus random noise inside the eps ball. What `adv` held before is not read.

    The formula and its sources are in the module docstring.

    Args:
        adv, clean: (B, ...), one float dtype, one dense layout with the batch outermost.
        eps: in pixel units (8/255, not 8); a number, or floats (B,) with one number for each sample; >= 0. A
            number may not be above the width of the range (or 1).
        noise: "uniform" in the ball, or "normal" with standard deviation `scale`.
        scale: the standard deviation of normal noise, in pixel units.
        seed: an int of 64 bits, or a tensor of one int64 on the device. With a tensor that a captured CUDA graph also
            advances, each replay of the graph draws anew.
        clip: whether to clamp to [lower, upper]. The released code of TRADES, RSLAD and ABSLD does not; its first step
            does.
        rows: (first, apart), where `adv` is the rows first, first + apart, ... of a larger batch: it gets their draws.
        lower, upper: the range of a valid pixel.

    Returns:
        `adv` itself.

    Raises:
        ValueError: the tensors differ in shape, dtype, device or strides; autograd is tracking `adv`; unknown noise;
            the seed does not fit; rows that cannot be; eps is a number below 0 or above the range of a pixel; the range
            is empty.
    """
    require_writable("adv", adv)
    eps_scalar, eps_per_sample = per_sample("eps", eps, adv.shape[0] if adv.dim() else 0)
    require_pixel_units(lower, upper, eps=eps_scalar)
    if not isinstance(seed, Tensor):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: {seed} does not fit 64 bits")
        seed = torch.full((1,), seed, dtype=torch.int64, device=adv.device)
    _random_start_op(adv, clean, seed, eps_scalar, eps_per_sample, noise, scale, clip, *rows, lower, upper)
    return adv
