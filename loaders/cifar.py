"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), in their binary version or in their python version.

A record of the binary version is the label (CIFAR-100: coarse label, then fine label) and 3,072 bytes: planes of red,
green and blue, 32 x 32 each. It is preferred, because the python version is pickles (see `pickles.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retemper.commands import command
from retemper.errors import DataError
from retemper.loaders.pickles import read_pickle
from retemper.loaders.split import Split, fingerprint_of, require_folder

SHAPE = (32, 32, 3)
PIXELS = 32 * 32 * 3


@dataclass(frozen=True)
class _Version:
    """The files of one version of a set."""

    folder: str
    files: dict[str, tuple[str, ...]]
    names: str  # the file that lists the classes
    archive: str
    label: str | int  # the key in a pickle, or the place of the label in a record
    label_names: str = ""

    @property
    def binary(self) -> bool:
        return isinstance(self.label, int)


VERSIONS = {
    "cifar10": (
        _Version(
            "cifar-10-batches-bin",
            {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
            "batches.meta.txt",
            "cifar-10-binary.tar.gz",
            label=0,
        ),
        _Version(
            "cifar-10-batches-py",
            {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
            "batches.meta",
            "cifar-10-python.tar.gz",
            label="labels",
            label_names="label_names",
        ),
    ),
    "cifar100": (
        _Version(
            "cifar-100-binary",
            {"train": ("train.bin",), "test": ("test.bin",)},
            "fine_label_names.txt",
            "cifar-100-binary.tar.gz",
            label=1,
        ),
        _Version(
            "cifar-100-python",
            {"train": ("train",), "test": ("test",)},
            "meta",
            "cifar-100-python.tar.gz",
            label="fine_labels",
            label_names="fine_label_names",
        ),
    ),
}


def load_cifar(name: str, split: str, data_root: Path | None) -> Split:
    """Read one half of the set `name`, cifar10 or cifar100; see `load_split`."""
    version, folder = _find(name, split, data_root)
    files = [folder / file for file in version.files[split]]
    for path in [*files, folder / version.names]:
        if not path.is_file():
            raise DataError(f"{path} is missing: unpack {version.archive} again")
    read = _read_binary if version.binary else _read_pickled
    parts = [read(path, version) for path in files]
    if len({len(labels) for _, labels in parts}) > 1:
        sizes = ", ".join(f"{path.name}: {len(labels):,}" for path, (_, labels) in zip(files, parts, strict=True))
        raise DataError(f"{folder}: the batches differ in length ({sizes}); unpack {version.archive} again")

    def images() -> np.ndarray:
        planes = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
        return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))

    labels = np.concatenate([labels for _, labels in parts])
    mark = fingerprint_of(files, folder, name, split)
    return Split(name, split, labels, _class_names(folder / version.names, version), SHAPE, mark, images)


def _find(name: str, split: str, data_root: Path | None) -> tuple[_Version, Path]:
    """Return the version that is there, and its folder: in the root or in a folder named as the set, or that itself."""
    versions = VERSIONS[name]
    root = require_folder(data_root, name, f"{versions[0].folder} or {versions[1].folder}")
    places = [root, *(root / other for other in _other_names(name))]
    for version in versions:
        for folder in (folder for place in places for folder in (place / version.folder, place)):
            if any((folder / file).is_file() for file in version.files[split]):
                return version, folder
    for archive in (place / version.archive for version in versions for place in places):
        if archive.is_file():
            raise DataError(f"{archive} is still packed: run `{command('tar', '-xzf', archive, '-C', archive.parent)}`")
    if (root / "train").is_dir():
        raise DataError(
            f"no {name} in {root}, but {root / 'train'}: of folders with an image a file it is --dataset folder"
        )
    raise DataError(
        f"no {name} in {root}: download {versions[0].archive} (the binary version) from the set's home page and run "
        f"`{command('tar', '-xzf', versions[0].archive, '-C', root)}`, which makes {root / versions[0].folder}"
    )


def _other_names(name: str) -> list[str]:
    """Return what people call the set's folder: cifar10, cifar-10, CIFAR10, CIFAR-10, cifar_10."""
    number = name.removeprefix("cifar")
    return [name, f"cifar-{number}", name.upper(), f"CIFAR-{number}", f"cifar_{number}"]


def _read_binary(path: Path, version: _Version) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, 3072) uint8 pixels, plane by plane, and (N,) int64 labels. The pixels are mapped, not read."""
    assert isinstance(version.label, int)
    record, size = version.label + 1 + PIXELS, path.stat().st_size
    if size == 0 or size % record:
        raise DataError(
            f"{path} is damaged: {size:,} bytes are not whole records of {record:,}; unpack {version.archive} again"
        )
    records = np.memmap(path, np.uint8, mode="r").reshape(-1, record)
    return records[:, version.label + 1 :], records[:, version.label].astype(np.int64)


def _read_pickled(path: Path, version: _Version) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, 3072) uint8 pixels, plane by plane, and (N,) int64 labels, as `_read_binary` does."""
    batch = _text_keys(read_pickle(path))
    assert isinstance(version.label, str)
    pixels, labels = batch.get("data"), batch.get(version.label)
    if isinstance(labels, np.ndarray) and labels.ndim == 1:
        labels = labels.tolist()
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2):
        raise DataError(f"{path} has no (N, {PIXELS}) bytes under 'data': unpack {version.archive} again")
    if not isinstance(labels, list) or not all(isinstance(label, int | np.integer) for label in labels):
        raise DataError(f"{path} has no list of numbers under '{version.label}': unpack {version.archive} again")
    if pixels.shape != (len(labels), PIXELS):
        raise DataError(f"{path} has {pixels.shape} pixels for {len(labels):,} labels: unpack {version.archive} again")
    return pixels, np.array(labels, dtype=np.int64)


def _class_names(path: Path, version: _Version) -> tuple[str, ...]:
    if version.binary:
        return tuple(line.strip() for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip())
    names = _text_keys(read_pickle(path)).get(version.label_names)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise DataError(f"{path} has no list of names under '{version.label_names}': unpack {version.archive} again")
    return tuple(map(_text, names))


def _text_keys(batch: dict[bytes | str, Any]) -> dict[str, Any]:
    """Return a pickled dictionary with text for keys: Python 2 wrote byte strings, Python 3 writes text."""
    return {_text(key): value for key, value in batch.items()}


def _text(name: bytes | str) -> str:
    return name.decode("utf-8", errors="replace") if isinstance(name, bytes) else str(name)
