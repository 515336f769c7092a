"""Tables of addresses on the device, from which one launch finds its way through any number of tensors.

A kernel of PyTorch's for many tensors takes their addresses as arguments, and has room for a few dozen a launch. A
kernel of ours reads them from a table: a row for each of its programs. A table is made once, since what it serves keeps
its place: the weights of a network, their averages, their folded copies. A CUDA graph may hold a launch whose table was
made before; to make one copies from the host, which a graph cannot hold.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from retemper.kernels.runtime import is_dense_batch_first, runs_triton

Row = tuple[int, ...]


class Tables:
    """The tables of one kernel, each kept as long as the first tensor that it names.

    Args:
        rows: takes the lists of tensors, and what else decides the rows; returns the integers of each program, or None
            where the tensors do not lie as the kernel needs.
    """

    def __init__(self, rows: Callable[..., list[Row] | None]) -> None:
        self.rows = rows
        self.made = WeakTensorKeyDictionary()

    def __call__(self, *lists: Sequence[Tensor], also: Row = ()) -> Tensor | None:
        """Return the table for these tensors, (programs, columns) int64; it is made where one is new or has moved.

        None where the kernel does not take them: they are of several dtypes, in an odd layout, or not for Triton.

        Args:
            lists: of tensors on one device, at least one of them; what is kept in it ends with its first tensor.
            also: what else decides the rows.
        """
        tensors = [*chain.from_iterable(lists)]
        if not runs_triton(*tensors) or any(len({t.dtype for t in many}) > 1 for many in lists):
            return None
        places = (*map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors), *also)
        made: dict[Row, Tensor | None] = self.made.setdefault(tensors[0], {})  # pyright: ignore[reportAssignmentType]
        if places not in made:
            rows = self.rows(*lists, also) if also else self.rows(*lists)
            made[places] = None if rows is None else torch.tensor(rows, device=tensors[0].device)
        return made[places]


def lie_alike(*tensors: Tensor) -> bool:
    """Say whether tensors have one shape and one order in memory, without holes, row after row."""
    steps = [[step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in tensors]
    alike = all(t.shape == tensors[0].shape for t in tensors) and all(one == steps[0] for one in steps)
    return alike and (tensors[0].dim() == 0 or is_dense_batch_first(tensors[0]))
