"""The backend that reads an FFCV file: FFCV reads ahead in a thread; the order and the views are ours.

FFCV's traps and what is done about them: it counts epochs itself, so every epoch is handed its order; it uses its
buffers again, so a batch is a copy; training would wait for ever if its thread died, so the wait has a limit; it sets
torch's thread count, see `ffcv_library.py`.
"""

import os
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retemper.errors import DataError
from retemper.loaders.beton import verify
from retemper.loaders.ffcv_library import ffcv_module
from retemper.loaders.loader import Batch, Loader, Plan, upload
from retemper.loaders.split import Split

TIMEOUT_S = 120.0  # for one batch; before the first, numba compiles for 1 to 15 s
POLL_S = 0.2  # between two looks at whether the thread lives
STOP_S = 5.0  # for the thread to end when the rest of an epoch is not wanted


class FfcvLoader(Loader):
    """A loader that reads FILE.beton, after a check of its digest.

    Raises:
        DataError: the file is damaged, or holds another data set than `split`.
        UsageError: FFCV is not installed.
    """

    def __init__(
        self,
        split: Split,
        path: str | Path,
        plan: Plan,
        device: torch.device,
        reason: str,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        super().__init__(plan, len(split), device, f"loader: ffcv from {Path(path).absolute()} ({reason})")
        self.path = Path(path)
        self._timeout_s = timeout_s
        loaders = ffcv_module("loader.loader")
        self._facts = verify(self.path)
        self.jpeg_quality = self._facts.jpeg_quality
        if not self._facts.matches(split):
            raise DataError(f"{path} holds another data set than {split.name} {split.split}: convert that one")
        # One worker for pixels: FFCV does not spread one copy an image over threads; JPEG copies are decoded by all
        # cores. The seed decides nothing, but without one FFCV draws from numpy's global generator.
        cores = max(1, len(os.sched_getaffinity(0)) // plan.world_size)
        self._ffcv = loaders.Loader(
            str(path),
            batch_size=plan.local_size,
            num_workers=1 if self._facts.jpeg_quality is None else cores,
            os_cache=True,
            order=loaders.OrderOption.SEQUENTIAL,
            seed=0,
            drop_last=False,
        )
        if not np.array_equal(self._ffcv.reader.metadata["f1"], split.labels):
            raise DataError(f"{path} has other labels than {split.name} {split.split}: convert that one again")
        self._pump: Any = None
        self._compiled = False

    def _fetch(self, index: np.ndarray, view: np.ndarray, batches: int) -> Iterator[Batch]:
        on_view, rows = upload(view, self.device), self.plan.local_size
        pump = self._start(index) if len(index) else None
        try:
            for start in range(0, batches * rows, rows):
                at = slice(start, start + rows)
                if pump is None or start >= len(index):  # this process has no row of the last batch
                    yield self._empty(on_view)
                    continue
                image, label, position = self._next(pump)
                if not np.array_equal(position[:, 0].numpy(), index[at]):
                    raise DataError(f"{self.path}: FFCV gave other images than asked for; use --loader resident")
                yield Batch(self._copy(image), self._copy(label[:, 0]), self._copy(position[:, 0]), on_view[at])
        finally:
            if pump is not None:
                pump.stop()

    def _start(self, index: np.ndarray) -> Any:
        """Start FFCV's thread on these (M,) positions."""
        if not self._compiled:
            print("FFCV is compiling its pipeline (some seconds, once a run)", file=sys.stderr, flush=True)
        self._pump = _pump_class()(self._ffcv, np.ascontiguousarray(index, dtype=np.int64))
        return self._pump

    def _next(self, pump: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return FFCV's next image, label and position; they are valid until the next call.

        Raises:
            DataError: the thread died, or gave nothing within the time limit.
        """
        end = time.monotonic() + self._timeout_s
        fix = "use --loader resident, or convert the set again"
        while True:
            try:
                item = pump.output_queue.get(timeout=POLL_S)
            except Empty:
                if not pump.is_alive() and pump.output_queue.empty():
                    if isinstance(pump.failure, MemoryError):
                        raise pump.failure from None
                    raise DataError(f"FFCV stopped reading {self.path} ({pump.failure!r}): {fix}") from pump.failure
                if time.monotonic() > end:
                    limit = f"{self._timeout_s:g} s"
                    raise DataError(f"FFCV gave no batch of {self.path} for {limit}: {fix}") from None
                continue
            if item is None:
                raise DataError(f"FFCV ended the epoch of {self.path} too early: {fix}")
            self._compiled = True
            return item[1]

    def _copy(self, buffer: Tensor) -> Tensor:
        """Return a copy on the device.

        FFCV may fill its buffer again while a transfer from it is under way. So a GPU gets the copy from pinned memory
        of ours, which torch keeps until the transfer is done.
        """
        if self.device.type != "cuda":
            return buffer.clone().to(self.device)
        return (
            torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
            .copy_(buffer)
            .to(self.device, non_blocking=True)
        )

    def _empty(self, view: Tensor) -> Batch:
        """Return a batch of no images."""
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        image = torch.empty((0, *self._facts.shape), dtype=torch.uint8, device=self.device)
        return Batch(image, none, none, view[:0])

    def close(self) -> None:
        if self._pump is not None:
            self._pump.stop()


@cache
def _pump_class() -> Any:
    """Return the class of FFCV's reading thread, extended by `failure` and `stop`."""
    base: Any = ffcv_module("loader.epoch_iterator").EpochIterator

    class Pump(base):
        failure: BaseException | None = None

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:  # of any kind: the training thread must hear of it
                self.failure = error

        def stop(self) -> None:
            """End the thread, whether or not the epoch was read to its end."""
            self.terminate_event.set()
            self.iter_ixes = iter(())  # nothing more to read ...
            end = time.monotonic() + STOP_S
            while self.is_alive() and time.monotonic() < end:
                try:
                    self.output_queue.get(timeout=0.01)  # ... and room for the thread's last entry
                except Empty:
                    continue

    return Pump
