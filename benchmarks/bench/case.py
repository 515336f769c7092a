"""Cases of a benchmark, the contenders in each, and the checks that their results must pass."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EXACTNESS = ("bitwise", "rounding", "lower precision", "different algorithm", "peer")
WARM_UP = 3  # rounds
NOT_WANTED = "not asked for"

Call = Callable[[], Any]
Check = Callable[[Any], str | None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The request of `retemper bench`.

    Attributes:
        batch: in place of the benchmark's own batch sizes.
        quick: one small size and nothing compiled: to try it out, not to measure.
        only: the cases whose name holds one of these; empty for all.
        rows: the rows of these names alone; empty for all. Ratios are then to the first of them that a table has.
        sweep: try the kernels' block sizes instead.
        seconds: begin no table after so many, and take no round beyond a third; None for no limit.
        checked: whether a result must be right to get a time. False is for rehearsals on what computes no values.
    """

    what: str
    device: torch.device
    rounds: int = 20
    batch: int | None = None
    quick: bool = False
    only: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    sweep: bool = False
    seconds: float | None = None
    checked: bool = True

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def batches(self, usual: tuple[int, ...], quick: int) -> tuple[int, ...]:
        """Return the batch sizes to measure: the one asked for, the `quick` one, or the usual ones."""
        if self.batch is not None:
            return (self.batch,)
        return (quick,) if self.quick else usual

    def wants(self, row: str) -> bool:
        """Say whether the row of that name is to be measured."""
        return not self.rows or row in self.rows

    @property
    def command(self) -> str:
        """Return the command that measures it again."""
        words = ["retemper", "bench", self.what, "--device", str(self.device), "--rounds", str(self.rounds)]
        words += ["--batch", str(self.batch)] if self.batch is not None else []
        words += ["--only", *self.only] if self.only else []
        words += ["--rows", *self.rows] if self.rows else []
        return shlex.join([*words, *(["--quick"] if self.quick else []), *(["--sweep"] if self.sweep else [])])


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least work of one call: images it takes, floating-point operations, bytes it reads and writes."""

    images: int = 0
    flop: float = 0
    bytes: float = 0


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do the work of a case.

    Attributes:
        call: does it once; None where that is not possible, for `reason`.
        exactness: of the result, one of EXACTNESS. Ours say how they relate to the plain computation; what a user would
            take instead of ours is a "peer".
        check: says what is wrong with the result of the first call, or None.
        prepare: called before the first call, untimed: what works in place gets fresh inputs for the check.
        compiled: torch.compile takes part: on a CPU its operations cannot be counted.
        calls: how many times the work is done in one `call`; times are for one.
        work: its own work, where that is not the case's.
        tells: the call starts a process and returns the seconds that this has measured: they are taken.
    """

    name: str
    call: Call | None = None
    exactness: str = "peer"
    check: Check | None = None
    prepare: Callable[[], object] | None = None
    reason: str | None = None
    compiled: bool = False
    calls: int = 1
    work: Work | None = None
    tells: bool = False

    def __post_init__(self) -> None:
        assert self.exactness in EXACTNESS and (self.call is None) == (self.reason is not None)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The contenders for the same work. The first is the baseline of all ratios.

    Attributes:
        name: the title of the table.
        work: the work that times are set against; without it there are times alone.
        precision: how matrix products are computed, see `in_precision`.
        bound: the precision whose matrix rate bounds the work, where it is another.
        rounds, warm_up: where a turn takes long, fewer than asked for.
        by_host: ratios are of the time that a call holds the host; on a CPU there is no other.
        own_time: on a CPU the time is what the processor spent on this thread, to which other processes add little; for
            calls that stay in it.
        close: frees what the contenders share; called when the case is done.
        conclude: makes of the rows a line for the result's notes, or None.
    """

    name: str
    contenders: Sequence[Contender]
    work: Work = field(default_factory=Work)
    precision: str = "fp32"
    bound: str | None = None
    rounds: int | None = None
    warm_up: int = WARM_UP
    by_host: bool = False
    own_time: bool = False
    close: Callable[[], object] = lambda: None
    conclude: Callable[[list[dict[str, Any]]], str | None] = lambda rows: None

    def __post_init__(self) -> None:
        names = [contender.name for contender in self.contenders]
        assert len(set(names)) == len(names), names


@dataclass(frozen=True)
class PlannedCase:
    """A case that is built when its turn comes, so that two never share the memory."""

    name: str
    build: Callable[[], Case]


def equal_to(expected: Tensor, part: Callable[[Any], Tensor] = lambda result: result) -> Check:
    """Return a check that the result, or a part of it, is `expected` to the bit."""

    def check(result: Any) -> str | None:
        found = part(result).to(expected.device)
        if found.shape != expected.shape:
            return f"its shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
        wrong = int((found != expected).sum())
        return f"{wrong:,} of {expected.numel():,} values differ" if wrong else None

    return check


def near_to(expected: Tensor, tolerance: float, part: Callable[[Any], Tensor] = lambda result: result) -> Check:
    """Return a check that the result, or a part of it, is off by at most `tolerance` of the largest of `expected`."""

    def check(result: Any) -> str | None:
        found = part(result).detach().to(expected.device).double()
        if found.shape != expected.shape:
            return f"its shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
        off = float((found - expected.double()).abs().max() / expected.double().abs().max())
        return None if off <= tolerance else f"off by {off:.1e} of the largest value, {tolerance:.1e} allowed"

    return check
