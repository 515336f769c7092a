"""The Triton kernel of class_temperature_js, which must agree with the reference in jensen_shannon.py.

Bound by memory: one launch reads two (B, K) tensors for the losses, and another one reads them again and writes the
gradients. Eager PyTorch takes about twenty launches for the loss alone. At 1,000 classes in fp32, it takes 76
instructions a logit for the loss and as many for the student's gradient, of the 55 and 83 that the memory leaves time
for (logit_rows.py).

p is the teacher, q the student and m their mixture. All logarithms are to the base 2 (numerics.py says why).
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (Triton declares that static_range never returns, so pyright lets no loop go over it.)

from typing import Any

from torch import Tensor

from retemper.kernels.kl_arguments import Inputs, require_fitting
from retemper.kernels.language import cdiv, tl, triton
from retemper.kernels.launch import Launch, launch_prepared
from retemper.kernels.logit_rows import (
    each_stride,
    log2_softmax,
    row_log2_total,
    row_logits,
    row_numbers,
    row_peak,
    row_stride,
    row_tiles,
    store_block,
)
from retemper.kernels.numerics import LN2, LOG2E
from retemper.kernels.runtime import access_width


@triton.jit
def _weighted(log_p, log_q, beta):
    """Return p, q, p log2(p / m) and q log2(q / m), where m = beta p + (1 - beta) q, from log2 p and log2 q.

    All are told by the larger of p and q, so that equal ones give 0: with r = smaller / larger and s the share of the
    smaller in m, m / larger = 1 - s (1 - r).
    """
    ratio = log_q - log_p
    p_is_larger = ratio <= 0
    apart = tl.maximum(-tl.abs(ratio), -200.0)  # finite, also where one is 0, or both and the ratio is NaN
    r = tl.exp2(apart)
    log_m = tl.log2(1 - tl.where(p_is_larger, 1 - beta, beta) * (1 - r))
    larger = tl.exp2(tl.maximum(log_p, log_q, propagate_nan=tl.PropagateNan.ALL))
    smaller = larger * r
    of_larger = -larger * log_m
    of_smaller = smaller * (apart - log_m)
    p, q = tl.where(p_is_larger, larger, smaller), tl.where(p_is_larger, smaller, larger)
    return p, q, tl.where(p_is_larger, of_larger, of_smaller), tl.where(p_is_larger, of_smaller, of_larger)


@triton.jit
def _means(
    teacher_row,
    student_row,
    of_p,
    of_q,
    beta,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Return the expectations of log2(p / m) under p, and of log2(q / m) under q: (ROWS,) each."""
    sum_p = tl.zeros((ROWS, LANES), tl.float32)
    sum_q = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        teacher = row_logits(teacher_row, start, K, LANES, STEPS)
        student = row_logits(student_row, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            log_p, log_q = log2_softmax(teacher[step], of_p), log2_softmax(student[step], of_q)
            _, _, p_log, q_log = _weighted(log_p, log_q, beta)
            sum_p += p_log
            sum_q += q_log
    return tl.sum(sum_p, 1), tl.sum(sum_q, 1)


@triton.jit
def _write_gradients(
    teacher_grad_ptr,
    student_grad_ptr,
    teacher_row,
    student_row,
    of_p,
    of_q,
    mean_p,
    mean_q,
    scale_p,
    scale_q,
    row,
    ignored,
    beta,
    B,
    K: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the gradients at the logits, (B, K) and dense."""
    for start in range(0, K, STEPS * LANES):
        teacher = row_logits(teacher_row, start, K, LANES, STEPS)
        student = row_logits(student_row, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            log_p, log_q = log2_softmax(teacher[step], of_p), log2_softmax(student[step], of_q)
            p, q, p_log, q_log = _weighted(log_p, log_q, beta)
            cls = start + step * LANES + tl.arange(0, LANES)
            if teacher_grad_ptr is not None:
                grad = scale_p[:, None] * (p_log - p * tl.expand_dims(mean_p, 1))
                store_block(teacher_grad_ptr, grad, row, cls, ignored, B, K, K)
            if student_grad_ptr is not None:
                grad = scale_q[:, None] * (q_log - q * tl.expand_dims(mean_q, 1))
                store_block(student_grad_ptr, grad, row, cls, ignored, B, K, K)


@triton.jit
def _js_kernel(
    student_ptr,
    teacher_ptr,
    label_ptr,
    temperature_ptr,
    weight_ptr,
    row_weight_ptr,
    row_grad_ptr,
    loss_ptr,
    student_grad_ptr,
    teacher_grad_ptr,
    temperature,
    student_temperature,
    beta,
    ignore_index,
    BY_ROW: tl.constexpr,
    temperature_stride,
    row_weight_stride,
    row_grad_stride,
    B,
    STUDENT_STRIDE: tl.constexpr,  # constant as K is: what divides it decides how wide an access may be
    TEACHER_STRIDE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the weighted loss of each row to loss (B,), or its gradients to (B, K), dense, or one of them.

    Without temperature_ptr, `temperature` is that of every row.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, B - 1)  # rows past the end repeat the last one, and are not stored
    student_row, teacher_row = student_ptr + real * STUDENT_STRIDE, teacher_ptr + real * TEACHER_STRIDE
    _, own_temperature, scale, ignored = row_numbers(
        label_ptr, temperature_ptr, weight_ptr, row_weight_ptr, row_grad_ptr,
        temperature_stride, row_weight_stride, row_grad_stride, ignore_index, temperature, real, BY_ROW, K, ROWS,
    )  # fmt: skip
    rate_p = LOG2E / own_temperature
    rate_q = tl.full((ROWS,), 1.0, tl.float32) * (LOG2E / student_temperature)
    peak_p = row_peak(teacher_row, K, ROWS, LANES, STEPS)
    peak_q = row_peak(student_row, K, ROWS, LANES, STEPS)
    log_total_p = row_log2_total(teacher_row, peak_p, rate_p, K, ROWS, LANES, STEPS)
    log_total_q = row_log2_total(student_row, peak_q, rate_q, K, ROWS, LANES, STEPS)
    of_p, of_q = (peak_p, rate_p, log_total_p), (peak_q, rate_q, log_total_q)
    mean_p, mean_q = _means(teacher_row, student_row, of_p, of_q, beta, K, ROWS, LANES, STEPS)
    if loss_ptr is not None:
        loss = (beta * mean_p + (1 - beta) * mean_q) * LN2
        loss = scale * tl.maximum(loss, 0.0, propagate_nan=tl.PropagateNan.ALL)  # only rounding makes it negative
        tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss), mask=row < B)
    else:
        scale_p = beta * scale * rate_p * (LN2 * LN2)  # a rate is 1 / (LN2 temperature)
        scale_q = (1 - beta) * scale * rate_q * (LN2 * LN2)
        _write_gradients(
            teacher_grad_ptr, student_grad_ptr, teacher_row, student_row, of_p, of_q, mean_p, mean_q,
            scale_p, scale_q, row, ignored, beta, B, K, LANES, STEPS,
        )  # fmt: skip


def launch(
    inputs: Inputs,
    beta: float,
    row_grad: Tensor | None = None,
    *,
    loss: Tensor | None = None,
    student_grad: Tensor | None = None,
    teacher_grad: Tensor | None = None,
) -> None:
    """Fill `loss`, (B,), with the loss of each row; or gradients, (B, K), with those of the losses times `row_grad`."""
    launch_prepared(
        _prepared,
        *(inputs.student, inputs.teacher, inputs.label, inputs.temperatures, inputs.class_weight, inputs.row_weight),
        *(row_grad, loss, student_grad, teacher_grad),
        *(float(inputs.temperature), float(inputs.student_temperature), float(beta)),
        *(inputs.ignore_index, inputs.by_row and inputs.temperatures is not None),
    )


def _prepared(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None,
    temperatures: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    row_grad: Tensor | None,
    loss: Tensor | None,
    student_grad: Tensor | None,
    teacher_grad: Tensor | None,
    temperature: float,
    student_temperature: float,
    beta: float,
    ignore_index: int | None,
    by_row: bool,
) -> Launch | None:
    """Check the arguments, and return the launch."""
    tensors = (student, teacher, label, temperatures, class_weight, None, row_weight)
    require_fitting(
        Inputs(*tensors, temperature, student_temperature, by_row, ignore_index, reverse=False, given=False)
    )
    batch, classes = student.shape
    if batch == 0:
        return None
    named: dict[str, Any] = row_tiles(classes, access_width(classes, student, teacher))
    grid = (cdiv(batch, named["ROWS"]),)
    named |= {"STUDENT_STRIDE": row_stride(student), "TEACHER_STRIDE": row_stride(teacher), "B": batch}
    named |= {"temperature_stride": each_stride(temperatures) if by_row else 0}
    named |= {"row_weight_stride": each_stride(row_weight), "row_grad_stride": each_stride(row_grad)}
    return Launch(_js_kernel, grid, named)
