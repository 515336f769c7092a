"""Settings of full size start, take two steps and are evaluated, on files in their data set's own format.

All data and networks that settings combine, each with the method whose turn it is: methods share the options of
recipes/settings.py, and tests/recipes/test_methods_run.py trains each of them on digits.
WRN-34-10 and -20 would take most of the time and of the memory, and are narrow here; tests/engine/test_models.py has
the first whole.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from types import ModuleType

import pytest
import torch

from retemper.cli import run
from retemper.engine import create_model, save_weights
from retemper.engine.catalogue import find_setting, method_module, methods
from retemper.engine.checkpoints.published import published
from retemper.engine.models import MODELS
from retemper.engine.models.wide_resnet import WideResNet
from retemper.loaders import load_split, usual_eps
from retemper.recipes.data_sets import SMALL

SHORT = "--epochs 1 --batch-size 2 --attack-steps 1 --holdout-per-class 0 --images-per-class none".split()
NAMES = [f"{method}:{setting}" for method in methods() for setting in method_module(method).SETTINGS]

ELSEWHERE = ("digits", *SMALL, "imagenet100")  # other tests train these: on a CPU, or from folders of images


def large() -> Iterator[str]:
    """The names of the settings to run: of each combination one, by the method that has run the fewest."""
    ran: Counter[str] = Counter()
    large = [name for name in NAMES if not name.partition(":")[2].startswith(ELSEWHERE)]
    for _, names in groupby(sorted(large, key=combined), key=combined):
        name = min(names, key=lambda name: ran[name.partition(":")[0]])
        ran[name.partition(":")[0]] += 1
        yield name


def combined(name: str) -> tuple[str, ...]:
    """The data, the student and the teacher of a setting."""
    recipe = find_setting(name)[2].recipe
    return recipe.data.dataset, recipe.networks.student, recipe.networks.teacher_model or ""


@pytest.fixture(scope="module")
def data_root(datafiles: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """A few training images of a data set, or two of every class; made once."""
    made: dict[tuple[str, bool], Path] = {}
    makers = {
        "cifar10": lambda root, two: datafiles.make_cifar10(root, n=4 if two else 1),
        "cifar100": lambda root, two: datafiles.make_cifar100(root, n=200 if two else 4, version="python"),
        "svhn": lambda root, two: datafiles.make_svhn(root, n=40 if two else 4),
        "tiny-imagenet": lambda root, two: datafiles.make_tiny_imagenet(root, n=2 if two else 1),
        "fashion-mnist": lambda root, two: datafiles.make_fashion_mnist(root, n=20 if two else 4),
    }

    def make(dataset: str, two: bool) -> Path:
        if (dataset, two) not in made:
            made[dataset, two] = tmp_path_factory.mktemp(dataset)
            makers[dataset](made[dataset, two], two)
        return made[dataset, two]

    return make


@pytest.mark.own_process
@pytest.mark.parametrize("name", [*large()])
def test_starts_steps_and_is_evaluated(
    name: str, data_root: Callable[[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "wrn34_10", lambda classes, channels=3: WideResNet(classes, channels, 34, 1))
    monkeypatch.setitem(MODELS, "wrn34_20", lambda classes, channels=3: WideResNet(classes, channels, 34, 2))
    recipe = find_setting(name)[2].recipe
    learns_from_held_out = bool(recipe.method.validates_by) or recipe.optim.average_above > 0
    root = data_root(recipe.data.dataset, learns_from_held_out)
    classes = len(load_split(recipe.data.dataset, "train", root).classes)
    channels = 1 if recipe.data.dataset == "fashion-mnist" else 3
    words = ["train", name, "--data-root", str(root), "--out", str(tmp_path / "run"), "--loader", "resident", *SHORT]
    if learns_from_held_out:
        words += "--holdout-per-class 1 --select-steps 1 --batch-size 32".split()
    start = recipe.networks.student if recipe.networks.start_recipe else None
    teachers = {"teacher": recipe.networks.teacher_model, "clean-teacher": recipe.networks.clean_teacher_model}
    for option, model in (teachers | {"start": start}).items():
        if model:
            path = tmp_path / f"{option}.safetensors"
            save_weights(path, create_model(model, classes, channels=channels))
            words += [f"--{option}", str(path)]
    assert run(words) == 0
    (line,) = (json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert len(line["class_loss"]) == classes and line["loss"] > 0
    for state, value in recipe.method.class_state(classes, recipe).items():
        assert torch.tensor(line[state]).shape == value.shape
    assert run(["evaluate", str(tmp_path / "run"), "--attacks", "clean,fgsm", "--limit", "2"]) == 0
    protocol = json.loads((tmp_path / "run/evaluation.json").read_text())["protocol"]
    assert (protocol["dataset"], protocol["eps"]) == (recipe.data.dataset, usual_eps(recipe.data.dataset))


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is_and_what_was_measured(name: str) -> None:
    method, _, found = find_setting(name)
    assert found.note and found.status
    module = method_module(method)
    assert module.__doc__ and module.__doc__.splitlines()[0].endswith(").")


@pytest.mark.parametrize("name", NAMES)
def test_what_it_builds_on_is_trained_by_the_recipe_that_it_names(name: str) -> None:
    recipe = find_setting(name)[2].recipe
    assert bool(recipe.networks.clean_teacher_model) == bool(recipe.method.clean_teacher_sees)
    for model, trained_by, attacked in (
        (recipe.networks.teacher_model, recipe.networks.teacher_recipe, True),
        (recipe.networks.clean_teacher_model, recipe.networks.clean_teacher_recipe, False),
        (recipe.networks.student, recipe.networks.start_recipe, True),
    ):
        if trained_by and trained_by.startswith("robustbench:"):
            known = published(trained_by)
            assert known is not None and known.dataset == recipe.data.dataset
        elif trained_by:
            found = find_setting(trained_by)[2].recipe
            assert (found.networks.student, found.data.dataset) == (model, recipe.data.dataset)
            assert (found.data.image_size, found.networks.teacher_model) == (recipe.data.image_size, None)
            assert bool(found.attack.steps) is attacked and bool(found.selection.select_steps) is attacked
            assert attacked or found.attack.eps == recipe.attack.eps  # what it is evaluated at
