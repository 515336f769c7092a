"""The sums, by class, of cross-entropy, correct predictions and samples, from which class-wise methods adapt.

    loss_sum[k] = sum over y_i = k of log sum_j exp(logit_ij) - logit_ik
    correct[k]  = number of i with y_i = k whose first largest logit is at k
    count[k]    = number of i with y_i = k

The temperatures of ABSLD (Zhao et al., 2023) and the class weights of other methods follow from them.
Deterministic: each program writes the sums of its own rows, which are then added in a fixed order, without atomics.
Bound by memory: one pass over the logits, where eager PyTorch takes a log-softmax, an argmax, two gathers and three
scatters.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import cdiv, next_power_of_2, tl, triton
from retemper.kernels.operators import operator
from retemper.kernels.runtime import (
    EXACT,
    compute_dtype,
    launching,
    require_one_device,
    require_rows,
    require_vector,
    runs_triton,
)

TILE = 1024  # logits that a program holds: 8 for each thread of 4 warps; twice as many spill registers on sm_90
WIDEST = 128  # classes of a tile; a wider one has so few rows that there are more partial sums than logits


def sum_tiles(classes: int) -> dict[str, int]:
    """Return the constants of the kernel for that many classes: K, ROWS and BLOCK."""
    block = min(next_power_of_2(classes), WIDEST)
    return {"K": classes, "ROWS": TILE // block, "BLOCK": block}


def class_sums_reference(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sums in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args and Returns: as for `class_sums`. Nothing is checked.
    """
    wide = logits.to(compute_dtype(logits))
    member = label[:, None] == torch.arange(logits.shape[1], device=logits.device)
    cross_entropy = -wide.log_softmax(1).gather(1, label.clamp(0, logits.shape[1] - 1)[:, None])
    hit = (logits.argmax(1, keepdim=True) == label[:, None]) & ~cross_entropy.isnan()
    return torch.where(member, cross_entropy, 0).sum(0), (member & hit).sum(0), member.sum(0)


@triton.jit
def _class_sums_kernel(
    logits_ptr, label_ptr, loss_ptr, count_ptr, stride, B, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    label = tl.load(label_ptr + row, mask=row < B, other=-1)
    known = (label >= 0) & (label < K)
    row_ptr = logits_ptr + tl.minimum(row, B - 1) * stride  # rows past the end: the last one, without a label
    own = tl.load(row_ptr + label, mask=known, other=0.0).to(tl.float32)

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    better = tl.zeros((ROWS,), tl.int32)  # how many logits an argmax would prefer to that of the label
    for start in range(0, K, BLOCK):
        cls = (start + tl.arange(0, BLOCK))[None, :]
        logit = tl.load(row_ptr[:, None] + cls, mask=cls < K, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(logit, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # while all are -inf: -inf - -inf is NaN
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logit - shift[:, None]), 1)
        peak = higher
        first_among_equals = (logit == own[:, None]) & (cls < label[:, None])
        better += tl.sum(((logit > own[:, None]) | first_among_equals).to(tl.int32), 1)
    cross_entropy = tl.log(total) - (own - peak)
    hit = (better == 0) & (cross_entropy == cross_entropy)  # a row with NaN predicts nothing

    for start in range(0, K, BLOCK):
        cls = start + tl.arange(0, BLOCK)
        member = label[:, None] == cls[None, :]
        place = program * K + cls
        tl.store(loss_ptr + place, tl.sum(tl.where(member, cross_entropy[:, None], 0.0), 0), mask=cls < K)
        correct = tl.sum((member & hit[:, None]).to(tl.int32), 0)
        tl.store(count_ptr + program * K + place, correct, mask=cls < K)
        tl.store(count_ptr + program * K + place + K, tl.sum(member.to(tl.int32), 0), mask=cls < K)


def _fake(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    classes = logits.shape[1:]
    loss = logits.new_empty(classes, dtype=compute_dtype(logits))
    return loss, logits.new_empty(classes, dtype=torch.int64), logits.new_empty(classes, dtype=torch.int64)


@operator("class_sums(Tensor logits, Tensor label) -> (Tensor, Tensor, Tensor)", fake=_fake)
def _class_sums_op(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    require_rows(logits=logits)
    require_one_device(logits=logits, label=label)
    batch, classes = logits.shape
    require_vector("label", label, batch, torch.int64)
    if not runs_triton(logits):
        return class_sums_reference(logits, label)
    options: dict[str, Any] = {**sum_tiles(classes), **EXACT}
    programs = cdiv(batch, options["ROWS"])
    loss = logits.new_empty((programs, classes), dtype=torch.float32)
    count = logits.new_empty((programs, 2, classes), dtype=torch.int32)
    if programs:
        with launching(logits):
            _class_sums_kernel[(programs,)](logits, label, loss, count, logits.stride(0), batch, **options)
    return loss.sum(0), count[:, 0].sum(0), count[:, 1].sum(0)


def class_sums(logits: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the cross-entropy, the correct predictions and the samples of each class. Not differentiable.

    A row with NaN makes the loss of its own class NaN, no other, and is not correct. A row whose label is no class
    adds nothing. Of equal logits the first is the prediction. The formula is in the module docstring.

    Args:
        logits: (B, K), any float dtype, the K of a row side by side in memory.
        label: (B,) int64.
        num_classes: K; a model with more outputs than the data has classes is refused.

    Returns:
        loss_sum: (K,) in nats, float32, or float64 for float64 logits.
        correct, count: (K,) int64.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; K is not `num_classes`.
    """
    if logits.dim() != 2 or logits.shape[1] != num_classes:
        raise ValueError(f"logits: shape {tuple(logits.shape)}; needs (B, {num_classes}), as num_classes says")
    return _class_sums_op(logits.detach(), label)
