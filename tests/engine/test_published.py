"""Published networks are recognised by their digests and held to their accuracy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retemper.cli import run
from retemper.engine import create_model
from retemper.engine.checkpoints.find import find_network
from retemper.engine.checkpoints.published import PUBLISHED, Published
from retemper.files import file_digest

Train = Callable[..., int]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_a_released_teacher_is_named_and_held_to_its_accuracy(
    teacher: Path, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = file_digest(teacher / "best.safetensors")

    def stated(accuracy: float) -> None:
        known = Published(
            known_by=digest, title="ours", model="tiny_resnet_wide", dataset="digits", clean_accuracy=accuracy
        )
        monkeypatch.setattr("retemper.engine.checkpoints.published.PUBLISHED", (known,))

    out = tmp_path / "run"
    stated(0.99)
    assert train("rslad:digits", out, "--epochs", "1") == 3
    assert "should classify 99.00%" in capsys.readouterr().err and not (out / "config.json").exists()
    assert run(["evaluate", str(teacher), "--attacks", "clean", "--out", str(tmp_path / "e")]) == 0
    stated(read(tmp_path / "e/evaluation.json")["attacks"]["clean"]["average"])
    assert train("rslad:digits", out, "--epochs", "1") == 0
    assert "is ours" in capsys.readouterr().err and read(out / "config.json")["teacher"]["released"] == "ours"
    stated(0.99)
    assert train("rslad:digits", out, "--epochs", "1") == 0  # a run that goes on is not held up again


def test_a_released_checkpoint_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    torch.save(create_model("tiny_resnet", 10).state_dict(), path)
    monkeypatch.setattr(
        "retemper.engine.checkpoints.published.PUBLISHED",
        (Published(known_by=file_digest(path), title="t", model="resnet56", dataset="cifar10", clean_accuracy=0.9),),
    )
    facts = find_network(path, dataset=None).facts
    assert (facts.model, facts.dataset) == ("resnet56", "cifar10")
    known = {one.known_by for one in PUBLISHED}
    assert len(known) == len(PUBLISHED) and all(0.5 < one.clean_accuracy < 1 for one in PUBLISHED)
