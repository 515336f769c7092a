"""Record work on a GPU in a CUDA graph and replay it: the host then makes one launch in place of thousands.

A graph can hold work that never waits for the device and whose tensors keep their addresses (`State`); its inputs are
copied into tensors of the graph's own. A replay runs the kernels of the eager work in their order: bitwise the same.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor

from retemper.console import say_once
from retemper.engine.device import is_out_of_memory, tuned_convolutions
from retemper.errors import UsageError

Step = Callable[..., Tensor]
Recorded = tuple[Callable[[], None], Tensor]  # replays a call; the tensor that each replay overwrites with its result
Record = Callable[[Callable[[], Tensor]], Recorded]
WARM_UP = 3  # eager steps of a shape before it is recorded: they make optimizer state and workspaces
_RECORDING = Lock()  # PyTorch records one graph at a time


@dataclass
class _Kind:
    """Calls that do the same work: the tensors that it reads, how many there were in each thread, and a recording."""

    inputs: tuple[Tensor | None, ...]
    calls: Counter[int] = field(default_factory=Counter)
    recorded: Recorded | None = None
    refused: bool = False

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Have the memory of its tensors, once they are gone, wait for what is under way on another stream."""
        for own in self.inputs:
            if own is not None:
                own.record_stream(stream)


class Recordings:
    """Work on tensors, each kind of which is replayed from its own recording once it was called a few times.

    Of one kind are calls whose inputs agree in shape, strides and dtype, so that the last, smaller batch of an epoch is
    replayed as well.

    Args:
        record: records a call: `CudaGraphs`, or a stand-in for it in tests without a GPU.
        warm_up: how many calls of a kind run in each thread before one is recorded.
        most: of how many kinds tensors and recordings are kept, those of the last calls; None for all.
        name: what the work is, in a note to the user: what cannot be recorded then runs as it is. None to raise.
        tuned: whether work runs once more, with tuned convolutions, before it is recorded with them: for work without
            effects. It is not done where torch is to be deterministic.
    """

    def __init__(
        self,
        record: Record,
        *,
        warm_up: int = WARM_UP,
        most: int | None = None,
        name: str | None = None,
        tuned: bool = False,
    ) -> None:
        self.record, self.warm_up, self.most, self.name, self.tuned = record, warm_up, most, name, tuned
        self.kinds: OrderedDict[Any, _Kind] = OrderedDict()

    def __call__(self, work: Step, inputs: tuple[Tensor | None, ...], phase: Hashable = None) -> Tensor:
        """Run or replay `work` on copies of `inputs`, and return a copy of its result.

        Args:
            phase: what else decides which work is done.
        """
        kind = self._kind(inputs, phase)
        if kind.refused:
            return work(*inputs)
        with torch.no_grad():
            for own, given in zip(kind.inputs, inputs, strict=True):
                if own is not None and given is not None:
                    own.copy_(given)
        if kind.recorded is None:
            kind.calls[get_ident()] += 1
            if kind.calls[get_ident()] <= self.warm_up:
                return work(*kind.inputs)
            kind.recorded = self._recorded(lambda: work(*kind.inputs))
            if kind.recorded is None:
                kind.refused = True
                return work(*inputs)
        replay, result = kind.recorded
        replay()
        return result.clone()

    def _kind(self, inputs: tuple[Tensor | None, ...], phase: Hashable) -> _Kind:
        """Return the kind of a call, whose tensors are the work's from the first one on.

        What is compiled for them in the warm-up is then what is recorded.
        """
        shapes = tuple(None if given is None else (given.shape, given.stride(), given.dtype) for given in inputs)
        key = shapes, phase
        if key not in self.kinds:
            with torch.inference_mode(False):
                self.kinds[key] = _Kind(tuple(None if given is None else given.detach().clone() for given in inputs))
            if self.most is not None and len(self.kinds) > self.most:
                self.kinds.popitem(last=False)
        self.kinds.move_to_end(key)
        return self.kinds[key]

    def _recorded(self, work: Callable[[], Tensor]) -> Recorded | None:
        """Return the recording of a call; None where there can be none, which the user is told."""
        try:
            with tuning(self.tuned):
                if self.tuned:
                    work()
                return self.record(work)
        except Exception as error:  # which the eager call, next, raises again where it is the caller's
            if self.name is None:
                raise
            if is_out_of_memory(error):
                for kind in self.kinds.values():
                    kind.recorded, kind.refused = None, True
            say_once(f"note: {self.name} runs without a CUDA graph: {why(error)}")
            return None


class Captured:
    """A step that is called as the original is, and is replayed from its fourth call of a kind on.

    Args:
        step: takes tensors or None, and returns one tensor; on the current GPU.
        record: as for `Recordings`.
        phase: returns what else decides which work a call does.
    """

    def __init__(self, step: Step, record: Record, phase: Callable[[], Hashable] = lambda: None) -> None:
        self.step, self.recordings, self.phase = step, Recordings(record), phase

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Run or replay the step on copies of `inputs`, and return a copy of its result."""
        return self.recordings(self.step, inputs, self.phase())


class CudaGraphs:
    """The recorder of calls in CUDA graphs. All share one pool of memory, since they never run at the same time.

    Args:
        device: the GPU; None for the current one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], Tensor]) -> Recorded:
        """Record one call of `work`.

        Raises:
            UsageError: it does what a graph cannot hold.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with _RECORDING, torch.cuda.stream(torch.cuda.current_stream()):  # which a failure would leave changed
            torch.clear_autocast_cache()  # a weight that was cast before would be cast in no replay
            try:
                # thread_local, as loaders have threads
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    result = work()
            except RuntimeError as error:
                self._recover()
                if is_out_of_memory(error):
                    raise
                raise UsageError(
                    f"the step cannot be recorded in a CUDA graph ({why(error)}): use --capture off"
                ) from error
            finally:
                torch.clear_autocast_cache()  # what was cast in the recording lies in its memory
        return graph.replay, result

    def _recover(self) -> None:
        """Undo what a recording that failed leaves behind: PyTorch believes in it until told otherwise.

        Memory of other streams would never be taken back, and random numbers could not be drawn.
        """
        device = torch.cuda.current_device()
        with suppress(RuntimeError, AttributeError):  # it had ended, or this PyTorch has no such functions
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"):
            torch.zeros(1, device="cuda")


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


def tuning(wanted: bool) -> AbstractContextManager[None]:
    """Return a context with tuned convolutions, where they are wanted and torch need not be deterministic."""
    return tuned_convolutions() if wanted and not torch.are_deterministic_algorithms_enabled() else nullcontext()


def why(error: BaseException) -> str:
    """Return the first line of what an error says, or the one that it came after: a graph that fails has two."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
