"""The KL divergence from a student to a teacher whose temperature depends on the class, and its gradient.

    loss_i  = w[y_i] sum_k p_ik (log p_ik - log q_ik)
    p_i     = (1 - l[y_i]) softmax(teacher_i / T[y_i]) + l[y_i] onehot(y_i),   q_i = softmax(student_i / Ts)
    d loss_i / d student_ik = w[y_i] (q_ik - p_ik) / Ts

Of row i, y_i is the label. Of each class, T is the temperature, w the weight, and l the trust: how far the label is
trusted over the teacher. Without l, the target p is the teacher alone. A term with p = 0 counts 0, as in torch.xlogy.

The loss and its class temperatures are those of ABSLD (Zhao et al., 2023). With one temperature of 1 it is the KL
divergence of TRADES (Zhang et al., ICML 2019) and RSLAD (Zi et al., ICCV 2021).

The arithmetic, in PyTorch and in Triton, is in kl_divergence.py. Here are the PyTorch operators and what users call.
"""

import math
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.kl_divergence import (
    Inputs,
    class_temperature_kl_grad_reference,
    class_temperature_kl_reference,
    launch,
)
from retemper.kernels.operators import differentiable, is_symbol, operator, overwritten, rewritten
from retemper.kernels.runtime import (
    compute_dtype,
    require_one_device,
    require_rows,
    require_vector,
    require_writable,
    runs_triton,
)

REDUCTIONS = ("batchmean", "mean", "sum", "none")


def _check(inputs: Inputs) -> None:
    """Raise ValueError where a shape, dtype, device or stride does not fit."""
    student, teacher, label, temperature, class_weight, label_trust, *_ = inputs
    by_class = {"temperature": temperature, "class_weight": class_weight, "label_trust": label_trust}
    require_rows(student=student, teacher=teacher)
    require_one_device(student=student, teacher=teacher, label=label, **by_class)
    batch, classes = student.shape
    require_vector("label", label, batch, torch.int64)
    for name, value in by_class.items():
        require_vector(name, value, classes, torch.float32, torch.float64)


_INPUTS = (
    "Tensor teacher, Tensor label, Tensor? temperature_by_class, Tensor? class_weight, Tensor? label_trust,"
    " float temperature, float student_temperature"
)


@operator(
    f"class_temperature_kl(Tensor student, {_INPUTS}) -> Tensor",
    fake=lambda student, teacher, *_: student.new_empty(student.shape[0], dtype=compute_dtype(student, teacher)),
)
def _loss_op(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature_by_class: Tensor | None,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    temperature: float,
    student_temperature: float,
) -> Tensor:
    by_class = (temperature_by_class, class_weight, label_trust)
    inputs = Inputs(student, teacher, label, *by_class, temperature, student_temperature)
    _check(inputs)
    if not runs_triton(student, teacher):
        return class_temperature_kl_reference(**inputs.for_reference())
    loss = student.new_empty(student.shape[0], dtype=torch.float32)
    launch(inputs, None, loss)
    return loss


@operator(
    f"class_temperature_kl_backward(Tensor row_grad, Tensor student, {_INPUTS}) -> Tensor",
    fake=lambda row_grad, student, *_: torch.empty(student.shape, dtype=student.dtype, device=student.device),
)
def _backward_op(
    row_grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature_by_class: Tensor | None,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    temperature: float,
    student_temperature: float,
) -> Tensor:
    by_class = (temperature_by_class, class_weight, label_trust)
    inputs = Inputs(student, teacher, label, *by_class, temperature, student_temperature)
    if not runs_triton(student, teacher):
        return class_temperature_kl_grad_reference(**inputs.for_reference(), row_grad=row_grad)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    launch(inputs, row_grad, grad)
    return grad


@operator(f"class_temperature_kl_grad_(Tensor(a!) student, {_INPUTS}) -> ()", fake=lambda *_: None)
def _grad_op(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature_by_class: Tensor | None,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    temperature: float,
    student_temperature: float,
) -> None:
    by_class = (temperature_by_class, class_weight, label_trust)
    inputs = Inputs(student, teacher, label, *by_class, temperature, student_temperature)
    _check(inputs)
    if student.shape[0] > 1 and student.stride(0) < student.shape[1]:
        raise ValueError(f"student: strides {student.stride()} overlap and cannot be overwritten; call .contiguous()")
    if runs_triton(student, teacher):
        launch(inputs, None, student)
        overwritten(student)
    else:
        student.copy_(class_temperature_kl_grad_reference(**inputs.for_reference()))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.temperature, ctx.student_temperature = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of the student. The teacher is a constant, as in every method that uses this loss."""
    grad = None
    if ctx.needs_input_grad[0]:
        grad = _backward_op(row_grad, *ctx.saved_tensors, ctx.temperature, ctx.student_temperature)
    return grad, *[None] * 7


differentiable(_loss_op, _backward, _setup)


_REST = (
    "Tensor teacher, Tensor label, Tensor? class_weight, Tensor? label_trust,"
    " Scalar temperature, float student_temperature"
)


@rewritten(f"class_temperature_kl_number(Tensor student, {_REST}) -> Tensor")
def _loss_of_number(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    temperature: Any,  # a number, or a symbol of torch.compile
    student_temperature: float,
) -> Tensor:
    by_class, number = _temperatures(temperature, student, teacher)
    return _loss_op(student, teacher, label, by_class, class_weight, label_trust, number, student_temperature)


@rewritten(f"class_temperature_kl_grad_number_(Tensor(a!) student, {_REST}) -> ()")
def _grad_of_number(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    temperature: Any,  # a number, or a symbol of torch.compile
    student_temperature: float,
) -> None:
    by_class, number = _temperatures(temperature, student, teacher)
    _grad_op(student, teacher, label, by_class, class_weight, label_trust, number, student_temperature)


def _temperatures(number: Any, student: Tensor, teacher: Tensor) -> tuple[Tensor | None, float]:
    """Return None and the number; or, of a symbol, (K,) temperatures and a number that is not read."""
    if is_symbol(number):
        ones: Any = student.new_ones(student.shape[1:], dtype=compute_dtype(student, teacher))
        return ones * number, 1.0
    return None, number


def _require_positive(**numbers: float | Tensor) -> None:
    for name, number in numbers.items():
        if not isinstance(number, Tensor) and not 0 < number < math.inf:
            raise ValueError(f"{name}: {number}; needs a finite number above 0")


def class_temperature_kl(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """Compute the KL divergence of each row at the temperature of its class. Differentiable, once, in `student`.

    With `label_trust` the target is (1 - trust) times the teacher's prediction plus trust times the one-hot label. A
    row whose label is no class is NaN, and so is its gradient. The formula and its sources are in the module docstring.

    Args:
        student, teacher: (B, K) logits, any two float dtypes, the K of a row side by side in memory.
        label: (B,) int64, the class of each row.
        temperature: of the teacher: one number above 0 for all classes, or (K,) float32 or float64 above 0.
        student_temperature: one number above 0 for all classes.
        class_weight: (K,) float32 or float64, a factor on the loss of each row of that class; 1 when left out.
        label_trust: (K,) float32 or float64 in [0, 1]; 0 when left out.
        reduction: "batchmean" divides the sum by B, "mean" by B * K; "sum"; "none" returns the rows.

    Returns:
        A scalar, or (B,) for "none", in nats; float32, or float64 when student or teacher is. An empty batch gives 0.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; a temperature given as a number is not finite or not
            above 0; unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}; needs one of {', '.join(REDUCTIONS)}")
    _require_positive(temperature=temperature, student_temperature=student_temperature)
    if isinstance(temperature, Tensor):
        loss = _loss_op(student, teacher, label, temperature, class_weight, label_trust, 1.0, student_temperature)
    else:
        loss = _loss_of_number(student, teacher, label, class_weight, label_trust, temperature, student_temperature)
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
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
) -> Tensor:
    """Overwrite the logits `student` with the gradient of the summed loss: what an attack needs of it.

    Args:
        student: (B, K) logits, overwritten in place; its rows must not overlap.
        teacher, label, ...: as for `class_temperature_kl`.

    Returns:
        `student` itself.

    Raises:
        ValueError: as `class_temperature_kl`; the rows of `student` overlap; autograd is tracking `student`.
    """
    require_writable("student", student)
    _require_positive(temperature=temperature, student_temperature=student_temperature)
    if isinstance(temperature, Tensor):
        _grad_op(student, teacher, label, temperature, class_weight, label_trust, 1.0, student_temperature)
    else:
        _grad_of_number(student, teacher, label, class_weight, label_trust, temperature, student_temperature)
    return student
