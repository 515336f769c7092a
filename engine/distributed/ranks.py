"""One run on several processes, one a GPU: which of them this is, and what they say to one another.

Tensors on a GPU go by NCCL, those on the host by gloo. A process on its own is one of one: nothing is set up then, and
every method gives back what it was given. launcher.py has the processes meet.

A process that is gone is noticed at once where gloo speaks, a stalled one after a time limit; either ends the others
with one line. Where one process may have work for long and the others have none (what comes before the first step, an
attack's last batch, a share of AutoAttack), they wait patiently, without that limit.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from retemper.engine.device import is_out_of_memory
from retemper.errors import DataError


class RankLost(DataError):
    """Another process is gone, or says nothing."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among those that run the same command.

    Attributes:
        rank: 0 is the first, which writes every file.
        joined: whether there is a process group; with one of a single process all is done as if there were more.
        words, patient: gloo groups for tensors on the host, with and without a time limit.
    """

    rank: int = 0
    world_size: int = 1
    joined: bool = False
    words: Any = None
    patient: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def rows(self) -> tuple[int, int]:
        """The first row of a batch that is this process's, and how far apart its rows are."""
        return self.rank, self.world_size

    def all_reduce_(self, tensor: Tensor, largest: bool = False) -> Tensor:
        """In place, over all processes: the sum, or the largest. On a GPU a captured graph may hold it."""
        if self.joined:
            with self.checked():
                how = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
                dist.all_reduce(tensor, how, group=None if tensor.is_cuda else self.words)
        return tensor

    def all_reduced(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of tensors of one dtype, in one call."""
        if not self.joined:
            return list(tensors)
        flat = self.all_reduce_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    @torch.no_grad()
    def all_reduce_each_(self, tensors: Sequence[Tensor], mean: bool = False) -> None:
        """In place, tensors of any dtypes: their sums, or means, taken in float64; integers up to 2^53 are exact."""
        if self.joined and tensors:
            sums = self.all_reduced([tensor.double() for tensor in tensors])
            for tensor, total in zip(tensors, sums, strict=True):
                tensor.copy_(total / self.world_size if mean else total)

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set on any process: all then do the same."""
        if not self.joined:
            return list(flags)
        return self.all_reduce_(torch.tensor(flags, dtype=torch.int32), largest=True).bool().tolist()

    def broadcast(self, value: dict[str, Any]) -> dict[str, Any]:
        """What the first process holds, however long it takes: tensors, numbers, words and containers of them."""
        if not self.joined:
            return value
        data = _packed(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(data)])
        with self.checked():
            dist.broadcast(size, 0, group=self.patient)
            data = data if self.is_first else data.resize_(int(size))
            dist.broadcast(data, 0, group=self.patient)
        return value if self.is_first else _unpacked(data)

    def gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """What each process holds, in order, on the first; nothing on the others."""
        if not self.joined:
            return [value]
        data = _packed(value)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        with self.checked():
            dist.all_reduce(sizes, group=self.words)
            padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
            padded[: len(data)] = data
            found = [torch.empty_like(padded) for _ in range(self.world_size)] if self.is_first else None
            dist.gather(padded, found, 0, group=self.words)
        return [_unpacked(one[:size]) for one, size in zip(found or [], sizes.tolist(), strict=False)]

    def barrier(self, patiently: bool = False) -> None:
        """Until all have come here; `patiently`: however long it takes."""
        if self.joined:
            with self.checked():
                dist.barrier(group=self.patient if patiently else self.words)

    def hold_same_bits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all processes hold the same bits."""
        if not self.joined:
            return True
        words = [tensor.detach().reshape(-1).view(torch.int32).long() for tensor in tensors]
        places = (torch.arange(1, len(one) + 1, device=one.device) for one in words)
        digest = torch.stack([(one * place).sum() for one, place in zip(words, places, strict=True)])
        return bool((self.all_reduce_(digest.clone(), largest=True) == -self.all_reduce_(-digest, largest=True)).all())

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Raises RankLost: the others did not answer."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error) or _is_capturing():
                raise
            reason = str(error).strip().splitlines()[0].rpartition("] ")[2]
            raise RankLost(
                f"another of the {self.world_size} processes is gone or has stalled ({reason[:200]}): its own message "
                "says why; run the same command again, it goes on from what was saved"
            ) from None


ALONE = Ranks()


@dataclass(eq=False)
class Part:
    """This process's rows of a batch that all processes have together.

    Attributes:
        weight: 0-dim float64 on the device, the share of the batch's rows that they are; None: all of them.
        idle: there is none; the process goes along with an image that counts for nothing.
    """

    ranks: Ranks = ALONE
    weight: Tensor | None = None
    idle: bool = False

    @classmethod
    def begin(cls, ranks: Ranks, device: torch.device) -> "Part":
        """All rows of a batch, until `take` says otherwise."""
        return cls(ranks, torch.ones((), dtype=torch.float64, device=device) if ranks.joined else None)

    def take(self, rows: int, whole: int) -> None:
        """So many rows of a batch of `whole` are this process's in the step to come."""
        if self.weight is not None:
            self.weight.fill_(rows / whole)

    def weigh(self, mean: Tensor) -> Tensor:
        """A mean over these rows as its share of the batch's mean, which is the sum over the processes."""
        return mean if self.weight is None else (mean * self.weight).to(mean.dtype)

    def mean(self, mean: Tensor) -> Tensor:
        """Of a mean over these rows, without gradient, that over the whole batch."""
        return self.ranks.all_reduce_(self.weigh(mean).clone()) if self.ranks.joined else mean

    def sum(self, total: Tensor) -> Tensor:
        """Of a sum over these rows, without gradient, that over the whole batch."""
        return self.ranks.all_reduce_(total * (not self.idle)) if self.ranks.joined else total

    def largest(self, value: Tensor) -> Tensor:
        """Of the largest in these rows, without gradient, that in the whole batch."""
        if not self.ranks.joined:
            return value
        return self.ranks.all_reduce_(torch.full_like(value, -torch.inf) if self.idle else value.clone(), largest=True)


WHOLE = Part()


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _packed(value: dict[str, Any]) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _unpacked(data: Tensor) -> dict[str, Any]:
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
