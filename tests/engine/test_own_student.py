"""A student of the user's own file, through every verb."""

import json
import shutil
from pathlib import Path

import pytest

from retemper.cli import run

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Linear(64, classes)

    def forward(self, image):
        x = self.norm(self.conv(image)).relu()
        if x.sum() < 0:  # torch.fx does not trace this
            x = x + 1
        return self.head(x.flatten(1))

def build(num_classes, channels):
    return Net(channels, num_classes)

def few():
    return Net(1, 3)

class Overwriting(Net):
    def forward(self, image):
        answer = super().forward(image)
        image.detach().zero_()
        return answer

def overwriting(num_classes, channels):
    return Overwriting(channels, num_classes)
"""


def test_a_student_of_ones_own_is_trained_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, out = tmp_path / "net.py", tmp_path / "run"
    net.write_text(NET)
    words = ["--student", f"{net}:build", "--epochs", "1", "--attack-steps", "1", "--holdout-per-class", "0"]
    train = ["train", "sat:digits", "--device", "cpu", *words]
    assert run([*train, "--out", str(out)]) == 0
    assert "the attack looks at the student itself" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["networks"]["student"] == f"{net}:build" and len(config["student_source"]) == 64
    evaluate = ["evaluate", str(out), "--attacks", "clean", "--limit", "20", "--device", "cpu"]
    assert run(evaluate) == 0 and run([*train, "--out", str(out)]) == 0
    assert run([*train, "--out", str(tmp_path / "second"), "--start", str(out)]) == 0
    shutil.copytree(out, tmp_path / "other")
    assert run(["compare", str(out), str(tmp_path / "other")]) == 0
    assert run(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    assert run(["export", str(out), "--out", str(tmp_path / "given")]) == 0
    assert (tmp_path / "given" / "model.py").read_text() == NET
    card = (tmp_path / "given" / "README.md").read_text()
    assert "build(num_classes=10, channels=1)" in card and "A net.py:build for digits" in card
    assert "create_model" not in card  # which builds networks of the literature alone
    assert str(net) not in card + (tmp_path / "given" / "config.json").read_text()
    assert run(["export", str(out), "--out", str(tmp_path / "bench"), "--format", "robustbench"]) == 2
    net.write_text(NET + "\n")
    capsys.readouterr()
    assert run([*train, "--out", str(out)]) == 2
    assert "student_source" in capsys.readouterr().err
    assert run(evaluate) == 3
    assert f"{net} has changed since the network was trained" in capsys.readouterr().err


def test_a_student_that_cannot_be_one_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(NET)
    for student, told in {
        "resnet19": "--student resnet19 (did you mean 'resnet18'?): it must be one of",
        f"{tmp_path}/gone.py:build": "there is no file",
        f"{tmp_path}/net.py:few": "answers two images of 10 classes with (2, 3)",
        f"{tmp_path}/net.py:overwriting": "net.py:overwriting changes the images that it is given",
    }.items():
        assert run(["train", "sat:digits", "--student", student, "--out", str(tmp_path / "run")]) in (2, 3)
        assert told in capsys.readouterr().err
