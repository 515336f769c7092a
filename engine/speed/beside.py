"""Work on a stream beside the current one: the teacher answers while the attack takes its first forward, or all of it.

The stream is forked from the current one where its work begins and joined before a result is read, so that a CUDA graph
records both as parallel branches. The kernels and their inputs are the same, and so are the bits.

Memory is safe without marks for the allocator. What is made beside is read after the join and freed before the next
fork, at which the stream waits for all that the current one was given. What the work reads is held by its caller until
the join.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Branch:
    """A branch of a step.

    Args:
        device: where the step runs.
        apart: whether the branch has a stream of its own; without one, and on a CPU, its work is done on the spot.
    """

    def __init__(self, device: torch.device, apart: bool) -> None:
        self.stream = torch.cuda.Stream(device) if apart and device.type == "cuda" else None
        self.pending = False

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Return what `work` returns, to be read after `join`; `work` reads tensors that are there already."""
        if self.stream is None:
            return work()
        self.stream.wait_stream(torch.cuda.current_stream())
        self.pending = True
        with torch.cuda.stream(self.stream):
            return work()

    def join(self) -> None:
        """Let what the current stream is given from here on come after the work beside it."""
        if self.pending and self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.pending = False


class Awaiting:
    """An objective of an attack that joins a branch when it is first looked at, which is after a forward.

    Args:
        make: makes the objective, and may read what is done beside.
    """

    def __init__(self, make: Callable[[], Callable[[Tensor], Tensor]], branch: Branch) -> None:
        self._make, self._branch = make, branch

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the objective of (B, K) logits."""
        return self._objective(logits)

    def __getattr__(self, name: str) -> Any:
        """Return what the objective has under that name: its gradient, its rows."""
        return getattr(self._objective, name)

    @cached_property
    def _objective(self) -> Callable[[Tensor], Tensor]:
        self._branch.join()
        return self._make()
