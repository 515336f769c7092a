"""A stand-in for CUDA graphs on a CPU: it runs recorded operations again, on the recorded tensors.

A tensor that moves, a number read on the host, and what Python decides then replay wrongly here too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Recorder(TorchDispatchMode):
    """A mode that keeps each operation with the tensors it took and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outs in self.calls:
            news = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, Tensor)]
            for old, new in zip(outs, news, strict=True):
                if old.data_ptr() != new.data_ptr():  # a view, or written in place, otherwise
                    old.copy_(new)


class Graphs:
    """A recorder of calls without effects, as `CudaGraphs` is one.

    Attributes:
        recorded, replayed: how many there were.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with Recorder() as recorder:
            result = work()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            recorder.replay()

        return replay, result
