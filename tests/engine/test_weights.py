"""Reading released checkpoints, refusing everything else with the model untouched, and writing that survives a kill."""

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from retemper.engine.checkpoints.weights import CheckpointError, load_checkpoint, save_weights, state_digest
from retemper.engine.device import is_out_of_memory
from retemper.engine.models import create_model
from retemper.engine.models.wide_resnet import WideResNet
from retemper.errors import DataError

State = dict[str, Any]


def network(seed: int = 0, num_classes: int = 10) -> nn.Module:
    """A small network whose every tensor, statistics included, differs from seed to seed."""
    gen = torch.Generator().manual_seed(seed)
    model = create_model("tiny_resnet", num_classes)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=gen))
        else:
            tensor.fill_(seed + 1)
    return model


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (torch's overloads omit it)


def same(left: nn.Module, right: nn.Module) -> bool:
    theirs = right.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in left.state_dict().items())


def refusal(path: Path, model: nn.Module | None = None) -> str:
    """The message, after the checks that hold for every refusal: one line, the path in it, the model as it was."""
    model, untouched = (model, None) if model else (network(5), network(5))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, model)
    message = str(error.value)
    assert isinstance(error.value, DataError)
    assert "\n" not in message and message.startswith(str(path))
    assert untouched is None or same(model, untouched)
    return message.removeprefix(str(path))


WRAPS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "net": lambda state: {"net": state, "acc": 93.2},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "nested": lambda state: {"model": {"state_dict": state}},
    "parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "old": lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_loads_what_the_literature_released(wrap: str, zipped: bool, tmp_path: Path) -> None:
    source, model, path = network(1), network(1 if wrap == "old" else 2), tmp_path / "model.pth.tar"
    if wrap == "old":  # the counter stays the model's own; all else is loaded
        for parameter in model.parameters():
            parameter.data.zero_()
    torch.save(WRAPS[wrap](source.state_dict()), path, _use_new_zipfile_serialization=zipped)
    load_checkpoint(path, model)
    assert same(model, source)


def test_drops_the_dead_stage_of_trades_wide_resnet(tmp_path: Path) -> None:
    source, model = WideResNet(10, 3, depth=10, widen=1), WideResNet(10, 3, depth=10, widen=1)
    state = source.state_dict()
    dead = {f"sub_{key}": value for key, value in state.items() if key.startswith("block1.")}
    assert dead
    torch.save({f"module.{key}": value for key, value in {**state, **dead}.items()}, tmp_path / "wrn.pt")
    load_checkpoint(tmp_path / "wrn.pt", model)
    assert same(model, source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_keeps_the_models_dtype_and_layout(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, model, path = network(1).to(dtype), channels_last(network(2)), tmp_path / suffix
    if suffix == "pt":
        torch.save(source.state_dict(), path)
    else:
        save_weights(path, source)
    load_checkpoint(path, model)
    assert same(model, source.float())
    weight = model.state_dict()["layer1.0.conv1.weight"]
    assert weight.dtype == torch.float32 and weight.is_contiguous(memory_format=torch.channels_last)


def test_loads_into_wrapped_models_in_place(tmp_path: Path) -> None:
    source, model = network(1), network(2)
    wrapped = nn.Sequential()
    wrapped.add_module("module", model)  # the names that DataParallel gives
    storage = model.state_dict()["conv1.weight"].data_ptr()
    save_weights(tmp_path / "w.safetensors", source)
    load_checkpoint(str(tmp_path / "w.safetensors"), wrapped)
    assert same(model, source)
    assert model.state_dict()["conv1.weight"].data_ptr() == storage  # a captured CUDA graph reads this address


CHANGES: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (lambda s: [s.pop(k) for k in list(s)[:5]], r"5 missing \(conv1.weight, bn1.weight, bn1.bias, \.\.\.\)"),
    "unexpected": (lambda s: s.update({"a.b": torch.ones(1)}), r"1 unexpected \(a.b\)"),
    "dead stage lookalike": (lambda s: s.update({"sub_block2.x": torch.ones(1)}), r"1 unexpected \(sub_block2.x\)"),
    "shape": (lambda s: s.update({"bn1.bias": torch.ones(3)}), r"bn1.bias \(3,\), the model's \(16,\)"),
    "features": (lambda s: s.update({"linear.weight": torch.ones(10, 9)}), r"another size.*linear.weight \(10, 9\)"),
    "complex": (lambda s: s.update({"bn1.bias": torch.ones(16, dtype=torch.complex64)}), "plain numbers.*bn1.bias"),
    "integers": (lambda s: s.update({"bn1.bias": torch.ones(16).char()}), "plain numbers.*bn1.bias"),
    "sparse": (lambda s: s.update({"linear.weight": s["linear.weight"].to_sparse()}), "plain numbers.*linear.weight"),
    "terminal codes": (lambda s: s.update({"a\x1b[2J\nb": torch.ones(1)}), r"a\\x1b\[2J\\nb"),
    "not a tensor": (lambda s: s.update({"lr": 0.1}), r"not tensors: lr"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_is_strict_and_names_the_keys(change: str, tmp_path: Path) -> None:
    state: State = dict(network(1).state_dict())
    alter, expected = CHANGES[change]
    alter(state)
    torch.save(state, tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert re.search(expected, message), message


@pytest.mark.parametrize("name", ["tiny_resnet", "wrn"])
def test_names_a_mismatch_of_the_classes_as_such(name: str, tmp_path: Path) -> None:
    build = {"tiny_resnet": lambda k: network(1, k), "wrn": lambda k: WideResNet(k, 3, depth=10, widen=1)}[name]
    torch.save(build(100).state_dict(), tmp_path / "model.pt")
    assert "the checkpoint has 100 classes, the model 10;" in refusal(tmp_path / "model.pt", build(10))


def test_a_wider_network_is_not_taken_for_other_classes(tmp_path: Path) -> None:
    save_weights(tmp_path / "wide", create_model("tiny_resnet_wide", 100))
    assert "another size of this architecture" in refusal(tmp_path / "wide")


BYTES = {
    "html": (b"\r\n <!DOCTYPE html><title>Google Drive - Virus scan warning</title>", "web page"),
    "html with a mark": (b"\xef\xbb\xbf<html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "empty": (b"", "empty"),
    "text": (b"hello world, these are no weights", "a text file, no checkpoint"),
    "json": (b'{"error": "not found"}', "no checkpoint"),
    "pickle without tensors": (pickle.dumps({"epoch": 3}, protocol=4), "no checkpoint"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "unpack it"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "zip magic": (b"PK\x03\x04" + bytes(100), "damaged"),
    "safetensors of nonsense": (bytes([16, 0, 0, 0, 0, 0, 0, 0]) + b"{ nonsense       ", "damaged"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_refuses_files_of_other_kinds(kind: str, tmp_path: Path) -> None:
    data, expected = BYTES[kind]
    (tmp_path / "model.pt").write_bytes(data)
    assert expected in refusal(tmp_path / "model.pt")


def test_refuses_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nothing.pt")
    assert "a folder" in refusal(tmp_path)


def test_a_safetensors_header_that_looks_like_a_web_page_still_loads(tmp_path: Path) -> None:
    source, model, path = network(1), network(2), tmp_path / "w.safetensors"
    save_weights(path, source)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    save_weights(path, source, {"pad": "x" * (0x3C20 - header - len('"pad":"",'))})  # 0x20 0x3c: a space and a "<"
    assert path.read_bytes()[:2] == b" <"
    load_checkpoint(path, model)
    assert same(model, source)


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3, {}, {"epoch": 3, "acc": 0.5}], ids=repr)
def test_refuses_what_holds_no_weights(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert "not a state_dict" in message or "no weights in it" in message


def test_refuses_a_dict_that_holds_itself(tmp_path: Path) -> None:
    content: State = {"epoch": 1}
    content["model"] = content
    torch.save(content, tmp_path / "model.pt")
    assert "no weights in it" in refusal(tmp_path / "model.pt")


class Runs:
    """An object that makes a file when an unsafe reader unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {quote(str(self.mark))}",)


@pytest.mark.parametrize("writer", ["zip", "legacy", "by hand", *range(6)])
def test_never_runs_code(writer: str | int, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "model.pt"
    content = {"state_dict": {"conv1.weight": torch.ones(1) if isinstance(writer, str) else 1, "evil": Runs(mark)}}
    if writer == "by hand":  # the opcode INST, which no writer of today uses
        path.write_bytes(f'(S"touch {quote(str(mark))}"\niposix\nsystem\n.'.encode())
    elif isinstance(writer, int):
        path.write_bytes(pickle.dumps(content, protocol=writer))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    assert "refused: it asks to run code (posix.system); only tensors are loaded" in refusal(path)
    assert not mark.exists()
    if not isinstance(writer, str) or writer == "by hand":
        pickle.loads(path.read_bytes())  # the bait does work
        assert mark.exists()


def test_names_the_code_of_a_pickled_model(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert "Linear" in message and "save model.state_dict() alone" in message


def test_refuses_torchscript(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:  # torch.jit itself is deprecated and warns
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"model/{name}", b"")
    assert "TorchScript" in refusal(tmp_path / "model.pt")


def test_refuses_an_archive_of_other_things(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("release/model.pt", b"weights")
    assert "a zip archive, no checkpoint; unpack it" in (said := refusal(tmp_path / "model.zip"))
    assert "release/model.pt" in said


def written(kind: str, path: Path) -> bytes:
    if kind == "safetensors":
        save_weights(path, network(1))
    else:
        torch.save(network(1).state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_refuses_truncated_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    data = written(kind, path)
    for length in (1, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert "damaged" in refusal(path)


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_a_flipped_bit_is_found_or_harmless(kind: str, tmp_path: Path) -> None:
    path, source = tmp_path / "model", network(1)
    data = written(kind, path)
    gen = torch.Generator().manual_seed(0)
    anywhere = torch.randint(len(data), (60,), generator=gen).tolist()
    for spot in (*anywhere, *range(8, 400, 13), *range(len(data) - 200, len(data), 7)):
        flipped = bytearray(data)
        flipped[spot] ^= 1 << (spot % 8)
        path.write_bytes(flipped)
        model = network(5)
        try:
            load_checkpoint(path, model)
            assert same(model, source), spot
        except CheckpointError:
            assert same(model, network(5)), spot


def test_too_little_memory_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A safetensors file is checked for its lengths first; a damaged file of torch's may ask for any size."""
    for kind in ("safetensors", "zip"):
        written(kind, tmp_path / kind)

    def ask_for_too_much(*_: object, **__: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("safetensors.safe_open", ask_for_too_much)
    monkeypatch.setattr("torch.load", ask_for_too_much)
    with pytest.raises(RuntimeError) as error:
        load_checkpoint(tmp_path / "safetensors", network(5))
    assert is_out_of_memory(error.value)
    assert "more memory than there is" in refusal(tmp_path / "zip")


def test_refuses_a_record_that_claims_to_be_a_folder(tmp_path: Path) -> None:
    torch.save(network(1).state_dict(), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for entry in good.infolist():
            data = good.read(entry)
            entry.external_attr = 0x10 if entry.filename.endswith("data/0") else 0
            bad.writestr(entry, data)
    assert "data/0 is not as written" in refusal(tmp_path / "bad.pt")


def test_saved_weights_carry_metadata_and_plain_names(tmp_path: Path) -> None:
    path, source = tmp_path / "w.safetensors", channels_last(network(1))
    save_weights(path, {f"_orig_mod.{key}": value for key, value in source.state_dict().items()}, {"epoch": "3"})
    with safe_open(path, "pt") as file:
        assert file.metadata()["epoch"] == "3"
        assert set(file.keys()) == set(source.state_dict())
        loaded: Tensor = file.get_tensor("layer1.0.conv1.weight")
    assert torch.equal(loaded, source.state_dict()["layer1.0.conv1.weight"])
    assert os.listdir(tmp_path) == ["w.safetensors"]


METADATA = {name: name.upper() for name in ("model", "eps", "epoch", "score", "dataset", "method", "setting", "né")}


def test_equal_weights_with_equal_facts_give_equal_files(tmp_path: Path) -> None:
    files = set()
    for turn in range(8):
        names = list(METADATA)[turn:] + list(METADATA)[:turn]
        save_weights(tmp_path / "w.safetensors", network(1), {name: METADATA[name] for name in names})
        files.add((tmp_path / "w.safetensors").read_bytes())
    assert len(files) == 1
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert METADATA.items() <= file.metadata().items()
    load_checkpoint(tmp_path / "w.safetensors", model := network(2))
    assert same(model, network(1))
    assert len(files.pop()) % 8 == 0  # a reader that maps the file finds the tensors aligned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_file_is_what_the_formats_own_writer_makes_of_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """But for the order of the header's keys, and the digest. The tensors have every kind of shape."""
    state = {**channels_last(network(1)).to(dtype).state_dict(), "none": torch.zeros(0), "one": torch.tensor(True)}
    save_weights(tmp_path / "w", state, {"née": 'a "\\\x01'})
    written = (tmp_path / "w").read_bytes()
    with safe_open(tmp_path / "w", "pt") as file:
        own = safetensors.torch.save({name: value.contiguous() for name, value in state.items()}, file.metadata())
    ends = [8 + int.from_bytes(data[:8], "little") for data in (written, own)]
    assert json.loads(written[8 : ends[0]]) == json.loads(own[8 : ends[1]])
    assert written[ends[0] :] == own[ends[1] :]


def test_numbers_that_the_format_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no torch.complex128, which turns is of"):
        save_weights(tmp_path / "w", {"turns": torch.zeros(2, dtype=torch.complex128)})
    assert not os.listdir(tmp_path)


def test_a_file_of_an_earlier_version_is_read_and_its_damage_found(tmp_path: Path) -> None:
    """Its header stands in the order in which it happened to be written."""
    header = {"b": "1", "a": "2", "format": "pt", "writer": "retemper", "sha256": "file:" + "0" * 64}
    data = safetensors.torch.save({name: value.contiguous() for name, value in network(1).state_dict().items()}, header)
    whole = data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)
    (tmp_path / "w.safetensors").write_bytes(whole)
    load_checkpoint(tmp_path / "w.safetensors", model := network(2))
    assert same(model, network(1))
    (tmp_path / "w.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "does not match its digest" in refusal(tmp_path / "w.safetensors")


def test_no_tensor_is_lost_in_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one name"):
        save_weights(tmp_path / "w.safetensors", {"module.a": torch.ones(1), "a": torch.zeros(1)})
    assert not os.listdir(tmp_path)


def test_the_digest_of_a_network_is_of_its_tensors_alone() -> None:
    digest = state_digest(network(1))
    wrapped = nn.Sequential()
    wrapped.add_module("module", network(1))
    assert digest == state_digest(wrapped) == state_digest(channels_last(network(1)))
    changed = network(1)
    changed.state_dict()["bn1.running_var"][3] += 1e-3
    assert len({digest, state_digest(changed), state_digest(network(2)), state_digest(network(1).double())}) == 4
