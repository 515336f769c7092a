"""Weights on disk: read whatever the literature released, refuse everything else in one line, and write so that a kill
at any moment leaves the old file or the new one.

Nothing here runs code from a file: only safetensors and `torch.load(weights_only=True)` are used.
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

from retemper.errors import DataError
from retemper.files import DAMAGED, write_atomically

WRAPPERS = ("model_state_dict", "state_dict", "model", "net")  # names under which released files nest the weights
DEAD = "sub_block1."  # TRADES' WideResNet stores a stage that no forward pass reads
# metadata entries: a digest of the whole file, its own 64 digits as zeros (before, of the tensors alone), and who wrote
# it, so that a file that has lost the one is not taken for somebody else's, which has neither
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
    path = Path(path)
    load_state(str(path), _state(path, _read(path)), model)


def load_state(whose: str, state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Likewise from the state_dict of a network; `whose` it is is for messages. Raises CheckpointError."""
    state = {_plain(name): value for name, value in state.items()}
    target = {_plain(name): tensor for name, tensor in model.state_dict().items()}
    state = {name: value for name, value in state.items() if name in target or not name.startswith(DEAD)}
    problem = _misfit(state, target)
    if problem:
        raise CheckpointError(f"{whose}: {problem}")
    with torch.no_grad():
        for name in target.keys() & state.keys():
            target[name].copy_(state[name])


def require_intact(path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError: the file is missing, damaged, or of another kind than `load_checkpoint` takes."""
    _state(Path(path), _read(Path(path)))


def save_weights(
    path: str | os.PathLike[str], weights: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write safetensors atomically, with a digest of the file that `load_checkpoint` verifies.

    Args:
        path: overwritten if it is there; its folder must exist.
        weights: a model (plain, compiled or wrapped), or its state_dict; any device, dtype and memory format.
        metadata: strings kept in the file's header.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is intact.
    """
    import safetensors.torch  # here, not above: the benchmarks read and write no weights, and run without it

    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {_plain(name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = {**(metadata or {}), "format": "pt", WRITER: "retemper", DIGEST: WHOLE + BLANK}
    data = safetensors.torch.save(tensors, header)
    blank = f'"{DIGEST}":"{WHOLE}{BLANK}"'.encode()
    digest = blank.replace(BLANK.encode(), hashlib.sha256(data).hexdigest().encode())
    write_atomically(path, data.replace(blank, digest, 1))


def state_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights and statistics, in the order of the names."""
    state = {_plain(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return _tensor_digest({name: value.detach().cpu() for name, value in state.items()})


def _plain(name: str) -> str:
    """The name without what DataParallel (`module.`) and torch.compile (`_orig_mod.`) put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def _read(path: Path) -> object:
    """Whatever the file holds; CheckpointError if that is no checkpoint."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a .safetensors file or a .pt with a state_dict") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: a folder; name the file in it, such as best.safetensors") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not size:
        raise CheckpointError(f"{path}: empty; copy or download it again")
    try:
        if head[8:9] == b"{":  # before the text checks: the eight bytes of the header's length may look like text
            return _read_safetensors(path)
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
            raise CheckpointError(f"{path}: a web page, not weights (Google Drive sends one); download the file itself")
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
        return _read_torch(path, is_zip=head.startswith(b"PK"))
    except DAMAGED:
        raise CheckpointError(f"{path}: truncated, damaged, or no checkpoint; copy or download it again") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors  # here, as in `save_weights`

    try:
        with safetensors.safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None  # one of DAMAGED
    expected = metadata.get(DIGEST, "")
    if expected.startswith(WHOLE):
        data, digits = path.read_bytes(), expected.removeprefix(WHOLE).encode()
        found = WHOLE + hashlib.sha256(data.replace(digits, BLANK.encode(), 1)).hexdigest()
    else:
        found = _tensor_digest(state) if expected else ""
    if found != expected or (WRITER in metadata and not expected):
        raise CheckpointError(f"{path}: damaged, it does not match its digest; copy or download it again")
    return state


def _read_torch(path: Path, is_zip: bool) -> object:
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise CheckpointError(
                    f"{path}: refused: a TorchScript archive is a program; save the state_dict instead"
                )
            folders = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
            damaged = next(folders, None) or archive.testzip()  # torch.load reads garbage for either, and says nothing
        if damaged:
            raise CheckpointError(
                f"{path}: damaged, record {_show(damaged)} is not as written; copy or download it again"
            )
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
    """The first function or class named by a pickle of a protocol that torch.load cannot read; nothing is run."""
    strings: list[str] = []
    with open(path, "rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STACK_GLOBAL":
                return _show(".".join(strings[-2:]))
            if opcode.name in ("GLOBAL", "INST"):
                return _show(str(argument).replace(" ", "."))
            if isinstance(argument, str):
                strings.append(argument)
    return None


def _state(path: Path, content: object) -> dict[str, Tensor]:
    """The tensors by plain name, out of whatever nests them."""
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
    return {_plain(name): value for name, value in content.items()}


def _misfit(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str | None:
    """Why the tensors do not fit the model's, or None."""
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
    """Whether `copy_` carries every value over: dense, with data, and floating point iff the target is."""
    dense = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return dense and value.is_floating_point() == target.is_floating_point()


def _few(names: Iterable[str], separator: str = ", ") -> str:
    shown = [_show(name) for name in names]
    return separator.join(shown[:3] + ["..."] * (len(shown) > 3))


def _show(name: str) -> str:
    """A name from a file, fit for one line of a terminal."""
    return name.encode("unicode_escape").decode()[:100]


def _tensor_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
