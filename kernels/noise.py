"""The arithmetic of random_start.py: noise in the ball of a norm, in plain PyTorch. In Triton: noise_kernels.py.

    L-inf, uniform:  u ~ U(-eps, eps)
    L-inf, normal:   u ~ scale N(0, 1), kept inside [-eps, eps]
    L2, uniform:     u = eps z_1 ... z_d / ||z||,  z ~ N(0, 1) of d + 2 numbers
    L2, normal:      u = min(scale, eps / ||z||) z,  z ~ N(0, 1) of d numbers

The first d coordinates of a point on the sphere of d + 2 dimensions are uniform in the ball of d dimensions (Harman and
Lacko, J. Multivariate Analysis 2010), so that no radius need be drawn.

One counter is for 8 pixels that lie side by side. A sample takes as many as it needs, from those of its place in the
batch on. Of normal numbers it takes as many for its second half as for its first: a draw of the first and one of the
second, that far apart, make a number for each of their pixels. In L2 a number is made twice: for the length, and for
the pixels.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import cdiv, tl
from retemper.kernels.philox import DRAWS, UNIT, random_words, to_normal
from retemper.kernels.pixels import spread

NO_LENGTH = tl.constexpr(1e-30)  # below that of any sample: divides zeros

# A CPU makes so many pixels at a time on each thread: what it computes of them stays in its cache.
PART = 2**17
MANY = 2**19  # pixels that are worth it
FURTHEST = 7  # standard deviations: no draw is further from 0


def spare(noise: str, norm: str) -> int:
    """Return how many numbers a sample draws beside those of its pixels."""
    return 2 if (noise, norm) == ("uniform", "l2") else 0


def halves(numbers: int) -> int:
    """Return the counters of each half of so many normal numbers."""
    return cdiv(numbers, 2 * DRAWS.value)


def fill(
    adv: Tensor,
    clean: Tensor,
    seed: Tensor,
    noise: str,
    scale: float,
    clip: bool,
    rows: tuple[int, int],
    norm: str,
    *numbers: float | Tensor,
) -> Tensor:
    """Write the start to `adv`, which is dense with the batch outermost, and return it.

    A CPU takes a few samples of a large batch at a time.

    Args:
        numbers: eps, lower and upper; tensors of them as `pixels.grid` makes them.
    """
    batch = adv.shape[0]
    size = max(1, PART * torch.get_num_threads() * batch // adv.numel())
    if adv.numel() < MANY or size >= batch or adv.is_cuda:
        return _fill(adv, clean, seed, noise, scale, clip, rows, norm, *numbers)
    for start in range(0, batch, size):
        part = slice(start, start + size)
        own = (n[part] if isinstance(n, Tensor) and n.shape[0] == batch else n for n in numbers)
        places = rows[0] + rows[1] * start, rows[1]
        _fill(adv[part], clean[part], seed, noise, scale, clip, places, norm, *own)
    return adv


def _fill(
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
    """Write the start of all samples to `adv`, and return it."""
    batch, pixels = adv.shape[0], adv.numel() // adv.shape[0]
    numbers = pixels + spare(noise, norm)
    pairs = (noise, norm) != ("uniform", "linf")
    words = random_words(seed, rows, batch, 2 * halves(numbers) if pairs else cdiv(pixels, DRAWS.value))
    draws = words.to(torch.float32)  # first, so that they are the same in any dtype
    if adv.dtype == torch.float64 or clean.dtype == torch.float64:
        draws = draws.double()
    noises = draws.as_strided(adv.shape, (draws.shape[1], *adv.stride()[1:]))  # as adv lies, rows of whole counters
    if isinstance(eps, Tensor):
        eps = spread(eps, adv, draws.dtype).clamp(min=0)
    if not pairs:
        noises.mul_(eps * UNIT.value)
    elif norm == "linf":
        to_normal(draws)
        noises.mul_(scale)
        if isinstance(eps, Tensor) or eps < FURTHEST * scale:
            _clip(noises, -eps, eps)
    else:
        to_normal(draws)
        length = torch.linalg.vector_norm(draws[:, :numbers], dim=1).clamp_(min=NO_LENGTH.value)
        factor = length.reciprocal_().view(-1, *[1] * (adv.dim() - 1)) * eps
        noises.mul_(factor if noise == "uniform" else factor.clamp_(max=scale))
    start = adv if adv.dtype == noises.dtype else noises  # rounded after it is clipped, as the kernels do
    torch.add(clean.to(noises.dtype), noises, out=start)
    if clip:
        lower, upper = (spread(b, start, start.dtype) if isinstance(b, Tensor) else b for b in (lower, upper))
        _clip(start, lower, upper)
    return adv if start is adv else adv.copy_(start)


def _clip(image: Tensor, lower: Any, upper: Any) -> None:
    """Clip the image, in place, to numbers, or to tensors that broadcast to it."""
    if isinstance(lower, Tensor) == isinstance(upper, Tensor):
        image.clamp_(lower, upper)
    else:
        image.clamp_(min=lower).clamp_(max=upper)
