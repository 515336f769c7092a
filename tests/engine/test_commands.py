"""Commands that are told to the user: they run as they stand, in any folder, and go on with what they are about."""

import json
import shlex
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from retemper.cli import run
from retemper.commands import command
from retemper.engine import create_model, save_weights
from retemper.engine.catalogue import find_setting, override
from retemper.engine.evaluation.protocols import attack_options
from retemper.engine.recipe import Recipe
from retemper.engine.report.read import read_run
from retemper.engine.run.changed import flat_options
from retemper.engine.run.commands import absolute, evaluate_again, train_again
from retemper.engine.run.job import Job
from retemper.engine.run.train import _next

SHORT = "--epochs 1 --attack-steps 1 --holdout-per-class 0 --batch-size 16 --loader resident".split()


def words(line: str) -> list[str]:
    """Return what `retemper` is given by a command."""
    program, *rest = shlex.split(line)
    assert program == "retemper"
    return rest


def test_words_are_quoted_and_absent_options_left_out() -> None:
    line = command("retemper", "evaluate", Path("my runs/a"), data_root=Path("it's here"), out=None, limit=20)
    assert shlex.split(line) == ["retemper", "evaluate", "my runs/a", "--data-root", "it's here", "--limit", "20"]


def test_paths_are_written_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../net.py:build") == f"{tmp_path}/net.py:build"
    assert absolute("robustbench:Known2020@cifar10/Linf") == "robustbench:Known2020@cifar10/Linf"
    assert absolute(None) is None


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"variant": "released", "epochs": 7, "lr": 1 / 3, "lr_drops": (), "flip": False},
        {"variant": "released", "temperature_rate": 0.25, "image_size": 14, "images_per_class": None},
    ],
)
def test_the_command_for_a_run_makes_the_recipe_of_that_run(change: dict[str, object]) -> None:
    own = find_setting("absld:fashion_mnist_small")[2].recipe
    recipe = own.as_variant("released") if "variant" in change else own
    recipe = recipe.replace(**{name: value for name, value in change.items() if name != "variant"})
    config = {"method": "absld", "setting": "fashion_mnist_small", "seed": 3, "data_root": "/my data"}
    config |= {"recipe": flat_options(json.loads(json.dumps(recipe.grouped()))), "teacher": {"path": "/a b/teacher"}}
    train, name, *rest = words(train_again(config, Path("runs/x")))
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    assert (train, name) == ("train", "absld:fashion_mnist_small")
    where = {"out": "runs/x", "seed": "3", "data-root": "/my data", "teacher": "/a b/teacher"}
    assert {option: given.pop(f"--{option}") for option in where} == where
    again: Recipe = override(own, {option[2:].replace("-", "_"): text for option, text in given.items()})
    assert again == recipe


def test_a_run_by_few_steps_is_to_be_checked_for_masked_gradients() -> None:
    def told(**options: Any) -> str:
        recipe = find_setting("rslad:digits")[2].recipe.replace(**options)
        return _next(cast(Job, SimpleNamespace(recipe=recipe, out=Path("r"), beton=None, data_root=None)))

    assert told() == told(attack_steps=4) == "retemper evaluate r"
    few = (told(attack="pgi"), told(attack="pgd3"), told(attack_steps=3))
    assert set(few) == {"retemper evaluate r --check"}


def test_a_relative_root_and_teacher_are_found_from_another_folder(
    tmp_path: Path, datafiles: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datafiles.make_fashion_mnist(tmp_path / "my data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(["train", "sat:fashion_mnist_small", "--data-root", "my data", "--out", "my teacher", *SHORT]) == 0
    assert "next: retemper evaluate 'my teacher' --check\n" in capsys.readouterr().err
    taught = ["--teacher", "my teacher", "--data-root", "my data", "--out", "student", *SHORT]
    assert run(["train", "rslad:fashion_mnist_small", *taught]) == 0
    config = json.loads((tmp_path / "student/config.json").read_text())
    assert config["data_root"] == str(tmp_path / "my data") and config["out"] == str(tmp_path / "student")
    assert config["teacher"]["path"] == str(tmp_path / "my teacher")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(["evaluate", "../student", "--attacks", "clean"]) == 0
    content = json.loads((tmp_path / "student/evaluation.json").read_text())
    assert content["protocol"]["data_root"] == str(tmp_path / "my data")
    (tmp_path / "my data").rename(tmp_path / "moved")
    capsys.readouterr()
    assert run(["evaluate", "../student", "--attacks", "clean"]) == 3
    said = capsys.readouterr().err
    assert "config.json names, is not a folder: say with --data-root where fashion-mnist lies now" in said
    assert run(["evaluate", "../student", "--attacks", "clean", "--data-root", "../moved"]) == 0
    line = read_run(tmp_path / "student").evaluate
    assert line == command("retemper", "evaluate", tmp_path / "student", data_root=tmp_path / "moved")
    shutil.rmtree(tmp_path / "elsewhere")


def test_the_command_for_a_network_from_elsewhere_goes_on_with_its_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_weights("a net.pt", create_model("tiny_resnet", 10, channels=1))
    told = ["--model", "tiny_resnet", "--dataset", "digits", "--eps", "0.1"]
    protocol = ["--limit", "20", "--seed", "3", "--batch-size", "10", "--out", "of it"]
    assert run(["evaluate", "a net.pt", "--attacks", "clean", *told, *protocol]) == 0
    line = read_run(tmp_path / "of it").evaluate
    assert line.startswith(f"retemper evaluate '{tmp_path}/a net.pt' --model tiny_resnet --dataset digits --eps 0.1 ")
    monkeypatch.chdir("/")
    assert run([*words(line), "--attacks", "fgsm"]) == 0
    assert json.loads((tmp_path / "of it/evaluation.json").read_text())["attacks"].keys() == {"clean", "fgsm"}
    assert {path.name for path in (tmp_path / "of it").iterdir()} >= {"evaluation.json", "evaluation.csv"}
    assert not (tmp_path / "of it/evaluation.1.json").exists()  # the protocol was the same


def test_a_suite_of_autoattack_is_named_as_the_command_line_takes_it(tmp_path: Path) -> None:
    protocol = {"images": 100, "attacks": {"autoattack-fast": {"images": 50}, "autoattack": {"images": 100}}}

    def told(result: str) -> list[str]:
        return words(evaluate_again(tmp_path, {"protocol": protocol}, **attack_options(result, protocol)))

    for name in ("cw", "autoattack"):  # of which the evaluation has none yet
        assert told(f"{name}-fair-ard")[-4:] == f"--attacks {name} --protocol fair-ard".split()
    assert told("pgd-sat-rslad")[-4:] == "--attacks pgd-sat --protocol rslad".split()
    assert told("autoattack-fast")[-6:] == "--attacks autoattack --suite fast --autoattack-limit 50".split()
    assert told("autoattack")[-2:] == ["--attacks", "autoattack"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "resnet18"], "is a run of tiny_resnet_wide: leave out --model"),
        (["--fold"], "--fold is for AutoAttack"),
        (["--suite", "fast"], "--suite fast is for AutoAttack"),
        (["--autoattack-limit", "10"], "--autoattack-limit is for AutoAttack"),
        (["--budget", "1"], "--budget is for AutoAttack"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    given: list[str], said: str, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(teacher), "--attacks", "clean", *given]) == 2
    assert said in capsys.readouterr().err


def test_weights_are_chosen_of_a_run_alone(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(teacher / "best.safetensors"), "--weights", "last"]) == 2
    assert "is one file, leave it out" in capsys.readouterr().err
