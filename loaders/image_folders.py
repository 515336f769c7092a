"""Data sets of image files: Tiny-ImageNet (Le and Yang, 2015), and any folder of class folders.

Pillow decodes the pixels to RGB when they are first asked for.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retemper.console import progress
from retemper.errors import DataError
from retemper.loaders.split import Split, fingerprint_of, require_folder

if TYPE_CHECKING:
    from PIL.Image import Image  # imported where it is needed: other sets and the benchmarks do without Pillow

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TINY_SHAPE = (64, 64, 3)


def load_tiny_imagenet(split: str, data_root: Path | None) -> Split:
    """Read one half of Tiny-ImageNet; see `load_split`. Classes are sorted by their ids; `val` is the test half."""
    name = "tiny-imagenet"
    root = require_folder(data_root, name, "tiny-imagenet-200")
    root = next((r for r in (root / "tiny-imagenet-200", root) if (r / "wnids.txt").is_file()), root)
    if not (root / "wnids.txt").is_file():
        archive = root / "tiny-imagenet-200.zip"
        if archive.is_file():
            raise DataError(f"{archive} is still packed: run `unzip -q {archive} -d {root}`")
        raise DataError(
            f"no {name} in {root}: download tiny-imagenet-200.zip from the set's home page and run "
            f"`unzip -q tiny-imagenet-200.zip -d {root}`, which makes {root / 'tiny-imagenet-200'}"
        )
    wnids = sorted((root / "wnids.txt").read_text("utf-8", errors="replace").split())
    files, labels = (_tiny_train if split == "train" else _tiny_val)(root, wnids)
    mark = fingerprint_of([*files, root / "wnids.txt"], root, name, split)
    read = partial(_decode, files, TINY_SHAPE, None, f"decoding {name} {split}")
    return Split(name, split, labels, _tiny_class_names(root, wnids), TINY_SHAPE, mark, read)


def load_folder(split: str, data_root: Path | None, image_size: int | None) -> Split:
    """Read one half of a folder of images; see `load_split`. Classes are the folders in train/, sorted by name."""
    name = "folder"
    root = require_folder(data_root, name, "train/CLASS/... and test/CLASS/... (or val/CLASS/...)")
    train = _subfolders(root / "train")
    classes = tuple(folder.name for folder in train)
    folders = train
    if split == "test":
        half = next((root / half for half in ("test", "val") if (root / half).is_dir()), root / "test")
        folders = _subfolders(half)
        if tuple(folder.name for folder in folders) != classes:
            odd = sorted({folder.name for folder in folders} ^ set(classes))
            raise DataError(f"{half} and {root / 'train'} hold different classes: {', '.join(odd[:5])} in one only")
    files, labels = _files_of(folders)
    shape = (image_size, image_size, 3) if image_size else (*_size(files[0]), 3)
    mark = fingerprint_of(files, root, name, split, image_size)
    read = partial(_decode, files, shape, image_size, f"decoding {split}")
    return Split(name, split, labels, classes, shape, mark, read)


def _tiny_train(root: Path, wnids: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    return _files_of([root / "train" / wnid / "images" for wnid in wnids])


def _tiny_val(root: Path, wnids: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    table = root / "val" / "val_annotations.txt"
    if not table.is_file():
        raise DataError(f"{table} is missing: unpack tiny-imagenet-200.zip again")
    number = {wnid: k for k, wnid in enumerate(wnids)}
    rows = sorted(line.split("\t") for line in table.read_text("utf-8", errors="replace").splitlines() if line.strip())
    for row in rows:
        if len(row) < 2 or row[1] not in number or "/" in row[0]:
            raise DataError(f"{table} has a line that names no class of wnids.txt: {' '.join(row)[:60]!r}")
    files = [root / "val" / "images" / row[0] for row in rows]
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is missing: unpack tiny-imagenet-200.zip again")
    return files, np.array([number[row[1]] for row in rows], dtype=np.int64)


def _tiny_class_names(root: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    """Return each class's first name in words.txt; its id where it has none, or shares it with another class."""
    words = root / "words.txt"
    lines = words.read_text("utf-8", errors="replace").splitlines() if words.is_file() else []
    word = {wnid: names.split(",")[0].strip() for wnid, _, names in (line.partition("\t") for line in lines)}
    named = [word.get(wnid, "") or wnid for wnid in wnids]
    return tuple(name if named.count(name) == 1 else wnid for name, wnid in zip(named, wnids, strict=True))


def _subfolders(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        raise DataError(f"{folder} holds no class folders: make one folder of images for each class in it")
    return found


def _files_of(folders: Sequence[Path]) -> tuple[list[Path], np.ndarray]:
    """Return the images of each class folder, sorted by name, and (N,) int64 labels."""
    files: list[Path] = []
    labels: list[int] = []
    for k, folder in enumerate(folders):
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        if not found:
            raise DataError(f"{folder} holds no images ({' '.join(sorted(SUFFIXES))})")
        files += found
        labels += [k] * len(found)
    return files, np.array(labels, dtype=np.int64)


def _size(path: Path) -> tuple[int, int]:
    """Return (height, width), read from the head of the file."""
    with _opened(path) as image:
        return image.height, image.width


def _opened(path: Path) -> "Image":
    from PIL import Image

    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not an image that can be read ({error}): replace or remove it") from error


def _decode(files: Sequence[Path], shape: tuple[int, int, int], side_px: int | None, label: str) -> np.ndarray:
    """Return (N, H, W, 3) uint8, resized and cropped to `side_px` if that is given."""
    images = np.empty((len(files), *shape), dtype=np.uint8)
    for i, path in enumerate(progress(files, len(files), label)):
        with _opened(path) as image:
            try:
                rgb = image.convert("RGB")
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise on damaged files
                raise DataError(f"{path} is damaged ({error}): replace or remove it") from error
        rgb = _fit(rgb, side_px) if side_px else rgb
        if (rgb.height, rgb.width) != shape[:2]:
            raise DataError(
                f"{path} is {rgb.width} x {rgb.height}, others are {shape[1]} x {shape[0]}: pass --image-size to make "
                "all of one size"
            )
        images[i] = np.asarray(rgb)
    return images


def _fit(image: "Image", side_px: int) -> "Image":
    """Scale the shorter side to `side_px`, bilinear over the area that a pixel covers, and take the middle."""
    from PIL.Image import Resampling

    scale = side_px / min(image.size)
    width, height = (max(side_px, round(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Resampling.BILINEAR)
    left, top = (width - side_px) // 2, (height - side_px) // 2
    return image.crop((left, top, left + side_px, top + side_px))
