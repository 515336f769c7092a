"""Pickles of others, read without running their code.

A pickle is a program: it may name any function and have it called. CIFAR's "python version" needs a few names to
rebuild numpy arrays. This reader knows those and refuses every other before it is looked up.
"""

import io
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np

from retemper.errors import DataError


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """Encode as latin-1, in place of `_codecs.encode`, which pickles of Python 3 call with any codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding}")
    return text.encode("latin1")


def _array(buffer: bytes, dtype: Any, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    """Return an array of numbers over its bytes, in place of numpy's own, which pickles of protocol 5 call."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


# numpy's own reconstructors, whatever module this version of numpy keeps them in
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]

ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy.core.numeric", "_frombuffer"): _array,
    ("numpy._core.numeric", "_frombuffer"): _array,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1_bytes,
    ("builtins", "bytes"): bytes,
    ("__builtin__", "bytes"): bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return ADMITTED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}") from None


def read_pickle(path: Path) -> dict[bytes | str, Any]:
    """Return the dictionary in a pickle of numpy arrays, lists, numbers and text, of Python 2 or 3.

    Raises:
        DataError: it is damaged, holds something else, or asks for code. None of its code has run.
    """
    refusal = f"{path} is not a CIFAR batch and was not run"
    advice = "delete it and fetch the set again, best as its binary version"
    data = path.read_bytes()
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    # a damaged pickle may ask its machine for anything: a missing stack entry, a huge length, a bad argument
    except (
        pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, OverflowError, MemoryError
    ) as error:  # fmt: skip
        raise DataError(f"{refusal} ({error}): {advice}") from error
    if not isinstance(content, dict):
        raise DataError(f"{refusal} (it holds a {type(content).__name__}): {advice}")
    return content
