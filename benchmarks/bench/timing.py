"""The measuring protocol, the same for every benchmark.

The contenders of a case take turns within each round (A B C, A B C, ...), and a ratio is taken within a round and then
over the rounds: a machine whose speed drifts is unfair to none. Before that every contender is called once. The time of
this call is its start-up time (compilation, autotuning; less where the compilers' caches on disk are warm), and its
result is checked: what is wrong gets the reason in place of a time. Rounds that do not count come next.

A turn repeats the call until it lasts `ROUND_S`. `ms` is the time of one call: between CUDA events on a GPU; on a CPU
by the clock that the row names, the wall's or, of work on one thread, the processor's own. `host_ms` is how long Python
was held on a GPU: where it is no less than `ms`, the GPU waited.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from retemper.bench.case import Call, Case, Contender
from retemper.bench.machine import Rates, added_memory, count_launches, wait
from retemper.engine.device import in_precision

ROUND_S = 0.005
MAX_CALLS = 1000
LEAST_ROUNDS = 3  # of a case that was begun


@dataclass
class Measurement:
    """The measurement of a contender so far: the reason why it has no time, or the times of its rounds."""

    contender: Contender
    reason: str | None
    clock: Callable[[], float]
    start_up_s: float | None = None
    calls: int = 1
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


def measure(
    case: Case, device: torch.device, rounds: int, rates: Rates, until: float | None = None
) -> list[dict[str, Any]]:
    """Time the contenders of a case, and return a row for each, in order; result.py lists its columns.

    Args:
        until: the time of `time.perf_counter` after which no round beyond `LEAST_ROUNDS` is taken.
    """
    rounds = min(rounds, case.rounds or rounds)
    rates.next_case()
    with in_precision(case.precision):
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # cases compile one chain for many shapes: past a limit it would run eagerly, unsaid
        clock = time.thread_time if _own_time(case, device) else time.perf_counter
        found = [_first_call(contender, device, clock) for contender in case.contenders]
        for turn in range(1 + case.warm_up + rounds):
            if until is not None and turn > case.warm_up + LEAST_ROUNDS and time.perf_counter() >= until:
                break
            for measurement in found:
                if measurement.reason is None:
                    _take_turn(measurement, device, kept=turn > case.warm_up)
        return [_row(case, measurement, found[0], device, rates) for measurement in found]


def failure(error: Exception) -> str:
    """Return the reason, for its row, why a contender could not be made or called."""
    lines = str(error).strip().splitlines()
    return f"fails: {type(error).__name__}{': ' + lines[0][:200] if lines else ''}"


def _own_time(case: Case, device: torch.device) -> bool:
    return case.own_time and device.type == "cpu" and torch.get_num_threads() == 1


def _first_call(contender: Contender, device: torch.device, clock: Callable[[], float]) -> Measurement:
    """Call a contender for the first time, check its result, and return its measurement."""
    found = Measurement(contender, contender.reason, clock)
    if contender.call is None:
        return found
    if contender.prepare:
        contender.prepare()
    wait(device)
    started = time.perf_counter()
    try:
        result = contender.call()
        wait(device)
    except Exception as error:  # of a peer, a compiler, a lack of memory: the row says which, and the others go on
        found.reason = failure(error)
        return found
    found.start_up_s = time.perf_counter() - started
    wrong = contender.check(result) if contender.check else None
    found.reason = f"disagrees: {wrong}" if wrong else None
    return found


def _take_turn(found: Measurement, device: torch.device, kept: bool) -> None:
    """Time `found.calls` calls; a turn that is not kept settles how many calls the next ones take."""
    assert found.contender.call is not None
    try:
        if found.contender.tells:
            ms = host_ms = 1e3 * found.contender.call()
        else:
            ms, host_ms = _timed(found.contender.call, found.calls, device, found.clock)
    except Exception as error:  # as in `_first_call`
        found.reason = f"{failure(error)} (after its first call)"
        return
    if kept:
        found.ms.append(ms / found.contender.calls)
        found.host_ms.append(host_ms / found.contender.calls)
    elif not found.contender.tells:
        found.calls = max(1, min(MAX_CALLS, round(1e3 * ROUND_S / max(ms, 1e-6))))


def _timed(call: Call, calls: int, device: torch.device, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the milliseconds of one call: of the device, and of the host until the last call came back."""
    wait(device)
    begin = end = None
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
    started = clock()
    for _ in range(calls):
        call()
    host_ms = 1e3 * (clock() - started) / calls
    if begin is None or end is None:
        return host_ms, host_ms
    end.record()
    wait(device)
    return begin.elapsed_time(end) / calls, host_ms


def _row(case: Case, found: Measurement, base: Measurement, device: torch.device, rates: Rates) -> dict[str, Any]:
    """Return the row of a contender; without a time where there is a reason."""
    contender, timed = found.contender, found.reason is None
    ms = spread(found.ms) if timed else None
    pairs = zip(found.host_ms, base.host_ms, strict=True) if case.by_host else zip(found.ms, base.ms, strict=True)
    ratios = [own / other for own, other in pairs] if timed and not base.reason else None
    row: dict[str, Any] = {
        "table": case.name,
        "name": contender.name,
        "exactness": contender.exactness,
        "precision": case.precision,
        "reason": found.reason,
        "clock": "processor" if _own_time(case, device) else "wall" if device.type == "cpu" else "device",
        "start_up_s": found.start_up_s if timed and not contender.tells else None,
        "rounds": len(found.ms) if timed else 0,
        "calls_a_round": found.calls,
        "round_ms": [float(f"{value:.5g}") for value in found.ms] if timed else None,
        "ms": ms,
        "host_ms": spread(found.host_ms) if timed and device.type == "cuda" else None,
        "ratio_to": base.contender.name,
        "ratio": spread(ratios) if ratios else None,
    }
    work, seconds = contender.work or case.work, 1e-3 * ms["median"] if ms else 0
    done = {"images_per_s": work.images, "tflop_per_s": work.flop / 1e12, "gb_per_s": work.bytes / 1e9}
    row |= {key: amount / seconds if amount and seconds else None for key, amount in done.items()}
    bound_ms = rates.bound_ms(work, case.bound or case.precision)
    row |= {"bound_ms": bound_ms, "share_of_bound": bound_ms / ms["median"] if bound_ms and ms else None}
    row |= dict.fromkeys(("launches", "launches_kind", "kernel_ms", "peak_mb", "added_mb"))
    counted = not contender.tells and (device.type == "cuda" or not contender.compiled)
    if timed and contender.call and counted:
        try:
            row |= count_launches(contender.call, device, contender.calls) | added_memory(contender.call, device)
        except Exception as error:  # a profiler that may not run here: the times stand all the same
            row["launches_kind"] = f"not counted: {type(error).__name__}"
    return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the 10th percentile, the median and the 90th percentile."""
    return dict(zip(("p10", "median", "p90"), np.percentile(values, (10, 50, 90)).tolist(), strict=True))
