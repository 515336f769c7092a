"""The generalised Jensen-Shannon divergence of a student and a teacher whose temperature depends on the class.

    loss_i = w_i (beta sum_k p_ik u_ik + (1 - beta) sum_k q_ik v_ik)
    p_i    = softmax(teacher_i / T_i),   q_i = softmax(student_i / Ts),   m_i = beta p_i + (1 - beta) q_i
    u_ik   = log p_ik - log m_ik,        v_ik = log q_ik - log m_ik
    d loss_i / d teacher_ik = w_i beta p_ik (u_ik - sum_j p_ij u_ij) / T_i
    d loss_i / d student_ik = w_i (1 - beta) q_ik (v_ik - sum_j q_ij v_ij) / Ts

T_i and w_i are those of class_temperature_kl.py. A term with p = 0 or q = 0 counts 0. Whatever the logits, the loss is
at most ln 2 w_i, and it is symmetrical for beta = 1/2 (Lin, IEEE Transactions on Information Theory 1991).

At beta = 0 and 1 the formula is 0. Divided by beta, it tends to KL(teacher || student) as beta tends to 0; divided by
1 - beta, to KL(student || teacher) as beta tends to 1. As in Liger-Kernel, these two are what the function returns
there, and with them it is the family of generalised knowledge distillation (Agarwal et al., ICLR 2024).

The Triton kernel is in js_kernel.py. Here are the reference, the operators and what users call.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.class_temperature_kl import REDUCTIONS, class_temperature_kl, constant, reduced
from retemper.kernels.js_kernel import launch
from retemper.kernels.kl_arguments import Inputs, arguments, require_fitting
from retemper.kernels.kl_divergence import distribution, evaluate, finished, rows_of
from retemper.kernels.operators import differentiable, keep, operator, rewritten
from retemper.kernels.runtime import compute_dtype, require_no_grad, runs_triton


def class_temperature_js_reference(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    beta: float = 0.5,
    **options: Any,
) -> Tensor:
    """Compute the loss of each row in plain PyTorch, differentiable in every tensor. `beta` lies between 0 and 1.

    Args:
        student, teacher, ...: as for `class_temperature_js` without `reduction`, but shapes and dtypes not checked.

    Returns:
        (B,) in nats, leading dimensions flattened; float32, or float64 when student or teacher is.
    """
    return _compute(arguments(student, teacher, label, temperature, **options), beta=beta)[0]


def _compute(
    inputs: Inputs, of_student: bool = False, of_teacher: bool = False, *, beta: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses of the rows, (B,), and the gradients that are wanted, (B, K), all in the dtype of the sums."""
    dtype = compute_dtype(inputs.student, inputs.teacher)
    rows = rows_of(inputs, dtype)
    log_p, p = distribution(inputs.teacher.to(dtype), rows.temperature)
    log_q, q = distribution(inputs.student.to(dtype), inputs.student_temperature)
    limits = torch.finfo(dtype)
    log_m = torch.lerp(q, p, beta).clamp_(min=limits.tiny).log_()  # the smallest p, times beta, is 0
    p_terms = p * log_p.clamp(min=limits.min / 2).sub_(log_m)
    q_terms = q * log_q.clamp(min=limits.min / 2).sub_(log_m)
    p_mean, q_mean = p_terms.sum(1), q_terms.sum(1)
    loss = finished((beta * p_mean + (1 - beta) * q_mean).relu(), rows)  # only rounding makes it negative
    student_grad = teacher_grad = None
    if of_student:
        factor = (1 - beta) / inputs.student_temperature
        student_grad = finished(q_terms.addcmul_(q, q_mean[:, None], value=-1).mul_(factor), rows)
    if of_teacher:
        teacher_grad = finished(p_terms.addcmul_(p, p_mean[:, None], value=-1).mul_(beta / rows.temperature), rows)
    return loss, student_grad, teacher_grad


_INPUTS = (
    "Tensor student, Tensor teacher, Tensor? label, Tensor? temperatures, Tensor? class_weight, Tensor? row_weight,"
    " {number} temperature, {number} student_temperature, float beta, bool by_row, int? ignore_index"
)
_REAL, _ANY = _INPUTS.format(number="float"), _INPUTS.format(number="Scalar")


def _split(arguments: Sequence[Any]) -> tuple[Inputs, float]:
    """Return the inputs and beta out of the arguments of an operator."""
    *tensors, row_weight, temperature, student_temperature, beta, by_row, ignore_index = arguments
    numbers = (temperature, student_temperature, by_row, ignore_index)
    without_trust: Any = (*tensors, None, row_weight, *numbers)
    return Inputs(*without_trust, reverse=False, given=False), beta


def _joined(inputs: Inputs, beta: float) -> tuple[Any, ...]:
    """Return the arguments of an operator: the reverse of `_split`."""
    i = inputs
    tensors = (i.student, i.teacher, i.label, i.temperatures, i.class_weight, i.row_weight)
    return *tensors, i.temperature, i.student_temperature, beta, i.by_row, i.ignore_index


def _fake_rows(student: Tensor, teacher: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape[:1], dtype=compute_dtype(student, teacher))


def _fake_backward(row_grad: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    student_grad, teacher_grad = (
        torch.empty(logits.shape if wanted else (0,), dtype=logits.dtype, device=logits.device)
        for logits, wanted in zip((student, teacher), rest[-2:], strict=True)
    )
    return student_grad, teacher_grad


@operator(f"class_temperature_js_rows({_REAL}) -> Tensor", fake=_fake_rows)
def _rows_op(*arguments: Any) -> Tensor:
    """Return the losses of the rows."""
    inputs, beta = _split(arguments)
    if not runs_triton(inputs.student, inputs.teacher):
        require_fitting(inputs)
        return evaluate(inputs, compute=partial(_compute, beta=beta))[0]
    loss = _fake_rows(*arguments)
    launch(inputs, beta, loss=loss)
    return loss


@operator(
    f"class_temperature_js_backward(Tensor row_grad, {_REAL}, bool of_student, bool of_teacher) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward_op(row_grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients that are wanted, of the losses times `row_grad`; empty tensors for others."""
    *given, of_student, of_teacher = arguments
    inputs, beta = _split(given)
    grads = _fake_backward(row_grad, *arguments)
    if runs_triton(inputs.student, inputs.teacher):
        wanted = (grad if want else None for grad, want in zip(grads, (of_student, of_teacher), strict=True))
        launch(inputs, beta, row_grad, **dict(zip(("student_grad", "teacher_grad"), wanted, strict=True)))
    else:
        computed = evaluate(inputs, of_student, of_teacher, partial(_compute, beta=beta))
        for grad, found in zip(grads, computed[1:], strict=True):
            if found is not None:
                torch.mul(found, row_grad[:, None], out=grad)
    return grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.temperature, ctx.student_temperature, ctx.beta, ctx.by_row, ctx.ignore_index = inputs
    keep(ctx, *tensors)


def _backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of student and teacher."""
    wanted = ctx.needs_input_grad[:2]
    numbers = (ctx.temperature, ctx.student_temperature, ctx.beta, ctx.by_row, ctx.ignore_index)
    grads = _backward_op(row_grad, *ctx.saved_tensors, *numbers, *wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 9


differentiable(_rows_op, _backward, _setup)


@rewritten(f"class_temperature_js({_ANY}) -> Tensor")
def _loss_op(*arguments: Any) -> Tensor:
    """Return the losses of the rows, whatever the temperatures are."""
    inputs, beta = _split(arguments)
    return _rows_op(*_joined(constant(inputs), beta))


def class_temperature_js(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    beta: float = 0.5,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    class_dim: int = -1,
    reduction: str = "batchmean",
) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence of each row. Differentiable, once, in student and teacher.

    The formula and its sources are in the module docstring. It is bounded, also where one of the two holds impossible
    what the other predicts. Rows that are ignored or have no class are as in `class_temperature_kl`.

    Args:
        student, teacher, label, temperature, student_temperature: as for `class_temperature_kl`.
        class_weight, row_weight, ignore_index, class_dim, reduction: as there.
        beta: the teacher's share in the mixture, from 0 to 1. 0 gives KL(teacher || student) and 1 gives
            KL(student || teacher).

    Returns:
        A scalar, or for "none" one number a row, in nats; float32, or float64 when student or teacher is. Without a row
        that counts it is 0.

    Raises:
        TypeError, ValueError: as `class_temperature_kl`; `beta` is no number from 0 to 1.
        RuntimeError: a gradient is differentiated again.
    """
    options: dict[str, Any] = {
        "student_temperature": student_temperature,
        "class_weight": class_weight,
        "row_weight": row_weight,
        "ignore_index": ignore_index,
        "class_dim": class_dim,
    }
    if isinstance(beta, Tensor) or not 0 <= beta <= 1:
        raise ValueError(f"beta: {beta}; needs a number from 0 to 1")
    if beta in (0, 1):
        return class_temperature_kl(
            student, teacher, label, temperature, reverse=beta == 1, reduction=reduction, **options
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}; needs one of {', '.join(REDUCTIONS)}")
    require_no_grad(temperature=temperature, class_weight=class_weight, row_weight=row_weight)
    inputs = arguments(student, teacher, label, temperature, **options)
    loss = reduced(inputs, reduction, partial(_compute, beta=beta), partial(_through_operators, beta=beta))
    if reduction == "none" and student.dim() > 2:
        return loss.view(student.movedim(class_dim, -1).shape[:-1])
    return loss


def _through_operators(inputs: Inputs, beta: float) -> Tensor:
    """Return the losses of the rows by an operator, which a GPU and torch.compile need."""
    return (_loss_op if torch.compiler.is_compiling() else _rows_op)(*_joined(inputs, beta))
