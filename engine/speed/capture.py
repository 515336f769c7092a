"""A training step recorded once in a CUDA graph and replayed: the host then says one word a step instead of a thousand.

What a graph may hold is a step that never waits for the device and whose tensors keep their addresses (`State`); its
inputs are copied into tensors of its own. A replay runs the kernels of the eager step in their order: bitwise the same.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retemper.engine.device import is_out_of_memory
from retemper.errors import UsageError

Step = Callable[..., Tensor]
WARM_UP = 3  # eager steps of a shape before it is recorded: optimizer state and workspaces are made in them


class Captured:
    """`step` with the same arguments and results, from its fourth call on replayed.

    Every shape of the arguments has its own recording, so that the last, smaller batch of an epoch is replayed as well.

    Args:
        step: tensors (or None) to one tensor, on the current GPU.
        record: how a call is recorded, for tests without a GPU; it gives back the replay and the recorded result.
    """

    def __init__(self, step: Step, record: Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]) -> None:
        self.step, self.record = step, record
        self.calls: Counter[Any] = Counter()
        self.own: dict[Any, tuple[Tensor | None, ...]] = {}
        self.recorded: dict[Any, tuple[Callable[[], None], Tensor]] = {}

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        shape = tuple(None if given is None else (given.shape, given.stride(), given.dtype) for given in inputs)
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
    """Records on a stream of its own, all graphs in one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
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


def captured(step: Step) -> Step:
    """`step`, warmed up aside and then replayed from CUDA graphs on the current GPU."""
    stream = torch.cuda.Stream()

    def aside(*inputs: Tensor | None) -> Tensor:
        """An eager step on the side: what it leaves behind must not belong to the default stream."""
        if torch.cuda.is_current_stream_capturing():
            return step(*inputs)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    return Captured(aside, CudaGraphs())
