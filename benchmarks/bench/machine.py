"""The machine under a benchmark: its own copy and matrix rates, and the launches and memory of a call."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.bench.case import Call, Work
from retemper.engine.device import DTYPES, in_precision

PROFILED_CALLS = 3
STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # 5 in the latter resets the peak
LEAST_MB = 32  # glibc maps larger blocks alone, and gives them back when they are freed


def wait(device: torch.device) -> None:
    """Return when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Rates:
    """The rates that this machine reaches: of a large copy, and of a large matrix product in each precision.

    They are measured anew for every case that asks, since the machine may be busy: the best so far counts.

    Args:
        quick: measure small ones, which say little; for trying a benchmark out.
    """

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device, self.quick = device, quick
        self.best: dict[str, float] = {}
        self.fresh: set[str] = set()  # measured for this case

    def next_case(self) -> None:
        """Measure anew what is asked for from here on."""
        self.fresh.clear()

    def copy_gb_per_s(self) -> float:
        """Return the rate of a copy, bytes read and written, in GB/s: of 1 GiB on a GPU, 64 MiB on a CPU."""

        def measured() -> float:
            size = 2**22 if self.quick else 2**30 if self.device.type == "cuda" else 2**26
            source = torch.randint(256, (size,), dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            return 2 * size / 1e9 / self._seconds(lambda: target.copy_(source))

        return self._best("copy", measured)

    def matmul_tflop_per_s(self, precision: str) -> float:
        """Return the rate of the product of two square matrices of random numbers, in TFLOP/s."""

        def measured() -> float:
            side = 256 if self.quick else 8192 if self.device.type == "cuda" else 1024
            with in_precision(precision):
                a, b = (torch.randn(side, side, device=self.device, dtype=DTYPES[precision]) for _ in range(2))
                return 2 * side**3 / 1e12 / self._seconds(lambda: a @ b)

        return self._best(precision, measured)

    def bound_ms(self, work: Work, precision: str) -> float | None:
        """Return the least time of the work at these rates, in ms; work that stays in a cache can beat it."""
        needed = []
        if work.bytes:
            needed.append(work.bytes / 1e9 / self.copy_gb_per_s())
        if work.flop:
            needed.append(work.flop / 1e12 / self.matmul_tflop_per_s(precision))
        return 1e3 * max(needed) if needed else None

    def as_json(self) -> dict[str, Any]:
        """Return the rates measured so far."""
        matmul = {name: rate for name, rate in self.best.items() if name != "copy"}
        return {"copy_gb_per_s": self.best.get("copy"), "matmul_tflop_per_s": matmul}

    def _best(self, name: str, measured: Callable[[], float]) -> float:
        if name not in self.fresh:
            self.best[name] = max(self.best.get(name, 0), measured())
            self.fresh.add(name)
        return self.best[name]

    def _seconds(self, call: Call) -> float:
        """Return the seconds of one call: the best of 10, after 3 that do not count."""
        taken = []
        for _ in range(13):
            wait(self.device)
            started = time.perf_counter()
            call()
            wait(self.device)
            taken.append(time.perf_counter() - started)
        return min(taken[3:])


class _Counter(TorchDispatchMode):
    """A mode that counts the operations which torch dispatches within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_launches(call: Call, device: torch.device, calls: int = 1) -> dict[str, Any]:
    """Count what one call starts: on a GPU kernels, copies and fills, and their time; on a CPU operations of torch.

    Args:
        call: on a CPU, without torch.compile, which refuses to run under a mode that counts.
        calls: how many calls a `call` stands for.
    """
    if device.type != "cuda":
        with _Counter() as counter:
            call()
        return {"launches": round(counter.count / calls), "launches_kind": "dispatched operations", "kernel_ms": None}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED_CALLS):
            call()
        wait(device)
    events = [
        event
        for event in profiled.events() or []
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]
    busy_us = sum(event.time_range.elapsed_us() for event in events)
    return {
        "launches": round(len(events) / PROFILED_CALLS / calls) or None,
        "launches_kind": "kernels",
        "kernel_ms": 1e-3 * busy_us / PROFILED_CALLS / calls or None,
    }


def added_memory(call: Call, device: torch.device) -> dict[str, float | None]:
    """Return the memory of one call, in MB: the peak of all that is allocated, and its rise over before.

    On a CPU it is that of the process, and Linux tells it. A rise below 32 MB is None there: smaller blocks come from
    what the process keeps.
    """
    if device.type != "cuda":
        return _added_on_cpu(call)
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait(device)
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak_mb": peak / 1e6, "added_mb": (peak - before) / 1e6}


def _added_on_cpu(call: Call) -> dict[str, float | None]:
    if CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")
        before = _resident_mb("VmRSS")
        call()
        peak = _resident_mb("VmHWM")
        if peak - before >= LEAST_MB:
            return {"peak_mb": peak, "added_mb": peak - before}
    return {"peak_mb": None, "added_mb": None}


def _resident_mb(what: str) -> float:
    """Return a line of /proc/self/status in MB: VmRSS is the memory that the process holds now, VmHWM its peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1]) / 1e6
