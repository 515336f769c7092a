"""The arithmetic of class_temperature_kl: the reference in PyTorch, and the Triton kernel that must agree with it.

The formula stands in class_temperature_kl.py. Bound by memory and, at the sizes of a training step, by the launch. One
launch reads 2 (B, K) tensors, where eager PyTorch takes ten launches, which write and read 7 more.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (Triton declares that static_range never returns, so pyright lets no loop go over it. And pyright does not see that
# two `if` on the same constant go together.)

from typing import Any, NamedTuple

import torch
from torch import Tensor

from retemper.kernels.language import cdiv, tl, triton
from retemper.kernels.logit_rows import row_log2_total, row_logits, row_peak, row_tiles
from retemper.kernels.numerics import LN2, LOG2E, exp2_m1, log2_1m
from retemper.kernels.runtime import EXACT, access_width, compute_dtype, launching


class Inputs(NamedTuple):
    """The arguments of the operators, in their order.

    Attributes:
        student, teacher: (B, K) logits.
        label: (B,) int64.
        temperature_by_class: (K,) temperatures of the teacher; None where the number `temperature` holds for all.
        class_weight, label_trust: (K,) or None.
        temperature, student_temperature: numbers above 0.
    """

    student: Tensor
    teacher: Tensor
    label: Tensor
    temperature_by_class: Tensor | None
    class_weight: Tensor | None
    label_trust: Tensor | None
    temperature: float
    student_temperature: float

    def for_reference(self) -> dict[str, Any]:
        """Return the keyword arguments of the references."""
        by_class = self.temperature_by_class
        return {
            "student": self.student,
            "teacher": self.teacher,
            "label": self.label,
            "temperature": self.temperature if by_class is None else by_class,
            "student_temperature": self.student_temperature,
            "class_weight": self.class_weight,
            "label_trust": self.label_trust,
        }


def class_temperature_kl_reference(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
) -> Tensor:
    """Compute the loss of each row in plain PyTorch and in float64: the truth for the tests, and the path on a CPU.

    Args:
        student, teacher, label, ...: as for `class_temperature_kl`, but not checked.

    Returns:
        (B,) in nats; float32, or float64 when student or teacher is.
    """
    temperature = _filled(temperature, student, teacher)
    label, temperature, class_weight, label_trust = _of_class(label, temperature, class_weight, label_trust)
    log_p = _log_softmax(teacher.double(), temperature)
    log_q = _log_softmax(student.double(), student_temperature)
    p = log_p.exp()
    if label_trust is not None:
        p = _mixed(p, label, label_trust)
        log_p = torch.where(label_trust == 0, log_p, p.log())
    kl = torch.where(p == 0, 0, p * (log_p - log_q)).sum(1)
    kl = torch.where(kl < 0, 0, kl)  # only rounding makes it negative; NaN stays
    kl = kl if class_weight is None else kl * class_weight[:, 0]
    return kl.to(compute_dtype(student, teacher))


def class_temperature_kl_grad_reference(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
    row_grad: Tensor | None = None,
) -> Tensor:
    """Compute d(sum_i row_grad_i loss_i) / d(student) in plain PyTorch and in float64, into a new tensor.

    Args:
        student, teacher, label, ...: as for `class_temperature_kl`, but not checked.
        row_grad: (B,) float; 1 for each row when left out.

    Returns:
        (B, K) of the student's dtype.
    """
    temperature = _filled(temperature, student, teacher)
    label, temperature, class_weight, label_trust = _of_class(label, temperature, class_weight, label_trust)
    p = _log_softmax(teacher.double(), temperature).exp_()
    if label_trust is not None:
        p = _mixed(p, label, label_trust)
    grad = _log_softmax(student.double(), student_temperature).exp_().sub_(p).div_(student_temperature)
    if class_weight is not None:
        grad *= class_weight
    if row_grad is not None:
        grad *= row_grad[:, None]
    return grad.to(student.dtype)


def _filled(temperature: float | Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the (K,) temperatures. A number is written K times, rounded to the dtype in which the loss is returned."""
    if isinstance(temperature, Tensor):
        return temperature
    return student.new_full(student.shape[1:], temperature, dtype=compute_dtype(student, teacher))


def _of_class(label: Tensor, *by_class: Tensor | None) -> list[Any]:
    """Return the labels, clamped to the classes, and for each (K,) tensor the value of each row's class as (B, 1).

    A row whose label is no class gets NaN. All tensors are looked up at once: on a CPU, one operation more in each
    attack step shows in the time of a training.
    """
    given = torch.stack([value for value in by_class if value is not None]).double()
    known, label = (label >= 0) & (label < given.shape[1]), label.clamp(0, given.shape[1] - 1)
    columns = iter(torch.where(known, given.index_select(1, label), float("nan"))[:, :, None])
    return [label, *(None if value is None else next(columns) for value in by_class)]


def _mixed(p: Tensor, label: Tensor, trust: Tensor) -> Tensor:
    """Move the teacher's probabilities, in place, towards the one-hot label by its trust."""
    one_hot = torch.eye(p.shape[1], dtype=p.dtype, device=p.device).index_select(0, label)
    return p.lerp_(one_hot, trust)


def _log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return log softmax(logits / temperature), with the peak subtracted first as in logit_rows.py."""
    return ((logits - logits.amax(1, keepdim=True)) / temperature).log_softmax(1)


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
def _kl_kernel(
    student_ptr,
    teacher_ptr,
    label_ptr,
    temperature_ptr,
    weight_ptr,
    trust_ptr,
    row_grad_ptr,
    out_ptr,
    row_grad_stride,
    temperature,
    student_temperature,
    B,
    STUDENT_STRIDE: tl.constexpr,  # constant as K is: what divides it decides how wide an access may be
    TEACHER_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    K: tl.constexpr,
    GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the weighted loss of each row to out (B,), or its gradient to out (B, K), which may be the student itself.

    Without temperature_ptr, `temperature` is that of every class.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, B - 1)  # rows past the end repeat the last one, and are not stored
    student_row, teacher_row = student_ptr + real * STUDENT_STRIDE, teacher_ptr + real * TEACHER_STRIDE
    label = tl.load(label_ptr + real)
    known = (label >= 0) & (label < K)
    own_temperature = tl.where(known, temperature, float("nan"))
    if temperature_ptr is not None:
        own_temperature = tl.load(temperature_ptr + label, mask=known, other=float("nan"))
    rate_p = LOG2E / own_temperature
    rate_q = tl.full((ROWS,), LOG2E, tl.float32) / student_temperature
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + label, mask=known, other=float("nan"))
    if row_grad_ptr is not None:
        scale *= tl.load(row_grad_ptr + real * row_grad_stride)

    peak_p = row_peak(teacher_row, K, ROWS, LANES, STEPS)
    peak_q = row_peak(student_row, K, ROWS, LANES, STEPS)
    log_total_p = row_log2_total(teacher_row, peak_p, rate_p, K, ROWS, LANES, STEPS)
    log_total_q = row_log2_total(student_row, peak_q, rate_q, K, ROWS, LANES, STEPS)
    if trust_ptr is not None:
        trust = tl.load(trust_ptr + label, mask=known, other=float("nan"))
        own = tl.load(teacher_row + label, mask=known, other=float("nan")).to(tl.float32)
        log_own = _mixed_own((own - peak_p) * rate_p - log_total_p, trust)
        log_kept = log2_1m(trust)
    if GRAD:
        scale = scale / student_temperature
    kl = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        teacher = row_logits(teacher_row, start, K, LANES, STEPS)
        student = row_logits(student_row, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            log_p = (teacher[step] - peak_p[:, None]) * rate_p[:, None] - log_total_p[:, None]
            log_q = (student[step] - peak_q[:, None]) * rate_q[:, None] - log_total_q[:, None]
            cls = start + step * LANES + tl.arange(0, LANES)
            if trust_ptr is not None:
                log_p = tl.where(cls == label[:, None], log_own[:, None], log_p + log_kept[:, None])
            if GRAD:
                grad = (scale[:, None] * _difference(log_p, log_q)).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + (row * OUT_STRIDE)[:, None] + cls, grad, mask=(row < B)[:, None] & (cls < K))
            else:
                p = tl.exp2(log_p)
                kl += tl.where(p == 0, 0.0, p * (log_p - log_q))
    if not GRAD:
        # only rounding makes a sum negative; NaN stays
        loss = tl.maximum(LN2 * tl.sum(kl, 1), 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + row, scale * loss, mask=row < B)


def _row_stride(rows: Tensor) -> int:
    """Return the stride from row to row. That of a single row means nothing, and is not worth a kernel of its own."""
    return rows.stride(0) if rows.shape[0] > 1 else rows[0].numel()


def launch(inputs: Inputs, row_grad: Tensor | None, out: Tensor) -> None:
    """Fill `out` by the Triton kernel: (B,) with the loss of each row, or (B, K) with its gradient times `row_grad`."""
    student, teacher, label, *by_class, temperature, student_temperature = inputs
    batch, classes = student.shape
    if batch == 0:
        return
    tiles = row_tiles(classes, access_width(classes, student, teacher))
    strides = {f"{name}_STRIDE": _row_stride(rows) for name, rows in (("STUDENT", student), ("TEACHER", teacher))}
    options: dict[str, Any] = {**strides, "OUT_STRIDE": _row_stride(out), "GRAD": out.dim() == 2, **tiles, **EXACT}
    tensors = (student, teacher, label, *(None if value is None else value.float() for value in by_class))
    row_grad_stride = 0 if row_grad is None else row_grad.stride(0)
    arguments: Any = (*tensors, row_grad, out, row_grad_stride, temperature, student_temperature, batch)
    with launching(student):
        _kl_kernel[(cdiv(batch, tiles["ROWS"]),)](*arguments, **options)
