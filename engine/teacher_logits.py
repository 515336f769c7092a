"""What the teacher says of the clean images, asked for several batches at once and kept for the next time.

A teacher that looks at clean images alone sees few things: a crop after padding by p, flipped or not, makes
2 (2 p + 1)^2 views of an image, 162 for p = 4. A table with a row for each is complete and exact; it fills as views are
drawn, and the next run with the same teacher finds it on the disk.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retemper.loaders import Batch
from retemper.loaders.errors import DataError

FORMAT = 1  # of the files, and of what a view's id means
AUTO_LIMIT = 4 * 2**30  # bytes: CIFAR-10 takes 0.3 GB, CIFAR-100 3.2, Tiny-ImageNet 13


class TeacherTable:
    """(N, V, K) logits, float32, and which of the (N, V) views are known: two files that all runs of a teacher share.

    A row is marked as known after its logits have reached the disk, so that a kill costs the newest rows only.

    Args:
        cache: the folder of all tables.
        facts: all that the logits depend on; its digest is the table's name.
    Raises:
        OSError: no room, or no permission.
        DataError: the files there are not such a table.
    """

    def __init__(self, cache: Path, images: int, views: int, classes: int, facts: dict[str, Any]) -> None:
        facts = facts | {"format": FORMAT, "images": images, "views": views, "classes": classes}
        text = json.dumps(facts, indent=1, sort_keys=True)
        self.folder = cache / "teacher_logits" / sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "facts.json").write_text(text + "\n")
        self.logits = _allocated(self.folder / "logits.f32", np.dtype(np.float32), (images, views, classes))
        self.known = _allocated(self.folder / "known.u8", np.dtype(np.uint8), (images, views))

    def look_up(self, index: np.ndarray, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(M,) bool, which of these views are known, and (M, K) their logits; the others' are zero."""
        return self.known[index, view] == 1, self.logits[index, view]

    def keep(self, index: np.ndarray, view: np.ndarray, logits: np.ndarray) -> None:
        """Add (M, K) logits, for this run and the next."""
        self.logits[index, view] = logits
        self.logits.flush()
        self.known[index, view] = 1
        self.known.flush()

    def sample(self, images: int) -> tuple[np.ndarray, np.ndarray]:
        """The index and the view of one known entry for each of up to so many images, spread over the table."""
        (index,) = np.nonzero(self.known.any(1))
        index = index[:: max(1, len(index) // images)][:images].copy()
        return index, self.known[index].argmax(1)


def table_bytes(images: int, views: int, classes: int) -> int:
    """What such a table takes on the disk."""
    return images * views * (4 * classes + 1)


def has_room(cache: Path, needed: int) -> bool:
    """Whether the disk of `cache` holds so many bytes more, and a tenth besides."""
    while not cache.exists():
        cache = cache.parent
    return shutil.disk_usage(cache).free > 1.1 * needed


def _allocated(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """The file as an array, made of zeros if need be; all its blocks are taken now, or a full disk would kill later."""
    size = kind.itemsize * int(np.prod(shape))
    with open(path, "ab") as file:
        if file.tell() not in (0, size):
            raise DataError(f"{path} has {file.tell():,} bytes, not {size:,}: delete {path.parent}")
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, kind, "r+", shape=shape)


class TeacherLogits:
    """Hands out an epoch's batches with the teacher's logits, asking it only for what is not known.

    Args:
        ask: (image (N, H, W, C) uint8, view (B,), index (B,)) to (B, K) logits.
        ahead: how many batches are collected before the teacher is asked for what they miss.
        rows: the teacher sees a multiple of so many images, padded, so that few shapes occur.
        at_once: at most so many images in one forward, a multiple of `rows`.
        table: where answers are kept; None keeps none.
    """

    def __init__(
        self,
        ask: Callable[[Tensor, Tensor, Tensor], Tensor],
        num_classes: int,
        device: torch.device,
        *,
        ahead: int,
        rows: int,
        at_once: int,
        table: TeacherTable | None = None,
    ) -> None:
        self.ask, self.num_classes, self.device = ask, num_classes, device
        self.ahead, self.rows, self.at_once, self.table = ahead, rows, at_once, table
        self.known_share = 0.0  # of the newest epoch

    def epoch(self, batches: Iterator[Batch], index: np.ndarray, view: np.ndarray) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with (B, K) float32 logits.

        Args:
            index, view: (M,) int64 on the host, what the batches hold, in their order.
        """
        logits_MK = torch.empty(len(index), self.num_classes, device=self.device)
        missing = np.arange(len(index))
        if self.table is not None:
            known, found = self.table.look_up(index, view)
            logits_MK.copy_(torch.from_numpy(found))
            missing = missing[~known]
        self.known_share = 1 - len(missing) / max(1, len(index))
        on_missing = torch.from_numpy(missing).to(self.device)
        row = 0
        while group := list(islice(batches, self.ahead)):
            end = row + sum(len(batch.label) for batch in group)
            first, last = np.searchsorted(missing, (row, end))
            self._fill(group, row, on_missing[first:last], logits_MK)
            for batch in group:
                yield batch, logits_MK[row : row + len(batch.label)]
                row += len(batch.label)
        if self.table is not None and len(missing):
            self.table.keep(index[missing], view[missing], logits_MK[on_missing].cpu().numpy())

    def _fill(self, group: list[Batch], row: int, missing: Tensor, logits_MK: Tensor) -> None:
        """Ask for the rows `missing` of `logits_MK`; the first image of `group` is row `row`."""
        if not len(missing):
            return
        image, view = torch.cat([batch.image for batch in group]), torch.cat([batch.view for batch in group])
        for part in missing.split(self.at_once):
            at = part - row
            padded = torch.cat([at, at[-1:].expand(-len(at) % self.rows)])
            logits_BK = self.ask(image, view.index_select(0, padded), padded)
            logits_MK.index_copy_(0, part, logits_BK[: len(at)].float())
