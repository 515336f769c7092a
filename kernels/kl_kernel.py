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

from retemper.kernels.kl_arguments import Inputs
from retemper.kernels.language import cdiv, tl, triton
from retemper.kernels.logit_rows import row_log2_total, row_logits, row_peak, row_tiles
from retemper.kernels.numerics import LN2, LOG2E, exp2_m1, log2_1m
from retemper.kernels.runtime import EXACT, access_width, launching


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
    temperature_stride,
    row_weight_stride,
    row_grad_stride,
    ignore_index,
    temperature,
    student_temperature,
    B,
    P_STRIDE: tl.constexpr,  # constant as K is: what divides it decides how wide an access may be
    Q_STRIDE: tl.constexpr,
    P_GRAD_STRIDE: tl.constexpr,
    Q_GRAD_STRIDE: tl.constexpr,
    BY_ROW: tl.constexpr,
    REVERSE: tl.constexpr,
    GIVEN: tl.constexpr,
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
    known = real >= 0
    own_temperature = tl.full((ROWS,), 1.0, tl.float32) * temperature
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if label_ptr is not None:
        given = tl.load(label_ptr + real).to(tl.int64)
        known = given.to(tl.uint64, bitcast=True) < K
        label = tl.where(known, given, 0).to(tl.int32)  # what is read of class 0 instead counts for nothing beside NaN
        if ignore_index is not None:
            ignored = given == ignore_index
        own_temperature = tl.where(known, temperature, float("nan"))
        if GIVEN:
            scale = tl.where(known, 1.0, float("nan"))
    if temperature_ptr is not None:
        if BY_ROW:
            own_temperature = tl.load(temperature_ptr + real * temperature_stride).to(tl.float32)
        else:
            own_temperature = tl.load(temperature_ptr + label).to(tl.float32)
        own_temperature = tl.where(known & (own_temperature > 0), own_temperature, float("nan"))
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + label).to(tl.float32)
    if row_weight_ptr is not None:
        scale *= tl.load(row_weight_ptr + real * row_weight_stride).to(tl.float32)
    if row_grad_ptr is not None:
        scale *= tl.load(row_grad_ptr + real * row_grad_stride)
    plain_temperature = tl.full((ROWS,), 1.0, tl.float32) * student_temperature
    if REVERSE:
        temperature_p, temperature_q = plain_temperature, own_temperature
    else:
        temperature_p, temperature_q = own_temperature, plain_temperature
    rate_p = LOG2E / temperature_p
    rate_q = LOG2E / temperature_q
    if GIVEN:
        if q_grad_ptr is not None:
            log_mass = tl.log2(_row_mass(p_row, K, ROWS, LANES, STEPS))
    else:
        peak_p = row_peak(p_row, K, ROWS, LANES, STEPS)
    peak_q = row_peak(q_row, K, ROWS, LANES, STEPS)
    if not GIVEN:
        log_total_p = row_log2_total(p_row, peak_p, rate_p, K, ROWS, LANES, STEPS)
    log_total_q = row_log2_total(q_row, peak_q, rate_q, K, ROWS, LANES, STEPS)
    if trust_ptr is not None:
        trust = tl.load(trust_ptr + label).to(tl.float32)
        own = tl.load(p_row + label).to(tl.float32)
        log_own = _mixed_own((own - peak_p) * rate_p - log_total_p, trust)
        log_kept = log2_1m(trust)

    # the expectation of log_p - log_q: the loss, and what P's gradient is measured from
    if loss_ptr is not None or (p_grad_ptr is not None and not GIVEN):
        kl = tl.zeros((ROWS, LANES), tl.float32)
        for start in range(0, K, STEPS * LANES):
            p = row_logits(p_row, start, K, LANES, STEPS)
            q = row_logits(q_row, start, K, LANES, STEPS)
            for step in tl.static_range(STEPS):
                log_q = (q[step] - peak_q[:, None]) * rate_q[:, None] - log_total_q[:, None]
                cls = start + step * LANES + tl.arange(0, LANES)
                if GIVEN:
                    log_p = tl.log2(tl.where(cls < K, p[step], 0.0))
                else:
                    log_p = (p[step] - peak_p[:, None]) * rate_p[:, None] - log_total_p[:, None]
                log_weight = log_p
                if trust_ptr is not None:
                    log_p = tl.where(cls == label[:, None], log_own[:, None], log_p + log_kept[:, None])
                    if loss_ptr is not None:
                        log_weight = log_p
                weight = tl.exp2(log_weight)
                kl += tl.where(weight == 0, 0.0, weight * (log_p - log_q))
        mean = tl.sum(kl, 1)
        middle = tl.expand_dims(mean, 1)
    if loss_ptr is not None:
        loss = mean * LN2
        if not GIVEN:  # only rounding makes a sum negative; NaN stays
            loss = tl.maximum(loss, 0.0, propagate_nan=tl.PropagateNan.ALL)
        loss = scale * loss
        if ignore_index is not None:
            loss = tl.where(ignored, 0.0, loss)
        tl.store(loss_ptr + row, loss, mask=row < B)
    else:
        scale_q = scale / temperature_q
        if p_grad_ptr is not None:
            scale_p = scale * LN2
            if not GIVEN:
                scale_p = scale_p / temperature_p
            if trust_ptr is not None:
                scale_p *= 1 - trust
        for start in range(0, K, STEPS * LANES):
            p = row_logits(p_row, start, K, LANES, STEPS)
            q = row_logits(q_row, start, K, LANES, STEPS)
            for step in tl.static_range(STEPS):
                log_q = (q[step] - peak_q[:, None]) * rate_q[:, None] - log_total_q[:, None]
                cls = start + step * LANES + tl.arange(0, LANES)
                inside = (row < B)[:, None] & (cls < K)
                if GIVEN:
                    log_p = tl.log2(tl.where(cls < K, p[step], 0.0))
                else:
                    log_p = (p[step] - peak_p[:, None]) * rate_p[:, None] - log_total_p[:, None]
                log_source = log_p
                if trust_ptr is not None:
                    log_p = tl.where(cls == label[:, None], log_own[:, None], log_p + log_kept[:, None])
                if q_grad_ptr is not None:
                    if GIVEN:
                        grad = scale_q[:, None] * _difference(log_p, log_q + log_mass[:, None])
                    else:
                        grad = scale_q[:, None] * _difference(log_p, log_q)
                    if ignore_index is not None:
                        grad = tl.where(ignored[:, None], 0.0, grad)
                    grad = grad.to(q_grad_ptr.dtype.element_ty)
                    tl.store(q_grad_ptr + (row * Q_GRAD_STRIDE)[:, None] + cls, grad, mask=inside)
                if p_grad_ptr is not None:
                    if GIVEN:
                        grad = scale_p[:, None] * (log_p - log_q + LOG2E)
                    else:
                        weight = tl.exp2(log_source)
                        apart = tl.where(weight == 0, 0.0, log_p - log_q)
                        grad = scale_p[:, None] * (weight * (apart - middle))
                    if ignore_index is not None:
                        grad = tl.where(ignored[:, None], 0.0, grad)
                    grad = grad.to(p_grad_ptr.dtype.element_ty)
                    tl.store(p_grad_ptr + (row * P_GRAD_STRIDE)[:, None] + cls, grad, mask=inside)


def _row_stride(rows: Tensor | None) -> int:
    """Return the stride from row to row. That of a single row means nothing, and is not worth a kernel of its own."""
    if rows is None:
        return 0
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def _each_stride(values: Tensor | None) -> int:
    """Return the stride from number to number, and 0 where one number holds for all."""
    return values.stride(0) if values is not None and values.dim() else 0


def launch(
    inputs: Inputs,
    row_grad: Tensor | None = None,
    *,
    loss: Tensor | None = None,
    student_grad: Tensor | None = None,
    teacher_grad: Tensor | None = None,
) -> None:
    """Fill `loss`, (B,), with the loss of each row; or gradients, (B, K), with those of the losses times `row_grad`."""
    batch, classes = inputs.student.shape
    if batch == 0:
        return
    p, q, p_grad, q_grad = inputs.teacher, inputs.student, teacher_grad, student_grad
    if inputs.reverse:
        p, q, p_grad, q_grad = q, p, q_grad, p_grad
    tiles = row_tiles(classes, access_width(classes, p, q))
    by_row = inputs.by_row and inputs.temperatures is not None
    arguments: Any = (
        *(p, q, inputs.label, inputs.temperatures),
        *(inputs.class_weight, inputs.label_trust, inputs.row_weight, row_grad),
        *(loss, p_grad, q_grad),
        *(_each_stride(inputs.temperatures) if by_row else 0, _each_stride(inputs.row_weight), _each_stride(row_grad)),
        *(inputs.ignore_index, inputs.temperature, inputs.student_temperature, batch),
    )
    strides = (_row_stride(p), _row_stride(q), _row_stride(p_grad), _row_stride(q_grad))
    constants: Any = (*strides, by_row, inputs.reverse, inputs.given)
    options: dict[str, Any] = {**tiles, **EXACT}
    with launching(p):
        _kl_kernel[(cdiv(batch, tiles["ROWS"]),)](*arguments, *constants, **options)
