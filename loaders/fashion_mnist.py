"""Fashion-MNIST (Xiao et al., 2017): four IDX files, gzipped or not.

An IDX file is a big-endian magic number (0x803 for three dimensions of bytes, 0x801 for one), a 32-bit length for each
dimension, then the bytes.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from retemper.errors import DataError
from retemper.loaders.split import Split, fingerprint_of, require_folder

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
SUBFOLDERS = (".", "fashion-mnist", "FashionMNIST/raw")
STEMS = {"train": "train", "test": "t10k"}
SIDE_PX = 28


def load_fashion_mnist(split: str, data_root: Path | None) -> Split:
    """Read one half of Fashion-MNIST; see `load_split`."""
    images, labels = _find(split, data_root)
    label_N = _read_idx(labels, 0x801).astype(np.int64)

    def read() -> np.ndarray:
        return _read_idx(images, 0x803)[..., None]

    mark = fingerprint_of([images, labels], images.parent, "fashion-mnist", split)
    return Split("fashion-mnist", split, label_N, CLASSES, (SIDE_PX, SIDE_PX, 1), mark, read)


def _find(split: str, data_root: Path | None) -> tuple[Path, Path]:
    """Return the files of images and labels."""
    folders = [DEBIAN]
    if data_root is not None:
        root = require_folder(data_root, "fashion-mnist", "the four files of the set")
        folders = [root / sub for sub in SUBFOLDERS] + folders
    wanted = [f"{STEMS[split]}-images-idx3-ubyte", f"{STEMS[split]}-labels-idx1-ubyte"]
    for folder in folders:
        found = [next((p for p in (folder / f"{w}.gz", folder / w) if p.is_file()), None) for w in wanted]
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    raise DataError(
        f"{wanted[0]}.gz and {wanted[1]}.gz of fashion-mnist are not in {', '.join(map(str, folders))}: "
        "run `apt-get install dataset-fashion-mnist`, or give the folder that holds them as --data-root"
    )


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Return the array in an IDX file, uint8 and writable."""
    again = f"delete {path} and fetch it again"
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): {again}") from error
    dimensions = magic & 0xFF
    head = np.frombuffer(raw, ">u4", count=min(1 + dimensions, len(raw) // 4))
    if len(head) != 1 + dimensions or head[0] != magic:
        raise DataError(f"{path} is not an IDX file with magic number {magic:#x}: {again}")
    shape = tuple(int(n) for n in head[1:])
    if dimensions == 3 and shape[1:] != (SIDE_PX, SIDE_PX):
        raise DataError(f"{path} holds images of {shape[1:]}, not {SIDE_PX} x {SIDE_PX}: {again}")
    body = len(raw) - 4 * len(head)
    if body != math.prod(shape):
        raise DataError(f"{path} ends after {body:,} of {math.prod(shape):,} values: {again}")
    return np.frombuffer(raw, np.uint8, offset=4 * len(head)).reshape(shape).copy()
