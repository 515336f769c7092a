"""The arithmetic of class_temperature_kl in plain PyTorch: the reference of the kernel, and the path on a CPU.

The formula stands in class_temperature_kl.py. Here one side of the divergence is P, of which the expectation is taken,
and the other is Q: teacher and student, or with `reverse` student and teacher. Of a row of logits z at temperature T,

    shifted_k = (z_k - max z) / T      exps_k = exp(shifted_k)      total = sum_k exps_k

    KL = sum_k exps_p (shifted_p - shifted_q) / total_p + ln(total_q / total_p)

The peak is subtracted before the division: logits of 1e4 at temperature 0.05 would lose their differences to rounding.
Computed in float32, or in float64 as soon as one of the logits is: the tests have their truth from there.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retemper.kernels.rows import as_rows, by_row, require_class_dim, require_positive, row_shapes
from retemper.kernels.runtime import compute_dtype

# How many logits of a tensor each thread of a CPU works on at a time: what it computes of them stays in its cache.
# Whole (512, 32000) tensors would go through memory once for every line of `compute`.
PART = 2**16
WIDE = 32  # classes, from which PyTorch's softmax of a CPU is vectorised and faster than its parts


class Inputs(NamedTuple):
    """The arguments of the operators, in their order.

    Attributes:
        student, teacher: (B, K) logits; the teacher's are probabilities where `given`.
        label: (B,) whole numbers, or None.
        temperatures: of the teacher: (B,) or a single one where `by_row`, otherwise (K,); None: `temperature` holds.
        class_weight, label_trust: (K,) or None.
        row_weight: (B,) or None.
        temperature, student_temperature: numbers above 0.
        by_row: what `temperatures` are.
        ignore_index: rows with this label count nothing; None leaves none out.
        reverse: KL(student || teacher) in place of KL(teacher || student).
        given: the teacher's probabilities are given as they are.
    """

    student: Tensor
    teacher: Tensor
    label: Tensor | None
    temperatures: Tensor | None
    class_weight: Tensor | None
    label_trust: Tensor | None
    row_weight: Tensor | None
    temperature: float
    student_temperature: float
    by_row: bool
    ignore_index: int | None
    reverse: bool
    given: bool
    known: bool = False  # that every label is a class; no argument of an operator

    def parts(self, size: int) -> Iterator[tuple[slice, "Inputs"]]:
        """Cut the rows into parts of at most `size` rows."""
        for start in range(0, self.student.shape[0], size):
            rows = slice(start, start + size)
            cut = {"student": self.student[rows], "teacher": self.teacher[rows]}
            for name in ("label", "row_weight", *(["temperatures"] if self.by_row else [])):
                value = getattr(self, name)
                cut[name] = value[rows] if value is not None and value.dim() else value
            yield rows, self._replace(**cut)


def arguments(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
    row_weight: Tensor | None = None,
    teacher_is: str = "logits",
    reverse: bool = False,
    ignore_index: int | None = -100,
    class_dim: int = -1,
) -> Inputs:
    """Return what users call with as the operators take it. The arguments are those of `class_temperature_kl`.

    Raises:
        TypeError: student, teacher, label or row_weight is no tensor.
        ValueError: two arguments exclude each other, a dimension is missing, or a number is out of its range.
    """
    require_class_dim("student", student, class_dim)
    require_class_dim("teacher", teacher, class_dim)
    shapes = row_shapes(student, class_dim)
    classes = student.shape[class_dim]
    given = teacher_is == "probabilities"
    if not given and teacher_is != "logits":
        raise ValueError(f"teacher_is: {teacher_is!r}; needs 'logits' or 'probabilities'")
    if given or reverse or label is None:
        _require_combination(teacher_is, label, temperature, class_weight, label_trust, reverse)
    require_positive(student_temperature=student_temperature)
    temperatures, of_rows = None, False
    if isinstance(temperature, Tensor):
        temperatures, of_rows = _temperatures(temperature, classes, shapes, label is not None)
        temperature = 1.0
    else:
        require_positive(temperature=temperature)
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: shape {tuple(teacher.shape)}, but student has {tuple(student.shape)}")
    return Inputs(
        as_rows(student, class_dim),
        as_rows(teacher, class_dim),
        None if label is None else by_row("label", label, shapes[:1]),
        temperatures,
        class_weight,
        label_trust,
        None if row_weight is None else by_row("row_weight", row_weight, shapes),
        temperature,
        student_temperature,
        of_rows,
        None if label is None else ignore_index,
        reverse,
        given,
    )


def _require_combination(
    teacher_is: str,
    label: Tensor | None,
    temperature: float | Tensor,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    reverse: bool,
) -> None:
    """Raise ValueError where one of the arguments leaves no meaning to another."""
    if label is None:
        for name, value in (("class_weight", class_weight), ("label_trust", label_trust)):
            if value is not None:
                raise ValueError(f"label: None; needs the class of each row, as {name} is by class")
    if reverse and label_trust is not None:
        raise ValueError("label_trust: needs reverse=False")
    if teacher_is == "logits":
        return
    if label_trust is not None:
        raise ValueError("label_trust: needs teacher_is='logits'")
    if reverse:
        raise ValueError("reverse: needs teacher_is='logits'; the logits of probabilities are their teacher.log()")
    if isinstance(temperature, Tensor) or temperature != 1:
        raise ValueError("temperature: needs teacher_is='logits'; probabilities are taken as they are")


def _temperatures(
    value: Tensor, classes: int, shapes: tuple[torch.Size, torch.Size], labelled: bool
) -> tuple[Tensor, bool]:
    """Return temperatures as (K,) by class, as (B,) by row, or as a single one; and whether they are not by class."""
    if value.dim() == 0:
        return value, True
    if labelled and value.shape == (classes,):
        return value, False
    if value.shape in shapes:
        return value.reshape(-1), True
    forms = f"({classes},) by class, {tuple(shapes[0])} by row" if labelled else f"{tuple(shapes[0])} by row"
    raise ValueError(f"temperature: shape {tuple(value.shape)}; needs {forms}, or one number")


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
    """A softmax that is not divided yet: (B, K), (B, K) and (B, 1), as in the module's formula.

    Of a side whose probabilities nobody asks for, `exps` is None: `shifted` is its logarithm then, and the total 1.
    """

    shifted: Tensor
    exps: Tensor | None
    total: Tensor


def _softmax(logits: Tensor, temperature: float | Tensor, exps: bool = True) -> Softmax:
    if exps or not _is_one(temperature) or logits.shape[1] < WIDE:
        logits = logits - logits.detach().amax(1, keepdim=True)
        if not _is_one(temperature):
            logits.div_(temperature)
    if not exps and logits.shape[1] >= WIDE:
        shifted = logits.log_softmax(1)
        return Softmax(shifted, None, shifted[:, :1].exp() * 0 + 1)  # NaN where the row is
    powers = logits.exp()
    return Softmax(logits, powers, powers.sum(1, keepdim=True))


def _probabilities(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return softmax(logits / temperature), when no logarithm is needed."""
    if logits.shape[1] < WIDE:
        _, exps, total = _softmax(logits, temperature)
        return exps.div_(total)
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
    label: Tensor | None  # clamped to the classes
    ignored: Tensor | None


def _rows(inputs: Inputs, dtype: torch.dtype) -> _Rows:
    _, _, label, temperatures, class_weight, label_trust, row_weight, temperature, *_ = inputs
    ignored = scale = trust = None
    if label is not None:
        label = label.long()[:, None]
        if not inputs.known:
            given, label = label, label.clamp(0, inputs.student.shape[1] - 1)
            scale = torch.where(label == given, 1.0, torch.nan)
            ignored = None if inputs.ignore_index is None else given == inputs.ignore_index
    if temperatures is not None:
        own = temperatures.reshape(-1, 1) if inputs.by_row else temperatures[label]
        temperature = torch.where(own > 0, own, torch.nan).to(dtype)
    if class_weight is not None:
        scale = _product(scale, class_weight[label])
    if row_weight is not None:
        scale = _product(scale, row_weight[:, None])
    if label_trust is not None:
        trust = label_trust[label].to(dtype)
    return _Rows(temperature, None if scale is None else scale.to(dtype), trust, label, ignored)


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
    source: Softmax,
    q: Softmax,
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
    p = source if trust is None or label is None else _mixed(source, label, trust)
    log_totals = (q.total / p.total).log()
    apart = p.shifted.sub_(q.shifted)
    from_source = source.exps * apart if p_grad and trust is not None else None
    terms = apart.mul_(p.exps)
    # a term that is NaN has p = 0; of a row that is NaN the total is as well
    kl = torch.addcdiv(log_totals, terms.nansum(1, keepdim=True), p.total)
    p_found = q_found = None
    if p_grad:
        terms = terms if from_source is None else from_source
        mean = log_totals - torch.addcdiv(log_totals, terms.nansum(1, keepdim=True), p.total)
        p_found = terms.nan_to_num_(0.0, torch.inf, -torch.inf).addcmul_(source.exps, mean)
        share = (1 if trust is None else 1 - trust) / source.total / p_temperature
        p_found = p_found.mul_(share)
    if q_grad:
        q_found = q.exps.div_(q.total).sub_(p.exps.div_(p.total))
        q_found = q_found if _is_one(q_temperature) else q_found.div_(q_temperature)
    return kl.clamp(min=0), p_found, q_found  # only rounding makes it negative


def _mixed(p: Softmax, label: Tensor, trust: Tensor) -> Softmax:
    """Return P after it moved towards the one-hot label by its trust; the total stays."""
    log_total = p.total.log()
    own = p.shifted.gather(1, label)
    log_own = own - log_total
    short = (trust - 1) * log_own.expm1()  # what P lacks of 1 at the label: where that is small, it keeps its digits
    far = ((1 - trust) * log_own.exp() + trust).log()
    log_own = torch.where(short > 0.5, far, (-short.clamp(max=0.5)).log1p())
    own = torch.where(trust == 0, own, log_own + log_total)
    shifted = (p.shifted + (-trust).log1p()).scatter(1, label, own)
    return Softmax(shifted, shifted.exp(), p.total)


def _of_probabilities(
    p: Tensor, q: Softmax, temperature: float, q_grad: bool, p_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return sum p (log p - log Q) as (B, 1), and the gradients at Q's logits and at p, which need not add up to 1."""
    mass, log_total = p.sum(1, keepdim=True), q.total.log()
    loss = torch.xlogy(p, p).sum(1, keepdim=True) - (p * q.shifted).nansum(1, keepdim=True) + mass * log_total
    q_found = (q.exps * (mass / q.total)).sub_(p).div_(temperature) if q_grad else None
    p_found = p.log() + 1 - q.shifted + log_total if p_grad else None
    return loss, q_found, p_found


def _direction(inputs: Inputs) -> Tensor:
    """Return the student's gradient alone."""
    if inputs.reverse:
        return compute(inputs, True)[1]  # type: ignore[return-value]
    dtype = compute_dtype(inputs.student, inputs.teacher)
    rows, p = _rows(inputs, dtype), inputs.teacher.to(dtype)
    q = _probabilities(inputs.student.to(dtype), inputs.student_temperature)
    if inputs.given:
        q = q * p.sum(1, keepdim=True)
    else:
        p = _probabilities(p, rows.temperature)
    if rows.trust is not None:
        p = (p * (1 - rows.trust)).scatter_add(1, rows.label, rows.trust)
    q.sub_(p)
    return _finished(q if _is_one(inputs.student_temperature) else q.div_(inputs.student_temperature), rows)


def evaluate(inputs: Inputs, of_student: bool = False, of_teacher: bool = False) -> Any:
    """Return what `compute` does, on a CPU part by part."""
    if _fits(inputs):
        return compute(inputs, of_student, of_teacher)
    student, dtype = inputs.student, compute_dtype(inputs.student, inputs.teacher)
    loss = student.new_empty(student.shape[0], dtype=dtype)
    grads = [student.new_empty(student.shape, dtype=dtype) if wanted else None for wanted in (of_student, of_teacher)]
    for rows, part in inputs.parts(_size(inputs)):
        loss[rows], *computed = compute(part, of_student, of_teacher)
        for grad, found in zip(grads, computed, strict=True):
            if grad is not None:
                grad[rows] = found
    return loss, *grads


def overwrite(inputs: Inputs) -> None:
    """Overwrite the student's logits with the gradient of the summed loss, on a CPU part by part."""
    parts = [(..., inputs)] if _fits(inputs) else inputs.parts(_size(inputs))
    for _, part in parts:
        part.student.copy_(_direction(part))


def looked_at(inputs: Inputs) -> Inputs:
    """Return the inputs, `known` where each label is a class: on a CPU a look costs less than care for all rows."""
    label = inputs.label
    if label is None or label.is_cuda or label.numel() == 0:
        return inputs
    lowest, highest = label.aminmax()
    known = lowest.item() >= 0 and highest.item() < inputs.student.shape[1]
    return inputs._replace(known=True, ignore_index=None) if known else inputs


def _size(inputs: Inputs) -> int:
    """Return how many rows a part has on a CPU."""
    return max(1, PART * torch.get_num_threads() // inputs.student.shape[1])


def _fits(inputs: Inputs) -> bool:
    return inputs.student.numel() <= PART or inputs.student.shape[0] <= _size(inputs) or inputs.student.is_cuda
