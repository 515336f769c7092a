"""Rows of logits in a Triton kernel: the tile of a program, what holds of a row, and its softmax.

    peak_i  = max_k logit_ik
    total_i = sum_k exp((logit_ik - peak_i) / temperature_i)

A program takes ROWS rows, each in STEPS loads of LANES logits. The peak is subtracted before the division by the
temperature: logits of 1e4 at temperature 0.05 would otherwise lose their differences to rounding.
"""

# pyright: reportGeneralTypeIssues=false
# (Triton declares that static_range never returns, so pyright lets no loop go over it.)
# "Any" stands in quotes: Triton looks names up, and Python 3.10's is a function to it, which no kernel may mention.

from typing import Any

from torch import Tensor

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


def row_stride(rows: Tensor | None) -> int:
    """Return the stride from row to row. That of a single row means nothing, and is not worth a kernel of its own."""
    if rows is None:
        return 0
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def each_stride(values: Tensor | None) -> int:
    """Return the stride from number to number, and 0 where one number holds for all."""
    return values.stride(0) if values is not None and values.dim() else 0


@triton.jit
def row_numbers(
    label_ptr,
    temperature_ptr,
    weight_ptr,
    row_weight_ptr,
    row_grad_ptr,
    temperature_stride,
    row_weight_stride,
    row_grad_stride,
    ignore_index,
    temperature,
    row,
    BY_ROW: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return the class, the temperature and the weight of each row, and whether it is ignored: (ROWS,) each.

    A row whose label is no class gets class 0 and a temperature of NaN. So does a temperature that is not above 0.
    Without temperature_ptr, `temperature` is that of every row. Without label_ptr, all rows are of class 0.
    """
    label = tl.zeros((ROWS,), tl.int32)
    known = tl.full((ROWS,), 1, tl.int1)
    ignored = tl.zeros((ROWS,), tl.int1)
    own_temperature = tl.full((ROWS,), 1.0, tl.float32) * temperature
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if label_ptr is not None:
        given = tl.load(label_ptr + row).to(tl.int64)
        known = given.to(tl.uint64, bitcast=True) < K
        label = tl.where(known, given, 0).to(tl.int32)
        own_temperature = tl.where(known, temperature, float("nan"))
        if ignore_index is not None:
            ignored = given == ignore_index
    if temperature_ptr is not None:
        if BY_ROW:
            own_temperature = tl.load(temperature_ptr + row * temperature_stride).to(tl.float32)
        else:
            own_temperature = tl.load(temperature_ptr + label).to(tl.float32)
        own_temperature = tl.where(known & (own_temperature > 0), own_temperature, float("nan"))
    if weight_ptr is not None:
        weight *= tl.load(weight_ptr + label).to(tl.float32)
    if row_weight_ptr is not None:
        weight *= tl.load(row_weight_ptr + row * row_weight_stride).to(tl.float32)
    if row_grad_ptr is not None:
        weight *= tl.load(row_grad_ptr + row * row_grad_stride)
    return label, own_temperature, weight, ignored


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


@triton.jit
def log2_softmax(logits, row):
    """Return log2 of the softmax of a block (ROWS, LANES), of rows with a peak, a rate and a log2 total."""
    peak, rate, log_total = row
    return (logits - peak[:, None]) * rate[:, None] - log_total[:, None]


@triton.jit
def store_block(out_ptr, values, row, cls, ignored, B, STRIDE: tl.constexpr, K: tl.constexpr):
    """Write a block (ROWS, LANES) to rows that lie STRIDE apart: 0 in those that are ignored."""
    values = tl.where(ignored[:, None], 0.0, values).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * STRIDE)[:, None] + cls, values, mask=(row < B)[:, None] & (cls < K))
