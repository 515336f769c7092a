"""The object in a checkpoint file, read without running any code of it; anything else is refused in one line.

Only safetensors and `torch.load(weights_only=True)` are used. Released files hold more than tensors: timm's arguments,
numpy's numbers, paths. Of those nothing is read either: an empty `Unread` takes their place.
"""

import hashlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from retemper.engine.device import is_out_of_memory
from retemper.errors import DataError
from retemper.files import DAMAGED

# entries of a safetensors header: DIGEST holds WHOLE and the SHA-256 of the file, taken with BLANK in its place; WRITER
# tells a file of ours that has lost its digest from other people's files, which have none
DIGEST, WRITER, WHOLE, BLANK = "sha256", "writer", "file:", "0" * 64


NAME_WEIGHTS = "name a .safetensors file or a .pt with a state_dict"
OTHER_FORMATS = {  # the first bytes of files that hold other things, or weights in a form that is not read
    b"\x1f\x8b": "a gzip file; unpack it and name the file in it",
    b"7z\xbc\xaf": "a 7z archive; unpack it and name the file in it",
    b"\x89HDF": "an HDF5 file, such as Keras writes; save the weights by torch.save(model.state_dict(), ...)",
    b"\x93NUMPY": "a numpy array; save the weights by torch.save(model.state_dict(), ...)",
}
# classes of plain facts beside released weights; `Unread` stands in for them, so that their own code never runs
PLAIN_FACTS = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "_codecs.encode", "argparse.Namespace", "types.SimpleNamespace"),
    *(f"pathlib{place}.{name}" for place in ("", "._local") for name in ("PosixPath", "WindowsPath", "PurePosixPath")),
)


class CheckpointError(DataError):
    """A checkpoint that cannot be read or does not fit the model; the message is one line that names the fix."""


class Misfit(CheckpointError):
    """A checkpoint whose tensors are of another network than the model."""


class Unread:
    """What stands in for an object of no interest beside the weights: it takes anything and holds nothing."""

    def __new__(cls, *_: object, **__: object) -> "Unread":
        """Ignore the arguments that the pickle has for the object."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Ignore the object's state."""


def plain_facts_unread() -> AbstractContextManager[None]:
    """Let `torch.load(weights_only=True)` within the context pass over `PLAIN_FACTS` in place of refusing the file."""
    return torch.serialization.safe_globals([(Unread, name) for name in PLAIN_FACTS])


def read_content(path: Path) -> object:
    """Return the object in a file. Raises CheckpointError if it is no checkpoint."""
    head = _head(path)
    try:
        if head[8:9] == b"{":  # before the text checks: the eight bytes of the header's length may look like text
            return _read_safetensors(path)
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
            raise CheckpointError(f"{path}: a web page, not weights (Google Drive sends one); download the file itself")
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
        if other := next((other for mark, other in OTHER_FORMATS.items() if head.startswith(mark)), None):
            raise CheckpointError(f"{path}: {other}")
        if head.startswith(b"PK"):
            _check_archive(path)
        return _read_torch(path)
    except DAMAGED as error:
        if not is_out_of_memory(error):
            if _is_text(head):
                raise CheckpointError(f"{path}: a text file, no checkpoint; {NAME_WEIGHTS}") from None
            raise CheckpointError(f"{path}: truncated, damaged, or no checkpoint; copy or download it again") from None
        if head[8:9] == b"{":
            raise  # safetensors checks all lengths before it allocates
        raise CheckpointError(f"{path}: asks for more memory than there is; free some, or it is damaged") from None


def _is_text(head: bytes) -> bool:
    """Say whether the beginning of a file is text: long enough to tell, and without control characters."""
    return len(head) >= 16 and not re.search(rb"[^\t\n\r\f\x20-\x7e\x80-\xff]", head)


def _head(path: Path) -> bytes:
    """Read the first 512 bytes. Raises CheckpointError if there are none."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        known = {
            FileNotFoundError: f"no such file; {NAME_WEIGHTS}",
            IsADirectoryError: "a folder; name the file in it, such as best.safetensors",
        }
        raise CheckpointError(f"{path}: {known.get(type(error), f'cannot be read: {error.strerror}')}") from None
    if not head:
        raise CheckpointError(f"{path}: empty; copy or download it again")
    return head


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors, and check the digest if the file has one."""
    import safetensors  # here, as in `save_weights`

    try:
        with safetensors.safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None  # one of DAMAGED
    expected = metadata.get(DIGEST, "")
    if WRITER in metadata or expected.startswith(WHOLE):
        digits = expected.removeprefix(WHOLE)
        data = path.read_bytes().replace(digits.encode(), BLANK.encode(), 1)
        if hashlib.sha256(data).hexdigest() != digits:
            raise CheckpointError(f"{path}: damaged, it does not match its digest; copy or download it again")
    return state


def _check_archive(path: Path) -> None:
    """Raise CheckpointError if a zip file is a program, none of torch's, or a record is not as it was written."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(
                f"{path}: refused: a TorchScript archive is a program; save its state_dict() instead, or load it in a "
                "function of your own and name that, as in net.py:build"
            )
        if not any(name.endswith("data.pkl") for name in names):
            inside = f"it holds {few(names)}" if names else "it is empty"
            raise CheckpointError(f"{path}: a zip archive, no checkpoint; unpack it and name the file in it ({inside})")
        folders = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
        damaged = next(folders, None) or archive.testzip()  # torch.load reads garbage for either, and says nothing
    if damaged:
        raise CheckpointError(f"{path}: damaged, record {show(damaged)} is not as written; copy or download it again")


def _read_torch(path: Path) -> object:
    """Read what `torch.save` wrote, without running any code of it."""
    try:
        with warnings.catch_warnings(), plain_facts_unread():
            warnings.simplefilter("ignore")  # on pickle protocols; what is refused is said below
            with open(path, "rb") as file:  # not its name: by a suffix torch would choose another reader
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        code = found.group(1) if found else _first_global(path)
        if not code:
            raise
        raise CheckpointError(
            f"{path}: refused: it asks to run code ({code}); only tensors are loaded; save model.state_dict() alone, "
            "as in torch.save(torch.load(FILE, weights_only=False).state_dict(), ...) where you trust the file"
        ) from None


def _first_global(path: Path) -> str | None:
    """Return the first function or class that a pickle of any protocol names; nothing is run."""
    strings: list[str] = []
    with open(path, "rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):  # the last takes its two words from the stack
                name = str(argument).replace(" ", ".") if argument else ".".join(strings[-2:])
                if name not in PLAIN_FACTS:
                    return show(name)
            if isinstance(argument, str):
                strings.append(argument)
    return None


def few(names: Iterable[str], separator: str = ", ") -> str:
    """Return the first three names for a message."""
    shown = [show(name) for name in names]
    return separator.join(shown[:3] + ["..."] * (len(shown) > 3))


def show(name: str) -> str:
    """Return a name from a file so that it fits in one line of a terminal."""
    return name.encode("unicode_escape").decode()[:100]
