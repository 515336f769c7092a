"""Files: written whole or not at all, locked, digested, and JSON that is read with one line where it is damaged."""

import hashlib
import json
import os
import pickle
import secrets
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from retemper.errors import DataError

DAMAGED = (  # what the readers of zip and pickle raise on bytes that are not theirs
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error),
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, OverflowError),
    *(OSError, MemoryError),
)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an error, and vanishes otherwise.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # same folder: a rename must not cross disks
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the rename itself may be lost when the machine stops
    finally:
        os.close(folder)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file by `data`: whoever reads it, whenever, finds the old content or the new. Raises OSError."""
    with atomic_write(path) as file:
        file.write(data)


def file_digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, 64 hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: no such file, or not one JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: is {path.parent} the folder of a run?") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} should hold one JSON object")
    return content


def finite(value: Any) -> Any:
    """`value` as strict JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
