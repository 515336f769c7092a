"""Networks that a user names: what is missing is said at once, first things first; and when two are the same."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retemper.cli import run
from retemper.engine import create_model
from retemper.engine.checkpoints.find import find_network, same_network

Fails = Callable[..., str]
MODEL = "tiny_resnet_wide"


def state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return dict(create_model(MODEL, 10).state_dict())


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Return the line that a command ends with, which is all that it says."""

    def command(code: int, *words: object) -> str:
        assert run([str(word) for word in words]) == code
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("retemper: error: ")

    return command


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {f"net.{name}": value for name, value in state(0).items()}}, "my net.pt")
    return Path("my net.pt")


def test_a_bare_checkpoint_asks_once_for_all_that_it_does_not_say(bare: Path, fails: Fails) -> None:
    command = f"retemper evaluate 'my net.pt' --model {MODEL} --dataset"
    said = fails(2, "evaluate", bare)
    assert f"does not say its architecture and its data set: {command} NAME --data-root DIR (data sets: digits" in said
    assert fails(2, "evaluate", bare, "--dataset", "digits").endswith(f"its architecture: {command} digits")
    assert f"its data set: {command} NAME --data-root /data/x" in fails(
        2, "evaluate", bare, "--model", MODEL, "--data-root", "/data/x"
    )
    torch.save({"conv1.weight": torch.ones(1)}, "strange.pt")
    assert "--model NAME --dataset NAME --data-root DIR (architectures: resnet18," in fails(2, "evaluate", "strange.pt")
    Path("net.py").write_text("build = None")
    assert fails(2, "evaluate", "net.py:build").startswith(
        "net.py:build does not say its data set: retemper evaluate net.py:build --dataset NAME"
    )


def test_what_the_file_is_comes_before_what_it_lacks(bare: Path, fails: Fails) -> None:
    Path("notes").write_text("just some notes about my weights")
    Path("cut.pt").write_bytes(bare.read_bytes()[:5000])
    Path("empty.pt").touch()
    torch.save(create_model(MODEL, 10), "whole.pt")
    known = {
        "notes": "a text file, no checkpoint",
        "cut.pt": "truncated, damaged",
        "empty.pt": "empty; copy",
        "whole.pt": "refused: it asks to run code (retemper.engine.models.resnet.ResNet)",
        "/dev/null": "neither a file nor a folder",
        "absent.pt:model": "does not exist",
    }
    for name, words in known.items():
        assert words in fails(3, "evaluate", name)


def test_a_folder_says_what_it_holds(bare: Path, fails: Fails) -> None:
    Path("folder").mkdir()
    assert "is no run's folder" in fails(3, "evaluate", "folder")
    bare.rename("folder/net.pt")
    assert fails(3, "evaluate", "folder").endswith("it is no run's folder, but holds net.pt: name the file")
    Path("folder/config.json").write_text("{}")
    Path("folder/last.safetensors").touch()
    assert "--weights last" in fails(3, "evaluate", "folder")


def test_the_user_may_choose_the_weights_by_name(
    bare: Path, fails: Fails, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.save({"state_dict": state(1), "state_dict_ema": state(2)}, "both.pt")
    digests = {}
    for name in ("both.pt", "both.pt:state_dict", "both.pt:state_dict_ema"):
        words = ["evaluate", name, "--model", MODEL, "--dataset", "digits", "--attacks", "clean", "--limit", "20"]
        out = tmp_path / f"out-{name}"
        assert run([*words, "--out", str(out)]) == 0
        content = json.loads((out / "evaluation.json").read_text())
        digests[name] = content["protocol"]["weights_sha256"], content["attacks"]["clean"]["confusion"]
    assert digests["both.pt"][1] == digests["both.pt:state_dict_ema"][1] != digests["both.pt:state_dict"][1]
    assert len({sha256 for sha256, _ in digests.values()}) == 3  # no two share an evaluation
    capsys.readouterr()
    words = ["--model", MODEL, "--dataset", "digits"]
    assert "there is no 'best' in it, but state_dict, state_dict_ema" in fails(3, "evaluate", "both.pt:best", *words)
    assert "takes state_dict_ema" not in capsys.readouterr().err
    start = ["train", "sat:digits", "--epochs", "1", "--attack-steps", "1", "--lr", "1e-9", "--holdout-per-class", "0"]
    torch.save({"student": state(1), "ema": state(2)}, "start.pt")
    assert run([*start, "--start", "start.pt:student", "--out", "run"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["start"]["path"] == os.path.abspath("start.pt:student")


def test_weights_that_are_not_finite_begin_no_run(bare: Path, fails: Fails) -> None:
    torch.save(state(0) | {"linear.bias": torch.full((10,), float("nan"))}, "start.pt")
    assert "not finite" in fails(3, "train", "sat:digits", "--start", "start.pt", "--out", "run")


def test_networks_are_the_same_by_their_file_or_by_their_tensors() -> None:
    file, tensors = {"sha256": "f", "tensors": "t"}, {"sha256": "g", "tensors": "t"}
    assert same_network(file, tensors) and same_network(file, {"sha256": "f"}) and same_network({}, {})
    for other in ({"sha256": "g"}, {"sha256": "g", "tensors": "u"}, {}):
        assert not same_network(file, other) and not same_network({"sha256": "h"}, other)


def test_the_digest_of_an_entry_is_not_that_of_the_file(bare: Path) -> None:
    whole, entry = find_network(bare, dataset=None), find_network(f"{bare}:model", dataset=None)
    assert (whole.entry, entry.entry) == (None, "model") and whole.weights == entry.weights == bare
    assert whole.sha256 != entry.sha256
