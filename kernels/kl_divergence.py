"""The arithmetic of class_temperature_kl in plain PyTorch: the reference of the kernel, and the path on a CPU.

The formula stands in class_temperature_kl.py. Here one side of the divergence is P, of which the expectation is taken,
and the other is Q: teacher and student, or with `reverse` student and teacher. Of a row of logits z at temperature T,

    shifted_k = (z_k - max z) / T      exps_k = exp(shifted_k)      total = sum_k exps_k

    KL = sum_k exps_p (shifted_p - shifted_q) / total_p + ln(total_q / total_p)

The peak is subtracted before the division: logits of 1e4 at temperature 0.05 would lose their differences to rounding.
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
PART = 2**16
WIDE = 32  # classes, from which PyTorch's softmax of a CPU is vectorised and faster than its parts


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


class Softmax(NamedTuple):
    """A softmax that need not be divided yet.

    Attributes:
        shifted: (B, K), its logarithm plus that of `total`.
        exps: (B, K), its values times `total`; None where nobody asks for them.
        total: (B, 1), or None where it is 1.
    """

    shifted: Tensor
    exps: Tensor | None
    total: Tensor | None

    def over_total(self) -> Any:
        """Return the values, in place of `exps`."""
        return self.exps if self.exps is None or self.total is None else self.exps.div_(self.total)


def _softmax(logits: Tensor, temperature: float | Tensor, exps: bool = True) -> Softmax:
    if not _is_one(temperature):
        logits = (logits - logits.detach().amax(1, keepdim=True)).div_(temperature)
    if logits.shape[1] >= WIDE:
        return Softmax(logits.log_softmax(1), logits.softmax(1) if exps else None, None)
    if _is_one(temperature):
        logits = logits - logits.detach().amax(1, keepdim=True)
    powers = logits.exp()
    return Softmax(logits, powers, powers.sum(1, keepdim=True))


def _probabilities(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return softmax(logits / temperature), when no logarithm is needed."""
    if logits.shape[1] < WIDE:
        return _softmax(logits, temperature).over_total()
    if not _is_one(temperature):
        logits = (logits - logits.amax(1, keepdim=True)).div_(temperature)
    return logits.softmax(1)


def _is_one(number: float | Tensor) -> bool:
    return not isinstance(number, Tensor) and number == 1


class _Rows(NamedTuple):
    """What holds of each row, as (B, 1): None where it changes nothing."""

    temperature: float | Tensor
    scale: Tensor | None  # NaN where the label is no class
    trust: Tensor | None
    label: Tensor | None  # (B,), clamped to the classes
    ignored: Tensor | None


def _rows(inputs: Inputs, dtype: torch.dtype) -> _Rows:
    _, _, label, temperatures, class_weight, label_trust, row_weight, temperature, *_ = inputs
    ignored = scale = trust = None
    if label is not None:
        given = label.long()
        label = given.clamp(0, inputs.student.shape[1] - 1)
        known = label == given
        if inputs.ignore_index is not None:
            ignored = given == inputs.ignore_index
            known, ignored = known | ignored, ignored[:, None]
        scale = torch.where(known, 1.0, torch.nan)[:, None]
    if temperatures is not None:
        own = temperatures.reshape(-1, 1) if inputs.by_row else _of_class(temperatures, label)
        temperature = own.to(dtype).clamp(min=0)  # at 0 a row is NaN: its peak is 0 / 0
    if class_weight is not None:
        scale = _product(scale, _of_class(class_weight, label))
    if row_weight is not None:
        scale = _product(scale, row_weight[:, None])
    if label_trust is not None:
        trust = _of_class(label_trust, label).to(dtype)
    return _Rows(temperature, None if scale is None else scale.to(dtype), trust, label, ignored)


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
    rows, own = _rows(inputs, dtype), inputs.student_temperature
    student, teacher = inputs.student.to(dtype), inputs.teacher.to(dtype)
    if inputs.given:
        q = _softmax(student, own)
        loss, of_student, of_teacher = _of_probabilities(teacher, q, own, student_grad, teacher_grad)
    elif inputs.reverse:
        p, q = _softmax(student, own), _softmax(teacher, rows.temperature, teacher_grad)
        loss, of_student, of_teacher = _of_logits(p, q, own, rows.temperature, None, None, student_grad, teacher_grad)
    else:
        p, q = _softmax(teacher, rows.temperature), _softmax(student, own, student_grad)
        loss, of_teacher, of_student = _of_logits(
            p, q, rows.temperature, own, rows.trust, rows.label, teacher_grad, student_grad
        )
    loss, of_student, of_teacher = (_finished(value, rows) for value in (loss, of_student, of_teacher))
    return loss.squeeze(1), of_student, of_teacher


def _finished(value: Any, rows: _Rows) -> Any:
    """Return losses or gradients times what each row weighs, and 0 in rows that are left out; None stays."""
    if value is not None and rows.scale is not None:
        value = value.mul_(rows.scale)
    return value if value is None or rows.ignored is None else value.masked_fill_(rows.ignored, 0)


def _of_logits(
    source: Any,  # two Softmax
    q: Any,
    p_temperature: float | Tensor,
    q_temperature: float | Tensor,
    trust: Tensor | None,
    label: Tensor | None,
    p_grad: bool,
    q_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return KL(P || Q) as (B, 1), and the gradients at the logits of both. With `trust` P moves towards the label.

    Tensors are overwritten where nothing needs them any more, autograd included: fresh memory costs a CPU as much time
    as the arithmetic. Where a gradient is computed here, autograd must be off.
    """
    p: Any = source if trust is None else _mixed(source, label, trust)
    if p.total is None or q.total is None:  # NaN in a row that is, otherwise 0
        log_totals = (p.exps[:, :1] + (q.shifted[:, :1].exp() if q.exps is None else q.exps[:, :1])) * 0
    else:
        log_totals = (q.total / p.total).log()
    tracked = p.shifted.requires_grad or q.shifted.requires_grad  # a softmax keeps its result for autograd
    apart = p.shifted - q.shifted if tracked else p.shifted.sub_(q.shifted)
    from_source = source.exps * apart if p_grad and trust is not None else None
    terms = apart.mul_(p.exps)
    mean = _mean(terms, p)
    p_found = q_found = None
    kl = mean + log_totals
    if p_grad:
        if from_source is not None:
            terms, mean = from_source, _mean(from_source, source)
        share: Any = (1 if trust is None else 1 - trust) / p_temperature
        p_found = terms.nan_to_num_(0.0, torch.inf, -torch.inf).addcmul_(source.exps, log_totals * 0 - mean)
        p_found = p_found.mul_(share if source.total is None else share / source.total)
    if q_grad:
        q_found = q.over_total().sub_(p.over_total())
        q_found = q_found if _is_one(q_temperature) else q_found.div_(q_temperature)
    return kl.clamp(min=0), p_found, q_found  # only rounding makes it negative


def _mean(terms: Tensor, p: Softmax) -> Tensor:
    """Return the sums of each row's terms, over the total. A term is NaN where p = 0, and then counts nothing."""
    total = terms.nansum(1, keepdim=True)
    return total if p.total is None else total / p.total


def _mixed(p: Any, label: Any, trust: Tensor) -> Softmax:
    """Return P after it moved towards the one-hot label by its trust; the total stays."""
    log_total = 0 if p.total is None else p.total.log()
    own = p.shifted.gather(1, label[:, None])
    log_own = own - log_total
    short = (trust - 1) * log_own.expm1()  # what P lacks of 1 at the label: where that is small, it keeps its digits
    far = ((1 - trust) * log_own.exp() + trust).log()
    log_own = torch.where(short > 0.5, far, (-short.clamp(max=0.5)).log1p())
    own = torch.where(trust == 0, own, log_own + log_total)
    shifted = (p.shifted + (-trust).log1p()).scatter(1, label[:, None], own)
    return Softmax(shifted, torch.where(trust == 0, p.exps, shifted.exp()), p.total)


def _of_probabilities(
    p: Tensor, q: Any, temperature: float, q_grad: bool, p_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return sum p (log p - log Q) as (B, 1), and the gradients at Q's logits and at p, which need not add up to 1."""
    mass = p.sum(1, keepdim=True)
    log_q = q.shifted if q.total is None else q.shifted - q.total.log()
    loss = torch.xlogy(p, p).sum(1, keepdim=True) - (p * log_q).nansum(1, keepdim=True)
    loss = loss + q.exps[:, :1] * 0  # NaN in a row that is
    q_found = (q.over_total() * mass).sub_(p).div_(temperature) if q_grad else None
    p_found = p.log() + 1 - log_q if p_grad else None
    return loss, q_found, p_found


def _direction(inputs: Inputs) -> Any:
    """Return the student's gradient alone, which needs no logarithm unless P is the student's or was mixed."""
    if inputs.reverse or inputs.given or inputs.label_trust is not None:
        return compute(inputs, True)[1]
    dtype, own = compute_dtype(inputs.student, inputs.teacher), inputs.student_temperature
    rows = _rows(inputs, dtype)
    apart = _probabilities(inputs.student.to(dtype), own).sub_(
        _probabilities(inputs.teacher.to(dtype), rows.temperature)
    )
    return _finished(apart if _is_one(own) else apart.div_(own), rows)


def evaluate(inputs: Inputs, of_student: bool = False, of_teacher: bool = False) -> Any:
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


def overwrite(inputs: Inputs) -> None:
    """Overwrite the student's logits with the gradient of the summed loss, on a CPU part by part."""
    parts = [(..., inputs)] if _fits(inputs) else inputs.parts(_size(inputs))
    for _, part in parts:
        part.student.copy_(_direction(part))


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
    def forward(ctx: Any, student: Tensor, teacher: Tensor, inputs: Inputs, reduction: str) -> Tensor:
        inputs = inputs._replace(student=student, teacher=teacher)
        loss, *grads = evaluate(inputs, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.dtypes, ctx.by_row, ctx.divisor = (student.dtype, teacher.dtype), reduction == "none", 1
        if ctx.by_row:
            return loss
        ctx.divisor = divisor(inputs, reduction)
        return loss.sum() / ctx.divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *differentiated_once(_scaled, ctx, grad), None, None


def _scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the saved gradients times that of the loss."""
    scale = grad[:, None] if ctx.by_row else grad / ctx.divisor
    found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return tuple(None if saved is None else (saved * scale).to(dtype) for saved, dtype in found)


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
