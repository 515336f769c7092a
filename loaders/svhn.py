"""SVHN (Netzer et al., 2011): digits of house numbers, 32 x 32, in MATLAB's files or in class folders of images.

train_32x32.mat and test_32x32.mat hold X, (32, 32, 3, N) bytes, and y, (N, 1), in which 10 stands for the digit 0. The
classes differ in size: 13,861 training images show a 1, 4,659 a 9. extra_32x32.mat is not read.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from retemper.errors import DataError
from retemper.loaders.image_folders import load_folder
from retemper.loaders.split import Split, fingerprint_of, require_folder

NAME = "svhn"
CLASSES = tuple("0123456789")
SHAPE = (32, 32, 3)
FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
SUBFOLDERS = (".", "svhn", "SVHN")


def load_svhn(split: str, data_root: Path | None) -> Split:
    """Read one half of SVHN; see `load_split`. The images of class folders are brought to 32 x 32."""
    root = require_folder(data_root, NAME, f"{FILES['train']} and {FILES['test']}")
    places = [root / sub for sub in SUBFOLDERS]
    for place in places:
        if (path := place / FILES[split]).is_file():
            return _of_matlab(path, split)
    for place in places:
        if (place / "train" / CLASSES[0]).is_dir():
            return _of_folders(place, split)
    others = " or ".join(SUBFOLDERS[1:])
    raise DataError(
        f"no {FILES[split]} in {root}, nor in {others} there: download it from the set's home page (format 2, cropped "
        f"digits) into {root}; class folders are found as {root / 'train' / '0'} to 9, and test"
    )


def _of_matlab(path: Path, split: str) -> Split:
    """Return the half in a MATLAB file: its labels are read now, its pixels when they are asked for."""
    kinds = {name: (shape, kind) for name, shape, kind in _matlab(path, "whosmat")}
    (*image, number), kind = kinds.get("X", ((0,), ""))
    if (*image, kind) != (*SHAPE, "uint8"):
        raise DataError(f"{path} has no (32, 32, 3, N) bytes under 'X': {_again(path)}")
    label_N = np.ravel(_matlab(path, "loadmat", variable_names=["y"]).get("y", ()))
    if len(label_N) != number or label_N.dtype.kind not in "uif" or not np.isin(label_N, range(11)).all():
        raise DataError(f"{path} has no {number:,} labels from 1 to 10 under 'y': {_again(path)}")
    if {0, 10} <= set(label_N.tolist()):  # either is the digit 0
        raise DataError(f"{path} has labels 0 and 10 under 'y', which are one class here: {_again(path)}")

    def read() -> np.ndarray:
        return _matlab(path, "loadmat", variable_names=["X"])["X"].transpose(3, 0, 1, 2)

    mark = fingerprint_of([path], path.parent, NAME, split)
    return Split(NAME, split, label_N.astype(np.int64) % 10, CLASSES, SHAPE, mark, read)


def _matlab(path: Path, function: str, **options: Sequence[str]) -> Any:
    """Return what scipy's `whosmat` or `loadmat` makes of a file; neither runs anything that is in it."""
    import scipy.io  # here: other sets do without it

    try:
        return getattr(scipy.io, function)(path, **options)
    except PermissionError:
        raise
    except Exception as error:  # of any kind, on a damaged file
        raise DataError(f"{path} is damaged, or no MATLAB file of version 5 ({error}): {_again(path)}") from error


def _again(path: Path) -> str:
    return f"delete it and fetch {path.name} again"


def _of_folders(root: Path, split: str) -> Split:
    """Return the half in class folders, `root`/train/0 to 9 and `root`/test/0 to 9."""
    found = load_folder(split, root, SHAPE[0])
    if found.classes != CLASSES:
        raise DataError(f"{root / 'train'} must hold the class folders 0 to 9: of others it is --dataset folder")
    return replace(found, name=NAME)
