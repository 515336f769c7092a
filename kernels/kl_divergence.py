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

# How many logits of a tensor each thread of a CPU works on at a time: what it computes of them stays in its cache. Whole
# (512, 32000) tensors would go through memory once for every line of `compute`.
PART = 2**16


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
    grad = compute(inputs, of_student=not of_teacher, of_teacher=of_teacher)[2 if of_teacher else 1]
    assert grad is not None
    grad = grad if row_grad is None else grad * row_grad[:, None]
    return grad.to(teacher.dtype if of_teacher else student.dtype)


class Softmax(NamedTuple):
    """A softmax that is not divided yet: (B, K), (B, K) and (B, 1), as in the module's formula."""

    shifted: Tensor
    exps: Tensor
    total: Tensor


def _softmax(logits: Tensor, temperature: float | Tensor) -> Softmax:
    shifted = logits - logits.detach().amax(1, keepdim=True)
    if isinstance(temperature, Tensor) or temperature != 1:
        shifted = shifted / temperature
    exps = shifted.exp()
    return Softmax(shifted, exps, exps.sum(1, keepdim=True))


class _Rows(NamedTuple):
    """What holds of each row, as (B, 1): None where it changes nothing."""

    temperature: float | Tensor
    scale: Tensor | None
    trust: Tensor | None
    label: Tensor  # clamped to the classes
    unknown: Tensor | None  # whose label is no class
    ignored: Tensor | None


def _rows(inputs: Inputs, dtype: torch.dtype) -> _Rows:
    label, temperature, unknown, ignored = inputs.student, inputs.temperature, None, None
    if inputs.label is not None:
        given = inputs.label.long()[:, None]
        label = given.clamp(0, inputs.student.shape[1] - 1)
        unknown = label != given
        ignored = None if inputs.ignore_index is None else given == inputs.ignore_index

    def of_class(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype).index_select(0, label[:, 0])[:, None]

    if inputs.temperatures is not None:
        own = inputs.temperatures.to(dtype).reshape(-1, 1) if inputs.by_row else of_class(inputs.temperatures)
        assert own is not None
        temperature = torch.where(own > 0, own, torch.nan)
    scale = of_class(inputs.class_weight)
    if inputs.row_weight is not None:
        scale = inputs.row_weight.to(dtype)[:, None] * (1 if scale is None else scale)
    return _Rows(temperature, scale, of_class(inputs.label_trust), label, unknown, ignored)


def compute(
    inputs: Inputs, *, of_student: bool = False, of_teacher: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses of the rows, (B,), and the gradients that are wanted, (B, K), all in the dtype of the sums."""
    dtype = compute_dtype(inputs.student, inputs.teacher)
    rows = _rows(inputs, dtype)
    student = _softmax(inputs.student.to(dtype), inputs.student_temperature)
    if rows.unknown is not None:  # all that follows of such a row is NaN
        student = student._replace(total=student.total.masked_fill(rows.unknown, torch.nan))
    if inputs.given:
        loss, *grads = _of_probabilities(inputs.teacher.to(dtype), student, inputs, of_student, of_teacher)
    else:
        teacher = _softmax(inputs.teacher.to(dtype), rows.temperature)
        if inputs.reverse:
            temperatures = (inputs.student_temperature, rows.temperature)
            loss, of_p, of_q = _of_logits(student, teacher, temperatures, rows, of_student, of_teacher)
            grads = [of_p, of_q]
        else:
            temperatures = (rows.temperature, inputs.student_temperature)
            loss, of_p, of_q = _of_logits(teacher, student, temperatures, rows, of_teacher, of_student)
            grads = [of_q, of_p]

    def finish(value: Tensor | None) -> Tensor | None:
        if value is not None and rows.scale is not None:
            value = value * rows.scale
        return value if value is None or rows.ignored is None else value.masked_fill(rows.ignored, 0)

    total = finish(loss)
    assert total is not None
    return total.squeeze(1), finish(grads[0]), finish(grads[1])


def _of_logits(
    source: Softmax, q: Softmax, temperatures: tuple[Any, Any], rows: _Rows, grad_p: bool, grad_q: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return KL(P || Q) as (B, 1), and the gradients at the logits of both; P is `source`, moved towards the label."""
    p = source if rows.trust is None else _mixed(source, rows.label, rows.trust)
    apart = p.shifted - q.shifted
    terms = p.exps * apart
    log_totals = (q.total / p.total).log()
    kl = terms.nansum(1, keepdim=True) / p.total + log_totals  # NaN: a term with p = 0, or a row whose totals are NaN
    of_p = of_q = None
    if grad_p:
        terms, mean = (terms, kl) if rows.trust is None else _of_source(source, apart, log_totals)
        share = (1.0 if rows.trust is None else 1 - rows.trust) / source.total / temperatures[0]
        terms = terms.nan_to_num(0.0, torch.inf, -torch.inf)
        of_p = (terms + source.exps * (log_totals - mean)) * share
    if grad_q:
        of_q = q.exps * (1 / q.total / temperatures[1]) - p.exps * (1 / p.total / temperatures[1])
    return kl.clamp(min=0), of_p, of_q  # only rounding makes it negative


def _of_source(source: Softmax, apart: Tensor, log_totals: Tensor) -> tuple[Tensor, Tensor]:
    """Return each term, and the mean, of log P - log Q as the softmax weighs it from which P was mixed."""
    terms = source.exps * apart
    return terms, terms.nansum(1, keepdim=True) / source.total + log_totals


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
    p: Tensor, q: Softmax, inputs: Inputs, of_student: bool, of_teacher: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return sum p (log p - log Q) as (B, 1), and the gradients at Q's logits and at p, which need not add up to 1."""
    mass, log_total = p.sum(1, keepdim=True), q.total.log()
    loss = torch.xlogy(p, p).sum(1, keepdim=True) - (p * q.shifted).nansum(1, keepdim=True) + mass * log_total
    of_q = (q.exps * (mass / q.total) - p) / inputs.student_temperature if of_student else None
    of_p = p.log() + 1 - q.shifted + log_total if of_teacher else None
    return loss, of_q, of_p


def evaluate(
    inputs: Inputs, of_student: bool, of_teacher: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what `compute` does, on a CPU part by part."""
    batch, classes = inputs.student.shape
    size = max(1, PART * torch.get_num_threads() // classes)
    if batch <= size or inputs.student.is_cuda:
        return compute(inputs, of_student=of_student, of_teacher=of_teacher)
    dtype = compute_dtype(inputs.student, inputs.teacher)
    loss = inputs.student.new_empty(batch, dtype=dtype)
    shapes = ((batch, classes) if wanted else None for wanted in (of_student, of_teacher))
    grads = [None if shape is None else inputs.student.new_empty(shape, dtype=dtype) for shape in shapes]
    for rows, part in inputs.parts(size):
        loss[rows], *computed = compute(part, of_student=of_student, of_teacher=of_teacher)
        for grad, found in zip(grads, computed, strict=True):
            if grad is not None:
                grad[rows] = found
    return loss, grads[0], grads[1]
