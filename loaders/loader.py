"""The loaders' common part: which images make up a batch, in what order and in which views.

A backend only fetches images by their position in the split. So every backend gives the same bits, and any epoch can be
drawn again.
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
    """B images on the device. The crop and the flip that `view` names are still to be made."""

    image: Tensor  # (B, H, W, C) uint8
    label: Tensor  # (B,) int64; -1 of an image of a pool that has none
    index: Tensor  # (B,) int64, position in the whole split; -1 - its position of an image of a pool
    view: Tensor  # (B,) int64, see views.py


@dataclass(frozen=True)
class Plan:
    """The images that an epoch visits, and how they are dealt into batches.

    indices: (M,) int64 positions in the split, the part to visit.
    batch_size: images in a batch of all processes together.
    seed: decides the order of the images and their views.
    views: the crops and flips to draw from.
    rank, world_size: this process takes rows rank, rank + world_size, ... of every batch. All processes see equally
        many batches; this one's part of a last batch of fewer than world_size images may be empty.

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
            raise UsageError(
                f"a batch of {self.batch_size} does not divide among {self.world_size} processes: give a --batch-size "
                f"that is a multiple of {self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"process {self.rank} is not one of {self.world_size}")

    @property
    def local_size(self) -> int:
        """Return the number of rows of a whole batch that this process takes."""
        return self.batch_size // self.world_size

    @property
    def num_rows(self) -> int:
        """Return the number of rows of all batches of an epoch, over all processes."""
        return len(self.indices)

    def draw(self, num_total: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw what the rows of an epoch hold, over all processes and batch after batch.

        Args:
            num_total: images in the split, in and outside the plan.
        Returns:
            (rows,) int64 positions and (rows,) int64 views, as `Batch` has them.
        """
        index = self.indices[epoch_order(len(self.indices), self.seed, epoch)]
        return index, self.views.draw(num_total, self.seed, epoch)[index]

    def batches(self, images: int) -> int:
        """Return the number of batches that hold so many images."""
        return -(-images // self.batch_size)

    def part(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of this process, batch after batch.

        Args:
            rows: (M,), those of all processes.
        """
        whole = len(rows) // self.batch_size * self.batch_size
        shared = rows[:whole].reshape(-1, self.batch_size)[:, self.rank :: self.world_size].reshape(-1)
        return np.concatenate([shared, rows[whole:][self.rank :: self.world_size]])


class Loader(ABC):
    """The batches of one split. `make_loader` makes one.

    plan: the images to visit.
    num_total: images in the split, in and outside the plan.
    device: where the batches are.
    description: one line for the user: which backend, and why.
    jpeg_quality: of the copies that it gives in place of the images; None where it gives the images.
    """

    jpeg_quality: int | None = None

    def __init__(self, plan: Plan, num_total: int, device: torch.device, description: str) -> None:
        self.plan = plan
        self.num_total = num_total
        self._require_inside(plan.indices)
        self.device = device
        self.description = description

    def __len__(self) -> int:
        """Return the number of batches of an epoch, a last partial one included."""
        return self.plan.batches(self.num_images)

    @property
    def num_images(self) -> int:
        """Return the number of images of an epoch, over all processes, those drawn from a pool included."""
        return self.plan.num_rows

    def schedule(self, epoch: int, start_batch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Draw what the batches of an epoch hold for this process.

        Returns:
            (M,) int64 positions and (M,) int64 views, as `Batch` has them, in the order of the batches from
            `start_batch` on.

        Raises:
            UsageError: there is no such batch.
        """
        if not 0 <= start_batch <= len(self):
            raise UsageError(f"an epoch has {len(self)} batches: cannot start at batch {start_batch}")
        plan = self.plan
        index, view = plan.draw(self.num_total, epoch)
        return plan.part(index[start_batch * plan.batch_size :]), plan.part(view[start_batch * plan.batch_size :])

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from `start_batch` on: the same ones whether or not it began before them.

        Raises:
            UsageError: there is no such batch.
            DataError: the backend failed.
        """
        return self._fetch(*self.schedule(epoch, start_batch), len(self) - start_batch)

    def walk(self, indices: np.ndarray) -> Iterator[Batch]:
        """Yield these images in this order and in the identity view, all of them in every process.

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
        """Yield so many batches of `plan.local_size` rows; the last may be shorter, or empty.

        Args:
            index, view: (M,) int64, as `schedule` returns them.
            batches: how many to yield.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the loader holds; no batch can be asked for afterwards."""


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy of `array` on the device, without waiting for it to arrive there."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
