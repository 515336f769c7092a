"""Functions of one number for Triton kernels, in powers and logarithms of 2, exact where the plain formula rounds away.

A GPU has one instruction each for 2**x and log2 x, and needs five for e**x. So the kernels compute in powers of 2:

    e**x = 2**(x LOG2E),   ln x = LN2 log2 x

Near x = 0 the float32 formulas log2(1 + x), 2**x - 1 and log2(1 - x) lose the digits of x beside the 1. There the
functions below take the Taylor series, which keeps them. Each function takes and gives float32 of any shape.
"""

import math

from retemper.kernels.language import tl, triton

# To the right of a tensor: the interpreters of Triton 3.7 and 3.8 make a constant of a constant times a tensor.
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def log2_total(rest, peaks):
    """Return log2(rest + peaks), for peaks >= 1 and rest >= -0.03, to the last digits of a small `rest`.

    It is the logarithm of a sum whose largest terms are 1: `peaks` counts those, `rest` is the sum of all others.
    """
    x = rest + (peaks - 1)
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x / 5))))
    return tl.where(x < 0.03, series * LOG2E, tl.log2(1 + x))


@triton.jit
def exp2_m1(x):
    """Return 2**x - 1 for x <= 0, to 2**-24 of its own value where x is small."""
    series = tl.fma(x, LN2 / 6, 1.0)
    series = tl.fma(x * (LN2 / 5), series, 1.0)
    series = tl.fma(x * (LN2 / 4), series, 1.0)
    series = tl.fma(x * (LN2 / 3), series, 1.0)
    series = tl.fma(x * (LN2 / 2), series, 1.0)
    return tl.where(x > -0.144, x * LN2 * series, tl.exp2(x) - 1)


@triton.jit
def log2_1m(x):
    """Return log2(1 - x) for x in [0, 1], to the last digits of a small x."""
    return tl.where(x > 0.03, tl.log2(1 - x), log2_total(-x, 1.0))
