"""Batches of a data set with a share of a pool in each: the plan of what is drawn, and the loader.

    a batch of B rows     R real images, without replacement     P = round(F B) of the pool, with replacement
    an epoch              all real images once: ceil(real images / R) batches; a last one of r real images has
                          round(r P / R) of the pool

F is the share that is asked for, and R = B - P. The real rows stand first. Draws and views are functions of (seed,
epoch, position of the draw in the epoch) alone, as all that is random here (views.py).
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retemper.errors import UsageError
from retemper.loaders.loader import Batch, Loader, Plan, upload
from retemper.loaders.pool import Pool
from retemper.loaders.views import POOL, POOL_VIEW, random_words

AHEAD = 4  # buffers: one that is being used, and three batches ahead
CHUNK = 2**24  # bytes at a time, of a pool that is copied to the device: the system reads 2**31 at most
Where = Literal["auto", "device", "disk"]


@dataclass(frozen=True)
class Extra:
    """A pool, the share of each batch that is drawn from it, and where it is to lie."""

    pool: Pool
    fraction: float
    where: Where = "auto"


@dataclass(frozen=True)
class MixedPlan(Plan):
    """A plan whose batches hold rows of a pool behind their real ones.

    pool_images: how many images there are to draw from.
    fraction: the share of a batch's rows that is drawn from them.

    Raises:
        UsageError: as `Plan`; or a process would have no row of one of the two kinds.
    """

    pool_images: int = field(kw_only=True)
    fraction: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.pool_rows, self.real_rows) < self.world_size:
            kinds = f"{self.real_rows} real images and {self.pool_rows} extra ones"
            processes = f" on {self.world_size} processes" * (self.world_size > 1)
            told = f"--extra-fraction {self.fraction:g} makes a batch of {self.batch_size} one of {kinds}{processes}"
            raise UsageError(f"{told}, and needs one of each: give a larger --batch-size, or another fraction")

    @property
    def pool_rows(self) -> int:
        """Return how many rows of a whole batch are drawn from the pool."""
        return round(self.fraction * self.batch_size)

    @property
    def real_rows(self) -> int:
        """Return how many rows of a whole batch are real."""
        return self.batch_size - self.pool_rows

    @property
    def local_real_rows(self) -> int:
        """Return how many of them are this process's."""
        return len(range(self.rank, self.real_rows, self.world_size))

    @property
    def num_rows(self) -> int:
        whole, rest = divmod(len(self.indices), self.real_rows)
        return whole * self.batch_size + rest + self._beside(rest)

    def draw(self, num_total: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        real, is_real = super().draw(num_total, epoch), self._is_real()
        draws = len(is_real) - len(self.indices)
        at = random_words(draws, self.seed, epoch, POOL) % np.uint64(self.pool_images)
        extra = -1 - at.astype(np.int64), self.views.draw(draws, self.seed, epoch, POOL_VIEW)
        index, view = np.empty(len(is_real), np.int64), np.empty(len(is_real), np.int64)
        for into, own, drawn in zip((index, view), real, extra, strict=True):
            into[is_real], into[~is_real] = own, drawn
        return index, view

    def _is_real(self) -> np.ndarray:
        """Return which rows of an epoch are real, (rows,) bool."""
        whole, rest = divmod(len(self.indices), self.real_rows)
        batch = np.arange(self.batch_size) < self.real_rows
        last = np.arange(rest + self._beside(rest)) < rest
        return np.concatenate([np.tile(batch, whole), last])

    def _beside(self, rest: int) -> int:
        """Return how many rows of the pool a last batch of `rest` real rows has."""
        return round(rest * self.pool_rows / self.real_rows)


class MixedLoader(Loader):
    """A loader that adds rows of a pool to the batches of another.

    Args:
        real: deals this process's real rows of every batch, `MixedPlan.local_real_rows` at a time.
        plan: draws the rows of both kinds.
    """

    def __init__(self, real: Loader, plan: MixedPlan, extra: Extra, device: torch.device) -> None:
        pool, resident = extra.pool, _lies_on(device, extra)
        told = f"{plan.pool_rows} of {plan.batch_size} images a batch from {pool.path}, {len(pool):,} images"
        told += f" on {device}" if resident else " on the disk, read ahead"
        super().__init__(plan, real.num_total, device, f"{real.description}; {told}")
        self.jpeg_quality = real.jpeg_quality
        self._real, self._pool, self._rows = real, pool, _copied(pool, device) if resident else None

    def _fetch(self, index: np.ndarray, view: np.ndarray, batches: int) -> Iterator[Batch]:
        rows, is_real = self.plan.local_size, index >= 0
        parts = [index[start : start + rows] for start in range(0, batches * rows, rows)]
        drawn = [-1 - part[part < 0] for part in parts]
        labels = self._pool.labels[-1 - index[~is_real]].astype(np.int64)
        on_index, on_view, on_label = (upload(one, self.device) for one in (index, view, labels))
        real, extra = self._real._fetch(index[is_real], view[is_real], batches), self._images(drawn)
        start = at = 0
        with closing(extra):
            for batch, image in zip(real, extra, strict=True):
                end, to = start + len(batch.label) + len(image), at + len(image)
                label = torch.cat([batch.label, on_label[at:to]])
                yield Batch(self._joined(batch.image, image), label, on_index[start:end], on_view[start:end])
                start, at = end, to

    def _images(self, drawn: Sequence[np.ndarray]) -> Generator[Tensor, None, None]:
        """Yield the images of the pool at each of `drawn`, (n,) int64; one is valid until the next is asked for."""
        if self._rows is None:
            yield from read_ahead(self._pool, drawn, self.device)
            return
        on_device = upload(np.concatenate([*drawn, np.empty(0, np.int64)]), self.device)
        for at in on_device.split([len(one) for one in drawn]):
            yield self._rows.index_select(0, at)

    def _joined(self, real: Tensor, extra: Tensor) -> Tensor:
        """Return both as one tensor on the device; `extra` may still be on its way when this returns."""
        image = torch.empty((len(real) + len(extra), *self._pool.shape), dtype=torch.uint8, device=self.device)
        image[: len(real)].copy_(real)
        image[len(real) :].copy_(extra, non_blocking=True)
        return image

    def walk(self, indices: np.ndarray) -> Iterator[Batch]:
        return self._real.walk(indices)

    def close(self) -> None:
        self._real.close()
        self._rows = None


def read_ahead(pool: Pool, drawn: Sequence[np.ndarray], device: torch.device) -> Generator[Tensor, None, None]:
    """Yield the images of a pool at each of `drawn`, (n, H, W, C) uint8 on the host, read by a thread ahead of time.

    They lie in a ring of `AHEAD` buffers, in pinned memory for a GPU. A buffer is filled again once what the current
    stream was given before the next one was asked for is done: a copy from it, that is.

    Args:
        drawn: (n,) int64 positions in the pool, for each batch.
        device: where the images go.
    """
    ring, on_gpu = min(AHEAD, len(drawn)), device.type == "cuda"
    most = max(map(len, drawn), default=0)
    buffers = [torch.empty((most, *pool.shape), dtype=torch.uint8, pin_memory=on_gpu) for _ in range(ring)]
    used: list[Any] = [None] * ring  # marks of the stream

    def fill(number: int) -> Tensor:
        buffer, index = buffers[number % ring], drawn[number]
        if (event := used[number % ring]) is not None:
            event.synchronize()
        pool.take(index, buffer.numpy())
        return buffer[: len(index)]

    thread = ThreadPoolExecutor(1, "pool")
    try:
        filling: deque[Future[Tensor]] = deque(thread.submit(fill, number) for number in range(ring))
        for number in range(len(drawn)):
            yield filling.popleft().result()
            if on_gpu:
                used[number % ring] = torch.cuda.current_stream(device).record_event()
            if number + ring < len(drawn):
                filling.append(thread.submit(fill, number + ring))
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


def _lies_on(device: torch.device, extra: Extra) -> bool:
    """Say whether the pool is to lie on the device.

    By itself it does where it takes at most half of a GPU's free memory. On a CPU it stays in its files, which the
    system keeps in memory as far as there is room.
    """
    if extra.where == "auto" and device.type == "cuda":
        return 2 * extra.pool.bytes <= torch.cuda.mem_get_info(device)[0]
    return extra.where == "device"


def _copied(pool: Pool, device: torch.device) -> Tensor:
    """Return all images of a pool on the device, (N, H, W, C) uint8."""
    images, first = torch.empty((len(pool), *pool.shape), dtype=torch.uint8, device=device), 0
    for part in pool.parts:
        most = max(1, CHUNK // part.size)
        for start in range(0, part.images, most):
            chunk = np.empty((min(most, part.images - start), *pool.shape), np.uint8)
            part.read(start, chunk.reshape(-1).data)
            images[first + start :][: len(chunk)].copy_(torch.from_numpy(chunk))
        first += part.images
    return images
