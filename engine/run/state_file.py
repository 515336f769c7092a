"""A training state on disk: the archive that torch.save writes, with its own SHA-256 in the archive's comment.

`torch.load(weights_only=True)` reads it as it stands. The digest covers every byte before it, so that a flipped bit or
a cut anywhere is found before anything is believed.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retemper.engine.device import is_out_of_memory
from retemper.errors import DataError
from retemper.files import DAMAGED
from retemper.shape import misfit

MARK = b"sha256:"
COMMENT = len(MARK) + 64  # bytes


class Damaged(DataError):
    """The file is not as it was written."""


def pack(state: Mapping[str, Any]) -> bytes:
    """Return tensors, numbers, words and containers of them as a file's content."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(-2, io.SEEK_END)  # a zip archive ends in the length of its comment, which is 0 here
    buffer.write(COMMENT.to_bytes(2, "little"))
    with buffer.getbuffer() as body:
        comment = _comment(body)
    buffer.write(comment)
    return buffer.getvalue()  # which shares the buffer's memory: a large network's state is there once, not three times


def unpack(path: Path, kind: Any = dict) -> dict[str, Any]:
    """Return what `pack` was given, on the host; it must have the shape `kind` (`retemper.shape`).

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


def on_host(value: Any) -> Any:
    """Return `value` with each tensor in its mappings and lists copied to the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: on_host(one) for name, one in value.items()}
    return [on_host(one) for one in value] if isinstance(value, list) else value
