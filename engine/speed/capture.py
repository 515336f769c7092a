"""Record a training step in a CUDA graph and replay it: the host then makes one launch per step instead of thousands.

A graph can hold a step that never waits for the device and whose tensors keep their addresses (`State`); its inputs are
copied into tensors of the graph's own. A replay runs the kernels of the eager step in their order: bitwise the same.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from retemper.engine.device import is_out_of_memory
from retemper.errors import UsageError

Step = Callable[..., Tensor]
Recorded = tuple[Callable[[], None], Tensor]  # replays a call; the tensor that each replay overwrites with its result
Record = Callable[[Callable[[], Tensor]], Recorded]
WARM_UP = 3  # eager steps of a shape before it is recorded: they make optimizer state and workspaces


class Captured:
    """A step that is called as the original is, and is replayed from its fourth call on.

    Each combination of shapes, strides and dtypes of the arguments has its own recording, so that the last, smaller
    batch of an epoch is replayed as well; and so has each phase.

    Args:
        step: takes tensors or None, and returns one tensor; on the current GPU.
        record: records a call: `CudaGraphs`, or a stand-in for it in tests without a GPU.
        phase: returns what else decides which work a call does.
    """

    def __init__(self, step: Step, record: Record, phase: Callable[[], Hashable] = lambda: None) -> None:
        self.step, self.record, self.phase = step, record, phase
        self.calls: Counter[Any] = Counter()
        self.own: dict[Any, tuple[Tensor | None, ...]] = {}
        self.recorded: dict[Any, Recorded] = {}

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Run or replay the step on copies of `inputs`, and return a copy of its result."""
        shapes = tuple(None if given is None else (given.shape, given.stride(), given.dtype) for given in inputs)
        shape = shapes, self.phase()
        if shape not in self.own:
            self.own[shape] = tuple(None if given is None else given.clone() for given in inputs)
        own = self.own[shape]  # in the warm-up too: what is compiled for them then is what is recorded
        for to, given in zip(own, inputs, strict=True):
            if to is not None and given is not None:
                to.copy_(given)
        self.calls[shape] += 1
        if self.calls[shape] <= WARM_UP:
            return self.step(*own)
        if shape not in self.recorded:
            self.recorded[shape] = self.record(lambda: self.step(*own))
        replay, result = self.recorded[shape]
        replay()
        return result.clone()


class CudaGraphs:
    """The recorder of calls in CUDA graphs. All share one pool of memory, since they never run at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Recorded:
        """Record one call of `work`.

        Raises:
            UsageError: it does what a graph cannot hold.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # loaders have threads
                result = work()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"the step cannot be recorded in a CUDA graph ({reason}): use --capture off") from error
        return graph.replay, result


def captured(step: Step, phase: Callable[[], Hashable] = lambda: None) -> Step:
    """Return `step` for the current GPU, warmed up on a stream of its own and then replayed from CUDA graphs.

    Args:
        phase: as for `Captured`.
    """
    stream = torch.cuda.Stream()

    def aside(*inputs: Tensor | None) -> Tensor:
        """Run the step on the other stream: tensors that it keeps must not belong to the default one."""
        if torch.cuda.is_current_stream_capturing():
            return step(*inputs)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    return Captured(aside, CudaGraphs(), phase)
