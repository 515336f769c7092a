"""What a loader is: batches of clean uint8 images on the device, in an order and in views that we draw ourselves.

A backend only fetches images by position; so every backend gives the same bits, and any epoch can be drawn again.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retemper.errors import UsageError
from retemper.loaders.views import ViewSpace, epoch_order


@dataclass(frozen=True)
class Batch:
    """B images on the device; the crop and flip in `view` are still to be made."""

    image: Tensor  # (B, H, W, C) uint8
    label: Tensor  # (B,) int64
    index: Tensor  # (B,) int64, position in the whole split
    view: Tensor  # (B,) int64, see views.py


@dataclass(frozen=True)
class Plan:
    """Which images an epoch visits and how, apart from how they are fetched.

    indices: (M,) int64, the part of the split to visit, as positions in it.
    batch_size: of all processes together.
    rank, world_size: this process takes rows rank, rank + world_size, ... of every batch, so its part of a last batch
        of fewer than world_size images may be empty; all processes see equally many batches.

    Raises:
        UsageError: no images, or a batch that does not divide among the processes.
    """

    indices: np.ndarray
    batch_size: int
    seed: int
    views: ViewSpace
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if len(self.indices) == 0:
            raise UsageError("there are no images to train on")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise UsageError(f"a batch of {self.batch_size} does not divide among {self.world_size} processes")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"process {self.rank} is not one of {self.world_size}")

    @property
    def local_size(self) -> int:
        """Rows of a whole batch that this process takes."""
        return self.batch_size // self.world_size

    def batches(self, images: int) -> int:
        """How many batches hold so many images."""
        return -(-images // self.batch_size)

    def part(self, rows: np.ndarray) -> np.ndarray:
        """The rows of this process, batch after batch."""
        whole = len(rows) // self.batch_size * self.batch_size
        shared = rows[:whole].reshape(-1, self.batch_size)[:, self.rank :: self.world_size].reshape(-1)
        return np.concatenate([shared, rows[whole:][self.rank :: self.world_size]])


class Loader(ABC):
    """Batches of one split. Use `make_loader`.

    plan: what is visited.
    num_total: images in the split, in and outside the plan.
    description: one line: which backend, and why.
    """

    def __init__(self, plan: Plan, num_total: int, device: torch.device, description: str) -> None:
        self.plan = plan
        self.num_total = num_total
        self._require_inside(plan.indices)
        self.device = device
        self.description = description

    def __len__(self) -> int:
        """Batches an epoch, the last partial one included."""
        return self.plan.batches(self.num_images)

    @property
    def num_images(self) -> int:
        """Images an epoch, over all processes."""
        return len(self.plan.indices)

    def schedule(self, epoch: int, start_batch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """What the batches of an epoch hold for this process, in their order: (M,) int64 indices and views.

        Raises:
            UsageError: there is no such batch.
        """
        if not 0 <= start_batch <= len(self):
            raise UsageError(f"an epoch has {len(self)} batches: cannot start at batch {start_batch}")
        plan = self.plan
        index = plan.indices[epoch_order(self.num_images, plan.seed, epoch)]
        view = plan.views.draw(self.num_total, plan.seed, epoch)[index]
        return plan.part(index[start_batch * plan.batch_size :]), plan.part(view[start_batch * plan.batch_size :])

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from `start_batch` on: the same ones whether or not those before were asked for.

        Raises:
            UsageError: there is no such batch.
            DataError: the backend failed.
        """
        return self._fetch(*self.schedule(epoch, start_batch), len(self) - start_batch)

    def walk(self, indices: np.ndarray) -> Iterator[Batch]:
        """These images of the split in this order, as they are (the identity view), all of them in every process.

        Args:
            indices: (M,) int64 positions in the split.

        Raises:
            UsageError: a position outside it.
            DataError: the backend failed.
        """
        self._require_inside(indices)
        view = np.full(len(indices), self.plan.views.identity, dtype=np.int64)
        return self._fetch(indices, view, -(-len(indices) // self.plan.local_size))

    def _require_inside(self, indices: np.ndarray) -> None:
        if len(indices) and (indices.min() < 0 or indices.max() >= self.num_total):
            raise UsageError(f"a position lies outside the {self.num_total:,} images of the split")

    @abstractmethod
    def _fetch(self, index: np.ndarray, view: np.ndarray, batches: int) -> Iterator[Batch]:
        """Yield so many batches of `plan.local_size` rows; the last may be shorter, or empty."""

    @abstractmethod
    def close(self) -> None:
        """Free what the loader holds, when no more batches are wanted."""


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; nobody waits for it to arrive."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
