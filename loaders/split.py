"""One half of a data set: the value that every reader returns and every backend takes."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from retemper.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """The training or the test half of a data set. Labels are read at once, pixels when `images` is first asked for.

    name, split: as in `load_split("cifar10", "train")`.
    labels: (N,) int64, each in [0, K).
    classes: K names.
    shape: (H, W, C) of every image.
    fingerprint: hexadecimal digits that change when a file of the split does; they name the converted file.
    read: returns the images, (N, H, W, C) uint8; called once.

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
        """Return the pixels, (N, H, W, C) uint8, C-contiguous; read from the disk once.

        Raises:
            DataError: a file is damaged, or not of this shape.
        """
        try:
            images = np.require(self.read(), np.uint8, ["C", "W"])
        except OSError as error:
            raise DataError(f"cannot read {error.filename or self.name}: {error.strerror or error}") from error
        if images.shape != (len(self), *self.shape):
            raise DataError(
                f"{self.name}: the {self.split} half has {len(self)} labels of {self.shape} images, "
                f"but its pixels are {images.shape}"
            )
        return images


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
