"""The norms of an evaluation: their names, the length of a perturbation, and which ball lies inside which."""

import math
from itertools import pairwise

from torch import Tensor

from retemper.errors import UsageError

TITLES = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
NORMS = tuple(TITLES)
ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
SLACK = 1e-5  # of a length in L2 or L1: what float32 adds to the sum over the pixels of an image
Ball = tuple[str, float]  # a norm and a radius


def length(delta: Tensor, norm: str) -> Tensor:
    """Return the length of each perturbation, (B, C, H, W) to (B,), in pixel units."""
    return delta.flatten(1).norm(ORDER[norm], dim=1)


def is_inside(inner: Ball, outer: Ball, pixels: int) -> bool:
    """Say whether every perturbation in one ball lies in the other too.

    A vector of d numbers has ||x||_q <= max(1, d^(1/q - 1/p)) ||x||_p, and some vector reaches it. So the L2 ball of a
    radius lies inside the L-inf ball of that radius, and the L-inf ball inside the L2 ball of its sqrt(d)-fold.

    Args:
        pixels: d, the numbers that an image has.
    """
    (p, eps), (q, radius) = (ORDER[inner[0]], inner[1]), (ORDER[outer[0]], outer[1])
    return eps * max(1.0, pixels ** (1 / q - 1 / p)) <= radius * (1 + 1e-9)


def require_radii(radii: tuple[float, ...], norm: str) -> None:
    """Raise UsageError for radii that are no pixel units, or do not rise."""
    for eps in radii:
        if norm == "linf" and eps > 1:
            raise UsageError(f"--eps {eps:g}: write it in [0, 1] pixels, 8/255 not 8")
    if any(eps >= after for eps, after in pairwise(radii)):
        raise UsageError(f"--eps {','.join(f'{eps:g}' for eps in radii)}: name each radius once, the smallest first")
