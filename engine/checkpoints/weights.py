"""Weights on disk: read a file, unwrap the state_dict in it, fit it to a network; and write one.

Reading takes what the literature released and refuses everything else in one line. No code of a file ever runs: only
safetensors and `torch.load(weights_only=True)` are used. Writing is atomic: a kill leaves the old file or the new one.
"""

import hashlib
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from retemper.engine.device import is_out_of_memory
from retemper.errors import DataError
from retemper.files import DAMAGED, write_atomically

WRAPPERS = ("model_state_dict", "state_dict", "model", "net")  # names under which released files nest the weights
DEAD = "sub_block1."  # TRADES' WideResNet stores a stage that no forward pass reads
# entries of a safetensors header: DIGEST holds WHOLE and the SHA-256 of the file, taken with BLANK in its place; WRITER
# tells a file of ours that has lost its digest from other people's files, which have none
DIGEST, WRITER, WHOLE, BLANK = "sha256", "writer", "file:", "0" * 64


class CheckpointError(DataError):
    """A checkpoint that cannot be read or does not fit the model; the message is one line that names the fix."""


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Copy the weights of a file into `model`, all or none; dtype, device and memory format stay the model's.

    Args:
        path: safetensors, or a state_dict saved by PyTorch (any suffix, zip or the format before 1.6), possibly nested
            in {"model" | "state_dict" | "net" | "model_state_dict"} and prefixed by `module.` or `_orig_mod.`.
            A WideResNet's dead `sub_block1.*` is dropped; `num_batches_tracked` may be missing; all else is strict.
        model: plain, compiled, or wrapped for several GPUs.
    Raises:
        CheckpointError: the file is missing, damaged, of another kind, asks to run code, or does not fit; the model is
            as it was.
    """
    load_state(str(path), _state_in(Path(path)), model)


def load_state(whose: str, state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy a state_dict into `model`, as `load_checkpoint` does.

    Args:
        whose: where the state_dict comes from, to begin the message with.
    Raises:
        CheckpointError: it does not fit; the model is as it was.
    """
    state = {plain_name(name): value for name, value in state.items()}
    target = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    state = {name: value for name, value in state.items() if name in target or not name.startswith(DEAD)}
    problem = _misfit(state, target)
    if problem:
        raise CheckpointError(f"{whose}: {problem}")
    with torch.no_grad():
        for name in target.keys() & state.keys():
            target[name].copy_(state[name])


def require_intact(path: str | os.PathLike[str]) -> None:
    """Check that a file holds weights, of whatever network. Raises CheckpointError as `load_checkpoint` does."""
    _state_in(Path(path))


def plain_name(name: str) -> str:
    """Return the name without what DataParallel (`module.`) and torch.compile (`_orig_mod.`) put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def save_weights(
    path: str | os.PathLike[str], weights: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically, with a digest of it that `load_checkpoint` verifies.

    Args:
        path: overwritten if it is there; its folder must exist.
        weights: a model (plain, compiled or wrapped), or its state_dict; any device, dtype and memory format.
        metadata: strings kept in the file's header.
    Raises:
        OSError: the folder is missing, read-only or full; the old file is intact.
    """
    import safetensors.torch  # here, not above: the benchmarks read and write no weights, and run without it

    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {plain_name(name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = {**(metadata or {}), "format": "pt", WRITER: "retemper", DIGEST: WHOLE + BLANK}
    data = safetensors.torch.save(tensors, header)
    blank = f'"{DIGEST}":"{WHOLE}{BLANK}"'.encode()
    digest = blank.replace(BLANK.encode(), hashlib.sha256(data).hexdigest().encode())
    write_atomically(Path(path), data.replace(blank, digest, 1))


def _content(path: Path) -> object:
    """Return the object in a file. Raises CheckpointError if it is no checkpoint."""
    head = _head(path)
    try:
        if head[8:9] == b"{":  # before the text checks: the eight bytes of the header's length may look like text
            return _read_safetensors(path)
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
            raise CheckpointError(f"{path}: a web page, not weights (Google Drive sends one); download the file itself")
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
        if head.startswith(b"PK"):
            _check_archive(path)
        return _read_torch(path)
    except DAMAGED as error:
        if not is_out_of_memory(error):
            raise CheckpointError(f"{path}: truncated, damaged, or no checkpoint; copy or download it again") from None
        if head[8:9] == b"{":
            raise  # safetensors checks all lengths before it allocates
        raise CheckpointError(f"{path}: asks for more memory than there is; free some, or it is damaged") from None


def _head(path: Path) -> bytes:
    """Read the first 512 bytes. Raises CheckpointError if there are none."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        known = {
            FileNotFoundError: "no such file; give a .safetensors file or a .pt with a state_dict",
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
    """Raise CheckpointError if a zip file that torch is to read is a program, or a record is not as it was written."""
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise CheckpointError(f"{path}: refused: a TorchScript archive is a program; save the state_dict instead")
        folders = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
        damaged = next(folders, None) or archive.testzip()  # torch.load reads garbage for either, and says nothing
    if damaged:
        raise CheckpointError(f"{path}: damaged, record {_show(damaged)} is not as written; copy or download it again")


def _read_torch(path: Path) -> object:
    """Read what `torch.save` wrote, without running any code of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols; what is refused is said below
            with open(path, "rb") as file:  # not its name: by a suffix torch would choose another reader
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        code = found.group(1) if found else _first_global(path)
        if not code:
            raise
        raise CheckpointError(
            f"{path}: refused: it asks to run code ({code}); only tensors are loaded; save model.state_dict() alone"
        ) from None


def _first_global(path: Path) -> str | None:
    """Return the first function or class that a pickle of any protocol names; nothing is run."""
    strings: list[str] = []
    with open(path, "rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):  # the last takes its two words from the stack
                return _show(str(argument).replace(" ", ".") if argument else ".".join(strings[-2:]))
            if isinstance(argument, str):
                strings.append(argument)
    return None


def _state_in(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by plain name, out of whatever nests them. Raises CheckpointError."""
    content = _content(path)
    for _ in range(3):  # bounded: a pickled dict may hold itself
        if isinstance(content, Mapping):
            content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state_dict; save model.state_dict()")
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: no weights in it, only {_few(map(str, content)) or 'an empty dict'}")
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(f"{path}: entries that are not tensors: {_few(others)}; save model.state_dict() alone")
    return {plain_name(name): value for name, value in content.items()}


def _misfit(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str | None:
    """Return why the tensors do not fit the model's, or None if they do."""
    missing = [name for name in target if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in target]
    if missing or unexpected:
        kinds = (missing, "missing"), (unexpected, "unexpected")
        told = " and ".join(f"{len(names)} {what} ({_few(names)})" for names, what in kinds if names)
        return f"another architecture: {told}; name the model that the checkpoint was made for"
    shapes = [name for name in target if name in state and state[name].shape != target[name].shape]
    last = [name for name in target if target[name].dim() == 2][-1:]  # the final layer's weight, (K, features)
    if shapes and shapes[:1] == last and all(name.split(".")[:-1] == last[0].split(".")[:-1] for name in shapes):
        theirs, ours = state[last[0]].shape, target[last[0]].shape
        if len(theirs) == 2 and theirs[1] == ours[1]:
            return f"the checkpoint has {theirs[0]} classes, the model {ours[0]}; build the model for {theirs[0]}"
    if shapes:
        told = [f"{name} {tuple(state[name].shape)}, the model's {tuple(target[name].shape)}" for name in shapes]
        return f"another size of this architecture: {_few(told, '; ')}"
    strange = [name for name, value in state.items() if not _copies(value, target[name])]
    return f"not plain numbers of the model's kind: {_few(strange)}; save model.state_dict()" if strange else None


def _copies(value: Tensor, target: Tensor) -> bool:
    """Say whether `copy_` carries every value over: dense, with data, and floating point iff the target is."""
    dense = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return dense and value.is_floating_point() == target.is_floating_point()


def _few(names: Iterable[str], separator: str = ", ") -> str:
    shown = [_show(name) for name in names]
    return separator.join(shown[:3] + ["..."] * (len(shown) > 3))


def _show(name: str) -> str:
    """Return a name from a file so that it fits in one line of a terminal."""
    return name.encode("unicode_escape").decode()[:100]
