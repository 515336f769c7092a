"""Checkpoints in the very form in which authors released them are known by their tensors, and start, teach and load."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retemper.cli import run
from retemper.engine.catalogue import find_setting
from retemper.engine.checkpoints.header import Facts, fitting_models, load_network
from retemper.engine.models import MODELS
from retemper.engine.models.wide_resnet import WideResNet
from retemper.engine.run.networks import NetworkLoader
from retemper.loaders import load_split

CPU = torch.device("cpu")
SHORT = "--epochs 1 --batch-size 32 --attack-steps 1 --holdout-per-class 1 --select-steps 1 --loader resident".split()


def norm(name: str, channels: int) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", torch.rand(channels) + 0.5
    yield f"{name}.bias", torch.randn(channels) / 10
    yield f"{name}.running_mean", torch.randn(channels) / 10
    yield f"{name}.running_var", torch.rand(channels) + 0.5
    yield f"{name}.num_batches_tracked", torch.tensor(7)


def conv(name: str, outputs: int, inputs: int, side: int) -> tuple[str, Tensor]:
    return f"{name}.weight", torch.randn(outputs, inputs, side, side) / (inputs * side**2) ** 0.5


def hot_start_state() -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of FRL's hot_start.pt, in the order of fair_robust's pre_resnet.py; the values are made up."""
    torch.manual_seed(0)
    yield conv("conv1", 64, 3, 3)
    inputs = 64
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for block in (f"layer{layer}.0", f"layer{layer}.1"):
            yield from norm(f"{block}.bn1", inputs)
            yield conv(f"{block}.conv1", width, inputs, 3)
            yield from norm(f"{block}.bn2", width)
            yield conv(f"{block}.conv2", width, width, 3)
            if inputs != width:
                yield conv(f"{block}.shortcut.0", width, inputs, 1)
            inputs = width
    yield "linear.weight", torch.randn(10, 512) / 512**0.5
    yield "linear.bias", torch.zeros(10)


@pytest.fixture(scope="module")
def hot_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frl") / "hot_start.pt"
    torch.save(dict(hot_start_state()), path)
    return path


@pytest.fixture(scope="module")
def cifar10(datafiles: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cifar10")
    datafiles.make_cifar10(root, n=4)
    return root


def test_frls_file_is_known_by_its_tensors(hot_start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fitting_models(hot_start) == ["preact_resnet18_frl"]
    assert run(["evaluate", str(hot_start), "--dataset", "cifar10"]) == 2
    assert "--model preact_resnet18_frl --dataset cifar10" in capsys.readouterr().err


def test_a_network_with_the_last_norm_is_not_taken_for_frls(tmp_path: Path) -> None:
    torch.save(MODELS["preact_resnet18"](10).state_dict(), tmp_path / "w.pt")
    assert fitting_models(tmp_path / "w.pt") == ["preact_resnet18"]


@pytest.mark.own_process
def test_frl_begins_with_its_file(hot_start: Path, cifar10: Path, tmp_path: Path) -> None:
    words = ["train", "frl:cifar10_preact_resnet18", "--data-root", str(cifar10), *SHORT, "--start", str(hot_start)]
    given = ["--student", "preact_resnet18_frl", "--lr", "1e-9", "--out", str(tmp_path / "run")]
    assert run([*words, *given]) == 0
    weights, state = load_file(tmp_path / "run/last.safetensors"), dict(hot_start_state())
    assert weights.keys() == state.keys()
    assert all(torch.allclose(weights[name], state[name], atol=1e-6) for name in state if name.endswith("weight"))
    assert run(["evaluate", str(tmp_path / "run"), "--attacks", "clean", "--limit", "2"]) == 0


def test_a_start_of_another_network_is_named(
    hot_start: Path, cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "frl:cifar10_preact_resnet18", "--data-root", str(cifar10), *SHORT, "--start", str(hot_start)]
    assert run([*words, "--out", str(tmp_path / "run")]) == 2
    said = "it is a preact_resnet18_frl, the student is a preact_resnet18: give --student preact_resnet18_frl"
    assert said in capsys.readouterr().err


def test_a_bare_teacher_of_another_architecture_is_recognised(
    hot_start: Path, cifar10: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = find_setting("rslad:cifar10_resnet18")[2].recipe
    split = load_split("cifar10", "train", cifar10)
    loader = NetworkLoader(split=split, data=recipe.data, eps=recipe.attack.eps, device=CPU, cache=cifar10)
    teacher, source = loader.teacher(recipe.networks.teacher_model, hot_start)
    assert teacher is not None and teacher(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert source is not None and source["model"] == "preact_resnet18_frl"
    assert f"the teacher {hot_start} is a preact_resnet18_frl, by its tensors" in capsys.readouterr().err


@pytest.mark.parametrize("dead", [False, True], ids=["as AdaAD loads it", "with the stage that is never read"])
def test_ltds_wide_resnet_is_taken_out_of_data_parallel(
    dead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(num_classes: int, channels: int = 3) -> WideResNet:
        return WideResNet(num_classes, channels, depth=34, widen=1)  # the same modules

    monkeypatch.setitem(MODELS, "wrn34_20", narrow)
    model = narrow(10).eval()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    if dead:
        block = {name.replace("block1", "sub_block1"): value for name, value in state.items() if "block1" in name}
        state |= block
    torch.save(state, tmp_path / "Chen2021LTD_34_20.pt")
    assert fitting_models(tmp_path / "Chen2021LTD_34_20.pt") == ["wrn34_20"]
    found = load_network(tmp_path / "Chen2021LTD_34_20.pt", Facts(model="wrn34_20", num_classes=10), CPU)
    image = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(found(image), model(image), rtol=1e-4, atol=1e-5)
