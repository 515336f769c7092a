"""Rows of logits in a Triton kernel: the tile of a program, the peak of a row and the logarithm of its softmax sum.

    peak_i  = max_k logit_ik
    total_i = sum_k exp((logit_ik - peak_i) / temperature_i)

A program takes ROWS rows, each in STEPS loads of LANES logits. The peak is subtracted before the division by the
temperature: logits of 1e4 at temperature 0.05 would otherwise lose their differences to rounding.
"""

# pyright: reportGeneralTypeIssues=false
# (Triton declares that static_range never returns, so pyright lets no loop go over it.)
# "Any" stands in quotes: Triton looks names up, and Python 3.10's is a function to it, which no kernel may mention.

from typing import Any

from retemper.kernels.language import cdiv, next_power_of_2, tl, triton
from retemper.kernels.numerics import log2_total

# How many logits of each tensor a thread holds, in how many steps, and the warps of a program. Chosen from the code for
# sm_90, not yet measured on a GPU. A row lies in the registers of one thread, or of neighbours in one warp: nothing is
# read twice, and a warp hardly waits for another. At 1,000 classes in fp32, kl_divergence.py takes 35 instructions a
# logit for the loss and 53 for its gradient. With 8 logits a thread and reductions by 4 warps it takes 107 and 154.
# The memory leaves time for 55 and 83. 32 logits take 96 registers; more would leave too few warps. 26 steps take 17
# seconds to compile.
PER_THREAD = 32
MOST_STEPS = 8
WARPS = 4


def row_tiles(classes: int, width: int) -> dict[str, int]:
    """Return the constants of a kernel over rows of logits: K, ROWS, LANES, STEPS and num_warps.

    Args:
        classes: K, the logits of a row.
        width: how many logits of a row a thread loads at once.
    """
    steps = min(MOST_STEPS, PER_THREAD // width)
    threads = min(32 * WARPS, next_power_of_2(cdiv(classes, steps * width)))
    lanes = threads * width
    steps = min(steps, cdiv(classes, lanes))
    return {"K": classes, "ROWS": 32 * WARPS // threads, "LANES": lanes, "STEPS": steps, "num_warps": WARPS}


@triton.jit
def row_logits(row_ptr, start, K: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr) -> "Any":
    """Load STEPS blocks (ROWS, LANES) of float32 logits from class `start` on; -inf beyond the last class."""
    logits = ()
    for step in tl.static_range(STEPS):
        cls = start + step * LANES + tl.arange(0, LANES)
        logit = tl.load(row_ptr[:, None] + cls, mask=cls < K, other=float("-inf"))
        logits = logits + (logit.to(tl.float32),)  # noqa: RUF005 (Triton has no starred expressions)
    return logits


@triton.jit
def row_peak(row_ptr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr) -> "Any":
    """Return the highest logit of each row: (ROWS,)."""
    highest = tl.full((ROWS, LANES), float("-inf"), tl.float32)
    for start in range(0, K, STEPS * LANES):
        logits = row_logits(row_ptr, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            highest = tl.maximum(highest, logits[step])
    return tl.max(highest, 1)


@triton.jit
def row_log2_total(row_ptr, peak, rate, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr):
    """Return log2 total of each row, (ROWS,), from its peak and its rate = LOG2E / temperature.

    A row that holds NaN or +inf, or nothing but -inf, gives NaN. The terms of the peak, each 1, are counted apart:
    where they dominate, the sum of the others would be lost to rounding beside them.
    """
    rest = tl.zeros((ROWS, LANES), tl.float32)
    peaks = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        logits = row_logits(row_ptr, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            tempered = (logits[step] - peak[:, None]) * rate[:, None]
            top = tempered == 0
            rest += tl.where(top, 0.0, tl.exp2(tempered))
            peaks += tl.where(top, 1.0, 0.0)
    return log2_total(tl.sum(rest, 1), tl.sum(peaks, 1))
