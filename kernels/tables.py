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

from retemper.kernels.runtime import runs_triton

Row = tuple[int, ...]


class Tables:
    """The tables of one kernel, each kept as long as the first tensor that it names.

    Args:
        rows: takes the lists of tensors, and what else decides the rows; returns the integers of each program.
    """

    def __init__(self, rows: Callable[..., list[Row]]) -> None:
        self.rows = rows
        self.made = WeakTensorKeyDictionary()

    def __call__(self, *lists: Sequence[Tensor], also: tuple[int, ...] = ()) -> Tensor:
        """Return the table for these tensors, (programs, columns) int64; it is made where one is new or has moved.

        Args:
            lists: of tensors on one device, at least one of them; what is kept in it ends with its first tensor.
            also: what else decides the rows.
        """
        tensors = [*chain.from_iterable(lists)]
        places = (*map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors), *also)
        made: dict[Row, Tensor] = self.made.setdefault(tensors[0], {})  # pyright: ignore[reportAssignmentType]
        if places not in made:
            made[places] = torch.tensor(self.rows(*lists, *([also] if also else [])), device=tensors[0].device)
        return made[places]


def one_launch(*lists: Sequence[Tensor]) -> bool:
    """Say whether a kernel takes these lists: those of each are of one dtype, and all go through Triton."""
    return runs_triton(*chain.from_iterable(lists)) and all(len({t.dtype for t in many}) == 1 for many in lists)
