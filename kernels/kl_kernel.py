"""The Triton kernel of class_temperature_kl, which must agree with the reference in kl_divergence.py.

Bound by memory and, at the sizes of a training step, by the launch. One launch reads 2 (B, K) tensors, where eager
PyTorch takes ten launches, which write and read 7 more. The gradients of student and teacher are one launch too.

Everything is in powers of 2: log_p and log_q are logarithms to the base 2 (numerics.py says why). P and Q are as in
kl_divergence.py: `launch` hands them over in this order, and REVERSE says that P is the student.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (Triton declares that static_range never returns, so pyright lets no loop go over it. And pyright does not see that
# two `if` on the same constant go together.)

from typing import Any

from torch import Tensor

from retemper.kernels.kl_arguments import Inputs, require_fitting, require_overwritable
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
from retemper.kernels.numerics import LN2, LOG2E, exp2_m1, log2_1m
from retemper.kernels.runtime import access_width


@triton.jit
def _mixed_own(log_p, trust):
    """Return log2 of the target at the label, ((1 - trust) p + trust), from log2 of the teacher's p there."""
    short = -(1 - trust) * exp2_m1(log_p)  # what the target lacks of 1: where that is small, it keeps its digits
    mixed = tl.where(short > 0.5, tl.log2((1 - trust) * tl.exp2(log_p) + trust), log2_1m(short))
    return tl.where(trust == 0, log_p, mixed)


@triton.jit
def _difference(log_p, log_q):
    """Return q - p as the larger of the two times what the smaller lacks: subtracting would lose the digits."""
    larger = tl.exp2(tl.maximum(log_p, log_q, propagate_nan=tl.PropagateNan.ALL))
    ratio = log_q - log_p
    apart = larger * exp2_m1(-tl.abs(ratio))
    return tl.where(larger == 0, 0.0, tl.where(ratio <= 0, apart, -apart))


@triton.jit
def _row_mass(row_ptr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr):
    """Return the sum of each row: (ROWS,)."""
    mass = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        values = row_logits(row_ptr, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            cls = start + step * LANES + tl.arange(0, LANES)
            mass += tl.where(cls < K, values[step], 0.0)
    return tl.sum(mass, 1)


@triton.jit
def _target_numbers(
    trust_ptr, trust_stride, p_row, label, row, of_p, of_p_logits, TRUST_BY_ROW: tl.constexpr, ROWS: tl.constexpr
):
    """Return the trust in the label, log2 of the target there, and log2 of the share that it keeps of P: (ROWS,)."""
    trust = tl.zeros((ROWS,), tl.float32)
    log_own, log_kept = trust, trust
    if trust_ptr is not None:
        peak, rate, log_total = of_p
        if TRUST_BY_ROW:
            trust = tl.load(trust_ptr + row * trust_stride).to(tl.float32)
        else:
            trust = tl.load(trust_ptr + label).to(tl.float32)
        own = tl.load(p_row + label).to(tl.float32)
        log_own = _mixed_own((own - peak) * rate - log_total, trust)
        log_kept = log2_1m(trust)
        if of_p_logits:
            log_kept = tl.maximum(log_kept, -1e30)  # a trust of 1 leaves P no share, and its logits a gradient of 0
    return trust, log_own, log_kept


@triton.jit
def _logarithms(p, q, cls, of_p, of_q, target, trusted, GIVEN: tl.constexpr, K: tl.constexpr):
    """Return log2 of P, of the target that is made of it, and of Q, of a block (ROWS, LANES)."""
    log_q = log2_softmax(q, of_q)
    if GIVEN:
        log_p = tl.log2(tl.where(cls < K, p, 0.0))
    else:
        log_p = log2_softmax(p, of_p)
    log_target = log_p
    if trusted:
        label, log_own, log_kept = target
        log_target = tl.where(cls == label[:, None], log_own[:, None], log_p + log_kept[:, None])
    return log_p, log_target, log_q


@triton.jit
def _expectation(
    p_row,
    q_row,
    of_p,
    of_q,
    target,
    of_target,
    trusted,
    GIVEN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Return the expectation of log2 target - log2 Q, over the target or else over P: (ROWS,)."""
    total = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        p = row_logits(p_row, start, K, LANES, STEPS)
        q = row_logits(q_row, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            cls = start + step * LANES + tl.arange(0, LANES)
            log_p, log_target, log_q = _logarithms(p[step], q[step], cls, of_p, of_q, target, trusted, GIVEN, K)
            weight = tl.exp2(log_target if of_target else log_p)
            total += tl.where(weight == 0, 0.0, weight * (log_target - log_q))
    return tl.sum(total, 1)


@triton.jit
def _write_gradients(
    p_grad_ptr,
    q_grad_ptr,
    p_row,
    q_row,
    of_p,
    of_q,
    target,
    mean,
    scale_p,
    scale_q,
    row,
    ignored,
    B,
    P_GRAD_STRIDE: tl.constexpr,
    Q_GRAD_STRIDE: tl.constexpr,
    trusted,
    GIVEN: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the gradients at the logits of P and Q. That of P is measured from `mean`, the expectation over P."""
    for start in range(0, K, STEPS * LANES):
        p = row_logits(p_row, start, K, LANES, STEPS)
        q = row_logits(q_row, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            cls = start + step * LANES + tl.arange(0, LANES)
            log_p, log_target, log_q = _logarithms(p[step], q[step], cls, of_p, of_q, target, trusted, GIVEN, K)
            if q_grad_ptr is not None:
                log_level = log_q
                if GIVEN:  # q times the sum of p, which need not be 1
                    log_level = log_q + of_p[2][:, None]
                grad = scale_q[:, None] * _difference(log_target, log_level)
                store_block(q_grad_ptr, grad, row, cls, ignored, B, Q_GRAD_STRIDE, K)
            if p_grad_ptr is not None:
                if GIVEN:
                    grad = scale_p[:, None] * (log_p - log_q + LOG2E)
                else:
                    weight = tl.exp2(log_p)
                    apart = tl.where(weight == 0, 0.0, log_target - log_q)
                    grad = scale_p[:, None] * (weight * (apart - tl.expand_dims(mean, 1)))
                store_block(p_grad_ptr, grad, row, cls, ignored, B, P_GRAD_STRIDE, K)


@triton.jit
def _kl_kernel(
    p_ptr,
    q_ptr,
    label_ptr,
    temperature_ptr,
    weight_ptr,
    trust_ptr,
    row_weight_ptr,
    row_grad_ptr,
    loss_ptr,
    p_grad_ptr,
    q_grad_ptr,
    temperature,
    student_temperature,
    ignore_index,
    BY_ROW: tl.constexpr,
    REVERSE: tl.constexpr,
    GIVEN: tl.constexpr,
    TRUST_BY_ROW: tl.constexpr,
    temperature_stride,
    row_weight_stride,
    row_grad_stride,
    B,
    trust_stride,
    P_STRIDE: tl.constexpr,  # constant as K is: what divides it decides how wide an access may be
    Q_STRIDE: tl.constexpr,
    P_GRAD_STRIDE: tl.constexpr,
    Q_GRAD_STRIDE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the weighted loss of each row to loss (B,), or one or both of its gradients at the logits to (B, K).

    A gradient may be written over its own logits. Without temperature_ptr, `temperature` is that of every row.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, B - 1)  # rows past the end repeat the last one, and are not stored
    p_row, q_row = p_ptr + real * P_STRIDE, q_ptr + real * Q_STRIDE
    label, temperature_p, scale, ignored = row_numbers(
        label_ptr, temperature_ptr, weight_ptr, row_weight_ptr, row_grad_ptr,
        temperature_stride, row_weight_stride, row_grad_stride, ignore_index, temperature, real, BY_ROW, K, ROWS,
    )  # fmt: skip
    temperature_q = tl.full((ROWS,), 1.0, tl.float32) * student_temperature
    if REVERSE:
        temperature_p, temperature_q = temperature_q, temperature_p
    rate_p = LOG2E / temperature_p
    rate_q = LOG2E / temperature_q
    peak_p, log_total_p = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    if GIVEN:
        if label_ptr is not None:
            scale = tl.where(temperature_p > 0, scale, float("nan"))  # else the rows of no class would go unseen
        if q_grad_ptr is not None:
            log_total_p = tl.log2(_row_mass(p_row, K, ROWS, LANES, STEPS))
    else:
        peak_p = row_peak(p_row, K, ROWS, LANES, STEPS)
    peak_q = row_peak(q_row, K, ROWS, LANES, STEPS)
    if not GIVEN:
        log_total_p = row_log2_total(p_row, peak_p, rate_p, K, ROWS, LANES, STEPS)
    log_total_q = row_log2_total(q_row, peak_q, rate_q, K, ROWS, LANES, STEPS)
    of_p, of_q = (peak_p, rate_p, log_total_p), (peak_q, rate_q, log_total_q)
    trust, log_own, log_kept = _target_numbers(
        trust_ptr, trust_stride, p_row, label, real, of_p, p_grad_ptr is not None, TRUST_BY_ROW, ROWS
    )
    target = (label, log_own, log_kept)

    mean = tl.zeros((ROWS,), tl.float32)
    if loss_ptr is not None or (p_grad_ptr is not None and not GIVEN):
        mean = _expectation(
            p_row, q_row, of_p, of_q, target,
            loss_ptr is not None, trust_ptr is not None, GIVEN, K, ROWS, LANES, STEPS,
        )  # fmt: skip
    if loss_ptr is not None:
        loss = mean * LN2
        if not GIVEN:  # only rounding makes a sum negative; NaN stays
            loss = tl.maximum(loss, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(loss_ptr + row, tl.where(ignored, 0.0, scale * loss), mask=row < B)
    else:
        scale_p, scale_q = scale * LN2, scale / temperature_q
        if not GIVEN:
            scale_p = scale_p / temperature_p * (1 - trust)
        _write_gradients(
            p_grad_ptr, q_grad_ptr, p_row, q_row, of_p, of_q, target, mean, scale_p, scale_q, row, ignored, B,
            P_GRAD_STRIDE, Q_GRAD_STRIDE, trust_ptr is not None, GIVEN, K, LANES, STEPS,
        )  # fmt: skip


def launch(
    inputs: Inputs,
    row_grad: Tensor | None = None,
    *,
    loss: Tensor | None = None,
    student_grad: Tensor | None = None,
    teacher_grad: Tensor | None = None,
) -> None:
    """Fill `loss`, (B,), with the loss of each row; or gradients, (B, K), with those of the losses times `row_grad`."""
    p, q, p_grad, q_grad = inputs.teacher, inputs.student, teacher_grad, student_grad
    if inputs.reverse:
        p, q, p_grad, q_grad = q, p, q_grad, p_grad
    launch_prepared(
        _prepared,
        *(p, q, inputs.label, inputs.temperatures, inputs.class_weight, inputs.label_trust, inputs.row_weight),
        *(row_grad, loss, p_grad, q_grad, float(inputs.temperature), float(inputs.student_temperature)),
        *(inputs.ignore_index, inputs.by_row and inputs.temperatures is not None, inputs.reverse, inputs.given),
        inputs.trust_by_row and inputs.label_trust is not None,
    )


def _prepared(
    p: Tensor,
    q: Tensor,
    label: Tensor | None,
    temperatures: Tensor | None,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    row_weight: Tensor | None,
    row_grad: Tensor | None,
    loss: Tensor | None,
    p_grad: Tensor | None,
    q_grad: Tensor | None,
    temperature: float,
    student_temperature: float,
    ignore_index: int | None,
    by_row: bool,
    reverse: bool,
    given: bool,
    trust_by_row: bool,
) -> Launch | None:
    """Check the arguments, and return the launch."""
    student, teacher = (p, q) if reverse else (q, p)
    tensors = (student, teacher, label, temperatures, class_weight, label_trust, row_weight)
    inputs = Inputs(*tensors, temperature, student_temperature, by_row, ignore_index, reverse, given, trust_by_row)
    (require_overwritable if loss is None else require_fitting)(inputs)
    batch, classes = student.shape
    if batch == 0:
        return None
    named: dict[str, Any] = row_tiles(classes, access_width(classes, p, q))
    grid = (cdiv(batch, named["ROWS"]),)
    named |= {"P_STRIDE": row_stride(p), "Q_STRIDE": row_stride(q), "B": batch}
    named |= {"P_GRAD_STRIDE": row_stride(p_grad), "Q_GRAD_STRIDE": row_stride(q_grad)}
    named |= {"temperature_stride": each_stride(temperatures) if by_row else 0}
    named |= {"trust_stride": each_stride(label_trust) if trust_by_row else 0}
    named |= {"row_weight_stride": each_stride(row_weight), "row_grad_stride": each_stride(row_grad)}
    return Launch(_kl_kernel, grid, named)
