"""The process group of one run: which rank this process has, and the collective operations on tensors and values.

Tensors on a GPU go by NCCL, those on the host by gloo. A process on its own is rank 0 of 1: there is no group then, and
every method returns what it was given. join.py makes the group.

A process that is gone is noticed at once where gloo connects it, and one that stalls after a time limit; either ends
the others with one line. Some calls wait longer, because one process may work for long before them while the others
have nothing to do: before the first step, for the last batch of an attack, for a share of AutoAttack. They wait as long
as every process gives signs of life within the limit (pulse.py).
"""

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from retemper.engine.device import is_out_of_memory
from retemper.engine.distributed.pulse import Pulse
from retemper.errors import DataError

AGAIN = "run the same command again, it goes on from what was saved"
SHORTEST_S, LONGEST_S = 0.0005, 0.02  # between two looks at an operation that may take long


class RankLost(DataError):
    """The error that another process of the group is gone, or did not answer within the time limit."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The process group that runs one command, as this process sees it.

    Every method but `checked` is a collective operation: all processes must call it, in the same order. Each raises
    RankLost if another process does not answer.

    Attributes:
        rank: of this process; rank 0 is the first, which writes every file.
        world_size: how many processes there are.
        joined: whether there is a process group. A group of one process works as a larger one does.
        host_group, patient_group: gloo groups for tensors on the host, with and without a time limit.
        pulse: the signs of life that are looked at where the time limit does not hold.
    """

    rank: int = 0
    world_size: int = 1
    joined: bool = False
    host_group: Any = None
    patient_group: Any = None
    pulse: Pulse | None = None

    @property
    def is_first(self) -> bool:
        """Say whether this process has rank 0."""
        return self.rank == 0

    @property
    def rows(self) -> tuple[int, int]:
        """Return the first row of a batch that is this process's, and the distance between its rows."""
        return self.rank, self.world_size

    def all_reduce_(self, tensor: Tensor, largest: bool = False) -> Tensor:
        """Replace `tensor` by its sum over all processes, or by its largest value, and return it.

        Args:
            tensor: any shape, the same in all processes; any dtype that NCCL or gloo sums. A captured CUDA graph may
                hold the call if it is on a GPU.
        """
        if self.joined:
            with self.checked():
                how = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
                dist.all_reduce(tensor, how, group=None if tensor.is_cuda else self.host_group)
        return tensor

    def all_reduced(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors of one dtype and device, of any shapes, over all processes, in one call."""
        if not self.joined:
            return list(tensors)
        flat = self.all_reduce_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    @torch.no_grad()
    def all_reduce_each_(self, tensors: Sequence[Tensor], mean: bool = False) -> None:
        """Replace tensors of any dtypes and shapes by their sums, or means, over all processes.

        The sums are taken in float64, so that integers up to 2^53 are exact.
        """
        if self.joined and tensors:
            sums = self.all_reduced([tensor.double() for tensor in tensors])
            for tensor, total in zip(tensors, sums, strict=True):
                tensor.copy_(total / self.world_size if mean else total)

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set in any process, so that all do the same."""
        if not self.joined:
            return list(flags)
        return self.all_reduce_(torch.tensor(flags, dtype=torch.int32), largest=True).bool().tolist()

    def broadcast(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return the value of rank 0, however long it takes that process to come here.

        Args:
            value: tensors, numbers, strings and containers of them; only that of rank 0 is read.
        """
        if not self.joined:
            return value
        data = _packed(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(data)])
        with self.checked():
            self._await(dist.broadcast(size, 0, group=self.patient_group, async_op=True))
            data = data if self.is_first else data.resize_(int(size))
            self._await(dist.broadcast(data, 0, group=self.patient_group, async_op=True))
        return value if self.is_first else _unpacked(data)

    def gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the values of all processes, by rank, in rank 0; an empty list in the others. See `broadcast`."""
        if not self.joined:
            return [value]
        data = _packed(value)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        with self.checked():
            dist.all_reduce(sizes, group=self.host_group)
            padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
            padded[: len(data)] = data
            found = [torch.empty_like(padded) for _ in range(self.world_size)] if self.is_first else None
            dist.gather(padded, found, 0, group=self.host_group)
        return [_unpacked(one[:size]) for one, size in zip(found or [], sizes.tolist(), strict=False)]

    def barrier(self, patiently: bool = False) -> None:
        """Wait until all processes have come here; `patiently` waits as long as they give signs of life."""
        if self.joined:
            with self.checked():
                if patiently:
                    self._await(dist.barrier(group=self.patient_group, async_op=True))
                else:
                    dist.barrier(group=self.host_group)

    def _await(self, work: Any) -> None:
        """Wait for an operation of the patient group while every process gives signs of life."""
        assert self.pulse is not None
        self.pulse.listen()
        pause_s = SHORTEST_S
        while not work.is_completed():
            if silent := self.pulse.silent():
                lost = f"process {' and '.join(map(str, silent))} of {self.world_size} has given no sign of life"
                if self.rank in silent:  # so it is the store that does not answer
                    lost = "the process where all of them meet (MASTER_ADDR, MASTER_PORT) does not answer"
                limit = f"for {self.pulse.limit_s:g} s (RETEMPER_RANK_TIMEOUT)"
                raise RankLost(f"{lost} {limit}: it is stopped, or its machine hangs; {AGAIN}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_S)
        self.pulse.listening = False
        work.wait()

    def hold_same_bits(self, tensors: Sequence[Tensor]) -> bool:
        """Say whether all processes hold the same bits of `tensors`, of 4 or 8 bytes a value, by a weighted sum."""
        if not self.joined:
            return True
        words = [tensor.detach().reshape(-1).view(torch.int32).long() for tensor in tensors]
        places = (torch.arange(1, len(one) + 1, device=one.device) for one in words)
        digest = torch.stack([(one * place).sum() for one, place in zip(words, places, strict=True)])
        return bool((self.all_reduce_(digest.clone(), largest=True) == -self.all_reduce_(-digest, largest=True)).all())

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Turn the error that torch raises within the context, when another process does not answer, into RankLost."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error) or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                raise
            reason = str(error).strip().splitlines()[0].rpartition("] ")[2]
            raise RankLost(
                f"another of the {self.world_size} processes is gone or has stalled ({reason[:200]}): its own message "
                f"says why; {AGAIN}"
            ) from None


ALONE = Ranks()


@dataclass(eq=False)
class Part:
    """The rows of a global batch that this process has.

    Attributes:
        weight: 0-dim float64 on the device, the share of the batch's rows that are here; None if all are.
        idle: whether there are none. The process then computes with a stand-in image that counts for nothing.
    """

    ranks: Ranks = ALONE
    weight: Tensor | None = None
    idle: bool = False

    @classmethod
    def begin(cls, ranks: Ranks, device: torch.device) -> "Part":
        """Return the part that is the whole batch, until `take` says otherwise."""
        return cls(ranks, torch.ones((), dtype=torch.float64, device=device) if ranks.joined else None)

    def take(self, rows: int, whole: int) -> None:
        """Set how many of the `whole` rows of the next batch are here."""
        if self.weight is not None:
            self.weight.fill_(rows / whole)

    def weigh(self, mean: Tensor) -> Tensor:
        """Turn a mean over these rows into their share of the batch's mean: the sum of it over all processes."""
        return mean if self.weight is None else (mean * self.weight).to(mean.dtype)

    def mean(self, mean: Tensor) -> Tensor:
        """Return the mean over the batch, given that over these rows: any shape, without gradient."""
        return self.ranks.all_reduce_(self.weigh(mean).clone()) if self.ranks.joined else mean

    def sum(self, total: Tensor) -> Tensor:
        """Return the sum over the batch, given that over these rows: any shape, without gradient."""
        return self.ranks.all_reduce_(total * (not self.idle)) if self.ranks.joined else total

    def largest(self, value: Tensor) -> Tensor:
        """Return the largest value in the batch, given that in these rows: any shape, without gradient."""
        if not self.ranks.joined:
            return value
        return self.ranks.all_reduce_(torch.full_like(value, -torch.inf) if self.idle else value.clone(), largest=True)


WHOLE = Part()


def _packed(value: dict[str, Any]) -> Tensor:
    """Return the value as (N,) uint8 on the host."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _unpacked(data: Tensor) -> dict[str, Any]:
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
