"""Files: written whole or not at all, locked, digested; and JSON, written strictly and refused in one line."""

import fcntl
import hashlib
import json
import math
import os
import pickle
import secrets
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

from retemper.console import progress
from retemper.errors import Busy, DataError
from retemper.shape import misfit, parse_json

DAMAGED = (  # what the readers of zip and pickle raise when the bytes are not a file of theirs
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error),
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, OverflowError),
    *(OSError, MemoryError),
)
BLOCK = 1 << 23  # bytes read at a time
SHOW_FROM = 1 << 30  # bytes; the digest of a smaller file takes a second or two


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` when the block ends without an error, and is removed otherwise.

    The file's `name` is its temporary path, for a library that must open the file itself. What killed processes left of
    the same kind is removed.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is intact.
    """
    path = Path(path)
    sweep(path)
    file = _open_beside(path)
    try:
        with file:
            yield file
            sync(file)
            os.replace(file.name, path)  # while it is still locked: `sweep` takes it for a dead process's otherwise
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)  # or the rename itself may be lost when the machine stops


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace the file by `data`. Any reader finds the old content or the new. Raises OSError as `atomic_write`."""
    with atomic_write(path) as file:
        file.write(data)


def sync(file: BinaryIO) -> None:
    """Wait until what was written to `file` is on the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Wait until the names of the files in `folder` are on the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(path: str | Path) -> None:
    """Remove the temporary files of `path` that no process writes any more: those of killed ones."""
    path = Path(path)
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with suppress(OSError), open(left, "rb") as file:  # it is gone, not ours, or on a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
            left.unlink()


def _open_beside(path: Path) -> BinaryIO:
    """Open a new temporary file for `path`, with the lock that tells `sweep` that its writer lives."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # here: a rename must not cross disks
        file = open(temporary, "xb")  # the caller closes it
        with suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return file
        file.close()  # another process's `sweep` came between the two


@contextmanager
def locked(path: str | Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock file `path` while the block runs.

    The kernel releases the lock however the process ends. The empty file stays.

    Args:
        path: the lock file; it and its folder are made if they do not exist.
        busy: the error's message when another process holds the lock; None waits until that one releases it.

    Raises:
        Busy: another process holds the lock, and `busy` is given.
        OSError: the folder cannot be made or written to.
    """
    from filelock import FileLock, Timeout  # here: a machine for benchmarks may lack it

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if busy is None else 0)
    except Timeout:
        path.parent.stat()  # a folder that was taken away since looks the same
        raise Busy(busy) from None
    try:
        yield
    finally:
        lock.release()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits. A large file shows its progress. Raises OSError."""
    path = Path(path)
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(BLOCK), b"")
        for block in progress(blocks, -(-size // BLOCK), f"checking {path.name}", show=size >= SHOW_FROM):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: str | Path, kind: Any = dict, advice: str = "", partial: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        kind: the shape that it must have (`retemper.shape`).
        advice: what to do about a file that is damaged, for the error.
        partial: whether fields may be missing.
    Raises:
        DataError: the file does not exist, or does not hold one such object; the message names the field.
    """
    path = Path(path)
    try:
        content = parse_json(path.read_bytes())
        wrong = misfit(content, kind, partial)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: is {path.parent} the folder of a run?") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        wrong, content = str(error), {}
    if wrong is not None:
        raise DataError(f"{path} is damaged ({wrong}){advice and f': {advice}'}")
    return content


def read_json_lines(path: str | Path, kind: Any) -> tuple[list[dict[str, Any]], int]:
    """Return the objects in a file with one a line, and how many lines hold none of the shape `kind`.

    A file that does not exist has no lines. Raises DataError where it cannot be read.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = [line for line in Path(path).read_bytes().splitlines() if line.strip()]
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    for line in lines:
        with suppress(ValueError):
            row = parse_json(line)
            rows += [row] if misfit(row, kind) is None else []
    return rows, len(lines) - len(rows)


def json_bytes(content: Any) -> bytes:
    """Return `content` as strict JSON, indented, with a newline at the end. Raises ValueError for a NaN (`finite`)."""
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"


def write_json(path: str | Path, content: Any) -> None:
    """Replace the file by `content` as JSON, atomically.

    Raises:
        ValueError: a number is not finite; the old file is intact.
        OSError: the folder is missing, read-only or full; the old file is intact.
    """
    write_atomically(path, json_bytes(content))


def finite(value: Any) -> Any:
    """Return `value` with every number that is not finite replaced by None, which JSON can hold."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
