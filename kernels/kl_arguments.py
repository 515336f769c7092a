"""The arguments of class_temperature_kl: what users call with, made what the operators take, and checked.

A front function asks `arguments` once. The operators themselves check shapes, dtypes, devices and strides, since they
can be called as torch.ops.retemper.* too.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retemper.kernels.rows import (
    LABELS,
    NUMBERS,
    as_rows,
    by_row,
    require_class_dim,
    require_dense,
    require_each,
    require_logits,
    require_positive,
    row_shapes,
)


class Inputs(NamedTuple):
    """The arguments of the operators, in their order.

    Attributes:
        student, teacher: (B, K) logits; the teacher's are probabilities where `given`.
        label: (B,) whole numbers, or None.
        temperatures: of the teacher: (B,) or a single one where `by_row`, otherwise (K,); None: `temperature` holds.
        class_weight: (K,) or None.
        label_trust: (B,) where `trust_by_row`, otherwise (K,); or None.
        row_weight: (B,) or None.
        temperature, student_temperature: numbers above 0.
        by_row: what `temperatures` are.
        ignore_index: rows with this label count nothing; None leaves none out.
        reverse: KL(student || teacher) in place of KL(teacher || student).
        given: the teacher's probabilities are given as they are.
        trust_by_row: what `label_trust` is.
        known: every label is an int64 of a class. It is no argument of an operator.
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
    trust_by_row: bool = False
    known: bool = False

    def of_operator(self) -> tuple[Any, ...]:
        """Return the arguments of an operator."""
        return self[:-1]

    def parts(self, size: int) -> Iterator[tuple[slice, "Inputs"]]:
        """Cut the rows into parts of at most `size` rows."""
        either = {"temperatures": self.by_row, "label_trust": self.trust_by_row}
        of_rows = ("label", "row_weight", *(name for name, by_row in either.items() if by_row))
        for start in range(0, self.student.shape[0], size):
            rows = slice(start, start + size)
            cut: dict[str, Any] = {"student": self.student[rows], "teacher": self.teacher[rows]}
            for name in of_rows:
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
    row_trust: Tensor | None = None,
    teacher_is: str = "logits",
    reverse: bool = False,
    ignore_index: int | None = -100,
    class_dim: int = -1,
) -> Inputs:
    """Return what users call with as the operators take it. The arguments are those of `class_temperature_kl`.

    Raises:
        TypeError: student, teacher, label, row_weight or row_trust is no tensor.
        ValueError: two arguments exclude each other, a dimension is missing, or a number is out of its range.
    """
    require_class_dim("student", student, class_dim)
    require_class_dim("teacher", teacher, class_dim)
    shapes = row_shapes(student, class_dim)
    classes = student.shape[class_dim]
    given = teacher_is == "probabilities"
    if not given and teacher_is != "logits":
        raise ValueError(f"teacher_is: {teacher_is!r}; needs 'logits' or 'probabilities'")
    trust_by_row = row_trust is not None
    if given or reverse or label is None or trust_by_row:
        trusts = {"label_trust": label_trust, "row_trust": row_trust}
        _require_combination(teacher_is, label, temperature, class_weight, trusts, reverse)
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
        by_row("row_trust", row_trust, shapes) if trust_by_row else label_trust,
        None if row_weight is None else by_row("row_weight", row_weight, shapes),
        temperature,
        student_temperature,
        of_rows,
        None if label is None else ignore_index,
        reverse,
        given,
        trust_by_row,
    )


def _require_combination(
    teacher_is: str,
    label: Tensor | None,
    temperature: float | Tensor,
    class_weight: Tensor | None,
    trusts: Mapping[str, Tensor | None],
    reverse: bool,
) -> None:
    """Raise ValueError where one of the arguments leaves no meaning to another."""
    asked = [name for name, value in trusts.items() if value is not None]
    if label is None:
        if class_weight is not None:
            raise ValueError("label: None; needs the class of each row, as class_weight is by class")
        if asked:
            raise ValueError(f"label: None; needs the class of each row, as {asked[0]} is the trust in it")
    if len(asked) > 1:
        raise ValueError("row_trust: needs label_trust=None; the trust in a label is by class or by row")
    if asked and reverse:
        raise ValueError(f"{asked[0]}: needs reverse=False")
    if teacher_is == "logits":
        return
    if asked:
        raise ValueError(f"{asked[0]}: needs teacher_is='logits'")
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


def require_fitting(inputs: Inputs) -> None:
    """Raise ValueError where a shape, dtype, device or stride does not fit."""
    student, teacher, label, temperatures, class_weight, label_trust, row_weight, *_ = inputs
    require_logits(student=student, teacher=teacher)
    batch, classes = student.shape
    if label is not None:
        require_each("label", label, batch, LABELS, student.device)
        require_dense("label", label)
    if row_weight is not None:
        require_each("row_weight", row_weight, batch, NUMBERS, student.device)
    by_class = {"class_weight": class_weight}
    if label_trust is not None and inputs.trust_by_row:
        require_each("row_trust", label_trust, batch, NUMBERS, student.device)
    else:
        by_class["label_trust"] = label_trust
    if temperatures is not None:
        if not inputs.by_row:
            by_class["temperature"] = temperatures
        elif temperatures.dim():
            require_each("temperature", temperatures, batch, NUMBERS, student.device)
        elif temperatures.device != student.device or temperatures.dtype not in NUMBERS:
            raise ValueError(
                f"temperature: {temperatures.dtype} on {temperatures.device}; needs float32 or float64 there"
            )
    for name, value in by_class.items():
        if value is not None:
            require_each(name, value, classes, NUMBERS, student.device)
            require_dense(name, value)


def require_overwritable(inputs: Inputs) -> None:
    """Raise ValueError where something does not fit, or the student's rows overlap."""
    require_fitting(inputs)
    student = inputs.student
    if student.shape[0] > 1 and student.stride(0) < student.shape[1]:
        raise ValueError(f"student: strides {student.stride()} overlap and cannot be overwritten; call .contiguous()")
