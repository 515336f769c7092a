"""Weights on disk: read a file, fit what it holds to a network; and write one.

Reading takes what the literature released and refuses everything else in one line. No code of a file ever runs
(content.py). Writing is atomic: a kill leaves the old file or the new one. The same weights with the same metadata give
the same bytes, and a network is known by a digest of its tensors, whatever file they are in.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from retemper.console import say
from retemper.engine.checkpoints.content import (
    BLANK,
    DIGEST,
    WHOLE,
    WRITER,
    CheckpointError,
    Misfit,
    few,
    read_content,
)
from retemper.engine.checkpoints.unwrap import Pixels, bare_name, holds_weights, take
from retemper.engine.models import NormalisingNetwork
from retemper.files import atomic_write

DTYPES = {  # their names in a safetensors file, where those of the last come first
    **{torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16"},
    **{torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"},
}


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Copy the weights of a file into `model`, all or none; dtype, device and memory format stay the model's.

    Args:
        path: safetensors, or a state_dict saved by PyTorch (any suffix, zip or the format before 1.6), possibly nested
            (`state_dict`, `model`, `ema`, ...) and with prefixed names (`module.`, `_orig_mod.`, `model.`, ...). Where
            the file holds the average of the weights too, that is taken; `FILE:NAME` takes what NAME is before. A
            WideResNet's dead `sub_block1.*` is dropped; `num_batches_tracked` may be missing; all else is strict.
        model: plain, compiled, or wrapped for several GPUs.
    Raises:
        CheckpointError: the file is missing, damaged, of another kind, asks to run code, holds several networks, or
            does not fit; the model is as it was.
    """
    file, entry = split_entry(path)
    _copy_into(model, file, read_content(file), entry, pixels_wanted=False)


def load_with_pixels(path: str | os.PathLike[str], model: nn.Module, entry: str | None = None) -> Pixels | None:
    """Copy the weights of a file into `model`, as `load_checkpoint` does; return what must be done to images first.

    Args:
        entry: the name that the user chose in the file, if any.
    Raises:
        CheckpointError: as `load_checkpoint`, but a network that normalises its images is not refused.
    """
    return _copy_into(model, path, read_content(Path(path)), entry, pixels_wanted=True)


def load_state(whose: str, state: Mapping[str, Tensor], model: nn.Module) -> Pixels | None:
    """Copy a state_dict into `model`, as `load_with_pixels` does; return what must be done to images first.

    Args:
        whose: where the state_dict comes from, to begin the message with.
    Raises:
        CheckpointError: it does not fit; the model is as it was.
    """
    return _copy_into(model, whose, state, None, pixels_wanted=True)


def split_entry(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Return the file, and the name in it where `path` is FILE:NAME and FILE alone exists."""
    file, colon, entry = str(path).rpartition(":")
    return (
        (Path(file), entry)
        if colon and entry and not Path(path).exists() and Path(file).is_file()
        else (Path(path), None)
    )


def _copy_into(
    model: nn.Module, whose: str | os.PathLike[str], content: object, entry: str | None, *, pixels_wanted: bool
) -> Pixels | None:
    """Copy the weights in `content` into `model`; return the pixels' mean and deviation, refused if not wanted."""
    own = model.state_dict()
    target = {bare_name(name): tensor for name, tensor in own.items()}
    if len(target) < len(own):
        raise CheckpointError(f"{whose}: cannot be told apart in a model with submodules called module or _orig_mod")
    taken = take(str(whose), content, target, entry)
    if problem := _misfit(taken.state, target):
        raise Misfit(f"{whose}: {problem}")
    pixels = taken.pixels
    if pixels is not None and not pixels_wanted and not isinstance(model, NormalisingNetwork):
        problem = f"its network first takes {pixels}, which the model does not; name a network that does not"
        raise CheckpointError(f"{whose}: {problem}")
    with torch.no_grad():
        for name in target.keys() & taken.state.keys():
            target[name].copy_(taken.state[name])
        if isinstance(model, NormalisingNetwork) and pixels is not None:
            model.take_pixels(pixels.mean, pixels.std)
    if taken.note:
        say(taken.note)
    return None if isinstance(model, NormalisingNetwork) else pixels


def require_intact(path: str | os.PathLike[str]) -> None:
    """Check that a file holds weights, of whatever network. Raises CheckpointError as `load_checkpoint` does."""
    if not holds_weights(read_content(Path(path))):
        raise CheckpointError(f"{path}: no weights in it; save model.state_dict()")


def plain_name(name: str) -> str:
    """Return the name without what DataParallel (`module.`) and torch.compile (`_orig_mod.`) put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def state_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all weights and statistics, 64 hexadecimal digits: names, dtypes, shapes and bytes."""
    state = {plain_name(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes_of(value))
    return digest.hexdigest()


def save_weights(
    path: str | os.PathLike[str], weights: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically, with a digest of it that `load_checkpoint` verifies.

    The same weights with the same metadata give the same bytes.

    Args:
        path: overwritten if it is there; its folder must exist.
        weights: a model (plain, compiled or wrapped), or its state_dict; any device, dtype and memory format.
        metadata: strings kept in the file's header.
    Raises:
        OSError: the folder is missing, read-only or full; the old file is intact.
        ValueError: two tensors have one name without `module.` and `_orig_mod.`, or one is of no dtype that the format
            has.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {plain_name(name): tensor.detach() for name, tensor in state.items()}
    if len(tensors) < len(state):
        raise ValueError("two of the tensors have one name without `module.` and `_orig_mod.`")
    if unknown := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        raise ValueError(f"a safetensors file holds no {tensors[unknown[0]].dtype}, which {few(unknown)} is of")
    facts = {**(metadata or {}), "format": "pt", WRITER: "retemper", DIGEST: WHOLE + BLANK}
    order = sorted(tensors, key=lambda name: (-[*DTYPES].index(tensors[name].dtype), name))  # so each is aligned
    header = _header({name: tensors[name] for name in order}, facts)
    digest = hashlib.sha256(header)
    with atomic_write(Path(path)) as file:
        file.write(header)
        for name in order:  # one after another: a second copy of all of them would take memory, and hold other threads
            data = _bytes_of(tensors[name])
            digest.update(data)
            file.write(data)
        file.seek(header.index(f'"{DIGEST}":"{WHOLE}{BLANK}"'.encode()) + len(f'"{DIGEST}":"{WHOLE}'))
        file.write(digest.hexdigest().encode())


def _header(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """Return the beginning of a safetensors file: the length of its JSON, and that, with sorted keys.

    The format's own writer leaves the order of `facts` to chance.
    """
    entries: dict[str, object] = {"__metadata__": facts}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the numbers of a tensor as bytes, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _misfit(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str | None:
    """Return why the tensors do not fit the model's, or None if they do."""
    missing = [name for name in target if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in target]
    if missing or unexpected:
        kinds = (missing, "missing"), (unexpected, "unexpected")
        told = " and ".join(f"{len(names)} {what} ({few(names)})" for names, what in kinds if names)
        return f"another architecture: {told}; name the model that the checkpoint was made for"
    shapes = [name for name in target if name in state and state[name].shape != target[name].shape]
    last = [name for name in target if target[name].dim() == 2][-1:]  # the final layer's weight, (K, features)
    if shapes and shapes[:1] == last and all(name.split(".")[:-1] == last[0].split(".")[:-1] for name in shapes):
        theirs, ours = state[last[0]].shape, target[last[0]].shape
        if len(theirs) == 2 and theirs[1] == ours[1]:
            return f"the checkpoint has {theirs[0]} classes, the model {ours[0]}; build the model for {theirs[0]}"
    if shapes:
        told = [f"{name} {tuple(state[name].shape)}, the model's {tuple(target[name].shape)}" for name in shapes]
        return f"another size of this architecture: {few(told, '; ')}"
    strange = [name for name, value in state.items() if not _copies(value, target[name])]
    return f"not plain numbers of the model's kind: {few(strange)}; save model.state_dict()" if strange else None


def _copies(value: Tensor, target: Tensor) -> bool:
    """Say whether `copy_` carries every value over: dense, with data, and floating point iff the target is."""
    dense = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return dense and value.is_floating_point() == target.is_floating_point()
