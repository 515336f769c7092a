"""The teacher's answers on the disk: each view of an image is asked for once, by whatever run comes first.

A teacher that looks at clean images alone sees few things: a crop after padding by p, flipped or not, makes
2 (2 p + 1)^2 views of an image, 162 for p = 4. A table with a row for each is complete and exact; it fills as views are
drawn, and the next run with the same teacher finds it.

Beside each row stands its checksum, which also says that it is known. A row that a kill, a crash of the machine or a
bad disk has left otherwise than it was written does not fit it, is told of, and is asked for again.
"""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from retemper.console import say
from retemper.errors import DataError
from retemper.files import locked, write_atomically
from retemper.loaders import Loader

Ask = Callable[[Tensor, Tensor, Tensor], Tensor]  # image (N, H, W, C) uint8, view (B,), index (B,) to (B, K) logits
CHECKED = 256  # entries, before a run trusts a table
FORMAT = 2  # of the files, and of what a view's id means
AUTO_LIMIT = 4 * 2**30  # bytes: CIFAR-10 takes 0.3 GB, CIFAR-100 3.2, Tiny-ImageNet 13


class TeacherTable:
    """Two files that all runs of a teacher share: (N, V, K) float32 logits, and (N, V) checksums, 0 where unknown.

    Args:
        cache: the folder of all tables.
        facts: all that the logits depend on; its digest is the table's name.
    Raises:
        OSError: no room, or no permission.
        DataError: the files there are not such a table.
    """

    def __init__(self, cache: Path, images: int, views: int, classes: int, facts: dict[str, Any]) -> None:
        self.folder, text = table_folder(cache, images, views, classes, facts), _text(images, views, classes, facts)
        with locked(self.folder / ".lock"):  # two runs may begin at once
            files = [self.folder / name for name in ("logits.f32", "checksums.u32")]
            taken = sum(512 * file.stat().st_blocks for file in files if file.exists())
            require_room(self.folder, table_bytes(images, views, classes) - taken)
            write_atomically(self.folder / "facts.json", text.encode() + b"\n")
            self.logits = _allocated(files[0], np.dtype(np.float32), (images, views, classes))
            self.checksums = _allocated(files[1], np.dtype(np.uint32), (images, views))

    @property
    def known(self) -> np.ndarray:
        """The views that have an answer, (N, V) bool."""
        return self.checksums != 0

    def look_up(self, index: np.ndarray, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of these views are known and undamaged, (M,) bool, and the logits of those, (M, K)."""
        logits, kept = self.logits[index, view], self.checksums[index, view]
        known = kept != 0
        rows = np.flatnonzero(known)
        known[rows] = self._checksum(index[rows], view[rows], logits[rows]) == kept[rows]
        if damaged := len(rows) - int(known.sum()):
            what = f"{damaged:,} answers in {self.folder} are damaged (their checksums differ)"
            say(f"{what}: the teacher is asked again")
        return known, logits

    def keep(self, index: np.ndarray, view: np.ndarray, logits: np.ndarray) -> None:
        """Add (M, K) logits, for this run and the next."""
        self.logits[index, view] = logits
        self.checksums[index, view] = self._checksum(index, view, logits)

    def _checksum(self, index: np.ndarray, view: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Return CRC-32 of each row and its place, (M,) uint32, never 0. It finds any damage of up to 32 bits."""
        data, size = np.ascontiguousarray(logits, dtype=np.float32).tobytes(), 4 * logits.shape[1]
        places = (index * self.checksums.shape[1] + view) & 0xFFFFFFFF
        sums = (crc32(data[at * size : (at + 1) * size], place) or 1 for at, place in enumerate(places.tolist()))
        return np.fromiter(sums, np.uint32, len(places))

    def check(self, loader: Loader, ask: Ask, tolerance: float) -> None:
        """Ask the teacher again for some of the answers.

        Raises:
            DataError: they differ by more than `tolerance`, in units of the largest logit.
        """
        rng = np.random.default_rng()  # other entries each time, one of each image
        index = np.sort(rng.permutation(np.flatnonzero(self.known.any(1)))[:CHECKED])
        known = self.checksums[index] != 0
        view = (known * rng.random(known.shape)).argmax(1)
        right, kept = self.look_up(index, view)
        index, view, kept = index[right], view[right], torch.from_numpy(kept[right])
        if not len(index):
            return
        image = torch.cat([batch.image for batch in loader.walk(index)])
        position = torch.arange(len(index), device=image.device)
        asked = ask(image, torch.from_numpy(view).to(image.device), position).float().cpu()
        if not torch.allclose(asked, kept, rtol=0, atol=tolerance * float(asked.abs().max())):
            raise DataError(f"{self.folder} does not hold this teacher's answers: delete the folder")


def table_folder(cache: Path, images: int, views: int, classes: int, facts: dict[str, Any]) -> Path:
    """Return the folder of the table of such answers, whether it is there or not."""
    text = _text(images, views, classes, facts)
    return cache / "teacher_logits" / sha256(text.encode()).hexdigest()[:16]


def _text(images: int, views: int, classes: int, facts: dict[str, Any]) -> str:
    """Return all that the logits depend on, as facts.json has it."""
    facts = facts | {"format": FORMAT, "images": images, "views": views, "classes": classes}
    return json.dumps(facts, indent=1, sort_keys=True)


def table_bytes(images: int, views: int, classes: int) -> int:
    """Return how many bytes such a table takes on the disk."""
    return 4 * images * views * (classes + 1)


def require_room(cache: Path, needed: int) -> None:
    """Raise OSError where the disk of `cache` does not hold so many bytes more, and a tenth besides."""
    while not cache.exists():
        cache = cache.parent
    if shutil.disk_usage(cache).free < 1.1 * needed:
        raise OSError(f"the disk has no room for {needed / 2**30:.1f} GiB")


def _allocated(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Return the file as an array, of zeros where new. All blocks are taken now: a full disk would kill later."""
    size = kind.itemsize * int(np.prod(shape))
    with open(path, "ab") as file:
        if file.tell() > size:
            raise DataError(f"{path} has {file.tell():,} bytes, not {size:,}: delete {path.parent}")
        if 0 < file.tell() < size:
            say(f"{path} was cut at {file.tell():,} of {size:,} bytes: the teacher is asked again for the rest")
        os.posix_fallocate(file.fileno(), 0, size)  # also what an earlier process did not get to the end of
    return np.memmap(path, kind, "r+", shape=shape)
