"""The arithmetic of random_start.py: noise in the ball of a norm, in plain PyTorch and in Triton.

    L-inf, uniform:  u ~ U(-eps, eps)
    L-inf, normal:   u ~ scale N(0, 1), kept inside [-eps, eps]
    L2, uniform:     u = eps U^(1/d) z / ||z||,  z ~ N(0, 1), U ~ U(0, 1): uniform in the ball of d dimensions
    L2, normal:      u = min(scale, eps / ||z||) z,  z ~ N(0, 1)

One counter is for 8 pixels that lie side by side. A sample takes as many as it needs, from those of its place in the
batch on. Of normal numbers it takes as many for its second half as for its first: a draw of the first and one of the
second, that far apart, make a number for each of their pixels. In L2 a number is made twice: for the length, and for
the pixels.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import cdiv, next_power_of_2, tl, triton
from retemper.kernels.philox import (
    DRAWS,
    SMALLEST,
    UNIT,
    first_draw,
    normal_draws,
    positive,
    random_words,
    to_normal,
    uniform_draws,
)
from retemper.kernels.pixels import channel_of, channels_of, differs_by, number, radius, spread
from retemper.kernels.runtime import EXACT, clamp, launching, locate, pixel_runs

NO_LENGTH = tl.constexpr(1e-30)  # below that of any sample: divides zeros
RADIUS_STREAM = tl.constexpr(1)  # the second word of the counters that U has to itself

# The pixels of a program: 8 for each thread of 4 warps, so one counter. A thread of normal noise makes 16, and has a
# program of half the threads in L-inf. Chosen from the code for sm_90, not yet measured on a GPU: it takes 38
# instructions a pixel of uniform noise and 62 of normal noise, where the memory leaves time for 55 in fp32.
BLOCK = 1024
WARPS = 2


def fill(
    adv: Tensor,
    clean: Tensor,
    seed: Tensor,
    noise: str,
    scale: float,
    clip: bool,
    rows: tuple[int, int],
    norm: str,
    eps: float | Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
) -> Tensor:
    """Write the start to `adv`, which is dense with the batch outermost, and return it.

    Args:
        eps, lower, upper: tensors of numbers as `pixels.grid` makes them.
    """
    batch, pixels = adv.shape[0], adv.numel() // adv.shape[0]
    pairs = (noise, norm) != ("uniform", "linf")  # of normal numbers, whose halves have as many counters
    counters = 2 * cdiv(pixels, 2 * DRAWS.value) if pairs else cdiv(pixels, DRAWS.value)
    words = random_words(seed, rows, batch, counters)
    draws = words.to(torch.float32)  # first, so that they are the same in any dtype
    if adv.dtype == torch.float64 or clean.dtype == torch.float64:
        draws = draws.double()
    noises = draws.as_strided(adv.shape, (draws.shape[1], *adv.stride()[1:]))  # as adv lies, rows of whole counters
    if isinstance(eps, Tensor):
        eps = spread(eps, adv, draws.dtype).clamp(min=0)
    if norm == "linf" and noise == "uniform":
        noises.mul_(eps * UNIT.value)
    elif norm == "linf":
        to_normal(draws)
        _clip(noises.mul_(scale), -eps, eps)
    else:
        to_normal(draws)
        length = torch.linalg.vector_norm(draws[:, :pixels], dim=1).clamp_(min=NO_LENGTH.value)
        if noise == "uniform":
            share = random_words(seed, rows, batch, 1, RADIUS_STREAM.value)[:, 0].to(torch.float32).to(draws.dtype)
            ratio = positive(torch, share).pow_(1 / pixels).div_(length)
        else:
            ratio = length.reciprocal_()  # to the edge of the ball, at eps 1
        factor = ratio.view(-1, *[1] * (adv.dim() - 1)) * eps
        noises.mul_(factor if noise == "uniform" else factor.clamp_(max=scale))
    torch.add(clean, noises, out=adv)
    if clip:
        lower, upper = (spread(b, adv, adv.dtype) if isinstance(b, Tensor) else b for b in (lower, upper))
        _clip(adv, lower, upper)
    return adv


def _clip(image: Tensor, lower: Any, upper: Any) -> None:
    """Clip the image, in place, to numbers, or to tensors that broadcast to it."""
    if isinstance(lower, Tensor) == isinstance(upper, Tensor):
        image.clamp_(lower, upper)
    else:
        image.clamp_(min=lower).clamp_(max=upper)


@triton.jit
def _put(
    adv_ptr,
    clean_ptr,
    noise,
    lower,
    upper,
    sample,
    pixel,
    pixels,
    inside,
    CLIP: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
):
    """Write the clean pixels of a sample plus noise, clipped."""
    offset = sample * pixels + pixel
    start = tl.load(clean_ptr + offset, mask=inside, other=0.0).to(tl.float32) + noise
    if CLIP:
        channel = channel_of(pixel, CHANNELS)
        least = number(lower, sample, channel, CHANNELS, LOWER)
        start = clamp(start, least, number(upper, sample, channel, CHANNELS, UPPER))
    tl.store(adv_ptr + offset, start.to(adv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _uniform_start_kernel(
    adv_ptr,
    clean_ptr,
    seed_ptr,
    eps,
    lower,
    upper,
    pixels,
    blocks,
    first_row,
    rows_apart,
    CLIP: tl.constexpr,
    CHANNELS: tl.constexpr,
    EPS: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offset, inside = locate(pixels, blocks, BLOCK)
    block = tl.program_id(0)
    if blocks is not None:
        block = block % blocks
    counter = block.to(tl.int64) * (BLOCK // DRAWS) + tl.arange(0, BLOCK // DRAWS)
    if blocks is not None:
        counter += (first_row + sample * rows_apart) * tl.cdiv(pixels, DRAWS)
    pixel = offset - sample * pixels
    noise = uniform_draws(tl.load(seed_ptr), counter, BLOCK)
    noise *= radius(eps, sample, channel_of(pixel, CHANNELS), CHANNELS, EPS)
    _put(adv_ptr, clean_ptr, noise, lower, upper, sample, pixel, pixels, inside, CLIP, CHANNELS, LOWER, UPPER)


@triton.jit
def _normal_start_kernel(
    adv_ptr,
    clean_ptr,
    seed_ptr,
    eps,
    scale,
    lower,
    upper,
    pixels,
    blocks,
    first_row,
    rows_apart,
    CLIP: tl.constexpr,
    CHANNELS: tl.constexpr,
    EPS: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    half = tl.cdiv(pixels, 2 * DRAWS)  # the counters of half a sample
    counter = (first_row + sample * rows_apart) * (2 * half) + block * (BLOCK // DRAWS) + tl.arange(0, BLOCK // DRAWS)
    low = block * BLOCK + tl.arange(0, BLOCK)
    high = low + half * DRAWS
    first, second = normal_draws(tl.load(seed_ptr), counter, half, BLOCK)
    first = _held(first * scale, eps, sample, low, CHANNELS, EPS)
    second = _held(second * scale, eps, sample, high, CHANNELS, EPS)
    own = low < tl.minimum(half * DRAWS, pixels)
    _put(adv_ptr, clean_ptr, first, lower, upper, sample, low, pixels, own, CLIP, CHANNELS, LOWER, UPPER)
    _put(adv_ptr, clean_ptr, second, lower, upper, sample, high, pixels, high < pixels, CLIP, CHANNELS, LOWER, UPPER)


@triton.jit
def _held(noise, eps, sample, pixel, CHANNELS: tl.constexpr, EPS: tl.constexpr):
    """Return the noise, kept inside the cube."""
    most = radius(eps, sample, channel_of(pixel, CHANNELS), CHANNELS, EPS)
    return clamp(noise, -most, most)


@triton.jit
def _ball_start_kernel(
    adv_ptr,
    clean_ptr,
    seed_ptr,
    eps,
    scale,
    lower,
    upper,
    first_row,
    rows_apart,
    PIXELS: tl.constexpr,
    HALF: tl.constexpr,
    UNIFORM: tl.constexpr,
    CLIP: tl.constexpr,
    CHANNELS: tl.constexpr,
    EPS: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    row, seed = first_row + sample * rows_apart, tl.load(seed_ptr)
    counter = row * (2 * HALF) + tl.arange(0, BLOCK // DRAWS)
    middle: tl.constexpr = HALF * DRAWS

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, middle, BLOCK):
        low = start + tl.arange(0, BLOCK)
        first, second = normal_draws(seed, counter + start // DRAWS, HALF, BLOCK)
        squares += tl.where(low < min(middle, PIXELS), first * first, 0.0)
        squares += tl.where(low + middle < PIXELS, second * second, 0.0)
    length = tl.maximum(tl.math.sqrt_rn(tl.sum(squares, 0)), NO_LENGTH)

    factor = radius(eps, sample, 0, CHANNELS, EPS) / length  # to the edge of the ball
    if UNIFORM:
        share = tl.maximum(tl.abs(first_draw(seed, row, RADIUS_STREAM)), SMALLEST)
        factor *= tl.exp(tl.log(share) / PIXELS)
    else:
        factor = tl.minimum(factor, scale)

    for start in range(0, middle, BLOCK):
        low = start + tl.arange(0, BLOCK)
        high = low + middle
        first, second = normal_draws(seed, counter + start // DRAWS, HALF, BLOCK)
        first, second, own = first * factor, second * factor, low < min(middle, PIXELS)
        _put(adv_ptr, clean_ptr, first, lower, upper, sample, low, PIXELS, own, CLIP, CHANNELS, LOWER, UPPER)
        own = high < PIXELS
        _put(adv_ptr, clean_ptr, second, lower, upper, sample, high, PIXELS, own, CLIP, CHANNELS, LOWER, UPPER)


def launch(
    adv: Tensor,
    clean: Tensor,
    seed: Tensor,
    noise: str,
    scale: float,
    clip: bool,
    rows: tuple[int, int],
    norm: str,
    *numbers: float | Tensor,
) -> None:
    """Write the start to `adv` by a kernel. The arguments are those of `fill`, and `clean` lies as `adv` does."""
    by = [differs_by(n if isinstance(n, Tensor) else None) for n in numbers]
    channels, pixels = channels_of(adv, *by), adv.numel() // adv.shape[0]
    options: dict[str, Any] = {"CLIP": clip, "CHANNELS": channels, **EXACT}
    options |= zip(("EPS", "LOWER", "UPPER"), by, strict=True)
    eps, *bounds = numbers
    kernel: Any
    if (noise, norm) == ("uniform", "linf"):
        alone = rows == (0, 1) and channels is None and "sample" not in by and pixels % DRAWS.value == 0
        pixels, blocks, options["BLOCK"], programs = pixel_runs(adv, BLOCK, not alone)
        places = (pixels, None, None, None) if blocks is None else (pixels, blocks, *rows)
        kernel, arguments = _uniform_start_kernel, (eps, *bounds, *places)
    else:
        half = cdiv(pixels, 2 * DRAWS.value)
        block = min(BLOCK, max(64, next_power_of_2(half * DRAWS.value)))
        if norm == "l2":
            kernel, programs, arguments = _ball_start_kernel, adv.shape[0], (eps, scale, *bounds, *rows)
            options |= {"PIXELS": pixels, "HALF": half, "UNIFORM": noise == "uniform", "BLOCK": block}
        else:
            block = min(block, BLOCK // 2)
            blocks = cdiv(half * DRAWS.value, block)
            options |= {"BLOCK": block, "num_warps": WARPS}
            kernel, programs = _normal_start_kernel, adv.shape[0] * blocks
            arguments = (eps, scale, *bounds, pixels, blocks, *rows)
    with launching(adv):
        kernel[(programs,)](adv, clean, seed, *arguments, **options)
