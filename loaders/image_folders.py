"""Data sets of image files: Tiny-ImageNet (Le and Yang, 2015), and any folder of class folders.

Pillow decodes the pixels to RGB when they are first asked for. No image is left out without a word: what is hidden or
has no image's name is not one, links are followed, and a file whose pixels cannot be told is refused.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retemper.commands import command
from retemper.console import progress, say
from retemper.errors import DataError, UsageError
from retemper.loaders.split import Split, fingerprint_of, require_folder

if TYPE_CHECKING:
    from PIL.Image import Image  # imported where it is needed: other sets and the benchmarks do without Pillow

SUFFIXES = {
    *(
        ".bmp",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".jp2",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
    ),
    ".webp",
}
LITTER = {"__pycache__", "__MACOSX", "@eaDir", "lost+found"}  # and whatever begins with a dot
ORIENTATION, LYING = 0x112, (5, 6, 7, 8)  # the EXIF tag, and its values for a picture that lies on its side
PIXELS = 2  # how pixels are made of files: a change makes other converted files and teachers' answers
TINY_SHAPE = (64, 64, 3)


def load_tiny_imagenet(split: str, data_root: Path | None) -> Split:
    """Read one half of Tiny-ImageNet; see `load_split`. Classes are sorted by their ids; `val` is the test half."""
    name = "tiny-imagenet"
    root = require_folder(data_root, name, "tiny-imagenet-200")
    root = next((r for r in (root / "tiny-imagenet-200", root) if (r / "wnids.txt").is_file()), root)
    if not (root / "wnids.txt").is_file():
        archive = root / "tiny-imagenet-200.zip"
        if archive.is_file():
            raise DataError(f"{archive} is still packed: run `{command('unzip', '-q', archive, '-d', root)}`")
        raise DataError(
            f"no {name} in {root}: download tiny-imagenet-200.zip from the set's home page and run "
            f"`{command('unzip', '-q', 'tiny-imagenet-200.zip', '-d', root)}`, which makes {root / 'tiny-imagenet-200'}"
        )
    wnids = sorted((root / "wnids.txt").read_text("utf-8", errors="replace").split())
    files, labels = (_tiny_train if split == "train" else _tiny_val)(root, wnids)
    mark = fingerprint_of([*files, root / "wnids.txt"], root, name, split)
    read = partial(_decode_all, files, TINY_SHAPE, None, f"decoding {name} {split}")
    return Split(name, split, labels, _tiny_class_names(root, wnids), TINY_SHAPE, mark, read)


def load_folder(split: str, data_root: Path | None, image_size: int | None, max_side: int | None = None) -> Split:
    """Read one half of a folder of images; see `load_split`. Classes are the folders in train/, sorted by name."""
    if max_side is not None and max_side < (image_size or 0):
        raise UsageError(f"--max-side {max_side}: views of --image-size {image_size} are cut from it: at least that")
    name = "folder"
    root = require_folder(data_root, name, "train/CLASS/... and test/CLASS/... (or val/CLASS/...)")
    half = root / "train"
    folders = _subfolders(half)
    classes = tuple(folder.name for folder in folders)
    if split == "test":
        half = next((root / half for half in ("test", "val") if (root / half).is_dir()), root / "test")
        folders = _subfolders(half)
        if half.resolve() == (root / "train").resolve():
            say(f"warning: {half} is the folder of the training images: no image there is new to the network")
        if tuple(folder.name for folder in folders) != classes:
            odd = sorted({folder.name for folder in folders} ^ set(classes))
            raise DataError(f"{half} and {root / 'train'} hold different classes: {', '.join(odd[:5])} in one only")
    files, labels, others = _files_of(folders)
    _say_left_out(half, others)
    side = image_size or max_side  # that is seen
    stored = max_side if max_side and split == "train" else side  # of a test image the middle alone
    shape = (side, side, 3) if side else (*_size(files[0]), 3)
    kept = (stored, stored, 3) if stored else shape
    fit = (max_side or side, stored) if side and stored else None
    facts = [split, stored, PIXELS, *([max_side] if max_side not in (None, stored) else [])]
    mark = fingerprint_of(files, root, name, *facts)
    read, some = partial(_decode_all, files, kept, fit, f"decoding {split}"), partial(_decode, files, kept, fit)
    return Split(name, split, labels, classes, shape, mark, read, some, stored if kept != shape else None)


def _tiny_train(root: Path, wnids: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    return _files_of([root / "train" / wnid for wnid in wnids])[:2]


def _tiny_val(root: Path, wnids: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    """Return the test images in the order of their names, whether in one folder or sorted into class folders."""
    if not (root / "val" / "images").is_dir() and any((root / "val" / wnid).is_dir() for wnid in wnids):
        files, labels, _ = _files_of([root / "val" / wnid for wnid in wnids])
        order = sorted(range(len(files)), key=lambda i: files[i].name)
        return [files[i] for i in order], labels[order]
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
    """Return the class folders in `folder`, sorted by name; links to folders are folders.

    Raises:
        DataError: there is none, or a link that leads nowhere.
    """
    found = sorted(path for path in folder.iterdir() if not _is_hidden(path.name)) if folder.is_dir() else []
    for path in found:
        _require_target(path)
    if not (classes := [path for path in found if path.is_dir()]):
        raise DataError(f"{folder} holds no class folders: make one folder of images for each class in it")
    first: dict[Path, Path] = {}
    for path in classes:
        if (same := first.setdefault(path.resolve(), path)) is not path:
            raise DataError(f"{path} and {same} are one folder, which cannot be two classes: remove the link")
    return classes


def _is_hidden(name: str) -> bool:
    """Say whether a file or folder is the system's or an editor's: .ipynb_checkpoints, .DS_Store, ._1.jpg."""
    return name.startswith(".") or name in LITTER


def _require_target(path: Path) -> None:
    """Raise DataError if `path` is a link that leads nowhere: without a word, its images would be missing."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link that leads nowhere: mend or remove it")


def _files_of(folders: Sequence[Path]) -> tuple[list[Path], np.ndarray, Counter[str]]:
    """Return the images of each class folder and of the folders in it.

    Returns:
        The images, by class and sorted by path; (N,) int64 labels; how many other files there are, by their suffix.
    """
    files: list[Path] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for k, folder in enumerate(folders):
        found: list[Path] = []
        for path in _walked(folder):
            if path.suffix.lower() in SUFFIXES:
                found.append(path)
            else:
                others[path.suffix or path.name] += 1
        if not found:
            raise DataError(f"{folder} holds no images ({' '.join(sorted(SUFFIXES))})")
        files += sorted(found)
        labels += [k] * len(found)
    return files, np.array(labels, dtype=np.int64), others


def _walked(folder: Path) -> Iterator[Path]:
    """Yield every file below `folder`, through links too.

    Raises:
        DataError: a link leads nowhere, or to a folder that was walked already: in a circle, say.
        OSError: a folder cannot be read.
    """
    walked: set[Path] = set()

    def fail(error: OSError) -> None:
        raise error

    for place, inner, names in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(place)
        if (real := here.resolve()) in walked:
            raise DataError(f"{here} leads to {real}, which {folder} holds already: remove the link")
        walked.add(real)
        inner[:] = sorted(name for name in inner if not _is_hidden(name))
        for path in (here / name for name in names if not _is_hidden(name)):
            _require_target(path)
            yield path


def _say_left_out(half: Path, others: Counter[str]) -> None:
    """Say which files of `half`, a half of a data set, are not among its images; `others` lie in class folders."""
    outside = [path.name for path in half.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    if outside := [name for name in outside if not _is_hidden(name)]:
        say(f"note: {len(outside)} images in {half} itself, in no class folder, are left out: {outside[0]}")
    if others:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in others.most_common(4))
        say(f"note: files in {half} that are no images by their names are left out: {kinds}")


def _size(path: Path) -> tuple[int, int]:
    """Return (height, width) as the image is to be seen, read from the head of the file."""
    with _opened(path) as image:
        lies = image.getexif().get(ORIENTATION, 1) in LYING
        return (image.width, image.height) if lies else (image.height, image.width)


def _opened(path: Path) -> "Image":
    from PIL import Image

    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not an image that can be read ({error}): replace or remove it") from error


Fit = tuple[int, int] | None  # what the shorter side is resized to, and the side of the middle that is taken


def _decode_all(files: Sequence[Path], shape: tuple[int, int, int], fit: Fit, label: str) -> np.ndarray:
    """Return (N, H, W, 3) uint8, and show the progress."""
    images = np.empty((len(files), *shape), dtype=np.uint8)
    for i in progress(range(len(files)), len(files), label):
        images[i] = _decode(files, shape, fit, [i])[0]
    return images


def _decode(files: Sequence[Path], shape: tuple[int, int, int], fit: Fit, index: Iterable[int]) -> np.ndarray:
    """Return the images at some positions, (B, H, W, 3) uint8, resized and cropped if `fit` is given."""
    images = []
    for path in (files[i] for i in index):
        with _opened(path) as image:
            try:
                rgb = _as_rgb(image, path)
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise on damaged files
                raise DataError(f"{path} is damaged ({error}): replace or remove it") from error
        rgb = _fit(rgb, *fit) if fit else rgb
        if (rgb.height, rgb.width) != shape[:2]:
            raise DataError(
                f"{path} is {rgb.width} x {rgb.height}, others are {shape[1]} x {shape[0]}: pass --image-size to make "
                "all of one size"
            )
        images.append(np.asarray(rgb))
    return np.array(images, dtype=np.uint8).reshape(-1, *shape)


def _as_rgb(image: "Image", path: Path) -> "Image":
    """Return the picture upright, in RGB of 8 bits: 16 bits scaled down, what is transparent laid on white.

    Raises:
        DataError: its pixels have no known range, or it holds several pictures.
        OSError, SyntaxError, ValueError: it is damaged.
    """
    from PIL import Image, ImageOps

    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a camera's JPEG with its previews behind it
        raise DataError(f"{path} holds {frames} pictures: save the one that is meant as a file of its own")
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("F", "I", "LAB") and not wide:
        raise DataError(
            f"{path} has pixels of mode {image.mode}, whose range is not known: save it as 8-bit RGB or grey"
        )
    image = ImageOps.exif_transpose(image)
    if wide:
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")  # 65535 becomes 255
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def _fit(image: "Image", scaled_px: int, side_px: int) -> "Image":
    """Scale the shorter side to `scaled_px`, bilinear over the area that a pixel covers, and take the middle."""
    from PIL.Image import Resampling

    scale = scaled_px / min(image.size)
    width, height = (max(scaled_px, round(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Resampling.BILINEAR)
    left, top = (width - side_px) // 2, (height - side_px) // 2
    return image.crop((left, top, left + side_px, top + side_px))
