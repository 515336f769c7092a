"""What is known about a network that is not in its weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from retemper.engine import create_model, save_weights
from retemper.engine.checkpoints.header import Facts, find_weights, is_run, load_network, read_facts
from retemper.errors import DataError, UsageError

CPU = torch.device("cpu")
KNOWN = Facts(model="tiny_resnet", num_classes=10, channels=1, image_size=8, dataset="digits", eps=0.1)


def test_facts_go_into_a_file_and_come_back(tmp_path: Path) -> None:
    for facts in (KNOWN, Facts(model="resnet18"), Facts()):
        save_weights(tmp_path / "w.safetensors", nn.Linear(2, 2), facts.as_metadata())
        assert read_facts(tmp_path / "w.safetensors") == facts


def test_facts_are_completed_and_never_overwritten() -> None:
    assert Facts(eps=0.3).or_else(KNOWN) == replace(KNOWN, eps=0.3)
    assert KNOWN.or_else(Facts(model="resnet18", eps=0.3)) == KNOWN


def test_a_header_that_is_no_runs_says_nothing(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", nn.Linear(2, 2), {"num_classes": "ten"})
    (tmp_path / "no.safetensors").write_bytes(b"no header")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    for name in ("w.safetensors", "no.safetensors", "w.pt", "absent.safetensors"):
        assert read_facts(tmp_path / name) == Facts()


def test_a_run_is_a_folder_with_a_config(tmp_path: Path) -> None:
    assert not is_run(tmp_path) and not is_run(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    assert is_run(tmp_path) and not is_run(tmp_path / "config.json")


def test_the_weights_of_a_run_are_found(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(DataError):
            find_weights(target)
    (tmp_path / "best.safetensors").touch()
    assert find_weights(tmp_path) == find_weights(tmp_path / "best.safetensors") == tmp_path / "best.safetensors"
    with pytest.raises(DataError, match=r"last\.safetensors"):
        find_weights(tmp_path, "last")


def test_a_network_comes_back_frozen_and_one_that_is_not_described_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "w.safetensors", create_model("tiny_resnet", 10)
    save_weights(path, model)
    loaded = load_network(path, KNOWN, CPU)
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    for facts, said in ((Facts(model="tiny_resnet"), "--model"), (Facts(model="resnt18", num_classes=10), "resnet18")):
        with pytest.raises(UsageError, match=said):
            load_network(path, facts, CPU)
