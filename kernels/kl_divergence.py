"""The arithmetic of class_temperature_kl in plain PyTorch: the reference of the kernel, and the path on a CPU.

The formula stands in class_temperature_kl.py. Here one side of the divergence is P, of which the expectation is taken,
and the other is Q: teacher and student, or with `reverse` student and teacher.

The peak of a row is subtracted before the division by the temperature: logits of 1e4 at temperature 0.05 would lose
their differences to rounding.
Computed in float32, or in float64 as soon as one of the logits is: the tests have their truth from there.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from retemper.kernels.kl_arguments import Inputs, arguments
from retemper.kernels.operators import differentiated_once
from retemper.kernels.runtime import compute_dtype

# How many logits of a tensor each thread of a CPU works on at a time: what it computes of them stays in its cache.
# Whole (512, 32000) tensors would go through memory once for every line of `compute`.
PART = 2**18
NOTHING = -1e30  # the logarithm of a share of 0: -inf times 0 would be NaN
FEW = 16  # classes; PyTorch's softmax of a CPU is 4 times as fast over the columns of such rows: they fill no vector


def class_temperature_kl_reference(
    student: Tensor, teacher: Tensor, label: Tensor | None = None, temperature: float | Tensor = 1.0, **options: Any
) -> Tensor:
    """Compute the loss of each row in plain PyTorch, differentiable in every argument.

    Args:
        student, teacher, ...: as for `class_temperature_kl` without `reduction`, but shapes and dtypes not checked.

    Returns:
        (B,) in nats, leading dimensions flattened; float32, or float64 when student or teacher is.
    """
    return compute(arguments(student, teacher, label, temperature, **options))[0]


def class_temperature_kl_grad_reference(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    row_grad: Tensor | None = None,
    of_teacher: bool = False,
    **options: Any,
) -> Tensor:
    """Compute d(sum_i row_grad_i loss_i) / d(student), or with `of_teacher` / d(teacher), without autograd.

    Args:
        student, teacher, ...: as for `class_temperature_kl` without `reduction`, but shapes and dtypes not checked.
        row_grad: (B,) float; 1 for each row when left out.

    Returns:
        (B, K) of the student's or the teacher's dtype, leading dimensions flattened.
    """
    inputs = arguments(student, teacher, label, temperature, **options)
    with torch.no_grad():
        grad: Any = compute(inputs, not of_teacher, of_teacher)[2 if of_teacher else 1]
    grad = grad if row_grad is None else grad * row_grad[:, None]
    return grad.to(teacher.dtype if of_teacher else student.dtype)


def distribution(logits: Tensor, temperature: float | Tensor, values: bool = True) -> tuple[Tensor, Any]:
    """Return the logarithm of softmax(logits / temperature) and, with `values`, the softmax: (B, K), of any strides."""
    if not is_one(temperature):
        logits = (logits - logits.detach().amax(1, keepdim=True)).div_(temperature)
    if logits.shape[1] < FEW:
        log_p = logits.t().log_softmax(0).t()
        return log_p, log_p.exp() if values else None
    return logits.log_softmax(1), logits.softmax(1) if values else None  # faster than exp of the logarithm


def _probabilities(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return softmax(logits / temperature), when no logarithm is needed."""
    if not is_one(temperature):
        logits = (logits - logits.amax(1, keepdim=True)).div_(temperature)
    return logits.softmax(1) if logits.shape[1] >= FEW else logits.t().log_softmax(0).exp_().t()


def is_one(number: float | Tensor) -> bool:
    """Say whether a temperature is a number, and 1."""
    return not isinstance(number, Tensor) and number == 1


class Rows(NamedTuple):
    """What holds of each row, as (B, 1): None where it changes nothing."""

    temperature: float | Tensor
    scale: Tensor | None  # NaN where the label is no class
    trust: Tensor | None
    label: Tensor | None  # (B,) int64, clamped to the classes
    ignored: Tensor | None


def rows_of(inputs: Inputs, dtype: torch.dtype) -> Rows:
    """Return what holds of each row, in the dtype of the sums."""
    _, _, label, temperatures, class_weight, label_trust, row_weight, temperature, *_ = inputs
    ignored = scale = trust = None
    if label is not None and not inputs.known:
        given = label.long()
        label = given.clamp(0, inputs.student.shape[1] - 1)
        known = label == given
        if inputs.ignore_index is not None:
            ignored = given == inputs.ignore_index
            known, ignored = known | ignored, ignored[:, None]
        scale = torch.where(known, 1.0, torch.nan)[:, None]
    if temperatures is not None:
        own = temperatures.reshape(-1, 1) if inputs.by_row else _of_class(temperatures, label)
        temperature = own.to(dtype).relu()  # at 0 a row is NaN: its peak is 0 / 0
    if class_weight is not None:
        scale = _product(scale, _of_class(class_weight, label).to(dtype))
    if row_weight is not None:
        scale = _product(scale, row_weight[:, None].to(dtype))
    if label_trust is not None:
        trust = (label_trust[:, None] if inputs.trust_by_row else _of_class(label_trust, label)).to(dtype)
    return Rows(temperature, None if scale is None else scale.to(dtype), trust, label, ignored)


def _of_class(value: Tensor, label: Any) -> Tensor:
    """Return the value of each row's class, (B, 1)."""
    return value.index_select(0, label)[:, None]


def _product(scale: Tensor | None, factor: Tensor) -> Tensor:
    return factor if scale is None else scale * factor


def compute(
    inputs: Inputs, student_grad: bool = False, teacher_grad: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses of the rows, (B,), and the gradients that are wanted, (B, K), all in the dtype of the sums."""
    dtype = compute_dtype(inputs.student, inputs.teacher)
    rows, own = rows_of(inputs, dtype), inputs.student_temperature
    student = inputs.student if inputs.student.dtype == dtype else inputs.student.to(dtype)
    teacher = inputs.teacher if inputs.teacher.dtype == dtype else inputs.teacher.to(dtype)
    if inputs.given:
        loss, of_student, of_teacher = _of_probabilities(teacher, student, own, student_grad, teacher_grad)
    elif inputs.reverse:
        sides = (student, own), (teacher, rows.temperature)
        loss, of_student, of_teacher = _of_logits(*sides, rows, student_grad, teacher_grad)
    else:
        sides = (teacher, rows.temperature), (student, own)
        loss, of_teacher, of_student = _of_logits(*sides, rows, teacher_grad, student_grad)
    return finished(loss, rows), finished(of_student, rows), finished(of_teacher, rows)


def finished(value: Any, rows: Rows) -> Any:
    """Return losses (B,) or gradients (B, K) times what a row weighs, and 0 in rows that are left out; None stays."""
    if value is None:
        return None
    value = value.contiguous()
    if rows.scale is not None:
        value = value * (rows.scale if value.dim() > 1 else rows.scale[:, 0])
    if rows.ignored is None:
        return value
    if value.dim() == 1 or value.shape[1] < FEW or value.requires_grad:
        return value.masked_fill_(rows.ignored if value.dim() > 1 else rows.ignored[:, 0], 0)
    bits = value.view(torch.int32 if value.dtype == torch.float32 else torch.int64)
    bits.bitwise_and_(rows.ignored.to(bits.dtype) - 1)  # without any bit a value is 0, also NaN; 10 times as fast
    return value


def _of_logits(
    source: tuple[Tensor, float | Tensor],  # logits and temperature, here and below
    other: tuple[Tensor, float | Tensor],
    rows: Rows,
    p_grad: bool,
    q_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return KL(P || Q) as (B,), and the gradients at the logits of both. With a trust, P moves towards the label."""
    log_p, p = distribution(*source)
    source_p = p
    log_q, q = distribution(*other, q_grad)
    if rows.trust is not None:
        log_p, p = _mixed(log_p, p, rows.label, rows.trust)
    apart = log_p - log_q
    terms = p * apart
    kl, p_found, q_found = _total(terms, log_p, log_q), None, None
    if p_grad:
        terms, mean = (terms, kl) if rows.trust is None else (source_p * apart, _total(source_p * apart, log_p, log_q))
        p_found = terms.nan_to_num_(0.0, torch.inf, -torch.inf).addcmul_(source_p, mean[:, None], value=-1)
        share: Any = (1.0 if rows.trust is None else 1 - rows.trust) / source[1]
        p_found = p_found if is_one(share) else p_found.mul_(share)
    if q_grad:
        q_found: Any = q - p
        q_found = q_found if is_one(other[1]) else q_found.div_(other[1])
    kl.detach().relu_()  # only rounding makes it negative, which is no matter of its gradient
    return kl, p_found, q_found


def _total(terms: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum of each row's terms, (B,), and NaN in a row of logits that holds NaN.

    A term is NaN where p = 0 and its logarithm is -inf, and counts nothing then. The logarithms of a row are no more
    than 0, or all are NaN.
    """
    wrong = (log_p.select(1, 0) + log_q.select(1, 0)).relu_()
    return terms.nansum(1) + wrong


def _mixed(log_p: Tensor, p: Tensor, label: Any, trust: Tensor) -> tuple[Tensor, Tensor]:
    """Return P and its logarithm after it moved towards the one-hot label by its trust."""
    own = log_p.gather(1, label[:, None])
    short = (trust - 1) * own.expm1()  # what P lacks of 1 at the label: where that is small, it keeps its digits
    far = ((1 - trust) * own.exp() + trust).log()
    moved = torch.where(short > 0.5, far, (-short.clamp(max=0.5)).log1p())
    kept = (-trust).log1p().clamp(min=NOTHING)  # a trust of 1 leaves P no share, and its logits a gradient of 0
    log_mixed = (log_p + kept).scatter(1, label[:, None], torch.where(trust == 0, own, moved))
    return log_mixed, torch.where(trust == 0, p, log_mixed.exp())


def _of_probabilities(
    p: Tensor, logits: Tensor, temperature: float, q_grad: bool, p_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return sum p (log p - log Q) as (B,), and the gradients at Q's logits and at p, which need not add up to 1."""
    log_q, q = distribution(logits, temperature)
    loss = torch.xlogy(p, p).sum(1) - _total(p * log_q, log_q, log_q)
    q_found = (q * p.sum(1, keepdim=True)).sub_(p).div_(temperature) if q_grad else None
    p_found = p.log() + 1 - log_q if p_grad else None
    return loss, q_found, p_found


def _direction(inputs: Inputs) -> Any:
    """Return the student's gradient alone, which needs no logarithm unless P is the student's or was mixed."""
    if inputs.reverse or inputs.given or inputs.label_trust is not None:
        return compute(inputs, True)[1]
    dtype, own = compute_dtype(inputs.student, inputs.teacher), inputs.student_temperature
    rows = rows_of(inputs, dtype)
    apart = _probabilities(inputs.student.to(dtype), own).sub_(
        _probabilities(inputs.teacher.to(dtype), rows.temperature)
    )
    return finished(apart if is_one(own) else apart.div_(own), rows)


def evaluate(inputs: Inputs, of_student: bool = False, of_teacher: bool = False, compute: Any = compute) -> Any:
    """Return what `compute` does, on a CPU part by part."""
    if _fits(inputs):
        return compute(inputs, of_student, of_teacher)
    student, dtype = inputs.student, compute_dtype(inputs.student, inputs.teacher)
    loss = student.new_empty(student.shape[0], dtype=dtype)
    grads = [student.new_empty(student.shape, dtype=dtype) if wanted else None for wanted in (of_student, of_teacher)]
    for rows, part in inputs.parts(_size(inputs)):
        computed: Any = compute(part, of_student, of_teacher)
        for whole, found in zip((loss, *grads), computed, strict=True):
            if whole is not None:
                whole[rows] = found
    return loss, *grads


def directions(inputs: Inputs) -> Tensor:
    """Return the gradient of the summed loss at the student's logits, on a CPU part by part."""
    if _fits(inputs):
        return _direction(inputs).to(inputs.student.dtype)
    grad = torch.empty_like(inputs.student)
    for rows, part in inputs.parts(_size(inputs)):
        grad[rows] = _direction(part)
    return grad


def overwrite(inputs: Inputs) -> None:
    """Overwrite the student's logits with the gradient of the summed loss, on a CPU part by part."""
    parts = [(..., inputs)] if _fits(inputs) else inputs.parts(_size(inputs))
    for _, part in parts:
        part.student.copy_(_direction(part))


def looked_up(inputs: Inputs) -> Inputs:
    """Return the inputs as `known` where every label is a class, and no row is left out.

    A look-up on a CPU refuses a label that is no class, which costs less than to compare and replace labels.
    """
    label, ignored, classes = inputs.label, inputs.ignore_index, inputs.student.shape[1]
    if label is None or inputs.student.device.type != "cpu" or not label.shape[0]:
        return inputs
    if ignored is not None and 0 <= ignored < classes:
        return inputs
    label, temperatures, of_rows = label.long(), inputs.temperatures, inputs.by_row
    try:
        if temperatures is None or of_rows:
            inputs.student.detach()[0].index_select(0, label)
        else:
            temperatures, of_rows = temperatures.index_select(0, label), True
    except IndexError:
        return inputs
    return inputs._replace(label=label, temperatures=temperatures, by_row=of_rows, ignore_index=None, known=True)


def _size(inputs: Inputs) -> int:
    """Return how many rows a part has on a CPU."""
    return max(1, PART * torch.get_num_threads() // inputs.student.shape[1])


def _fits(inputs: Inputs) -> bool:
    return inputs.student.numel() <= PART or inputs.student.shape[0] <= _size(inputs) or inputs.student.is_cuda


class AtOnce(torch.autograd.Function):
    """The loss in plain PyTorch, with its gradients computed beside it.

    On a CPU most of the time goes into the two softmaxes, which the gradients need as well.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, inputs: Inputs, reduction: str, compute: Any) -> Tensor:
        loss, *grads = evaluate(inputs, *ctx.needs_input_grad[:2], compute=compute)
        ctx.save_for_backward(*grads)
        ctx.dtypes, ctx.by_row, ctx.divisor = (student.dtype, teacher.dtype), reduction == "none", 1
        if ctx.by_row:
            return loss
        ctx.divisor = divisor(inputs, reduction)
        return loss.sum() / ctx.divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *differentiated_once(_scaled, ctx, grad), None, None, None


def _scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the saved gradients times that of the loss."""
    scale = grad[:, None] if ctx.by_row else grad / ctx.divisor
    found = []
    for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
        product = None if saved is None else saved * scale
        found.append(product if product is None or product.dtype == dtype else product.to(dtype))
    return tuple(found)


def divisor(inputs: Inputs, reduction: str) -> int | Tensor:
    """Return by what the sum of the losses is divided: no less than 1."""
    batch, classes = inputs.student.shape
    if reduction == "sum":
        return 1
    number = 1 if reduction == "batchmean" else classes
    if inputs.label is None or inputs.ignore_index is None:
        return max(1, batch * number)
    counted = (inputs.label != inputs.ignore_index).sum().clamp_(min=1)
    return counted if number == 1 else counted * number
