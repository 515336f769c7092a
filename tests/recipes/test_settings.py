"""Every setting, full size too, starts, takes two steps and is evaluated, on files in its data set's own format."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from retemper.engine import create_model, save_weights
from retemper.engine.catalogue import find_setting, method_module, methods
from retemper.engine.cli import run
from retemper.loaders import load_split

SHORT = "--epochs 1 --batch-size 2 --attack-steps 1 --holdout-per-class 0 --images-per-class none".split()
NAMES = [f"{method}:{setting}" for method in methods() for setting in method_module(method).SETTINGS]
LARGE = [name for name in NAMES if not name.endswith((":digits", "_small"))]


@pytest.fixture(scope="module")
def data_root(datafiles: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Four training images of a data set, made once."""
    made: dict[str, Path] = {}
    makers = {
        "cifar10": lambda root: datafiles.make_cifar10(root, n=1),
        "cifar100": lambda root: datafiles.make_cifar100(root, n=4, version="python"),
        "tiny-imagenet": lambda root: datafiles.make_tiny_imagenet(root, n=1),
        "fashion-mnist": lambda root: datafiles.make_fashion_mnist(root, n=4),
    }

    def make(dataset: str) -> Path:
        if dataset not in made:
            made[dataset] = tmp_path_factory.mktemp(dataset)
            makers[dataset](made[dataset])
        return made[dataset]

    return make


@pytest.mark.parametrize("name", LARGE)
def test_starts_steps_and_is_evaluated(name: str, data_root: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = find_setting(name)[2].recipe
    root = data_root(recipe.dataset)
    classes = len(load_split(recipe.dataset, "train", root).classes)
    channels = 1 if recipe.dataset == "fashion-mnist" else 3
    words = ["train", name, "--data-root", str(root), "--out", str(tmp_path / "run"), "--loader", "resident", *SHORT]
    if recipe.teacher_model:
        teacher = tmp_path / "teacher.safetensors"
        save_weights(teacher, create_model(recipe.teacher_model, classes, channels=channels))
        words += ["--teacher", str(teacher)]
    assert run(words) == 0
    (line,) = (json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert len(line["class_loss"]) == classes and line["loss"] > 0
    for state in find_setting(name)[2].recipe.class_state(classes):
        assert len(line[state]) == classes
    assert run(["evaluate", str(tmp_path / "run"), "--attacks", "clean,fgsm", "--limit", "2"]) == 0
    protocol = json.loads((tmp_path / "run/evaluation.json").read_text())["protocol"]
    assert (protocol["dataset"], protocol["eps"]) == (recipe.dataset, recipe.eps)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is_and_what_was_measured(name: str) -> None:
    method, _, found = find_setting(name)
    assert found.note and found.status
    module = method_module(method)
    assert module.__doc__ and module.__doc__.splitlines()[0].endswith(").")


@pytest.mark.parametrize("name", NAMES)
def test_its_teacher_recipe_trains_its_teacher(name: str) -> None:
    recipe = find_setting(name)[2].recipe
    if recipe.teacher_recipe:
        teacher = find_setting(recipe.teacher_recipe)[2].recipe
        assert (teacher.student, teacher.dataset) == (recipe.teacher_model, recipe.dataset)
        assert (teacher.image_size, teacher.teacher_model) == (recipe.image_size, None)
