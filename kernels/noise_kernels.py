"""The arithmetic of random_start.py in Triton; its formulas are in noise.py."""

from functools import partial
from typing import Any

from torch import Tensor

from retemper.kernels.language import cdiv, next_power_of_2, tl, triton
from retemper.kernels.launch import Launch, launch_prepared
from retemper.kernels.noise import NO_LENGTH, halves, spare
from retemper.kernels.philox import DRAWS, normal_draws, uniform_draws
from retemper.kernels.pixels import channel_of, channels_of, differs_by, number, radius
from retemper.kernels.runtime import clamp, locate, pixel_runs, require_one_layout

# The pixels of a program: 8 for each thread of 4 warps, so one counter. A thread of normal noise makes 16, and has a
# program of half the threads in L-inf. Chosen from the code for sm_90, not yet measured on a GPU: it takes 36
# instructions a pixel of uniform noise and 60 of normal noise, where the memory leaves time for 55 in fp32.
BLOCK = 1024
NORMAL_WARPS = 2


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
    CLIP: tl.constexpr,
    first_row,
    rows_apart,
    pixels,
    blocks,
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
    lower,
    upper,
    scale,
    CLIP: tl.constexpr,
    first_row,
    rows_apart,
    pixels,
    blocks,
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
    lower,
    upper,
    scale,
    CLIP: tl.constexpr,
    first_row,
    rows_apart,
    PIXELS: tl.constexpr,
    NUMBERS: tl.constexpr,
    HALF: tl.constexpr,
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
        squares += tl.where(low < min(middle, NUMBERS), first * first, 0.0)
        squares += tl.where(low + middle < NUMBERS, second * second, 0.0)
    length = tl.maximum(tl.math.sqrt_rn(tl.sum(squares, 0)), NO_LENGTH)

    factor = radius(eps, sample, 0, CHANNELS, EPS) / length
    if NUMBERS == PIXELS:
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
    given = (adv, clean, seed, *numbers)
    if (noise, norm) == ("uniform", "linf"):
        launch_prepared(_prepared_uniform, *given, clip, *rows)
    elif norm == "linf":
        launch_prepared(_prepared_normal, *given, scale, clip, *rows)
    else:
        launch_prepared(_IN_BALL[noise], *given, scale, clip, *rows)


def _named(adv: Tensor, *numbers: float | Tensor) -> dict[str, Any]:
    """Return how eps, lower and upper differ, as the kernels take it, if `adv` is dense with the batch outermost."""
    require_one_layout(adv=adv)
    by = [differs_by(n if isinstance(n, Tensor) else None) for n in numbers]
    return {"CHANNELS": channels_of(adv, *by), **dict(zip(("EPS", "LOWER", "UPPER"), by, strict=True))}


def _prepared_uniform(
    adv: Tensor,
    clean: Tensor,
    seed: Tensor,
    eps: float | Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    clip: bool,
    first_row: int,
    rows_apart: int,
) -> Launch:
    """Return the launch of uniform noise in L-inf."""
    named, pixels = _named(adv, eps, lower, upper), adv.numel() // adv.shape[0]
    alone = (first_row, rows_apart) == (0, 1) and named["CHANNELS"] is None and "sample" not in named.values()
    pixels, blocks, block, programs = pixel_runs(adv, BLOCK, not (alone and pixels % DRAWS.value == 0))
    return Launch(_uniform_start_kernel, (programs,), {**named, "pixels": pixels, "blocks": blocks, "BLOCK": block})


def _prepared_normal(
    adv: Tensor, clean: Tensor, seed: Tensor, eps: float | Tensor, lower: float | Tensor, upper: float | Tensor, *_: Any
) -> Launch:
    """Return the launch of normal noise in L-inf."""
    pixels = adv.numel() // adv.shape[0]
    half = halves(pixels + spare("normal", "linf"))
    block = min(BLOCK // 2, max(64, next_power_of_2(half * DRAWS.value)))
    blocks = cdiv(half * DRAWS.value, block)
    named = {"pixels": pixels, "blocks": blocks, "BLOCK": block, "num_warps": NORMAL_WARPS}
    return Launch(_normal_start_kernel, (adv.shape[0] * blocks,), named | _named(adv, eps, lower, upper))


def _prepared_ball(
    noise: str,
    adv: Tensor,
    clean: Tensor,
    seed: Tensor,
    eps: float | Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    *_: Any,
) -> Launch:
    """Return the launch of noise in the ball of L2."""
    pixels = adv.numel() // adv.shape[0]
    numbers = pixels + spare(noise, "l2")
    half = halves(numbers)
    block = min(BLOCK, max(64, next_power_of_2(half * DRAWS.value)))
    named = {"PIXELS": pixels, "NUMBERS": numbers, "HALF": half, "BLOCK": block}
    return Launch(_ball_start_kernel, (adv.shape[0],), named | _named(adv, eps, lower, upper))


_IN_BALL = {noise: partial(_prepared_ball, noise) for noise in ("uniform", "normal")}
