"""The measuring protocol, once for every benchmark.

Contestants take turns within each round (A B C, A B C, ...), so that a machine whose speed drifts is unfair to none; a
ratio is taken within a round and then over the rounds, so that drift cancels. Before that every contestant is called
once, which is its start-up time (compilation, autotuning; less where the compilers' caches on disk are warm), and what
it computed is checked: one that is wrong gets the reason in place of a time. Rounds that do not count come next.

A turn repeats the call until it lasts `ROUND_S`. `ms` is the time of one call: between CUDA events on a GPU, by the
wall clock on a CPU. `host_ms` is how long Python was held on a GPU: where it is no less than `ms`, the GPU waited.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from retemper.engine.bench.machine import Rates, Work, added_memory, count_launches, wait
from retemper.engine.device import in_precision

EXACTNESS = ("bitwise", "rounding", "lower precision", "different algorithm", "peer")
ROUND_S = 0.005
MAX_CALLS = 1000
WARM_UP = 3  # rounds

Run = Callable[[], Any]
Check = Callable[[Any], str | None]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do the work of a race.

    Attributes:
        run: a call; None where it cannot run, for `reason`.
        exactness: of the result, one of EXACTNESS. Ours say how they relate to the plain computation; what a user would
            take instead of ours is a "peer".
        check: what is wrong with the result of the first call, or None.
        prepare: called before the first call, untimed: what works in place gets fresh inputs for the check.
        compiled: torch.compile takes part: on a CPU its operations cannot be counted.
        calls: how many times the work is done in one call of `run`; times are for one.
        work: what it does, where that is not the race's.
    """

    name: str
    run: Run | None
    exactness: str = "peer"
    check: Check | None = None
    prepare: Callable[[], object] | None = None
    reason: str | None = None
    compiled: bool = False
    calls: int = 1
    work: Work | None = None

    def __post_init__(self) -> None:
        assert self.exactness in EXACTNESS and (self.run is None) == (self.reason is not None)


@dataclass(frozen=True, kw_only=True)
class Race:
    """Contestants for the same work. The first is the baseline: others are timed in its time.

    Attributes:
        name: of the table.
        work: names what it is measured against; none gives times alone.
        precision: the group, see `in_precision`.
        bound: the precision whose matrix rate bounds the work, where it is another.
        rounds, warm_up: where a turn takes long, fewer than asked for.
        close: frees what the contestants share; called when the race is over.
        conclude: rows to a line of the result's notes, or None.
    """

    name: str
    contestants: Sequence[Contestant]
    work: Work = field(default_factory=Work)
    precision: str = "fp32"
    bound: str | None = None
    rounds: int | None = None
    warm_up: int = WARM_UP
    close: Callable[[], object] = lambda: None
    conclude: Callable[[list[dict[str, Any]]], str | None] = lambda rows: None

    def __post_init__(self) -> None:
        names = [contestant.name for contestant in self.contestants]
        assert len(set(names)) == len(names) > 0, names


@dataclass
class _Lane:
    """A contestant under way."""

    contestant: Contestant
    reason: str | None
    start_up_s: float | None = None
    calls: int = 1
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


def run_race(race: Race, device: torch.device, rounds: int, rates: Rates) -> list[dict[str, Any]]:
    """A row for each contestant, in order; see `COLUMNS` in record.py."""
    rounds = min(rounds, race.rounds or rounds)
    rates.next_race()
    with in_precision(race.precision):
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # races compile one chain for many shapes: past a limit it would run eagerly, unsaid
        lanes = [_start(contestant, device) for contestant in race.contestants]
        for turn in range(1 + race.warm_up + rounds):
            for lane in lanes:
                if lane.reason is None:
                    _take_turn(lane, device, kept=turn > race.warm_up)
        return [_row(race, lane, lanes[0], device, rates) for lane in lanes]


def _start(contestant: Contestant, device: torch.device) -> _Lane:
    """The first call, and whether its result is right."""
    lane = _Lane(contestant, contestant.reason)
    if contestant.run is not None:
        if contestant.prepare:
            contestant.prepare()
        lane.reason, result, seconds = _attempt(contestant.run, device)
        if lane.reason is None:
            lane.start_up_s = seconds
            wrong = contestant.check(result) if contestant.check else None
            lane.reason = f"disagrees: {wrong}" if wrong else None
    return lane


def _attempt(run: Run, device: torch.device) -> tuple[str | None, Any, float]:
    """Why the call failed, or None; its result, and its seconds."""
    wait(device)
    started = time.perf_counter()
    try:
        result = run()
        wait(device)
    except Exception as error:  # of a peer, a compiler, a lack of memory: the row says which, and the others go on
        return failure(error), None, 0.0
    return None, result, time.perf_counter() - started


def failure(error: Exception) -> str:
    """The reason of a row that could not be made or called."""
    lines = str(error).strip().splitlines()
    return f"fails: {type(error).__name__}{': ' + lines[0][:200] if lines else ''}"


def _take_turn(lane: _Lane, device: torch.device, kept: bool) -> None:
    """Call it `lane.calls` times; a turn that is not kept settles how many calls the next ones take."""
    assert lane.contestant.run is not None
    try:
        ms, host_ms = _timed(lane.contestant.run, lane.calls, device)
    except Exception as error:  # as in `_attempt`
        lane.reason = f"{failure(error)} (after its first call)"
        return
    if kept:
        lane.ms.append(ms / lane.contestant.calls)
        lane.host_ms.append(host_ms / lane.contestant.calls)
    else:
        lane.calls = max(1, min(MAX_CALLS, round(1e3 * ROUND_S / max(ms, 1e-6))))


def _timed(run: Run, calls: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds of one call: of the device, and of the host until the last call came back."""
    wait(device)
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        ms = 1e3 * (time.perf_counter() - started) / calls
        return ms, ms
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    host_s = time.perf_counter() - started
    end.record()
    wait(device)
    return begin.elapsed_time(end) / calls, 1e3 * host_s / calls


def _row(race: Race, lane: _Lane, base: _Lane, device: torch.device, rates: Rates) -> dict[str, Any]:
    run, timed = lane.contestant.run, lane.reason is None
    row: dict[str, Any] = {
        "table": race.name,
        "name": lane.contestant.name,
        "exactness": lane.contestant.exactness,
        "precision": race.precision,
        "reason": lane.reason,
        "start_up_s": lane.start_up_s if timed else None,
        "rounds": len(lane.ms) if timed else 0,
        "calls_a_round": lane.calls,
    }
    ms = spread(lane.ms) if timed else None
    row["round_ms"] = [float(f"{value:.5g}") for value in lane.ms] if timed else None
    row["ms"], row["host_ms"] = ms, spread(lane.host_ms) if timed and device.type == "cuda" else None
    row["ratio_to"], row["ratio"] = base.contestant.name, None
    if timed and base.reason is None:
        row["ratio"] = spread([own / other for own, other in zip(lane.ms, base.ms, strict=True)])
    work, seconds = lane.contestant.work or race.work, 1e-3 * ms["median"] if ms else 0
    bound_ms = rates.bound_ms(work, race.bound or race.precision)
    for key, amount in (
        ("images_per_s", work.images),
        ("tflop_per_s", work.flop / 1e12),
        ("gb_per_s", work.bytes / 1e9),
    ):
        row[key] = amount / seconds if amount and seconds else None
    row["bound_ms"] = bound_ms
    row["share_of_bound"] = bound_ms / ms["median"] if bound_ms and ms else None
    row |= dict.fromkeys(("launches", "launches_kind", "kernel_ms", "peak_mb", "added_mb"))
    if timed and run and (device.type == "cuda" or not lane.contestant.compiled):
        try:
            row |= count_launches(run, device, lane.contestant.calls) | added_memory(run, device)
        except Exception as error:  # a profiler that may not run here: the times stand all the same
            row["launches_kind"] = f"not counted: {type(error).__name__}"
    return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """p10, median and p90."""
    p10, median, p90 = np.percentile(values, (10, 50, 90)).tolist()
    return {"p10": p10, "median": median, "p90": p90}


# What is compared


def equal_to(expected: torch.Tensor, part: Callable[[Any], torch.Tensor] = lambda result: result) -> Check:
    """The result, or a part of it, must be `expected` to the bit."""

    def check(result: Any) -> str | None:
        found = part(result).to(expected.device)
        if found.shape != expected.shape:
            return f"its shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
        wrong = int((found != expected).sum())
        return f"{wrong:,} of {expected.numel():,} values differ" if wrong else None

    return check


def near_to(
    expected: torch.Tensor, tolerance: float, part: Callable[[Any], torch.Tensor] = lambda result: result
) -> Check:
    """The result, or a part of it, may be off by `tolerance` times the largest value of `expected`."""

    def check(result: Any) -> str | None:
        found = part(result).detach().to(expected.device).double()
        if found.shape != expected.shape:
            return f"its shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
        off = float((found - expected.double()).abs().max() / expected.double().abs().max())
        return None if off <= tolerance else f"off by {off:.1e} of the largest value, {tolerance:.1e} allowed"

    return check
