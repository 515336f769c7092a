"""What was asked of a benchmark, and the races it consists of."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retemper.engine.bench.machine import Work
from retemper.engine.bench.timing import Check, Contestant, Race


@dataclass(frozen=True, kw_only=True)
class Request:
    """The words of `retemper bench`.

    Attributes:
        batch: in place of the benchmark's own batch sizes.
        quick: one small size and nothing compiled: to try it out, not to measure.
        only: races whose name holds one of these; empty for all.
        sweep: try the kernels' block sizes instead.
    """

    what: str
    device: torch.device
    rounds: int = 20
    batch: int | None = None
    quick: bool = False
    only: tuple[str, ...] = ()
    sweep: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def batches(self, usual: tuple[int, ...], quick: int) -> tuple[int, ...]:
        """The batch sizes to measure: the one asked for, the `quick` one, or the usual ones."""
        if self.batch is not None:
            return (self.batch,)
        return (quick,) if self.quick else usual

    @property
    def command(self) -> str:
        """What to type to measure it again."""
        words = ["retemper", "bench", self.what, "--device", str(self.device), "--rounds", str(self.rounds)]
        words += ["--batch", str(self.batch)] if self.batch is not None else []
        words += ["--only", *self.only] if self.only else []
        return shlex.join([*words, *(["--quick"] if self.quick else []), *(["--sweep"] if self.sweep else [])])


@dataclass(frozen=True)
class Plan:
    """A race to come: built when its turn is there, so that two never share the memory."""

    name: str
    build: Callable[[], Race]


OURS, EAGER, COMPILED = "retemper", "eager chain", "torch.compile of it"
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # of the largest value
CHECKED = 512  # samples, the first ones, where a check needs a copy in float64


def compiled(request: Request, chain: Callable[..., Any], call: Callable[[Any], Any], check: Check) -> Contestant:
    """`chain` under torch.compile, for static shapes and without graph breaks; `call` calls it."""
    if request.quick:
        return Contestant(name=COMPILED, run=None, reason="left out by --quick")
    fast = torch.compile(chain, fullgraph=True, dynamic=False)
    return Contestant(name=COMPILED, run=lambda: call(fast), check=check, compiled=True)


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def race(title: str, precision: str, contestants: list[Contestant], must_move: int) -> Race:
    return Race(name=title, contestants=contestants, work=Work(bytes=must_move), precision=precision)
