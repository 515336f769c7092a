"""A pool: images, generated or extra, that are mixed into the batches of a data set. They stay in their files.

A draw reads its rows by their place in the file: no page of it stays with the process, whatever the size. A memory map
takes two to four times the CPU (benchmarks/results/pool): around each image that is touched, Linux maps up to 2 MiB,
which would have to be let go again. The labels are read whole: two bytes an image.
"""

import hashlib
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retemper.errors import DataError
from retemper.loaders.pool_files import LAYOUT, Member, members, pool_files
from retemper.loaders.split import Split

NO_LABEL = -1


class Part:
    """(N, H, W, C) uint8 in a file, from `start` on."""

    def __init__(self, path: Path, start: int, shape: tuple[int, ...]) -> None:
        self.path, self.start, self.images, self.size = path, start, shape[0], math.prod(shape[1:])
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if hasattr(os, "posix_fadvise"):  # no reading ahead by the system: the next draw is anywhere
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, first: int, into: memoryview) -> None:
        """Fill a buffer of bytes with the images from `first` on. Raises DataError where the file has fewer."""
        try:
            if os.preadv(self._file, [into], self.start + first * self.size) == len(into):
                return
            why = "it has become shorter"
        except OSError as error:
            why = error.strerror or str(error)
        raise DataError(f"cannot read {self.path} ({why}): fetch it again, and go on with the same command")


@dataclass(frozen=True, eq=False)
class Pool:
    """The images of a pool.

    path: what the user named.
    parts: in the order of their numbers.
    labels: (N,) whole numbers; -1 where an image has none.
    shape: (H, W, C) of an image.
    fingerprint: hexadecimal digits that change with the content of an array, wherever the files lie.
    """

    path: Path
    parts: Sequence[Part]
    labels: np.ndarray
    shape: tuple[int, int, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bytes(self) -> int:
        """Return how much memory the pixels take."""
        return len(self) * math.prod(self.shape)

    @property
    def unlabelled(self) -> int:
        """Return how many images have no label."""
        return int((self.labels == NO_LABEL).sum())

    def describe(self) -> dict[str, Any]:
        """Return what config.json says of it."""
        told = {"images": len(self), "unlabelled": self.unlabelled, "fingerprint": self.fingerprint}
        return {"path": str(self.path.absolute()), **told}

    def take(self, index: np.ndarray, out: np.ndarray) -> None:
        """Copy the images at `index`, (n,) int64, to the first n of `out`, (m, H, W, C) uint8, contiguous.

        Raises:
            DataError: as `Part.read`.
        """
        first = np.cumsum([0, *(part.images for part in self.parts)])
        of = np.searchsorted(first, index, "right") - 1
        data, size = out.reshape(-1).data, math.prod(self.shape)
        for row, (part, at) in enumerate(zip(of.tolist(), (index - first[of]).tolist(), strict=True)):
            self.parts[part].read(at, data[row * size : (row + 1) * size])


def open_pool(path: str | Path, split: Split, cache: str | Path) -> Pool:
    """Return the pool in the files that `path` names (`pool_files`), for the images and classes of `split`.

    Args:
        cache: the folder where compressed files are unpacked, once.
    Raises:
        DataError: a file is missing, damaged or no pool, or its images or labels do not fit the split's.
    """
    path, cache = Path(path), Path(cache)
    files = pool_files(path)
    arrays = [members(file) for file in files]
    for file, found in zip(files, arrays, strict=True):
        _require_fitting(file, found, split)
    labels = np.concatenate([_labels(found, split) for found in arrays])
    parts = [Part(*found["image"].place(cache), found["image"].shape) for found in arrays]
    return Pool(path, parts, labels, split.shape, _fingerprint(arrays))


def _require_fitting(file: Path, found: dict[str, Member], split: Split) -> None:
    """Raise DataError unless the arrays of a file are images such as the split's, and labels."""
    image, label = found.get("image"), found.get("label")
    if image is None:
        raise DataError(f'{file} has no array "image", but {", ".join(found) or "none"}: {LAYOUT}')
    if image.dtype != np.uint8:
        raise DataError(f"{file}: image is {image.dtype}, not uint8: write 0 ... 255 as uint8, and no floats")
    if image.shape[1:] != split.shape:
        theirs, ours = (" x ".join(map(str, shape)) for shape in (image.shape[1:], split.shape))
        raise DataError(f"{file}: its images are {theirs or 'numbers'}, those of the run {ours}: resize the pool's")
    if image.shape[0] == 0:
        raise DataError(f"{file}: it holds no image: {LAYOUT}")
    if label is not None and label.shape != image.shape[:1]:
        told = f"{image.shape[0]:,} images, but label has the shape {label.shape}"
        raise DataError(f"{file}: it holds {told}: one label an image, or no label at all")
    if label is not None and label.dtype.kind not in "iu":
        raise DataError(f"{file}: label is {label.dtype}: write whole numbers, -1 where there is none")


def _labels(found: dict[str, Member], split: Split) -> np.ndarray:
    """Return a file's labels, (N,) int16 or int32; -1 of all where it has none. Raises DataError at a wrong one."""
    kind, classes = np.min_scalar_type(-max(len(split.classes), 2**8)), len(split.classes)
    labels = np.full(found["image"].shape[0], NO_LABEL, kind)
    if "label" not in found:
        return labels
    first = 0
    for values in found["label"].values():
        wrong = np.flatnonzero((values >= classes) | (values < NO_LABEL))
        if len(wrong):
            told = f"image {first + wrong[0]:,} has label {values[wrong[0]]}, but {split.name} has {classes} classes"
            raise DataError(f"{found['label'].path}: {told}: name a pool of the same classes, counted from 0")
        labels[first : first + len(values)] = values
        first += len(values)
    return labels


def _fingerprint(arrays: Sequence[dict[str, Member]]) -> str:
    """Return a digest of the checksums and sizes of the images and labels, in their order."""
    named = [(name, found[name]) for found in arrays for name in ("image", "label") if name in found]
    facts = [(name, one.shape, one.dtype.str, one.info.CRC) for name, one in named]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
