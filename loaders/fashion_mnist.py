"""Fashion-MNIST (Xiao et al., 2017): four IDX files, gzipped or not.

An IDX file is a big-endian magic number (0x803 for three dimensions of bytes, 0x801 for one), a 32-bit length for each
dimension, then the bytes.
"""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np

from retemper.commands import command
from retemper.console import say
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
SUBFOLDERS = (
    ".",
    "raw",
    *(name + sub for name in ("fashion-mnist", "fashion_mnist", "FashionMNIST") for sub in ("", "/raw")),
)
STEMS = {"train": "train", "test": "t10k"}
PUBLISHED = {  # how many labels, and the SHA-256 of their bytes: MNIST's files have the same names and sizes
    "train": (60_000, "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7"),
    "test": (10_000, "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"),
}
SIDE_PX = 28


def load_fashion_mnist(split: str, data_root: Path | None) -> Split:
    """Read one half of Fashion-MNIST; see `load_split`."""
    images, labels = _find(split, data_root)
    label_N = _read_idx(labels, 0x801)
    size, digest = PUBLISHED[split]
    if len(label_N) == size and hashlib.sha256(label_N.tobytes()).hexdigest() != digest:
        say(f"warning: {labels} does not hold Fashion-MNIST's labels; MNIST's files have the same names")

    def read() -> np.ndarray:
        return _read_idx(images, 0x803)[..., None]

    mark = fingerprint_of([images, labels], images.parent, "fashion-mnist", split)
    return Split("fashion-mnist", split, label_N.astype(np.int64), CLASSES, (SIDE_PX, SIDE_PX, 1), mark, read)


def _find(split: str, data_root: Path | None) -> tuple[Path, Path]:
    """Return the files of images and labels: those under the root that was named, or else those of Debian's package."""
    if data_root is None:
        folders = [DEBIAN]
    else:
        root = require_folder(data_root, "fashion-mnist", "the four files of the set")
        folders = [root / sub for sub in SUBFOLDERS]
    if found := next((pair for folder in folders if (pair := _pair(folder, split))), None):
        return found
    wanted = " and ".join(path.name for path in _packed(DEBIAN, split))
    fix = "give the folder that holds them as --data-root"
    if data_root is not None and _pair(DEBIAN, split):
        fix += f", or leave it out: {DEBIAN} holds them"
    else:
        fix += f", or run `{command('apt-get', 'install', 'dataset-fashion-mnist')}` and leave it out"
    where = DEBIAN if data_root is None else f"{data_root}, nor in {', '.join(SUBFOLDERS[1:])} there"
    raise DataError(f"{wanted} of fashion-mnist are not in {where}: {fix}")


def _packed(folder: Path, split: str) -> tuple[Path, Path]:
    """Return the paths that the gzipped files of images and labels have in `folder`."""
    return folder / f"{STEMS[split]}-images-idx3-ubyte.gz", folder / f"{STEMS[split]}-labels-idx1-ubyte.gz"


def _pair(folder: Path, split: str) -> tuple[Path, Path] | None:
    """Return the files of images and labels in `folder`, gzipped or not; None where one is missing."""
    images, labels = (
        next((path for path in (packed, packed.with_suffix("")) if path.is_file()), None)
        for packed in _packed(folder, split)
    )
    return None if images is None or labels is None else (images, labels)


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
