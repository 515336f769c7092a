"""`retemper evaluate`: the file it writes, what it adds to, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from retemper.cli import run
from retemper.engine import create_model, save_weights


def test_evaluate_writes_the_contracts_file_and_adds_to_it(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(teacher), "--limit", "50"]
    assert run([*words, "--attacks", "clean"]) == 0
    assert run([*words, "--attacks", "fgsm,pgd20"]) == 0
    content = json.loads((teacher / "evaluation.json").read_text())
    protocol = content["protocol"]
    assert (protocol["dataset"], protocol["split"], protocol["images"], protocol["eps"]) == ("digits", "test", 50, 0.15)
    assert (protocol["norm"], protocol["precision"], protocol["seed"]) == ("linf", "fp32", 0)
    assert list(content["attacks"]) == ["clean", "fgsm", "pgd20"] == list(protocol["attacks"])
    for result in content["attacks"].values():
        assert len(result["accuracy"]) == len(result["count"]) == 10 and sum(result["count"]) == 50
        assert {"average", "worst", "worst_class", "worst_tenth", "nsd", "interval"} <= result.keys()
    assert "pgd20" in capsys.readouterr().out
    assert run(["evaluate", str(teacher), "--limit", "60", "--attacks", "clean"]) == 0  # another protocol
    assert list(json.loads((teacher / "evaluation.json").read_text())["attacks"]) == ["clean"]
    assert json.loads((teacher / "evaluation.1.json").read_text()) == content


def test_a_bare_checkpoint_is_evaluated_when_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": create_model("tiny_resnet", 10).state_dict()}, path)
    words = ["evaluate", str(path), "--attacks", "clean", "--limit", "20"]
    assert run(words) == 2
    assert "--dataset" in capsys.readouterr().err
    assert run([*words, "--dataset", "digits"]) == 2
    assert "--model" in capsys.readouterr().err
    assert run([*words, "--dataset", "digits", "--model", "tiny_resnet", "--eps", "0.1"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["eps"] == 0.1


def test_a_checkpoint_of_another_data_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hundred.safetensors"
    save_weights(
        path, create_model("tiny_resnet", 100), {"model": "tiny_resnet", "num_classes": "100", "dataset": "digits"}
    )
    assert run(["evaluate", str(path), "--attacks", "clean"]) == 3
    assert "100 classes" in capsys.readouterr().err


def test_autoattack_is_the_librarys(teacher: Path) -> None:
    assert run(["evaluate", str(teacher), "--attacks", "pgd20,autoattack", "--limit", "10", "--weights", "last"]) == 0
    content = json.loads((teacher / "evaluation-last.json").read_text())
    assert content["attacks"]["autoattack"]["average"] <= content["attacks"]["pgd20"]["average"]
    assert content["protocol"]["attacks"]["autoattack"]["suite"] == "standard"


def test_an_evaluation_that_cannot_be_read_is_kept_aside(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    for number, damaged in enumerate(("{", "[]", '{"protocol": {}, "attacks": {}}'), start=1):
        path.write_text(damaged)
        assert run(["evaluate", str(teacher), "--attacks", "clean", "--limit", "20", "--out", str(tmp_path)]) == 0
        assert (tmp_path / f"evaluation.{number}.json").read_text() == damaged
        assert list(json.loads(path.read_text())["attacks"]) == ["clean"]


def test_lost_verdicts_are_told_and_the_others_written(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(teacher), "--limit", "20", "--out", str(tmp_path)]
    assert run([*words, "--attacks", "clean"]) == 0
    (tmp_path / "evaluation.csv").unlink()
    assert run([*words, "--attacks", "fgsm"]) == 0
    assert "the verdicts of clean are lost" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "evaluation.json").read_text())["attacks"]) == ["clean", "fgsm"]
    assert (tmp_path / "evaluation.csv").read_text().startswith("image,label,fgsm\n")
