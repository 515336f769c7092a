"""A run says in a line each what its teacher was trained for, where that is something else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from retemper.engine.checkpoints.find import find_network
from retemper.engine.groups import Data
from retemper.engine.run.told_apart import tell_apart
from retemper.loaders import Split, split_of_arrays

DIGITS = tuple("0123456789")


def split_of(classes: tuple[str, ...], pixels: int) -> Split:
    count = len(classes)
    return split_of_arrays("", "", np.zeros((count, pixels, pixels, 1), np.uint8), np.arange(count), classes, "")


def test_a_teacher_of_the_same_kind_is_passed_over(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = find_network(teacher, dataset="digits")
    for weights in (network, find_network(teacher / "last.safetensors", dataset="digits")):
        tell_apart("the teacher", weights, split_of(DIGITS, 8), Data(dataset="digits"), weights.facts.eps)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "pixels, classes, dataset, eps, said",
    [
        (8, DIGITS, "digits", 0.3, "note: the eps of the teacher is 0.15, the student's is 0.3"),
        (8, DIGITS, "digits", None, ""),  # a clean teacher
        (14, DIGITS, "digits", 0.15, "note: the teacher saw images of 8 px, the student's have 14"),
        (8, DIGITS, "folder", 0.15, "note: the teacher was trained on digits, the student is to learn folder"),
        (
            8,
            ("0", "2", "1", *DIGITS[3:]),
            "digits",
            0.15,
            "warning: the classes of the teacher are others: number 1 is 1 there, 2 here",
        ),
    ],
)
def test_each_difference_is_one_line(
    pixels: int,
    classes: tuple[str, ...],
    dataset: str,
    eps: float | None,
    said: str,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = find_network(teacher, dataset="digits")
    tell_apart("the teacher", network, split_of(classes, pixels), Data(dataset=dataset), eps)
    assert capsys.readouterr().err == f"{said}\n" * bool(said)


def test_a_damaged_config_beside_sound_weights_is_passed_over(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(teacher / "best.safetensors", tmp_path)
    for text in ("[", json.dumps({"classes": 3})):
        (tmp_path / "config.json").write_text(text)
        tell_apart("it", find_network(tmp_path, dataset=None), split_of(DIGITS, 8), Data(dataset="digits"), 0.15)
    assert capsys.readouterr().err == ""
