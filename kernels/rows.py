"""The arguments of a loss over rows of logits: dimensions flattened, and each number told by class, by row or for all.

A row is what a softmax runs over. Logits of any leading dimensions are (B, K) to the kernels, B rows of K classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retemper.kernels.runtime import FLOATS

LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NUMBERS = (torch.float32, torch.float64)  # of what is given by class or by row


def as_rows(logits: Tensor, class_dim: int) -> Tensor:
    """Return logits as (B, K): a view where the classes already come last, otherwise a copy if memory demands it."""
    if logits.dim() == 2 and class_dim in (-1, 1):
        return logits
    rows = logits.movedim(class_dim, -1).reshape(-1, logits.shape[class_dim])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def require_class_dim(name: str, logits: Tensor, class_dim: int) -> None:
    """Raise TypeError or ValueError unless `logits` is a tensor of two dimensions or more, of which this is one."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: a {type(logits).__name__}; needs a tensor")
    if logits.dim() < 2:
        raise ValueError(f"{name}: shape {tuple(logits.shape)}; needs (B, K), or more dimensions of rows")
    if not -logits.dim() <= class_dim < logits.dim():
        raise ValueError(f"class_dim: {class_dim}; {name} has shape {tuple(logits.shape)}")


def row_shapes(logits: Tensor, class_dim: int) -> tuple[torch.Size, torch.Size]:
    """Return the shape of one number a row, without the dimension of the classes and with 1 in its place."""
    if logits.dim() == 2 and class_dim in (-1, 1):
        return logits.shape[:1], torch.Size((logits.shape[0], 1))
    shape, place = list(logits.shape), class_dim % logits.dim()
    return torch.Size(shape[:place] + shape[place + 1 :]), torch.Size([*shape[:place], 1, *shape[place + 1 :]])


def by_row(name: str, value: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """Return one number a row as (B,), of any stride.

    Raises:
        TypeError: `value` is no tensor.
        ValueError: it has none of the shapes that `row_shapes` gives.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: a {type(value).__name__}; needs a tensor")
    if value.shape not in shapes:
        raise ValueError(f"{name}: shape {tuple(value.shape)}; needs {tuple(shapes[0])}, one number for each row")
    return value if value.dim() == 1 else value.reshape(-1)


def require_positive(**numbers: float) -> None:
    """Raise ValueError unless each number is finite and above 0."""
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            raise ValueError(f"{name}: a tensor of shape {tuple(number.shape)}; needs a number")
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: {number}; needs a finite number above 0")


def require_logits(**logits: Tensor) -> None:
    """Raise ValueError unless all are float logits (B, K) of one shape and device, the K of a row side by side."""
    (first_name, first), *_ = logits.items()
    for name, rows in logits.items():
        if rows.dtype not in FLOATS:
            raise ValueError(f"{name}: {rows.dtype}; needs one of {', '.join(map(str, FLOATS))}")
        if rows.dim() != 2 or rows.shape[1] == 0:
            raise ValueError(f"{name}: shape {tuple(rows.shape)}; needs (B, K) with K at least 1")
        if rows.shape != first.shape:
            raise ValueError(f"{name}: shape {tuple(rows.shape)}, but {first_name} has {tuple(first.shape)}")
        if rows.stride(1) != 1 and rows.shape[1] > 1:
            raise ValueError(f"{name}: strides {rows.stride()}; rows must be contiguous, call .contiguous() on it")
        if rows.device != first.device:
            raise ValueError(f"{name}: on {rows.device}, but {first_name} is on {first.device}; move it with .to()")


def require_each(name: str, values: Tensor, length: int, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Raise ValueError unless `values` is (length,), of one of the dtypes and on the device."""
    if values.shape != (length,):
        raise ValueError(f"{name}: shape {tuple(values.shape)}; needs ({length},)")
    if values.dtype not in dtypes:
        raise ValueError(f"{name}: {values.dtype}; needs {' or '.join(map(str, dtypes))}")
    if values.device != device:
        raise ValueError(f"{name}: on {values.device}, but the logits are on {device}; move it with .to()")


def require_dense(name: str, values: Tensor) -> None:
    """Raise ValueError unless the numbers lie side by side in memory."""
    if values.stride(0) != 1 and values.shape[0] > 1:
        raise ValueError(f"{name}: stride {values.stride(0)}; call .contiguous() on it")
