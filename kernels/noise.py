"""The arithmetic of random_start.py: noise in the ball of a norm, in plain PyTorch and in Triton.

    L-inf, uniform:  u ~ U(-eps, eps)
    L-inf, normal:   u ~ scale N(0, 1), kept inside [-eps, eps]
    L2, uniform:     u = eps U^(1/d) z / ||z||,  z ~ N(0, 1), U ~ U(0, 1): uniform in the ball of d dimensions
    L2, normal:      u = min(scale, eps / ||z||) z,  z ~ N(0, 1)

A sample takes cdiv(d, 8) counters, one for 8 pixels that lie side by side, from those of its place in the batch on. In
L2 each number is made twice: for the length, and for the pixels.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import cdiv, tl, triton
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
from retemper.kernels.runtime import EXACT, clamp, compute_dtype, launching, locate, pixel_runs

NO_LENGTH = tl.constexpr(1e-30)  # below that of any sample: divides zeros
RADIUS_STREAM = tl.constexpr(1)  # the second word of the counters that U has to itself

# The pixels of a program: 8 for each thread of 4 warps, so one counter for each. Chosen from the code for sm_90, not
# yet measured on a GPU.
BLOCK = 1024


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
    draws = random_words(seed, rows, batch, cdiv(pixels, DRAWS.value)).to(torch.float32).to(compute_dtype(adv, clean))
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
        factor = eps / length.view(-1, *[1] * (adv.dim() - 1))  # to the edge of the ball
        if noise == "normal":
            factor = factor.clamp(max=scale)
        else:
            share = random_words(seed, rows, batch, 1, RADIUS_STREAM.value)[:, 0].to(torch.float32).to(draws.dtype)
            factor = factor * positive(torch, share).pow_(1 / pixels).view(factor.shape)
        noises.mul_(factor)
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
def _random_start_kernel(
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
    UNIFORM: tl.constexpr,
    CLIP: tl.constexpr,
    CHANNELS: tl.constexpr,
    EPS: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, offset, inside = locate(pixels, blocks, BLOCK)
    first = tl.program_id(0)
    if blocks is not None:
        first = first % blocks
    counter = first.to(tl.int64) * (BLOCK // DRAWS) + tl.arange(0, BLOCK // DRAWS)
    if blocks is not None:
        counter += (first_row + sample * rows_apart) * tl.cdiv(pixels, DRAWS)
    channel = channel_of(offset - sample * pixels, CHANNELS)
    eps = radius(eps, sample, channel, CHANNELS, EPS)
    if UNIFORM:
        draw = uniform_draws(tl.load(seed_ptr), counter, BLOCK) * eps
    else:
        draw = clamp(normal_draws(tl.load(seed_ptr), counter, BLOCK) * scale, -eps, eps)
    start = tl.load(clean_ptr + offset, mask=inside, other=0.0).to(tl.float32) + draw
    if CLIP:
        start = clamp(
            start,
            number(lower, sample, channel, CHANNELS, LOWER),
            number(upper, sample, channel, CHANNELS, UPPER),
        )
    tl.store(adv_ptr + offset, start.to(adv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _random_start_l2_kernel(
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
    counter = row * ((PIXELS + DRAWS - 1) // DRAWS) + tl.arange(0, BLOCK // DRAWS)

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PIXELS, BLOCK):
        draw = normal_draws(seed, counter + start // DRAWS, BLOCK)
        squares += tl.where(start + tl.arange(0, BLOCK) < PIXELS, draw * draw, 0.0)
    length = tl.maximum(tl.math.sqrt_rn(tl.sum(squares, 0)), NO_LENGTH)

    longest = radius(eps, sample, 0, CHANNELS, EPS) / length
    if UNIFORM:
        share = tl.maximum(tl.abs(first_draw(seed, row, RADIUS_STREAM)), SMALLEST)
        longest *= tl.exp(tl.log(share) / PIXELS)
    else:
        longest = tl.minimum(longest, scale)

    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        draw = normal_draws(seed, counter + start // DRAWS, BLOCK) * longest
        moved = tl.load(clean_ptr + sample * PIXELS + pixel, mask=pixel < PIXELS, other=0.0).to(tl.float32) + draw
        if CLIP:
            channel = channel_of(pixel, CHANNELS)
            moved = clamp(
                moved,
                number(lower, sample, channel, CHANNELS, LOWER),
                number(upper, sample, channel, CHANNELS, UPPER),
            )
        tl.store(adv_ptr + sample * PIXELS + pixel, moved.to(adv_ptr.dtype.element_ty), mask=pixel < PIXELS)


def launch(
    adv: Tensor,
    clean: Tensor,
    seed: Tensor,
    uniform: bool,
    scale: float,
    clip: bool,
    rows: tuple[int, int],
    norm: str,
    *numbers: float | Tensor,
) -> None:
    by = [differs_by(n if isinstance(n, Tensor) else None) for n in numbers]
    channels = channels_of(adv, *by)
    alone = rows == (0, 1) and channels is None and "sample" not in by and adv[:1].numel() % DRAWS.value == 0
    pixels, blocks, block, programs = pixel_runs(adv, BLOCK, not alone or norm == "l2")
    eps, lower, upper = numbers
    options: dict[str, Any] = {"UNIFORM": uniform, "CLIP": clip, "CHANNELS": channels, "BLOCK": block, **EXACT}
    options |= zip(("EPS", "LOWER", "UPPER"), by, strict=True)
    arguments: tuple[Any, ...] = (adv, clean, seed, eps, scale, lower, upper)
    if norm == "l2":
        kernel, programs, arguments = _random_start_l2_kernel, adv.shape[0], (*arguments, *rows)
        options["PIXELS"] = pixels
    else:
        places = (pixels, None, None, None) if blocks is None else (pixels, blocks, *rows)
        kernel, arguments = _random_start_kernel, (*arguments, *places)
    with launching(adv):
        kernel[(programs,)](*arguments, **options)
