"""Folders of photographs of many sizes: stored at one side, seen in random boxes, evaluated in their middle."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from retemper.cli import run
from retemper.engine.checkpoints.header import read_facts
from retemper.engine.distributed.ranks import ALONE
from retemper.engine.models import create_model
from retemper.engine.predict import as_float
from retemper.engine.recipe import Recipe
from retemper.engine.run.data import load_data
from retemper.engine.speed.fold import Folded
from retemper.engine.state import clean_images
from retemper.errors import DataError
from retemper.kernels import resized_crop
from retemper.loaders import Split, beton_split, ffcv_problem, load_split
from retemper.loaders import split as split_module
from retemper.recipes.sat import SETTINGS

CLASSES, EACH = 4, {"train": 50, "val": 10}
NEEDS_FFCV = pytest.mark.skipif(ffcv_problem() is not None, reason="needs FFCV")
SMALL = "--image-size 24 --max-side 32 --student tiny_resnet --loader resident --batch-size 32 --device cpu".split()
SHORT = "--epochs 1 --attack-steps 1 --holdout-per-class 5 --select-steps 1 --cpu-threads 1 --seed 3".split()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 JPEG files of 30 to 70 pixels a side, smooth as photographs are, in class folders."""
    root, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for half, each in EACH.items():
        for k in range(CLASSES):
            (root / half / f"class{k}").mkdir(parents=True)
            for i in range(each):
                coarse = generator.integers(0, 256, (5, 5, 3), np.uint8) // 2 + 32 * k
                size = tuple(generator.integers(30, 71, 2).tolist())
                picture = Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
                picture.save(root / half / f"class{k}" / f"{i}.jpg", quality=95)
    return root


def train(photographs: Path, out: Path, *words: str) -> int:
    return run(
        [
            "train",
            "sat:imagenet100_resnet18",
            "--data-root",
            str(photographs),
            "--out",
            str(out),
            *SMALL,
            *SHORT,
            *words,
        ]
    )


def test_images_are_stored_larger_than_they_are_seen(photographs: Path) -> None:
    split = load_split("folder", "train", photographs, 24, 32)
    assert (split.shape, split.stored, split.images.shape) == ((24, 24, 3), (32, 32, 3), (200, 32, 32, 3))
    whole = load_split("folder", "train", photographs, 32)
    assert np.array_equal(split.images, whole.images) and split.fingerprint == whole.fingerprint
    test, large = (load_split("folder", "test", photographs, *sizes) for sizes in ((24, 32), (32,)))
    assert test.shape == test.stored == (24, 24, 3)
    assert np.array_equal(test.images, large.images[:, 4:28, 4:28]) and test.fingerprint != large.fingerprint
    assert torch.equal(as_float(split, torch.tensor([5]), torch.device("cpu"))[0], middle_of(split, 5))


def middle_of(split: Split, place: int) -> torch.Tensor:
    return torch.from_numpy(split.images[place, 4:28, 4:28]).permute(2, 0, 1) / 255


def test_large_splits_are_read_in_parts(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_split("folder", "test", photographs, 24, 32)
    monkeypatch.setattr(split_module, "HELD", 1000)
    parts = load_split("folder", "test", photographs, 24, 32)
    index = np.array([30, 2, 2])
    assert np.array_equal(parts.take(index), whole.images[index]) and "images" not in vars(parts)
    assert parts.take(np.arange(0)).shape == (0, 24, 24, 3)


def test_pixels_that_do_not_fit_into_memory_are_refused(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module.os, "sysconf", lambda name: 100)
    split = load_split("folder", "train", photographs, 24, 32)
    with pytest.raises(DataError, match="this machine has 0 GB of memory: convert it"):
        split.images  # noqa: B018


def test_views_follow_from_the_recipe(photographs: Path) -> None:
    recipe = SETTINGS["imagenet100_resnet18"].recipe.replace(image_size=24, max_side=32, crop_area=0.5, flip=False)
    image = torch.from_numpy(load_split("folder", "train", photographs, 24, 32).images[:8])
    view = torch.arange(8) * 2**55 - 1
    seen = clean_images(recipe, image, view)
    assert torch.equal(seen, resized_crop(image, view, size=24, least_area=0.5, flip=False))
    same = clean_images(recipe.replace(max_side=None, image_size=None), image, view)
    assert same.shape[2:] == (32, 32) and torch.equal(same[0], image[0].permute(2, 0, 1) / 255)


@pytest.mark.own_process
def test_trains_resumes_and_is_evaluated_in_the_middle(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(photographs, tmp_path / "run") == 0
    assert train(photographs, tmp_path / "cut", "--max-steps", "5") == 0
    assert train(photographs, tmp_path / "cut") == 0
    once, twice = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("run", "cut"))
    assert once == twice
    facts = read_facts(tmp_path / "run/last.safetensors")
    assert (facts.image_size, facts.max_side) == (24, 32)
    monkeypatch.setattr(split_module, "HELD", 1000)  # read in parts
    words = ["evaluate", str(tmp_path / "run"), "--attacks", "clean,fgsm", "--eps", "trained", "--device", "cpu"]
    assert run(words) == 0
    protocol = json.loads((tmp_path / "run/evaluation.json").read_text())["protocol"]
    assert (protocol["image_size"], protocol["max_side"], protocol["images"]) == (24, 32, 40)
    assert protocol["eps"] == pytest.approx(4 / 255)


@NEEDS_FFCV
@pytest.mark.own_process
def test_jpeg_copies_are_converted_read_and_trained_on(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(split_module, "HELD", 1000)
    file = tmp_path / "small.beton"
    words = ["convert", "folder", "--data-root", str(photographs), "--out", str(file), "--jpeg-quality", "90"]
    assert run([*words, "--image-size", "24", "--max-side", "32"]) == 0
    whole, split = load_split("folder", "train", photographs, 24, 32), beton_split(file)
    assert (split.shape, len(split)) == ((32, 32, 3), 200) and np.array_equal(split.labels, whole.labels)
    error = split.images.astype(int) - whole.images
    assert 0 < np.abs(error).mean() < 4  # copies
    assert np.array_equal(split.take(np.array([7, 3])), split.images[[7, 3]])
    words = ["--loader", "ffcv", "--cache", str(tmp_path)]
    assert train(photographs, tmp_path / "run", *words, "--beton", str(file)) == 0
    assert train(photographs, tmp_path / "run", *words) == 2  # the images themselves are other ones
    assert "jpeg_quality: 90, now None" in capsys.readouterr().err
    recipe = SETTINGS["imagenet100_resnet18"].recipe.replace(image_size=24, max_side=32, holdout_per_class=0)
    found = load_data(whole, recipe, ALONE, torch.device("cpu"), seed=0, data_root=None, cache=tmp_path, beton=file)
    assert found.split.fingerprint != whole.fingerprint  # a teacher's answers to copies are kept apart


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train sat:imagenet100_resnet18 --max-side 200 --show", "views of image_size = 224 are cut from it"),
        ("train sat:imagenet100_resnet18 --augment crop --show", "augment = 'crop' shows whole images"),
        ("train sat:imagenet100_resnet18 --cutout 8 --show", "augment = 'resized-crop' puts no squares"),
        ("convert folder --data-root {root} --image-size 24 --max-side 20 --out {out}", "views of --image-size 24"),
        ("convert digits --max-side 20 --out {out}", "digits has images of one size"),
        ("convert digits --jpeg-quality 90 --out {out}", "FFCV has JPEG copies of colour images, digits is grey"),
        ("convert folder --data-root {root} --jpeg-quality 0 --out {out}", "a quality lies in 1 .. 100"),
    ],
)
def test_says_what_cannot_be(
    words: str, said: str, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words.format(root=photographs, out=tmp_path / "out.beton").split()) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1 and not (tmp_path / "out.beton").exists()


@pytest.mark.parametrize("fault", ["empty", "broken"])
def test_a_folder_with_a_fault_is_refused_and_nothing_is_lost(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(2):
        (tmp_path / f"train/{k}").mkdir(parents=True)
        noise = np.random.default_rng(k).integers(0, 256, (90, 90, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"train/{k}/0.jpg")
    last = tmp_path / "train/1/0.jpg"
    last.unlink() if fault == "empty" else last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    out = tmp_path / "old.beton"
    out.write_bytes(b"old")
    words = ["convert", "folder", "--data-root", str(tmp_path), "--max-side", "32", "--out", str(out)]
    assert run(words) == (3 if ffcv_problem() is None or fault == "empty" else 2)
    error = capsys.readouterr().err.strip()
    if ffcv_problem() is None:
        assert ("holds no images" if fault == "empty" else "0.jpg is damaged") in error.splitlines()[-1]
    assert out.read_bytes() == b"old" and not list(tmp_path.glob(".*tmp"))


def test_options_without_effect_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "sat:imagenet100_resnet18", "--padding", "2", "--show"]) == 0
    assert "so --padding changes nothing" in capsys.readouterr().err
    assert run(["train", "sat:digits", "--crop-area", "0.5", "--show"]) == 0
    assert "so it changes nothing" in capsys.readouterr().err


def test_the_strong_preset_keeps_the_views() -> None:
    recipe: Recipe = SETTINGS["imagenet100_resnet18"].recipe
    assert recipe.as_preset("strong").data == recipe.data


@pytest.mark.parametrize("name", ["imagenet_resnet18", "imagenet_resnet50"])
def test_networks_for_imagenet(name: str) -> None:
    network = create_model(name, 1000).eval()
    count = sum(one.numel() for one in network.parameters())
    assert count == {"imagenet_resnet18": 11_689_512, "imagenet_resnet50": 25_557_032}[name]
    names = network.state_dict().keys()
    assert {"conv1.weight", "layer2.0.downsample.1.running_var", "layer4.1.conv2.weight", "fc.bias"} <= names
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(Folded(network, torch.float32, "plain")(image), network(image), rtol=1e-3, atol=1e-4)


def test_a_network_of_one_size_is_tried_on_images_of_that_size(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(24 * 24 * 3, num_classes))\n"
    )
    words = ["--student", f"{tmp_path / 'net.py'}:build", "--max-steps", "1"]
    assert train(photographs, tmp_path / "run", *words) == 0
