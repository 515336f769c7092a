"""One half of a data set: the value that every reader returns and every backend takes."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from retemper.errors import DataError

HELD = 2**31  # bytes of pixels that are read at once and held, where they could also be read in parts


@dataclass(frozen=True, eq=False)
class Split:
    """The training or the test half of a data set. Labels are read at once, pixels when `images` is first asked for.

    Training images may be stored larger than networks see them, which a view is cut from.

    name, split: as in `load_split("cifar10", "train")`.
    labels: (N,) int64, each in [0, K).
    classes: K names.
    shape: (H, W, C) of every image as networks see it.
    fingerprint: hexadecimal digits that change when a file of the split does; they name the converted file.
    read: returns the images as they are stored, (N, H, W, C) uint8; called once.
    read_some: returns those at some positions alone; None where it takes as long as to read all.
    max_side: the side that images are stored at, in pixels; None where they are stored as they are seen.

    Raises:
        DataError: there is no image, or a label has no class.
    """

    name: str
    split: str
    labels: np.ndarray
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    fingerprint: str
    read: Callable[[], np.ndarray] = field(repr=False)
    read_some: Callable[[np.ndarray], np.ndarray] | None = field(default=None, repr=False)
    max_side: int | None = None

    def __post_init__(self) -> None:
        if len(self.labels) == 0:
            raise DataError(f"{self.name}: the {self.split} half holds no image")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            wrong = low if low < 0 else high
            raise DataError(
                f"{self.name}: the {self.split} half has label {wrong}, but there are {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def images(self) -> np.ndarray:
        """Return the pixels as they are stored, (N, H, W, C) uint8, C-contiguous; read from the disk once.

        Raises:
            DataError: a file is damaged, or not of this shape; the pixels do not fit into memory.
        """
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self.bytes > memory:
            raise DataError(
                f"{self.name}: the {self.split} half has {self.bytes / 1e9:.0f} GB of pixels, this machine has "
                f"{memory / 1e9:.0f} GB of memory: convert it (retemper convert {self.name} --jpeg-quality 90 ...) and "
                "name the file with --beton"
            )
        images = np.require(self._sound(self.read), np.uint8, ["C", "W"])
        if images.shape != (len(self), *self.stored):
            raise DataError(
                f"{self.name}: the {self.split} half has {len(self)} labels of {self.stored} images, "
                f"but its pixels are {images.shape}"
            )
        return images

    @property
    def stored(self) -> tuple[int, int, int]:
        """Return (H, W, C) of every image as it is stored."""
        return self.shape if self.max_side is None else (self.max_side, self.max_side, self.shape[2])

    @property
    def bytes(self) -> int:
        """Return how many bytes all pixels are."""
        return len(self) * math.prod(self.stored)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Return stored images, (B, H, W, C) uint8; of many large ones no others are read, and none is held.

        Args:
            index: (B,) integers, positions in the split.
        Raises:
            DataError: as `images`.
        """
        some = self.read_some
        if some is None or self.bytes <= HELD or "images" in vars(self):
            return self.images[index]
        return self._sound(lambda: some(index))

    def seen(self, index: np.ndarray) -> np.ndarray:
        """Return images as they are evaluated: `take`, and of larger ones the middle."""
        return middle(self.take(index), *self.shape[:2])

    def _sound(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Return what is read; an error of the file system is one line."""
        try:
            return read()
        except OSError as error:
            raise DataError(f"cannot read {error.filename or self.name}: {error.strerror or error}") from error


def middle(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the middle of images, (B, H, W, C): the given height and width of it."""
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return images[:, top : top + height, left : left + width]


def split_of_arrays(
    name: str, split: str, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], fingerprint: str
) -> Split:
    """Return a `Split` of arrays in memory.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) integers in [0, K).
        classes: K names.
        name, split, fingerprint: as in `Split`.

    Raises:
        DataError: there is no image, or a label has no class.
    """
    height, width, channels = images.shape[1:]
    return Split(
        name, split, labels.astype(np.int64), classes, (height, width, channels), fingerprint, read=lambda: images
    )


def fingerprint_of(files: Iterable[Path], root: Path, *facts: object) -> str:
    """Return a digest of the names, sizes and times of `files` under `root`, and of `facts` that decide the pixels."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in sorted(files):
        stat = path.stat()
        digest.update(f"\n{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def require_folder(data_root: Path | None, name: str, holds: str) -> Path:
    """Return `data_root`, the folder that the user named for the set `name`; `holds` tells what belongs in it.

    Raises:
        DataError: no folder was named, or it does not exist.
    """
    if data_root is None:
        raise DataError(f"{name} needs --data-root: the folder that holds {holds}")
    if not data_root.is_dir():
        raise DataError(f"--data-root {data_root} is not a folder; for {name} it must hold {holds}")
    return data_root
