"""FFCV's files: written whole or not at all, and read only if their digest is right.

FFCV's format has no checksum and its writer is not atomic, so beside FILE.beton stands FILE.beton.json with the size
and the SHA-256. Both are written under other names. Then the old .json is removed, the .beton replaced, and the new
.json put in place last. Whatever moment the power fails at, a .beton with a .json that fits is whole; any other pair is
refused and can be written again.
"""

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from retemper.commands import command
from retemper.console import progress as shown
from retemper.errors import DataError, UsageError
from retemper.files import atomic_write, file_digest, json_bytes, locked, read_json, sweep, sync, sync_folder
from retemper.loaders.ffcv_library import ffcv_module
from retemper.loaders.split import Split

FORMAT = 1  # of the .json and of the fields in the .beton
LEFT = re.compile(r"\.(.+\.beton)(\.json)?\.[0-9a-f]+\.tmp")  # the temporary names of `atomic_write`
MIN_PAGE = 1 << 21  # bytes; the smallest that FFCV takes
IMAGES_PER_PAGE = 16  # at least: FFCV leaves the rest of a page empty


@dataclass(frozen=True)
class Sidecar:
    """The content of FILE.beton.json, which describes FILE.beton."""

    format: int
    dataset: str
    split: str
    images: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    fingerprint: str
    bytes: int
    sha256: str
    jpeg_quality: int | None = None  # files of earlier versions do not say it

    def matches(self, split: Split) -> bool:
        """Say whether the file holds as many images of the same shape and classes as `split`, under its name."""
        mine = (self.dataset, self.split, self.images, self.shape, self.classes)
        return mine == (split.name, split.split, len(split), split.stored, split.classes)


def convert(split: Split, out: str | Path, *, progress: bool = True, jpeg_quality: int | None = None) -> None:
    """Write `split` as an FFCV file with its digest beside it. At any moment the pair is the old, the new, or refused.

    Of large images, some at a time are read, encoded and written.

    Args:
        out: ends in .beton; an older file of that name is replaced, a missing folder made.
        progress: whether to show it on stderr.
        jpeg_quality: 1 ... 100 to store JPEG copies, about a tenth as large; None to store the pixels.

    Raises:
        UsageError: another name, FFCV is not installed, or JPEG copies are asked for of images without colours.
        DataError: the split cannot be read, or the file not written (a full disk, say).
    """
    out = Path(out)
    if out.suffix != ".beton" or out.is_dir():
        raise UsageError(f"{out}: a converted data set must be a file named something.beton")
    if jpeg_quality is not None and split.shape[2] != 3:
        raise UsageError(f"--jpeg-quality {jpeg_quality}: FFCV has JPEG copies of colour images, {split.name} is grey")
    ffcv_module("writer")
    _sweep_dead(out.parent)
    with _one_at_a_time(out):
        _write(split, out, progress, jpeg_quality)


def cached(split: Split, folder: str | Path) -> Path:
    """Return the converted file of `split` in `folder`; write it first if it is missing, damaged or out of date.

    Raises:
        UsageError, DataError: as `convert`.
    """
    out = Path(folder) / f"{split.name}-{split.split}-{split.fingerprint[:16]}.beton"
    _sweep_dead(out.parent)
    with _one_at_a_time(out):
        try:
            found = verify(out)
        except DataError:
            found = None
        if found is None or not found.matches(split) or found.fingerprint != split.fingerprint:
            _write(split, out, progress=True)
    return out


def verify(path: str | Path) -> Sidecar:
    """Check a .beton byte for byte against the .json beside it, and return what that says.

    Raises:
        DataError: one of the two is missing, damaged or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not there: run `{_convert_command(path)}`")
    again = f"delete it and run `{_convert_command(path)}`"
    if not sidecar_path(path).is_file():
        raise DataError(f"{path} has no digest beside it, so it may be half written: {again}")
    try:
        fields = read_json(sidecar_path(path), Sidecar, partial=True)
        fields |= {"shape": tuple(fields["shape"]), "classes": tuple(fields["classes"])}
        sidecar = Sidecar(**fields)
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{sidecar_path(path)} is damaged, so {path} cannot be trusted: {again}") from error
    if sidecar.format != FORMAT:
        raise DataError(f"{path} has format {sidecar.format}, this retemper reads {FORMAT}: {again}")
    again = f"delete it and run `{_convert_command(path, sidecar)}`"
    size = path.stat().st_size
    if size != sidecar.bytes:
        state = "truncated at" if size < sidecar.bytes else "too long:"
        raise DataError(f"{path} is damaged ({state} {size:,} of {sidecar.bytes:,} bytes): {again}")
    if file_digest(path) != sidecar.sha256:
        raise DataError(f"{path} is damaged (its digest differs): {again}")
    return sidecar


def beton_split(path: str | Path) -> Split:
    """Return the split that a .beton holds, of that file alone: without the data set that it was converted from.

    Raises:
        DataError: the file, or the .json beside it, is missing or damaged.
        UsageError: FFCV is not installed.
    """
    found = verify(path)
    reader = ffcv_module("reader").Reader(str(path))
    place = reader.metadata["f0"] if found.jpeg_quality is None else reader.metadata["f0"]["data_ptr"]
    size_of = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))

    def read_some(index: np.ndarray) -> np.ndarray:
        raw, images = np.memmap(path, np.uint8, mode="r"), np.empty((len(index), *found.shape), np.uint8)
        for image, start in zip(images, place[index].tolist(), strict=True):
            stored = raw[start : start + size_of[start]]
            if found.jpeg_quality is None:
                image[:] = stored[: image.size].reshape(found.shape)
            else:
                height, width, _ = found.shape
                ffcv_module("libffcv").imdecode(stored, image, height, width, height, width, 0, 0, 1, 1, False, False)
        return images

    label_N, read = reader.metadata["f1"].astype(np.int64), lambda: read_some(np.arange(found.images))
    return Split(found.dataset, found.split, label_N, found.classes, found.shape, found.fingerprint, read, read_some)


def sidecar_path(path: Path) -> Path:
    """Return FILE.beton.json of FILE.beton."""
    return path.with_name(path.name + ".json")


def _convert_command(path: Path, sidecar: Sidecar | None = None) -> str:
    """Return the command that writes `path` again; `sidecar` is what is known of it."""
    half = None if sidecar is None or sidecar.split == "train" else sidecar.split
    root = None if sidecar is not None and sidecar.dataset == "digits" else "DIR"
    name = "DATASET" if sidecar is None else sidecar.dataset
    quality = None if sidecar is None else sidecar.jpeg_quality
    return command("retemper", "convert", name, data_root=root, split=half, out=path, jpeg_quality=quality)


def _write(split: Split, out: Path, progress: bool, jpeg_quality: int | None = None) -> None:
    """Write both files; the lock is held."""
    split.take(np.arange(1))  # a damaged data set is found before anything is written, if it is read as a whole
    sidecar = sidecar_path(out)
    _require_room(split, out, jpeg_quality)
    with _complaining(out):
        sweep(out)
        sweep(sidecar)
        with atomic_write(sidecar) as facts, atomic_write(out) as data:  # renamed in the opposite order
            _write_samples(split, Path(data.name), progress, jpeg_quality)
            sync(data)
            described = Sidecar(
                FORMAT, split.name, split.split, len(split), split.stored, split.classes, split.fingerprint,
                bytes=Path(data.name).stat().st_size, sha256=file_digest(data.name), jpeg_quality=jpeg_quality,
            )  # fmt: skip
            facts.write(json_bytes(asdict(described)))
            sync(facts)
            sidecar.unlink(missing_ok=True)  # only now that both new ones are on the disk
            sync_folder(out.parent)


def _require_room(split: Split, out: Path, jpeg_quality: int | None) -> None:
    """Raise DataError if the disk has no room for the pixels as they are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if jpeg_quality is None and split.bytes > free:
        raise DataError(
            f"cannot write {out}: the pixels take {split.bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room, "
            "or convert with --jpeg-quality 90"
        )


def _write_samples(split: Split, path: Path, progress: bool, jpeg_quality: int | None) -> None:
    """Write the samples as FFCV's writer does, in this process: its workers wait for ever when one of them fails."""
    fields, writer_module = ffcv_module("fields"), ffcv_module("writer")
    page = max(MIN_PAGE, 1 << (math.prod(split.stored) * IMAGES_PER_PAGE - 1).bit_length())
    pixels = fields.NDArrayField(np.dtype(np.uint8), split.stored)
    kinds = {
        "image": pixels if jpeg_quality is None else fields.RGBImageField("jpg", jpeg_quality=jpeg_quality),
        "label": fields.IntField(),
        "index": fields.IntField(),
    }
    writer = writer_module.DatasetWriter(str(path), kinds, page_size=page, num_workers=1)
    writer.num_samples = len(split)
    writer.prepare()
    writer.metadata_sm.close()  # memory shared with FFCV's workers; here it is plain memory
    writer.metadata_sm.unlink()
    rows = np.zeros(len(split), dtype=writer.metadata_type)
    writer.metadata_sm = SimpleNamespace(buf=rows.view(np.uint8))
    allocator = ffcv_module("memory_allocator").MemoryAllocator(str(path), writer.data_region_start, page)
    with allocator:
        for i in shown(range(len(split)), len(split), f"converting {split.name} {split.split}", show=progress):
            sample = (split.take(np.array([i]))[0], int(split.labels[i]), i)
            writer_module.handle_sample(sample, i, rows.dtype.names, rows, allocator, kinds)
    writer.finalize(allocator.allocations)


def _sweep_dead(folder: Path) -> None:
    """Remove what killed conversions, of whatever name, have left in `folder`. Those of live processes hold a lock."""
    found = (LEFT.fullmatch(path.name) for path in folder.glob(".*.beton.*tmp"))
    for name in {match[1] for match in found if match}:
        with suppress(UsageError, OSError), locked(folder / f".{name}.lock", busy="it is being written"):
            sweep(folder / name)
            sweep(sidecar_path(folder / name))


@contextmanager
def _one_at_a_time(out: Path) -> Iterator[None]:
    """Wait until no other process converts to `out`, and hold its lock."""
    with ExitStack() as held:
        with _complaining(out):
            held.enter_context(locked(out.with_name(f".{out.name}.lock")))
        yield


@contextmanager
def _complaining(out: Path) -> Iterator[None]:
    """Turn an error of the file system into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error
