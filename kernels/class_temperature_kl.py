"""The KL divergence from a student to a teacher whose temperature depends on the class, and its gradients.

    loss_i  = w_i sum_k p_ik (log p_ik - log q_ik)
    p_i     = (1 - l_i) softmax(teacher_i / T_i) + l_i onehot(y_i),   q_i = softmax(student_i / Ts)
    d loss_i / d student_ik = w_i (q_ik - p_ik) / Ts
    d loss_i / d teacher_ik = w_i p_ik (log p_ik - log q_ik - KL_i) / T_i   without l, KL_i = loss_i / w_i

Of row i, y_i is the label, T_i the temperature, of its class or its own, and w_i the weight, of its class times its
own. l_i is the trust, of its class or its own: how far the label is trusted over the teacher. Without l, the target p
is the teacher alone. A term with p = 0 counts 0, as in torch.xlogy. `reverse` exchanges p and q in the sum.

The loss and its class temperatures are those of ABSLD (Zhao et al., 2023). With one temperature of 1 it is the KL
divergence of TRADES (Zhang et al., ICML 2019) and RSLAD (Zi et al., ICCV 2021).

The arithmetic is in kl_divergence.py, and in Triton in kl_kernel.py. Here are the operators and what users call.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.kl_arguments import Inputs, arguments, require_fitting, require_overwritable
from retemper.kernels.kl_divergence import AtOnce, compute, directions, divisor, evaluate, looked_up, overwrite
from retemper.kernels.kl_kernel import launch
from retemper.kernels.operators import differentiable, is_symbol, keep, operator, overwritten, rewritten
from retemper.kernels.pixels import apart, overlap
from retemper.kernels.runtime import compute_dtype, require_no_grad, require_writable, runs_triton

REDUCTIONS = ("batchmean", "mean", "sum", "none")

_INPUTS = (
    "Tensor teacher, Tensor? label, Tensor? temperatures, Tensor? class_weight, Tensor? label_trust,"
    " Tensor? row_weight, {number} temperature, {number} student_temperature, bool by_row, int? ignore_index,"
    " bool reverse, bool given, bool trust_by_row"
)
_REAL, _ANY = _INPUTS.format(number="float"), _INPUTS.format(number="Scalar")


def _fake_loss(student: Tensor, teacher: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape[0], dtype=compute_dtype(student, teacher))


@operator(f"class_temperature_kl_rows(Tensor student, {_REAL}) -> Tensor", fake=_fake_loss)
def _rows_op(*arguments: Any) -> Tensor:
    """Return the losses of the rows."""
    inputs = Inputs(*arguments)
    if not runs_triton(inputs.student, inputs.teacher):
        require_fitting(inputs)
        return evaluate(inputs)[0]
    loss = inputs.student.new_empty(inputs.student.shape[:1], dtype=torch.float32)
    launch(inputs, loss=loss)
    return loss


def _fake_grads(row_grad: Tensor | None, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return gradients to be filled, and an empty tensor for one that is not wanted."""
    of_student, of_teacher = (
        torch.empty(logits.shape if wanted else (0,), dtype=logits.dtype, device=logits.device)
        for logits, wanted in zip((student, teacher), rest[-2:], strict=True)
    )
    return of_student, of_teacher


@operator(
    f"class_temperature_kl_backward(Tensor? row_grad, Tensor student, {_REAL}, bool of_student, bool of_teacher)"
    " -> (Tensor, Tensor)",
    fake=_fake_grads,
)
def _backward_op(row_grad: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients that are wanted, of the losses times `row_grad`, or of the losses."""
    *given, of_student, of_teacher = arguments
    inputs, grads = Inputs(*given), _fake_grads(row_grad, *arguments)
    if runs_triton(inputs.student, inputs.teacher):
        student_grad, teacher_grad = grads
        given = {"student_grad": student_grad if of_student else None}
        launch(inputs, row_grad, **given, teacher_grad=teacher_grad if of_teacher else None)
    else:
        for grad, found in zip(grads, evaluate(inputs, of_student, of_teacher)[1:], strict=True):
            if found is not None:
                grad.copy_(found if row_grad is None else found * row_grad[:, None])
    return grads


@operator(f"class_temperature_kl_overwrite_(Tensor(a!) student, {_REAL}) -> ()", fake=lambda *_: None)
def _overwrite_op(*arguments: Any) -> None:
    """Overwrite the student's logits with the gradient of the summed loss."""
    inputs = Inputs(*arguments)
    student = inputs.student
    if overlap(inputs.teacher, student):
        inputs = inputs._replace(teacher=apart(inputs.teacher, student))
    if runs_triton(student, inputs.teacher):
        launch(inputs, student_grad=student)
        overwritten(student)
    else:
        require_overwritable(inputs)
        overwrite(inputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    if any(ctx.needs_input_grad[2:]):
        raise ValueError("only student and teacher have gradients; detach the other tensors")
    keep(ctx, *inputs[:7])
    ctx.rest = inputs[7:]


def _backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of student and teacher."""
    wanted = ctx.needs_input_grad[:2]
    grads = _backward_op(row_grad, *ctx.saved_tensors, *ctx.rest, *wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 12


differentiable(_rows_op, _backward, _setup)


def constant(inputs: Inputs) -> Inputs:
    """Return the inputs with numbers in place of torch.compile's symbols, which no operator with code of its own takes.

    A symbol of the teacher's temperature becomes a tensor, and the student's logits are divided by one of theirs.
    """
    student, dtype = inputs.student, compute_dtype(inputs.student, inputs.teacher)
    if is_symbol(inputs.temperature):
        ones: Any = student.new_ones((), dtype=dtype)
        inputs = inputs._replace(temperatures=ones * inputs.temperature, by_row=True, temperature=1.0)
    if is_symbol(inputs.student_temperature):
        inputs = inputs._replace(student=student.to(dtype) / inputs.student_temperature, student_temperature=1.0)
    return inputs


@rewritten(f"class_temperature_kl(Tensor student, {_ANY}) -> Tensor")
def _loss_op(*arguments: Any) -> Tensor:
    """Return the losses of the rows, whatever the temperatures are."""
    return _rows_op(*constant(Inputs(*arguments)).of_operator())


@rewritten(f"class_temperature_kl_grad_(Tensor(a!) student, {_ANY}) -> ()")
def _grad_op(*arguments: Any) -> None:
    """Overwrite the student's logits with the gradient of the summed loss, whatever the temperatures are."""
    inputs = Inputs(*arguments)
    known = constant(inputs)
    _overwrite_op(*known.of_operator())
    if known.student is not inputs.student:
        inputs.student.copy_(known.student / inputs.student_temperature)


def class_temperature_kl(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
    row_weight: Tensor | None = None,
    row_trust: Tensor | None = None,
    teacher_is: str = "logits",
    reverse: bool = False,
    ignore_index: int | None = -100,
    class_dim: int = -1,
    reduction: str = "batchmean",
) -> Tensor:
    """Compute the KL divergence of each row at the temperature of its class. Differentiable in student and teacher.

    With a trust the target is (1 - trust) times the teacher's prediction plus trust times the one-hot label. The
    formula and its sources are in the module docstring. B is the number of rows: leading dimensions are flattened.

    A row with the label `ignore_index` counts nothing: its loss and gradients are 0, and "batchmean" and "mean" do not
    divide by it. A row with another label that is no class is NaN, and so are its gradients; likewise one whose
    temperature, given in a tensor, is not above 0.

    Args:
        student, teacher: (B, K) logits, (B, T, K), or with `class_dim=1` (B, K, H, W); any two float dtypes. The K of a
            row of (B, K) lie side by side in memory; of more dimensions what does not is copied.
        label: the class of each row, of any integer dtype: (B,), (B, T) or (B, H, W). Needed for what is by class.
        temperature: of the teacher, above 0: one number, also as a tensor of no dimensions; (K,) by class; or by row,
            (B,) or (B, 1). Where B is K and labels are given, (K,) is by class. Tensors are float32 or float64.
        student_temperature: one number above 0 for all rows.
        class_weight: (K,) float32 or float64, a factor on the loss of each row of that class; 1 when left out.
        label_trust: (K,) float32 or float64 in [0, 1], the trust in the label of each row of that class; 0 when left
            out.
        row_weight: (B,) or (B, 1) float32 or float64, a factor on the loss of each row; 1 when left out.
        row_trust: (B,) or (B, 1) float32 or float64 in [0, 1], the trust in the label of each row, in place of
            `label_trust`.
        teacher_is: "logits"; or "probabilities", which are taken as they are, as in torch.nn.functional.kl_div, and
            need not add up to 1. Without temperature then.
        reverse: KL(student || teacher) in place of KL(teacher || student).
        ignore_index: the label of rows that count nothing. None where there are none: no row is looked for, and the
            means take no launch to count.
        class_dim: the dimension of the classes.
        reduction: "batchmean" divides the sum by the rows that count, "mean" by as many times K; "sum"; "none" returns
            the rows.

    Returns:
        A scalar, or for "none" one number a row, (B,), (B, T) or (B, H, W), in nats; float32, or float64 when student
        or teacher is. Without a row that counts it is 0.

    Raises:
        TypeError: what must be a tensor is none.
        ValueError: a shape, dtype, device or stride does not fit; a temperature given as a number is not finite or not
            above 0; two arguments exclude each other; temperature, class_weight, label_trust, row_weight or row_trust
            requires grad: only student and teacher have gradients.
        RuntimeError: a gradient is differentiated again.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}; needs one of {', '.join(REDUCTIONS)}")
    given = dict(class_weight=class_weight, label_trust=label_trust, row_weight=row_weight, row_trust=row_trust)
    require_no_grad(temperature=temperature, **given)
    inputs = arguments(
        student,
        teacher,
        label,
        temperature,
        student_temperature=student_temperature,
        **given,
        teacher_is=teacher_is,
        reverse=reverse,
        ignore_index=ignore_index,
        class_dim=class_dim,
    )
    loss = reduced(inputs, reduction)
    if reduction == "none" and student.dim() > 2:
        return loss.view(student.movedim(class_dim, -1).shape[:-1])
    return loss


def _through_operators(inputs: Inputs) -> Tensor:
    """Return the losses of the rows by an operator, which a GPU and torch.compile need."""
    return (_loss_op if torch.compiler.is_compiling() else _rows_op)(*inputs.of_operator())


def reduced(inputs: Inputs, reduction: str, compute: Any = compute, otherwise: Any = _through_operators) -> Tensor:
    """Return the losses of the rows, their sum, or a mean of those that count.

    Args:
        compute: a divergence and its gradients in plain PyTorch; `otherwise` takes its place where that will not do.
    """
    if _in_plain_pytorch(inputs):
        require_fitting(inputs)
        inputs = looked_up(inputs)
        student, teacher = inputs.student, inputs.teacher
        if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
            return AtOnce.apply(student, teacher, inputs, reduction, compute)
        loss = evaluate(inputs, compute=compute)[0]
    else:
        loss = otherwise(inputs)
    if reduction in ("none", "sum"):
        return loss if reduction == "none" else loss.sum()
    by = divisor(inputs, reduction)
    mean = not isinstance(by, Tensor) and by == loss.numel()
    return loss.mean() if mean else loss.sum() / by  # a mean is one launch


def _in_plain_pytorch(inputs: Inputs) -> bool:
    """Say whether the reference is called as it is. An operator around it would take longer than many a batch.

    torch.compile and torch.func see an operator, so that they meet the same limits on any device.
    """
    return not (
        torch.compiler.is_compiling()
        or runs_triton(inputs.student, inputs.teacher)
        or torch._C._are_functorch_transforms_active()
    )


def class_temperature_kl_grad_(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
    row_weight: Tensor | None = None,
    row_trust: Tensor | None = None,
    teacher_is: str = "logits",
    reverse: bool = False,
    ignore_index: int | None = -100,
    class_dim: int = -1,
) -> Tensor:
    """Overwrite the logits `student` with the gradient of the summed loss: what an attack needs of it.

    Args:
        student: logits, overwritten in place; its rows must not overlap.
        teacher, label, ...: as for `class_temperature_kl`.

    Returns:
        `student` itself.

    Raises:
        TypeError, ValueError: as `class_temperature_kl`; the rows of `student` overlap; autograd is tracking `student`
            or `teacher`.
    """
    given = dict(class_weight=class_weight, label_trust=label_trust, row_weight=row_weight, row_trust=row_trust)
    require_no_grad(teacher=teacher, temperature=temperature, **given)
    inputs = arguments(
        student,
        teacher,
        label,
        temperature,
        student_temperature=student_temperature,
        **given,
        teacher_is=teacher_is,
        reverse=reverse,
        ignore_index=ignore_index,
        class_dim=class_dim,
    )
    require_writable("student", student)
    if _in_plain_pytorch(inputs):
        require_overwritable(inputs)
        overwrite(looked_up(inputs._replace(teacher=apart(inputs.teacher, inputs.student))))
    else:
        (_grad_op if torch.compiler.is_compiling() else _overwrite_op)(*inputs.of_operator())
    if inputs.student is not student and not _is_at(inputs.student, student):  # copied, to lie side by side
        rows = student.movedim(class_dim, -1)
        rows.copy_(inputs.student.view(rows.shape))
    return student


def gradient(
    student: Tensor, teacher: Tensor, label: Tensor | None = None, temperature: float | Tensor = 1.0, **options: Any
) -> Tensor:
    """Return the gradient of the summed loss in memory of its own: the network may need its logits again.

    Args:
        student, teacher, ...: as for `class_temperature_kl_grad_`, without student_temperature and class_dim.

    Returns:
        (B, K) of the student's dtype.

    Raises:
        TypeError, ValueError: as `class_temperature_kl_grad_`.
    """
    require_no_grad(teacher=teacher, temperature=temperature, **options)
    inputs = arguments(student.detach(), teacher, label, temperature, **options)
    if _in_plain_pytorch(inputs):
        require_fitting(inputs)
        return directions(looked_up(inputs))
    inputs = constant(inputs) if torch.compiler.is_compiling() else inputs
    return _backward_op(None, *inputs.of_operator(), True, False)[0]


def _is_at(rows: Tensor, logits: Tensor) -> bool:
    """Say whether the rows are known to be the memory of the logits, which torch.compile does not tell."""
    return not torch.compiler.is_compiling() and rows.data_ptr() == logits.data_ptr()
