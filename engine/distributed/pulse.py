"""Signs of life: each process of a group counts up a number of its own in a store, and whoever waits reads the others'.

A process that is busy with long work goes on counting, in a thread. One that is stopped, or on a machine that hangs,
does not, although nothing has closed its connections.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

BEATS = 10  # within the time limit
LONGEST_S = 5.0  # between two beats


class Pulse:
    """The counting thread of this process, and what it has heard of the others.

    Attributes:
        limit_s: a process that has not counted for so long is silent.
        every_s: the time between two beats.
        heard: when each process was seen to count, by rank; of this one, when the store last answered.
    """

    def __init__(
        self, store: Any, rank: int, world_size: int, limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`store` has `add(key, number)`, which returns the sum; no other thread uses it."""
        self.store, self.rank, self.limit_s, self.clock = store, rank, limit_s, clock
        self.every_s = min(LONGEST_S, limit_s / BEATS)
        self.counts, self.heard, self.looked = [-1] * world_size, [clock()] * world_size, clock()
        self.listening, self.ended = False, threading.Event()

    def start(self) -> "Pulse":
        """Begin to count, until `stop`."""
        threading.Thread(target=self._run, name="pulse", daemon=True).start()
        return self

    def stop(self) -> None:
        """Count no more."""
        self.ended.set()

    def beat(self) -> None:
        """Count, and look at the others while somebody waits for them."""
        self._add(self.rank, 1)
        if self.listening:
            for other in range(len(self.counts)):
                count = self._add(other, 0)
                if count != self.counts[other]:
                    self.counts[other], self.heard[other] = count, self.clock()

    def listen(self) -> None:
        """Begin to look at the others; from now on each has the time limit."""
        self.heard, self.looked, self.listening = [self.clock()] * len(self.counts), self.clock(), True

    def silent(self) -> list[int]:
        """Return the ranks that have been silent for too long. Call it more often than the beats come."""
        now = self.clock()
        if now - self.looked > self.every_s:  # this process itself was stopped
            self.listen()
        self.looked = now
        return [rank for rank, at in enumerate(self.heard) if now - at > self.limit_s]

    def _add(self, rank: int, number: int) -> int:
        return self.store.add(f"retemper/pulse/{rank}", number)

    def _run(self) -> None:
        with suppress(RuntimeError):  # the store went with the process that held it: the connections tell of that
            self.beat()
            while not self.ended.wait(self.every_s):
                self.beat()


def pulse_of(rank: int, world_size: int, limit_s: float) -> Pulse:
    """Return the pulse of this process, running, in the store where the group has met."""
    place, limit = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=limit_s)
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]  # documented, and not in its __all__
        *place, is_master=False, wait_for_workers=False, timeout=limit
    )
    return Pulse(store, rank, world_size, limit_s).start()
