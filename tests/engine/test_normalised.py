"""A student that normalises its images: one function in training, in its files, as a teacher, a start and an export."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.cli import run
from retemper.engine import (
    LabelAttack,
    Recipe,
    State,
    Targets,
    create_model,
    cross_entropy_objective,
    load_checkpoint,
    pgd,
    save_weights,
    train_step,
)
from retemper.engine.checkpoints.header import load_network, read_facts
from retemper.engine.models import PIXELS, Normalised, normalising
from retemper.engine.speed.fold import Folded
from retemper.errors import DataError
from retemper.loaders import load_split

CPU = torch.device("cpu")
TRAIN = (
    "train sat:digits_student --device cpu --epochs 2 --attack-steps 1 --holdout-per-class 10 --select-steps 1".split()
)
(MEAN,), (STD,) = PIXELS["digits"]
IMAGE = torch.linspace(0, 1, 4 * 64).view(4, 1, 8, 8)

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Return the last line of a command that is to fail with `code`."""

    def command(code: int, *words: object) -> str:
        capsys.readouterr()
        assert run([str(word) for word in words]) == code
        return capsys.readouterr().err.splitlines()[-1]

    return command


@pytest.fixture(scope="module")
def normalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student normalises its images, and whose average is kept."""
    out = tmp_path_factory.mktemp("normalised") / "run"
    assert run([*TRAIN, "--normalise", "true", "--average", "ema", "--ema-decay", "0.5", "--out", str(out)]) == 0
    return out


def answers(path: Path) -> Tensor:
    """Return what the network in a run's file answers to `IMAGE`, its layers put together by hand."""
    state = load_file(path)
    mean, std = state.pop("mean"), state.pop("std")
    assert (mean.item(), std.item()) == (pytest.approx(MEAN), pytest.approx(STD))
    plain = create_model("tiny_resnet", 10)
    plain.load_state_dict(state)  # under the network's own names
    with torch.no_grad():
        return plain.eval()((IMAGE - mean) / std)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_the_file_says_is_what_was_trained(normalised: Path, teacher: Path) -> None:
    path = normalised / "best.safetensors"
    network = load_network(path, read_facts(path), CPU)
    assert isinstance(network, Normalised)
    close(network(IMAGE), answers(path))
    ours = create_model("tiny_resnet", 10, normalise="digits")
    load_checkpoint(path, ours)
    close(ours.eval()(IMAGE), network(IMAGE))
    assert run(["evaluate", str(normalised), "--attacks", "clean", "--device", "cpu"]) == 0
    found = json.loads((normalised / "evaluation.json").read_text())["attacks"]["clean"]["average"]
    split = load_split("digits", "test")
    image = torch.from_numpy(split.images).movedim(-1, 1) / 255
    right = network(image).argmax(1) == torch.from_numpy(split.labels)
    assert found == pytest.approx(right.double().mean().item(), abs=2e-3)
    assert "mean" not in load_file(teacher / "best.safetensors")  # of a run that does not normalise


def test_it_teaches_and_is_attacked_as_the_function_that_was_trained(normalised: Path, tmp_path: Path) -> None:
    words = ["train", "rslad:digits", *TRAIN[2:], "--teacher", str(normalised), "--teacher-model", "tiny_resnet"]
    assert run([*words, "--normalise", "true", "--out", str(tmp_path / "student")]) == 0
    suite = ["--attacks", "autoattack", "--suite", "fast", "--fold", "--limit", "4"]
    assert run(["evaluate", str(normalised), *suite, "--out", str(tmp_path / "e")]) == 0
    assert "autoattack-fast" in json.loads((tmp_path / "e/evaluation.json").read_text())["attacks"]


def test_a_run_that_is_cut_goes_on_to_the_same_weights(normalised: Path, tmp_path: Path) -> None:
    words = [*TRAIN, "--normalise", "true", "--average", "ema", "--ema-decay", "0.5", "--out", str(tmp_path / "run")]
    assert run([*words, "--max-steps", "20"]) == 0 and run(words) == 0
    for name in ("best", "last"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (normalised, tmp_path / "run"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(one["mean"], torch.full((1, 1, 1, 1), MEAN))


def test_a_start_must_normalise_as_the_student_does(normalised: Path, tmp_path: Path, fails: Fails) -> None:
    begin = [*TRAIN, "--epochs", "1", "--lr", "1e-9", "--out", tmp_path / "run", "--start"]
    save_weights(tmp_path / "plain.pt", create_model("tiny_resnet", 10))
    other = create_model("tiny_resnet", 10, normalise="digits")
    other.get_buffer("mean").fill_(0.5)
    save_weights(tmp_path / "other.pt", other)
    words = ["--normalise", "true"]
    assert "first takes (image - [0.3053]) / [0.3758], the student does not" in fails(2, *begin, normalised)
    assert "takes pixels as they are" in fails(2, *begin, tmp_path / "plain.pt", *words)
    assert "first takes (image - [0.5])" in fails(2, *begin, tmp_path / "other.pt", *words)
    assert not (tmp_path / "run/config.json").exists()
    assert run([str(word) for word in [*begin, normalised, *words]]) == 0
    before, after = load_file(normalised / "best.safetensors"), load_file(tmp_path / "run/last.safetensors")
    assert all(torch.allclose(after[name], before[name], atol=1e-5) for name in before if "weight" in name)


def test_a_start_of_ones_own_code_is_held_to_its_answers(normalised: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "net.py").write_text(f"""
from safetensors.torch import load_file
from retemper.engine import create_model

def build():
    state = load_file({str(normalised / "best.safetensors")!r})
    model = create_model("tiny_resnet", 10, normalise="digits")
    model.load_state_dict(state)
    return model
""")
    begin = [*TRAIN, "--epochs", "1", "--out", tmp_path / "run", "--start", tmp_path / "net.py:build"]
    begin[-1] = str(begin[-1])
    assert "--normalise true" in fails(3, *begin)
    assert run([str(word) for word in [*begin, "--normalise", "true"]]) == 0


@pytest.mark.parametrize("form", ["safetensors", "robustbench"])
def test_others_load_the_export_without_retemper(form: str, normalised: Path, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    assert run(["export", str(normalised), "--out", str(out), "--format", form, "--name", "One"]) == 0
    codes = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    plain = next(code for code in codes if "from model import" in code)
    fixed = re.sub(r"torch\.rand\(1, 1, 8, 8\)", "torch.linspace(0, 1, 256).view(4, 1, 8, 8)", plain)
    script = f"import sys; sys.modules['retemper'] = None\n{fixed}\ntorch.save(logits.detach(), 'logits.pt')\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    close(torch.load(out / "logits.pt", weights_only=True), answers(normalised / "best.safetensors"))
    if form == "safetensors":
        space: dict[str, Any] = {}
        exec(codes[-1].replace('"model.safetensors"', repr(str(out / "model.safetensors"))), space)
        assert isinstance(space["model"], Normalised)
        evaluate = ["evaluate", str(out / "model.safetensors"), "--attacks", "clean", "--limit", "10"]
        assert run([*evaluate, "--out", str(tmp_path / "e")]) == 0


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Linear(64, classes)

    def forward(self, image):
        return self.head(self.norm(self.conv(image)).relu().flatten(1))

def build(num_classes):
    return Net(num_classes)

def hiding(num_classes):
    net = Net(num_classes)
    net.register_buffer("mean", torch.zeros(3))
    return net
"""


def test_a_network_of_ones_own_normalises_too(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "net.py").write_text(OWN)
    words = [*TRAIN, "--normalise", "true", "--student"]
    assert run([*words, f"{tmp_path}/net.py:build", "--out", str(tmp_path / "run")]) == 0
    assert run(["evaluate", str(tmp_path / "run"), "--attacks", "clean,fgsm", "--limit", "20"]) == 0
    path = tmp_path / "run/best.safetensors"
    network = load_network(path, read_facts(path), CPU)
    assert isinstance(network, Normalised) and network.mean.item() == pytest.approx(MEAN)
    assert run(["export", str(tmp_path / "run"), "--out", str(tmp_path / "hub")]) == 0
    assert "model = Normalised(build(num_classes=10), mean=[0.3053], std=[0.3758])" in (
        (tmp_path / "hub/README.md").read_text()
    )
    said = fails(2, *words, f"{tmp_path}/net.py:hiding", "--out", tmp_path / "other")
    assert "its own tensors would hide the mean and the deviation" in said


def test_a_data_set_without_a_known_mean_is_refused(tmp_path: Path, fails: Fails) -> None:
    said = fails(2, *TRAIN, "--dataset", "folder", "--normalise", "true", "--out", tmp_path / "run")
    assert "normalise = True: no mean and deviation are known of the pixels of folder" in said
    with pytest.raises(ValueError, match="'folder', but of cifar10, cifar100"):
        create_model("tiny_resnet", 10, normalise="folder")


@pytest.mark.parametrize("dataset", ["digits", "fashion-mnist"])
def test_the_means_are_those_of_the_training_images(dataset: str) -> None:
    try:
        images = load_split(dataset, "train").images
    except DataError:  # Debian's package is not on every machine
        pytest.skip(f"there is no {dataset}")
    count, pixel = np.bincount(images.ravel(), minlength=256), np.arange(256) / 255
    found = np.average(pixel, weights=count)
    assert [found] == pytest.approx(PIXELS[dataset][0], abs=5.1e-5)
    assert [np.average((pixel - found) ** 2, weights=count) ** 0.5] == pytest.approx(PIXELS[dataset][1], abs=5.1e-5)


@dataclass(frozen=True, kw_only=True)
class Plain(LabelAttack):
    forwards: ClassVar[tuple[str, ...]] = ("adv",)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return F.cross_entropy(logits["adv"], targets.label_B)


def begun(dtype: torch.dtype, **options: Any) -> tuple[State, Recipe]:
    """Return the state of a run whose student normalises the digits, and its recipe."""
    given = dict(student="tiny_resnet", normalise=True, precision="fp32", weight_decay=0.01) | options
    recipe = Recipe.of(Plain, dataset="digits", **given)
    torch.manual_seed(0)
    student = create_model("tiny_resnet", 10).to(dtype)
    return State(recipe, normalising(student, "digits"), None, 10, CPU), recipe


def test_a_step_is_that_of_the_network_on_normalised_images() -> None:
    """The gradient of the weights, the weight decay and the running statistics; no constant moves."""
    state, recipe = begun(torch.float64, attack_steps=0, attack_start="none")
    torch.manual_seed(0)
    plain = create_model("tiny_resnet", 10).double().train()
    optimizer = torch.optim.SGD(
        plain.parameters(), lr=recipe.optim.lr, momentum=recipe.optim.momentum, weight_decay=recipe.optim.weight_decay
    )
    state.start_epoch(recipe, 1, 0)
    label = torch.tensor([3, 1, 4, 1])
    for image in (IMAGE.double(), IMAGE.double().flip(0)):
        train_step(state, recipe, image, label)
        F.cross_entropy(plain((image - MEAN) / STD), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = state.student.state_dict()
    assert (found.pop("mean").item(), found.pop("std").item()) == (MEAN, STD)  # in float64 to the last bit
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_the_attack_is_in_the_pixels_of_the_image() -> None:
    """Radius and range are those of [0, 1], whether the network or its folded twin is attacked."""
    network = create_model("tiny_resnet", 10, normalise="digits").eval()
    label = torch.tensor([3, 1, 4, 1])
    for attacked in (network, Folded(network)):
        adv = pgd(attacked, IMAGE, objective=cross_entropy_objective(label), steps=5, step=0.1, eps=0.15, seed=0)
        assert adv.min() >= 0 and adv.max() <= 1 and (adv - IMAGE).abs().max() == pytest.approx(0.15, abs=1e-6)


def test_the_twin_follows_the_student() -> None:
    state, recipe = begun(torch.float32, attack_steps=2)
    state.start_epoch(recipe, 1, 0)
    train_step(state, recipe, IMAGE, torch.tensor([3, 1, 4, 1]))
    assert isinstance(state.twin, Folded)
    close(state.attacked()(IMAGE), state.student.eval()(IMAGE))


def test_its_names_are_the_networks_own_wherever_it_stands() -> None:
    plain = create_model("tiny_resnet", 10)
    inside = nn.Sequential(Normalised(plain, [0.5], [0.25]), nn.Identity())
    assert inside.state_dict().keys() == {f"0.{name}" for name in (*plain.state_dict(), "mean", "std")}
    state = {name: value + 1 for name, value in inside.state_dict().items()}
    inside.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in inside.state_dict().items())
