"""Networks of timm as students and teachers, through every verb; without the package they are asked for in a line."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retemper.cli import run
from retemper.engine.checkpoints.header import load_network, read_facts
from retemper.engine.models import channels_last, create_model
from retemper.engine.models.from_timm import TimmNetwork
from retemper.engine.speed.fold import Folded
from retemper.errors import UsageError
from retemper.packages import import_package

CPU = torch.device("cpu")
VIT, CONVNEXT = "timm:vit_tiny_patch16_224", "timm:convnext_atto"
SHORT = ["--epochs", "1", "--max-steps", "2", "--batch-size", "2", "--attack-steps", "1", "--holdout-per-class", "0"]
SHORT += ["--loader", "resident", "--device", "cpu"]


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    """The package, where it is installed; torchvision's library may be absent."""
    try:
        return import_package("timm")
    except ImportError:
        pytest.skip("timm is not installed")


@pytest.fixture(scope="module")
def images(datafiles: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 64 x 64 images with three classes."""
    datafiles.make_tiny_imagenet(root := tmp_path_factory.mktemp("images"))
    return root


def trained(student: str, images: Path, out: Path) -> Path:
    words = ["train", "sat:tiny_imagenet_preact_resnet18", "--student", student, "--data-root", str(images), *SHORT]
    assert run([*words, "--out", str(out), "--ema-decay", "0.5", "--average", "ema"]) == 0
    return out


@pytest.mark.own_process
def test_a_vision_transformer_learns_teaches_and_is_given_on(
    timm: ModuleType, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, root = trained(VIT, images, tmp_path / "run"), ["--data-root", str(images), "--device", "cpu"]
    assert f"{VIT} is built for images of 64 x 64; timm's own weights are for 224 x 224" in capsys.readouterr().err
    header, state = read_facts(out / "last.safetensors"), load_file(out / "last.safetensors")
    assert (header.model, header.side) == (VIT, 64) and state["pos_embed"].shape == (1, 17, 192) and "mean" not in state
    suite = ["--attacks", "fgsm,autoattack", "--suite", "fast", "--fold", "--limit", "2"]
    assert run(["evaluate", str(out), "--weights", "last", *suite, *root]) == 0
    assert "AutoAttack looks at the network itself" in capsys.readouterr().err
    content = json.loads((out / "evaluation-last.json").read_text())
    assert content["protocol"]["attacks"]["autoattack-fast"]["fold"] is False

    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "bare.pt")
    teacher = ["--teacher", str(tmp_path / "bare.pt"), "--teacher-model", VIT, "--student", "tiny_resnet"]
    words = ["train", "rslad:tiny_imagenet_preact_resnet18", *SHORT, "--data-root", str(images), *teacher]
    assert run([*words, "--cache", str(tmp_path), "--out", str(tmp_path / "taught")]) == 0
    assert run(["evaluate", str(tmp_path / "bare.pt"), "--model", CONVNEXT, "--dataset", "tiny-imagenet", *root]) == 3
    assert "another architecture" in capsys.readouterr().err

    assert run(["export", str(out), "--weights", "last", "--out", str(tmp_path / "hub")]) == 0
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "hub/README.md").read_text(), flags=re.DOTALL)[0]
    monkeypatch.chdir(tmp_path / "hub")
    monkeypatch.syspath_prepend(str(tmp_path / "hub"))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    given: dict[str, Any] = {}
    exec(code, given)
    pixels = torch.rand(2, 3, 64, 64)
    ours = load_network(out / "last.safetensors", header, CPU)
    torch.testing.assert_close(given["model"](pixels), ours(pixels))


def test_a_convnext_learns_and_is_evaluated(timm: ModuleType, images: Path, tmp_path: Path) -> None:
    out = trained(CONVNEXT, images, tmp_path / "run")
    assert read_facts(out / "last.safetensors").side is None
    words = ["--weights", "last", "--attacks", "clean", "--limit", "2", "--device", "cpu"]
    assert run(["evaluate", str(out), "--data-root", str(images), *words]) == 0


def test_pixels_are_normalised_inside_as_timm_says(timm: ModuleType) -> None:
    network = create_model("timm:resnet10t", 7, image_size=64).eval()
    assert isinstance(network, TimmNetwork)
    plain = timm.create_model("resnet10t", num_classes=7).eval()
    plain.load_state_dict(network.state_dict())
    pixels, known = torch.rand(2, 3, 64, 64), plain.pretrained_cfg
    mean, std = (torch.tensor(known[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(network(pixels), plain((pixels - mean) / std))
    assert create_model("timm:resnet10t", 7, channels=1)(pixels[:, :1]).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002"])  # torch's batch norm, and timm's with its activation
def test_it_is_folded_in_half_precision_too(name: str, timm: ModuleType) -> None:
    torch.manual_seed(0)
    network = channels_last(create_model(f"timm:{name}", 10, image_size=32), CPU).eval()
    pixels = torch.rand(2, 3, 32, 32)
    expected = network(pixels)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        found = Folded(network, dtype, "fused")(pixels).float()
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_nothing_is_dropped_at_random(timm: ModuleType) -> None:
    network = create_model("timm:xcit_nano_12_p16_224", 3, image_size=32)
    torch.manual_seed(0)
    pixels, before = torch.rand(2, 3, 32, 32), torch.get_rng_state()
    network(pixels)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_name_that_is_none_is_told_the_nearest(timm: ModuleType) -> None:
    with pytest.raises(UsageError, match="timm has no network 'resnet19'; the nearest is timm:resnet18"):
        create_model("timm:resnet19", 10)
    with pytest.raises(UsageError, match=r"timm:resnet18\.none"):
        create_model("timm:resnet18.none", 10)


def test_timm_is_asked_for_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert run(["train", "sat:digits", "--student", "timm:not_there"]) == 2
    assert "timm:not_there needs the package timm" in (told := capsys.readouterr().err) and "pip install" in told
    assert run(["evaluate", "timm:resnet18", "--dataset", "digits"]) == 2
    assert "has no trained weights" in capsys.readouterr().err
    assert run(["train", "sat:digits", "--student", "tim:resnet18"]) == 2
    assert "timm:NAME" in capsys.readouterr().err


def test_an_evened_network_of_one_size_says_it(
    timm: ModuleType, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = create_model("timm:test_vit", 3, image_size=64)
    torch.save(network.state_dict(), tmp_path / "network.pt")
    for what in ("subject.require_learned", "images.LEAST"):
        stand_in = 1 if what.endswith("LEAST") else lambda *_: None
        monkeypatch.setattr(f"retemper.engine.even.{what}", stand_in)
    words = ["--model", "timm:test_vit", "--dataset", "tiny-imagenet", "--holdout", "2", "--data-root", str(images)]
    words += ["--by", "norm", "--device", "cpu", "--out", str(tmp_path / "evened")]
    assert run(["even", str(tmp_path / "network.pt"), *words]) == 0
    assert read_facts(tmp_path / "evened/best.safetensors").side == 64
