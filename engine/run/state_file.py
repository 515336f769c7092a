"""A training state on disk: the archive that torch.save writes, with its own SHA-256 in the archive's comment.

`torch.load(weights_only=True)` reads it as it stands. The digest covers every byte before it, so that a flipped bit or
a cut anywhere is found before anything is believed.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from retemper.engine.device import is_out_of_memory
from retemper.errors import DataError
from retemper.files import DAMAGED
from retemper.shape import misfit

MARK = b"sha256:"
COMMENT = len(MARK) + 64  # bytes


class Damaged(DataError):
    """The file is not as it was written."""


def write_state(file: BinaryIO, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, words and containers of them. Raises OSError as the file does.

    A large state is digested as it is written, and lies in memory once. Other threads run meanwhile.
    """
    sink = _Sink(file)
    torch.save(state, sink)  # pyright: ignore[reportArgumentType]  # which asks it for `write` and `flush` alone
    sink.finish()


class _Sink:
    """The file that torch.save writes to: it takes the digest along.

    An error waits for the end: raised in torch's writer, it would come out as another one.

    Attributes:
        held: the newest two bytes. A zip archive ends in the length of its comment, which is 0 as torch writes it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.held = file, hashlib.sha256(), b""
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Take some bytes; return how many."""
        whole = memoryview(data if len(data) > 1 else self.held + bytes(data))
        if len(data) > 1:
            self._pass_on(self.held)
        self._pass_on(whole[:-2])
        self.held = bytes(whole[-2:])
        return len(data)

    def flush(self) -> None:
        """Do nothing: whoever opened the file flushes it."""

    def finish(self) -> None:
        """Write the comment: the digest of every byte before it. Raises OSError where the file took less than all."""
        self._pass_on(COMMENT.to_bytes(2, "little"))
        self._pass_on(MARK + self.digest.hexdigest().encode())
        if self.error is not None:
            raise self.error

    def _pass_on(self, data: bytes | memoryview) -> None:
        if self.error is None:
            self.digest.update(data)
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error


def unpack(path: Path, kind: Any = dict) -> dict[str, Any]:
    """Return what `write_state` was given, on the host; it must have the shape `kind` (`retemper.shape`).

    Raises:
        Damaged: the digest is missing or another, or the file holds something else.
        DataError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if data[-COMMENT:] != _comment(memoryview(data)[:-COMMENT]):
        raise Damaged(f"{path} is damaged (its digest differs)")
    try:
        state = dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except DAMAGED as error:
        if is_out_of_memory(error):  # its digest is right
            raise
        raise Damaged(f"{path} is damaged ({type(error).__name__})") from None
    if (wrong := misfit(state, kind)) is not None:
        raise Damaged(f"{path} is damaged ({wrong})")
    return state


def _comment(body: memoryview) -> bytes:
    return MARK + hashlib.sha256(body).hexdigest().encode()
