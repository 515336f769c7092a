"""What the recorder has written down, read from within the process that runs on it."""

import ctypes
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dry_run.environment import LIBRARY

WORK = frozenset(("kernel", "triton", "gemm", "convolution", "memcpy", "memset", "graph", "host function"))
WAITS = frozenset(("sync", "free"))  # the host waits for the device


@dataclass(frozen=True)
class Record:
    """One thing that CUDA was asked for.

    Attributes:
        kind: one of WORK, or "sync", "query", "alloc", "free", "module", "illegal" (refused), "mark".
        blocks, threads: of a launch.
        bytes: of a copy, a fill or an allocation; of a graph its nodes.
        where: "captured"; "beside", where a thread that captures puts work into a stream that does not; else empty.
        name: the kernel, the convolution with its tensors, the rule that was broken.
    """

    kind: str
    blocks: int
    threads: int
    bytes: int
    stream: str
    where: str
    name: str

    @property
    def is_work(self) -> bool:
        return self.kind in WORK

    @property
    def is_illegal(self) -> bool:
        """Whether CUDA would refuse it, or a capture would miss it."""
        missed = self.where == "beside" and (self.is_work or self.waits or self.kind == "module")
        return missed or self.kind == "illegal"

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device."""
        return self.kind in WAITS or (self.kind == "memcpy" and self.name == "copy, device to pageable")


def parsed(lines: Iterable[str]) -> list[Record]:
    """Return the records of a dump, a line each."""
    records = []
    for line in lines:
        kind, blocks, threads, size, stream, where, name = line.rstrip("\n").split("\t", 6)
        records.append(Record(kind, int(blocks), int(threads), int(size), stream, where, name))
    return records


class Recorder:
    """The recorder of this process.

    Raises:
        RuntimeError: this process runs on none.
    """

    def __init__(self) -> None:
        path = os.environ.get("LD_PRELOAD", "").split(":")[0]
        if not path.endswith(LIBRARY):
            raise RuntimeError("this process has no recorder: start it by benchmarks/gpu_dry_run.py")
        self.library = ctypes.CDLL(path)
        self.library.dry_run_size.restype = ctypes.c_long

    def reset(self) -> None:
        self.library.dry_run_reset()

    def mark(self, name: str) -> None:
        self.library.dry_run_mark(name.encode())

    def size(self) -> int:
        return self.library.dry_run_size()

    def pause(self) -> None:
        """Write nothing down from here on, so that the time of a call is the call's own; illegal calls are kept."""
        self.library.dry_run_recording(0)

    def resume(self) -> None:
        self.library.dry_run_recording(1)

    def records(self) -> list[Record]:
        """Return everything since the last reset, in its order."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dump"
            if self.library.dry_run_dump(bytes(path)):
                raise RuntimeError(f"{path}: the recorder cannot write its dump there")
            with path.open(errors="replace") as lines:
                return parsed(lines)


def illegal(records: Iterable[Record]) -> Counter[str]:
    """Return what CUDA would refuse, or what a capture would miss, with how often."""
    return Counter(f"{one.where} {one.name}".strip() for one in records if one.is_illegal)


def waits(records: Iterable[Record]) -> Counter[str]:
    """Return what made the host wait for the device, with how often."""
    return Counter(one.name for one in records if one.waits)
