"""FFCV's files: written whole or not at all, and read only if their digest is right.

FFCV's format has no checksum and its writer is not atomic, so beside FILE.beton stands FILE.beton.json with the size
and the SHA-256. Both are written under other names. Then the old .json is removed, the .beton replaced, and the new
.json put in place last. Whatever moment the power fails at, a .beton with a .json that fits is whole; any other pair is
refused and can be written again.
"""

import math
import re
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

    def matches(self, split: Split) -> bool:
        """Say whether the file holds as many images of the same shape and classes as `split`, under its name."""
        mine = (self.dataset, self.split, self.images, self.shape, self.classes)
        return mine == (split.name, split.split, len(split), split.shape, split.classes)


def convert(split: Split, out: str | Path, *, progress: bool = True) -> None:
    """Write `split` as an FFCV file with its digest beside it. At any moment the pair is the old, the new, or refused.

    Args:
        out: ends in .beton; an older file of that name is replaced, a missing folder made.
        progress: whether to show it on stderr.

    Raises:
        UsageError: another name, or FFCV is not installed.
        DataError: the split cannot be read, or the file not written (a full disk, say).
    """
    out = Path(out)
    if out.suffix != ".beton" or out.is_dir():
        raise UsageError(f"{out}: a converted data set must be a file named something.beton")
    ffcv_module("writer")
    _sweep_dead(out.parent)
    with _one_at_a_time(out):
        _write(split, out, progress)


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
        fields = read_json(sidecar_path(path), Sidecar)
        fields |= {"shape": tuple(fields["shape"]), "classes": tuple(fields["classes"])}
        sidecar = Sidecar(**fields)
    except (DataError, TypeError) as error:
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
    metadata, size = ffcv_module("reader").Reader(str(path)).metadata, math.prod(found.shape)

    def read() -> np.ndarray:
        raw, images = np.memmap(path, np.uint8, mode="r"), np.empty((found.images, size), np.uint8)
        for image, start in zip(images, metadata["f0"].tolist(), strict=True):
            image[:] = raw[start : start + size]
        return images.reshape(found.images, *found.shape)

    label_N = metadata["f1"].astype(np.int64)
    return Split(found.dataset, found.split, label_N, found.classes, found.shape, found.fingerprint, read)


def sidecar_path(path: Path) -> Path:
    """Return FILE.beton.json of FILE.beton."""
    return path.with_name(path.name + ".json")


def _convert_command(path: Path, sidecar: Sidecar | None = None) -> str:
    """Return the command that writes `path` again; `sidecar` is what is known of it."""
    half = None if sidecar is None or sidecar.split == "train" else sidecar.split
    root = None if sidecar is not None and sidecar.dataset == "digits" else "DIR"
    name = "DATASET" if sidecar is None else sidecar.dataset
    return command("retemper", "convert", name, data_root=root, split=half, out=path)


def _write(split: Split, out: Path, progress: bool) -> None:
    """Write both files; the lock is held."""
    split.images  # noqa: B018  # a damaged data set is found before anything is written
    sidecar = sidecar_path(out)
    with _complaining(out):
        sweep(out)
        sweep(sidecar)
        with atomic_write(sidecar) as facts, atomic_write(out) as data:  # renamed in the opposite order
            _write_samples(split, Path(data.name), progress)
            sync(data)
            described = Sidecar(
                FORMAT, split.name, split.split, len(split), split.shape, split.classes, split.fingerprint,
                bytes=Path(data.name).stat().st_size, sha256=file_digest(data.name),
            )  # fmt: skip
            facts.write(json_bytes(asdict(described)))
            sync(facts)
            sidecar.unlink(missing_ok=True)  # only now that both new ones are on the disk
            sync_folder(out.parent)


def _write_samples(split: Split, path: Path, progress: bool) -> None:
    """Write the samples as FFCV's writer does, in this process: its workers wait for ever when one of them fails."""
    fields, writer_module = ffcv_module("fields"), ffcv_module("writer")
    page = max(MIN_PAGE, 1 << (math.prod(split.shape) * IMAGES_PER_PAGE - 1).bit_length())
    kinds = {
        "image": fields.NDArrayField(np.dtype(np.uint8), split.shape),
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
            sample = (split.images[i], int(split.labels[i]), i)
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
