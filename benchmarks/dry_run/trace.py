"""The operators of a step that launch something: which kernels, of which tensors, how many bytes they move."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dry_run.convolution import read
from dry_run.record import Record, Recorder

# Operators that overwrite tensors without reading them: PyTorch's, and of retemper's those whose schema cannot say so.
WRITE_ALONE = {"copy_", "fill_", "zero_", "random_start_", "fold_norms_", "scale_rows_"}
# Operators that read what they are given twice: for a channel's sums, and again to use them.
READ_TWICE = {"native_batch_norm", "native_batch_norm_backward", "batch_norm_", "batch_norm_backward"}


@dataclass(frozen=True)
class Op:
    """An operator that launched something.

    Attributes:
        launches: the kind and the name of each.
        bytes: read and written, by `bytes_moved`; of a convolution as cuDNN is given it.
        layouts: the shapes of float images that it reads or writes in another layout than channels-last.
    """

    phase: str
    name: str
    launches: list[tuple[str, str]]
    bytes: int
    layouts: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """A call of an operator, with the places of its records: from `begin` up to `end`."""

    op: Op
    begin: int
    end: int


class Trace(TorchDispatchMode):
    """A mode in which every operator that asks something of CUDA is kept, with the running `phase`."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder, self.phase = recorder, ""
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        begin = self.recorder.size()
        result = func(*args, **kwargs)
        end = self.recorder.size()
        if end > begin:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if on_gpu(leaf)]
            layouts = [tuple(one.shape) for one in tensors if in_another_layout(one)]
            op = Op(self.phase, str(func), [], bytes_moved(func, args, kwargs, result), layouts)
            self.calls.append(Call(op, begin, end))
        return result

    def ops(self, records: list[Record]) -> list[Op]:
        """Return the operators that launched something, given the records since the reset before this trace."""
        found, seen = [], set[int]()
        for call in self.calls:  # one within another comes before it
            own = [place for place in range(call.begin, call.end) if place not in seen and records[place].is_work]
            seen.update(own)
            launches = [(records[place].kind, records[place].name) for place in own]
            plans = [read(name) for kind, name in launches if kind == "convolution"]
            moved = sum(plan.bytes for plan in plans) or call.op.bytes
            if launches:
                found.append(replace(call.op, launches=launches, bytes=moved))
        return found


def on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def in_another_layout(tensor: Tensor) -> bool:
    """Return whether this is a batch of float images whose channels are not its fastest dimension."""
    if tensor.dim() != 4 or not tensor.is_floating_point() or 0 in tensor.stride():  # what is expanded has no layout
        return False
    _, channels, height, width = tensor.shape
    if channels == 1 or height * width == 1:
        return False
    return not tensor.is_contiguous(memory_format=torch.channels_last)


def bytes_moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes that an operator reads and writes: each tensor once, or as the two sets above say."""
    name = func._schema.name.split("::")[1]
    read, written = [], []
    for argument, value in zip(func._schema.arguments, arguments(func, args, kwargs), strict=True):
        tensors = [leaf for leaf in tree_leaves(value) if on_gpu(leaf)]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        written += tensors if is_written else []
        read += [] if is_written and (argument.is_out or name in WRITE_ALONE) else tensors
    known = {id(one) for one in written}
    written += [leaf for leaf in tree_leaves(result) if on_gpu(leaf) and id(leaf) not in known]
    times = 2 if name in READ_TWICE else 1
    return times * sum(map(size, read)) + sum(map(size, written))


def arguments(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """Yield the value of every argument in the schema's order; None for one that was left out."""
    for place, argument in enumerate(func._schema.arguments):
        yield args[place] if place < len(args) else kwargs.get(argument.name)


def size(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes, an expanded dimension once."""
    return tensor.element_size() * prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
