"""SVHN, whose classes differ in size, from training to the report."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from retemper.cli import run

HELD = ["--holdout-per-class", "1"]
SHORT = "--student tiny_resnet --epochs 1 --batch-size 32 --attack-steps 1 --select-steps 1 --loader resident".split()


@pytest.fixture
def root(tmp_path: Path, datafiles: ModuleType) -> Path:
    datafiles.make_svhn(tmp_path / "data", n=60)
    return tmp_path / "data"


def test_without_test_images_a_choice_by_them_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "test_32x32.mat").unlink()
    words = ["train", "sat:svhn_resnet18", "--data-root", str(root), "--out", str(tmp_path / "run"), *SHORT]
    assert run([*words, "--variant", "released"]) == 3
    said = capsys.readouterr().err
    assert "no test_32x32.mat" in said and "test images choose the epoch: --select-on holdout does without" in said
    assert run([*words, *HELD]) == 0


def test_it_is_trained_on_evaluated_exported_and_reported(
    root: Path, tmp_path: Path, datafiles: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = ["--data-root", str(root)], tmp_path / "run"
    assert run(["train", "fair_rslad:svhn_resnet18", *data, "--out", str(out), *SHORT, *teacher(root, tmp_path)]) == 0
    (line,) = (json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines())
    assert len(line["class_weight"]) == 10
    assert run(["evaluate", str(out), "--attacks", "clean,fgsm"]) == 0
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["protocol"]["dataset"] == "svhn" and evaluation["protocol"]["eps"] == 8 / 255
    for found in evaluation["attacks"].values():
        assert found["count"] == [3, 33, *[3] * 8]
        assert found["average"] == pytest.approx(np.average(found["accuracy"], weights=found["count"]))
    assert run(["export", str(out), "--out", str(tmp_path / "exported")]) == 0
    assert "60 test images of svhn (all)" in (tmp_path / "exported" / "README.md").read_text()
    assert run(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    assert "# Robustness class by class: svhn" in (tmp_path / "page" / "report.md").read_text()


def teacher(root: Path, folder: Path) -> list[str]:
    """The option that names a teacher, after it is trained."""
    out = folder / "teacher"
    assert run(["train", "sat:svhn_resnet18", "--data-root", str(root), "--out", str(out), *SHORT, *HELD]) == 0
    return ["--teacher", str(out), "--teacher-model", "tiny_resnet", *HELD]


def test_as_many_images_are_held_out_of_every_class(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "sat:svhn_resnet18", "--data-root", str(root), "--out", str(tmp_path / "run"), *SHORT]
    assert run([*words, "--holdout-per-class", "3"]) == 2
    assert "cannot hold out 3 images of each class: class 0 has 3" in capsys.readouterr().err
    assert run([*words, "--holdout-per-class", "2", "--images-per-class", "5"]) == 0
    assert "fewer to train on: 0 1, 2 1, 3 1, 4 1, 5 1 and 4 classes more" in capsys.readouterr().err


def test_it_is_converted(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beton, out = tmp_path / "svhn.beton", tmp_path / "run"
    assert run(["convert", "svhn", "--data-root", str(root), "--out", str(beton)]) == 0
    words = ["train", "sat:svhn_resnet18", "--beton", str(beton), "--out", str(out), *SHORT[:-2], *HELD]
    assert run(words) == 0
    assert f"next: retemper evaluate {out} --data-root DIR" in capsys.readouterr().err
