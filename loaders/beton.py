"""FFCV's files: written whole or not at all, and read only if their digest is right.

FFCV's format has no checksum and its writer is not atomic, so beside FILE.beton stands FILE.beton.json with size and
SHA-256. Both are written under other names and then renamed, the old .json gone first and the new one last: whatever
moment the power fails at, a .beton with a .json that fits is whole, and any other pair is refused and can be rewritten.
"""

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace

import numpy as np

from retemper.console import progress as shown
from retemper.errors import DataError, UsageError
from retemper.loaders.ffcv_library import ffcv_module
from retemper.loaders.split import Split

FORMAT = 1  # of the .json and of the fields in the .beton
MIN_PAGE = 1 << 21  # bytes; the smallest that FFCV takes
IMAGES_PER_PAGE = 16  # at least: FFCV leaves the rest of a page empty
CHUNK = 1 << 23  # bytes read at a time
SHOW_HASHING_FROM = 1 << 30  # bytes: below, hashing takes less than a second or two
STALE_S = 3600.0  # a partial file untouched for so long belongs to nobody


@dataclass(frozen=True)
class Sidecar:
    """What FILE.beton.json says of FILE.beton."""

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
        """Whether the file holds the images of `split`, as far as its description goes."""
        mine = (self.dataset, self.split, self.images, self.shape, self.classes)
        return mine == (split.name, split.split, len(split), split.shape, split.classes)


def convert(split: Split, out: Path, *, progress: bool = True) -> None:
    """Write `split` as an FFCV file and its digest; `out` is either what it was or complete, never between.

    Args:
        out: ends in .beton; an older file of that name is replaced.
        progress: shown on stderr.

    Raises:
        UsageError: another name, or FFCV is not installed.
        DataError: the split cannot be read, or the file not written (a full disk, say).
    """
    if out.suffix != ".beton" or out.is_dir():
        raise UsageError(f"{out}: a converted data set must be a file named something.beton")
    ffcv_module("writer")
    with _lock(out):
        _write(split, out, progress)


def cached(split: Split, folder: Path) -> Path:
    """The converted file of `split` in `folder`; written first if it is not there, damaged, or out of date.

    Raises:
        DataError, UsageError: as `convert`.
    """
    out = folder / f"{split.name}-{split.split}-{split.fingerprint[:16]}.beton"
    with _lock(out):
        try:
            found = verify(out)
        except DataError:
            found = None
        if found is None or not found.matches(split) or found.fingerprint != split.fingerprint:
            _write(split, out, progress=True)
    return out


def verify(path: Path) -> Sidecar:
    """Read the .json beside a .beton and check the file against it, byte for byte.

    Raises:
        DataError: one of the two is missing, damaged or truncated.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there: run `retemper convert DATASET --data-root DIR --out {path}`")
    again = f"delete it and run `retemper convert DATASET --data-root DIR --out {path}`"
    try:
        fields = json.loads(sidecar_path(path).read_bytes())
        fields |= {"shape": tuple(fields["shape"]), "classes": tuple(fields["classes"])}
        sidecar = Sidecar(**fields)
    except FileNotFoundError:
        raise DataError(f"{path} has no digest beside it, so it may be half written: {again}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{sidecar_path(path)} is damaged, so {path} cannot be trusted: {again}") from error
    if sidecar.format != FORMAT:
        raise DataError(f"{path} has format {sidecar.format}, this retemper reads {FORMAT}: {again}")
    again = again.replace("DATASET", sidecar.dataset)
    size = path.stat().st_size
    if size != sidecar.bytes:
        state = "truncated at" if size < sidecar.bytes else "too long:"
        raise DataError(f"{path} is damaged ({state} {size:,} of {sidecar.bytes:,} bytes): {again}")
    if _sha256(path) != sidecar.sha256:
        raise DataError(f"{path} is damaged (its digest differs): {again}")
    return sidecar


def sidecar_path(path: Path) -> Path:
    """FILE.beton.json of FILE.beton."""
    return path.with_name(path.name + ".json")


def _write(split: Split, out: Path, progress: bool) -> None:
    """Both files, with the lock held."""
    split.images  # noqa: B018  # a damaged data set is found before anything is written
    _remove_stale(out)
    with _complaining(out), _partial(out) as data, _partial(out) as facts:
        _write_samples(split, data, progress)
        _sync(data)
        sidecar = Sidecar(
            FORMAT, split.name, split.split, len(split), split.shape, split.classes, split.fingerprint,
            bytes=data.stat().st_size, sha256=_sha256(data),
        )  # fmt: skip
        facts.write_text(json.dumps(asdict(sidecar), indent=1) + "\n")
        _sync(facts)
        sidecar_path(out).unlink(missing_ok=True)
        _sync(out.parent)
        data.replace(out)
        _sync(out.parent)
        facts.replace(sidecar_path(out))
        _sync(out.parent)


def _write_samples(split: Split, path: Path, progress: bool) -> None:
    """What FFCV's writer does, in this process: its own workers leave it waiting for ever when one of them fails."""
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


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """One conversion of a file at a time, over all processes; the empty lock file stays."""
    with _complaining(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        handle = (out.parent / f".{out.name}.lock").open("w")
        fcntl.flock(handle, fcntl.LOCK_EX)
    with handle:
        yield


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """An empty file beside `out`, removed in the end if it is still there."""
    with NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", suffix=".partial", delete=False) as handle:
        path = Path(handle.name)
    try:
        path.chmod(0o666 & ~_umask())  # a temporary file is for its owner alone
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _complaining(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error


def _remove_stale(out: Path) -> None:
    """Partial files of conversions that were killed."""
    for path in out.parent.glob(f".{out.name}.*.partial"):
        if time.time() - path.stat().st_mtime > STALE_S:
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Onto the disk: a file's bytes, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as handle:
        chunks = iter(lambda: handle.read(CHUNK), b"")
        for chunk in shown(chunks, -(-size // CHUNK), f"checking {path.name}", show=size >= SHOW_HASHING_FROM):
            digest.update(chunk)
    return digest.hexdigest()
