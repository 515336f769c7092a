"""KL divergence to a teacher whose temperature depends on the class (ABSLD, Zhao et al., 2023), forward and backward.

    loss_i  = w[y_i] sum_k p_ik (log p_ik - log q_ik)
    p_i     = softmax(teacher_i / T[y_i]),   q_i = softmax(student_i / Ts)
    d loss_i / d student_ik = w[y_i] (q_ik - p_ik) / Ts

A term with p = 0 is 0, as in torch.xlogy. The peak of a row is taken off before the division by the temperature: logits
of 1e4 at temperature 0.05 would otherwise lose their differences to rounding. Bound by memory and, at the sizes of a
training step, by the launch: one launch reads 2 (B, K) tensors, where eager takes ten to write and re-read seven.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retemper.kernels.runtime import (
    EXACT,
    compute_dtype,
    launching,
    require_one_device,
    require_rows,
    require_vector,
    require_writable,
    runs_triton,
)

TILE = 1024  # logits of each tensor a program holds at a time: 8 per thread of 4 warps
REDUCTIONS = ("batchmean", "mean", "sum", "none")


def row_tiles(classes: int) -> dict[str, int]:
    """A kernel's constants. A program's tile holds whole rows while they fit, one row in blocks when they do not."""
    block = min(triton.next_power_of_2(classes), TILE)
    return {"K": classes, "ROWS": TILE // block, "BLOCK": block}


def class_temperature_kl_reference(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: Tensor,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """The loss of each row in plain PyTorch, in float64: the truth for the tests, and the path on a CPU."""
    log_p = _log_softmax(teacher.double(), _of_class(temperature, label))
    log_q = _log_softmax(student.double(), student_temperature)
    p = log_p.exp()
    kl = torch.where(p == 0, 0, p * (log_p - log_q)).sum(1)
    kl = torch.where(kl < 0, 0, kl)  # rounding only; NaN stays
    kl = kl if class_weight is None else kl * _of_class(class_weight, label)[:, 0]
    return kl.to(compute_dtype(student, teacher))


def class_temperature_kl_grad_reference(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: Tensor,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    row_grad: Tensor | None = None,
) -> Tensor:
    """d(sum of row_grad * loss)/d(student), likewise, into a new tensor of the student's dtype."""
    p = _log_softmax(teacher.double(), _of_class(temperature, label)).exp_()
    grad = _log_softmax(student.double(), student_temperature).exp_().sub_(p).div_(student_temperature)
    if class_weight is not None:
        grad *= _of_class(class_weight, label)
    if row_grad is not None:
        grad *= row_grad[:, None]
    return grad.to(student.dtype)


def _of_class(value: Tensor, label: Tensor) -> Tensor:
    """The value of each row's class as a (B, 1) column; NaN where the label is no class."""
    known = (label >= 0) & (label < value.shape[0])
    return torch.where(known, value.double()[label.clamp(0, value.shape[0] - 1)], float("nan"))[:, None]


def _log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    return ((logits - logits.amax(1, keepdim=True)) / temperature).log_softmax(1)


@triton.jit
def _tempered(row_ptr, inverse, peak, cls, K: tl.constexpr):
    """(logit - peak) / temperature of one tile, as float32; -inf beyond the last class."""
    logit = tl.load(row_ptr[:, None] + cls[None, :], mask=cls[None, :] < K, other=float("-inf")).to(tl.float32)
    return (logit - peak[:, None]) * inverse[:, None]


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0: where it is small, 1 + x would have rounded it away."""
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x / 5))))
    return tl.where(x < 0.03, series, tl.log(1 + x))


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, likewise."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.1, series, tl.exp(x) - 1)


@triton.jit
def _row_statistics(row_ptr, inverse, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The peak of each row, and log sum exp((logit - peak) / temperature), in one pass over the classes.

    The peak's own term, 1, is left out of `rest`: a sure row's rest is lost to rounding beside it.
    """
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    for start in range(0, K, BLOCK):
        lane = tl.arange(0, BLOCK)
        cls = start + lane
        logit = tl.load(row_ptr[:, None] + cls[None, :], mask=cls[None, :] < K, other=float("-inf")).to(tl.float32)
        highest = tl.max(logit, 1)
        shift = tl.where(highest == float("-inf"), 0.0, highest)  # nothing but -inf: no -inf - -inf
        others = tl.exp((logit - shift[:, None]) * inverse[:, None])
        own = lane[None, :] == tl.argmax(logit, 1)[:, None]
        add = tl.sum(tl.where(own, 0.0, others), 1)
        broken = tl.max(((logit != logit) | (logit == float("inf"))).to(tl.int32), 1)
        add = tl.where(broken > 0, float("nan"), add)
        gap = tl.where(peak == highest, 0.0, tl.abs(highest - peak))  # two -inf are no NaN apart
        lower = tl.exp(-gap * inverse) * tl.where(tl.minimum(peak, highest) == float("-inf"), 0.0, 1.0)
        rest = tl.where(peak >= highest, rest + (add + 1) * lower, (rest + 1) * lower + add)
        peak = tl.maximum(peak, highest)
    return peak, _log1p(rest)


@triton.jit
def _kl_kernel(
    student_ptr,
    teacher_ptr,
    label_ptr,
    temperature_ptr,
    weight_ptr,
    row_grad_ptr,
    out_ptr,
    student_stride,
    teacher_stride,
    row_grad_stride,
    out_stride,
    student_temperature,
    B,
    K: tl.constexpr,
    GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weighted loss of each row into out (B,), or its gradient into out (B, K), which may be the student itself."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, B - 1)  # rows past the end repeat the last one, and are not stored
    student_row, teacher_row = student_ptr + real * student_stride, teacher_ptr + real * teacher_stride
    label = tl.load(label_ptr + real)
    known = (label >= 0) & (label < K)
    inverse_p = 1.0 / tl.load(temperature_ptr + label, mask=known, other=float("nan"))
    inverse_q = tl.full((ROWS,), 1.0, tl.float32) / student_temperature
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + label, mask=known, other=float("nan"))
    if row_grad_ptr is not None:
        scale *= tl.load(row_grad_ptr + real * row_grad_stride)

    peak_p, log_total_p = _row_statistics(teacher_row, inverse_p, K, ROWS, BLOCK)
    peak_q, log_total_q = _row_statistics(student_row, inverse_q, K, ROWS, BLOCK)
    kl = tl.zeros((ROWS,), tl.float32)
    for start in range(0, K, BLOCK):
        cls = start + tl.arange(0, BLOCK)
        log_p = _tempered(teacher_row, inverse_p, peak_p, cls, K) - log_total_p[:, None]
        log_q = _tempered(student_row, inverse_q, peak_q, cls, K) - log_total_q[:, None]
        p = tl.exp(log_p)
        if GRAD:
            # q - p, from whichever is larger: as a difference of two it would keep no digit where they are close
            q, ratio = tl.exp(log_q), log_q - log_p
            apart = tl.where(ratio <= 0, p * _expm1(ratio), -q * _expm1(-ratio))
            grad = (scale * inverse_q)[:, None] * tl.where((p == 0) & (q == 0), 0.0, apart)
            place = out_ptr + (row * out_stride)[:, None] + cls[None, :]
            tl.store(place, grad.to(out_ptr.dtype.element_ty), mask=(row < B)[:, None] & (cls < K)[None, :])
        else:
            kl += tl.sum(tl.where(p == 0, 0.0, p * (log_p - log_q)), 1)
    if not GRAD:
        kl = tl.where(kl < 0, 0.0, kl)  # rounding only; NaN stays
        tl.store(out_ptr + row, scale * kl, mask=row < B)


def _check(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor, class_weight: Tensor | None) -> None:
    require_rows(student=student, teacher=teacher)
    require_one_device(
        student=student, teacher=teacher, label=label, temperature=temperature, class_weight=class_weight
    )
    batch, classes = student.shape
    require_vector("label", label, batch, torch.int64)
    require_vector("temperature", temperature, classes, torch.float32, torch.float64)
    require_vector("class_weight", class_weight, classes, torch.float32, torch.float64)


def _launch(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: Tensor,
    class_weight: Tensor | None,
    student_temperature: float,
    row_grad: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out`: (B,) with the loss of each row, or (B, K) with its gradient."""
    batch, classes = student.shape
    if batch == 0:
        return
    tiles = row_tiles(classes)
    strides = (student.stride(0), teacher.stride(0), row_grad.stride(0) if row_grad is not None else 0, out.stride(0))
    tensors = (student, teacher, label, temperature.float(), None if class_weight is None else class_weight.float())
    options: dict[str, Any] = {"GRAD": out.dim() == 2, **tiles, **EXACT}
    with launching(student):
        _kl_kernel[(triton.cdiv(batch, tiles["ROWS"]),)](
            *tensors, row_grad, out, *strides, student_temperature, batch, **options
        )


@torch.library.custom_op("retemper::class_temperature_kl", mutates_args=())
def _class_temperature_kl_op(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: Tensor,
    class_weight: Tensor | None,
    student_temperature: float,
) -> Tensor:
    _check(student, teacher, label, temperature, class_weight)
    if not runs_triton(student, teacher):
        return class_temperature_kl_reference(
            student, teacher, label, temperature, student_temperature=student_temperature, class_weight=class_weight
        )
    loss = student.new_empty(student.shape[0], dtype=torch.float32)
    _launch(student, teacher, label, temperature, class_weight, student_temperature, None, loss)
    return loss


@torch.library.custom_op("retemper::class_temperature_kl_backward", mutates_args=())
def _backward_op(
    row_grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: Tensor,
    class_weight: Tensor | None,
    student_temperature: float,
) -> Tensor:
    if not runs_triton(student, teacher):
        return class_temperature_kl_grad_reference(
            student,
            teacher,
            label,
            temperature,
            student_temperature=student_temperature,
            class_weight=class_weight,
            row_grad=row_grad,
        )
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(student, teacher, label, temperature, class_weight, student_temperature, row_grad, grad)
    return grad


@torch.library.custom_op("retemper::class_temperature_kl_grad_", mutates_args=("student",))
def _grad_op(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: Tensor,
    class_weight: Tensor | None,
    student_temperature: float,
) -> None:
    _check(student, teacher, label, temperature, class_weight)
    if student.shape[0] > 1 and student.stride(0) < student.shape[1]:
        raise ValueError(f"student: strides {student.stride()} overlap and cannot be overwritten; call .contiguous()")
    if runs_triton(student, teacher):
        _launch(student, teacher, label, temperature, class_weight, student_temperature, None, student)
    else:
        grad = class_temperature_kl_grad_reference(
            student, teacher, label, temperature, student_temperature=student_temperature, class_weight=class_weight
        )
        student.copy_(grad)


@_class_temperature_kl_op.register_fake
def _(student: Tensor, teacher: Tensor, *args: object) -> Tensor:
    return student.new_empty(student.shape[0], dtype=compute_dtype(student, teacher))


@_backward_op.register_fake
def _(row_grad: Tensor, student: Tensor, *args: object) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


@_grad_op.register_fake
def _(*args: object) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.student_temperature = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor | None, ...]:
    """The student's gradient; the teacher is a constant, as in every method that uses this loss."""
    grad = _backward_op(row_grad, *ctx.saved_tensors, ctx.student_temperature) if ctx.needs_input_grad[0] else None
    return grad, None, None, None, None, None


_class_temperature_kl_op.register_autograd(_backward, setup_context=_setup)


def class_temperature_kl(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: Tensor,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """KL of the student to the teacher at the temperature of each row's class. Differentiable, once, in `student`.

    A row whose label is no class is NaN, and so is its gradient.

    Args:
        student, teacher: (B, K) logits, the K of a row side by side; any two float dtypes.
        label: (B,) int64.
        temperature, class_weight: (K,) float32 or float64; temperatures above 0.
        student_temperature: one number above 0 for all classes.
        reduction: "batchmean" divides the sum by B, "mean" by B * K; "sum"; "none" gives the rows.

    Returns:
        A scalar, or (B,), in nats; float32, or float64 when student or teacher is. An empty batch gives 0.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}; needs one of {', '.join(REDUCTIONS)}")
    _require_positive(student_temperature)
    loss = _class_temperature_kl_op(student, teacher, label, temperature, class_weight, student_temperature)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / max(1, student.shape[0] if reduction == "batchmean" else student.numel())


def class_temperature_kl_grad_(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: Tensor,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Overwrite the logits `student` with d(sum of class_temperature_kl)/d(student): what an attack needs of the loss.

    Args as for `class_temperature_kl`; rows of `student` must not overlap.

    Returns:
        `student` itself.

    Raises:
        ValueError: as `class_temperature_kl`; or `student` is tracked by autograd.
    """
    require_writable("student", student)
    _require_positive(student_temperature)
    _grad_op(student, teacher, label, temperature, class_weight, student_temperature)
    return student


def _require_positive(student_temperature: float) -> None:
    if not student_temperature > 0:
        raise ValueError(f"student_temperature: {student_temperature}; needs a number above 0")
