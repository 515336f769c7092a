"""Presets: what `strong` sets in every setting, what is typed wins, and how files, folders and commands name it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retemper.cli import run
from retemper.engine import Recipe
from retemper.engine.catalogue import find_setting, method_module, methods, override
from retemper.engine.run.changed import flat_options
from retemper.engine.run.commands import train_again
from retemper.engine.run.job import Job, default_out
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.teachers import carried_options

ALL = [f"{method}:{name}" for method in methods() for name in method_module(method).SETTINGS]
SHORT = "--epochs 2 --attack-steps 1 --holdout-per-class 5 --select-steps 1 --batch-size 256 --device cpu".split()

SETTINGS = {
    "rslad:digits": 0.97,
    "rslad:fashion_mnist_small": 0.98,
    "rslad:cifar10_small": 0.99,
    "rslad:cifar10_resnet18": 0.999,
}


def recipe_of(name: str, **texts: str) -> Recipe:
    return override(find_setting(name)[2].recipe, texts)


def test_every_setting_takes_both_presets() -> None:
    for name in ALL:
        own = find_setting(name)[2].recipe
        assert recipe_of(name, preset="paper") == own, name
        strong = recipe_of(name, preset="strong")
        before, now = own.flat(), strong.flat()
        changed = {option for option in now if now[option] != before[option]}
        always = {"preset", "lr_schedule", "decay_norms"}
        average = {"average", "ema_decay", "ema_warmup"} & changed
        assert always <= changed <= always | average | {
            "weight_decay", "label_smoothing", "awp_gamma", "awp_from", "augment",
        }, name  # fmt: skip
        assert (now["lr_schedule"], now["weight_decay"], now["decay_norms"]) == ("onecycle", 5e-4, False)
        assert now["label_smoothing"] == (0.1 if own.method.smooths_labels() else 0.0), name
        assert now["average"] != "none" and now["awp_gamma"] > 0
        assert bool(average) == (before["average"] == "none"), name  # a method's own average stays
        assert before["awp_gamma"] in (0, now["awp_gamma"]) and 1 <= now["awp_from"] <= now["epochs"]
        if "augment" in now:
            small = now["dataset"] == "digits" or (now["image_size"] or 32) <= 16
            assert (now["augment"] == before["augment"]) == (small or before["augment"] == "resized-crop"), name


def test_what_is_typed_wins_over_the_preset_which_follows_the_epochs() -> None:
    recipe = recipe_of("rslad:cifar10_resnet18", preset="strong", weight_decay="0.001", average="none", epochs="100")
    optim = recipe.optim
    assert (optim.weight_decay, optim.average, optim.epochs, optim.lr_schedule) == (1e-3, "none", 100, "onecycle")
    assert (optim.awp_from, recipe_of("rslad:cifar10_resnet18", preset="strong").optim.awp_from) == (6, 16)
    assert recipe_of("rslad:digits", preset="strong", lr_schedule="cosine").optim.lr_schedule == "cosine"
    both = recipe_of("rslad:cifar10_resnet18", preset="strong", variant="released")
    assert (both.method.variant, both.selection.select_on, both.optim.preset) == ("released", "test", "strong")


def test_a_strong_student_learns_from_the_teacher_of_any_other(tmp_path: Path) -> None:
    teacher = find_setting("sat:digits")[2].recipe
    for texts, carried in (({}, {}), ({"eps": "0.1", "attack_step": "0.025"}, {"eps": 0.1, "attack_step": 0.025})):
        job = Job(
            method="rslad", setting="digits", recipe=recipe_of("rslad:digits", preset="strong", **texts),
            out=tmp_path / "x", cache=tmp_path, device=torch.device("cpu"),
        )  # fmt: skip
        assert carried_options(job, teacher) == carried
    large = recipe_of("rslad:fashion_mnist_resnet18", preset="strong")
    job = Job(
        method="rslad", setting="fashion_mnist_resnet18", recipe=large, out=tmp_path / "x", cache=tmp_path,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert carried_options(job, find_setting("sat:fashion_mnist_preact_resnet18")[2].recipe) == {}


def test_runs_of_two_presets_have_two_folders() -> None:
    assert default_out("absld", "digits", 3) == Path("runs/absld-digits-seed3")
    assert default_out("absld", "digits", 3, "strong") == Path("runs/absld-digits-strong-seed3")


def test_a_strong_run_is_named_trained_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "trades:digits_student", "--preset", "strong", *SHORT, "--ema-decay", "0.5"]
    assert run([*command, "--max-steps", "8"]) == 0
    out = tmp_path / "runs" / "trades-digits_student-strong-seed0"
    config: dict[str, Any] = RunFolder(out).read_config()
    shown = flat_options(json.loads((out / "config.json").read_text())["recipe"])
    assert shown["preset"] == "strong" and shown["awp_from"] == 2 and shown["ema_warmup"] is True
    again = train_again(config, out)
    assert "--preset strong" in again and "--lr-schedule" not in again and "--awp" not in again
    assert "--ema-decay 0.5" in again and "--epochs 2" in again and "--weight-decay" not in again
    assert run(again.split()[1:]) == 0  # the same run, to its end
    rates = [json.loads(line)["lr"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rates) == 2 and rates[0] > rates[1]
    assert run(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.md").read_text()
    assert "| preset | strong |" in page and "| learning rate | 0.1, by onecycle |" in page


def test_another_preset_in_the_same_folder_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "sat:digits_student", *SHORT, "--max-steps", "1", "--out", str(tmp_path / "run")]
    assert run(words) == 0
    assert run([*words, "--preset", "strong"]) == 2
    assert "preset: paper, now strong" in capsys.readouterr().err
    assert run([*words, "--preset", "heavy"]) == 2
    assert "paper, strong" in capsys.readouterr().err


def test_an_average_of_few_epochs_forgets_their_beginning() -> None:
    decays = {name: find_setting(name)[2].recipe.named_in({"preset": "strong"}).optim.ema_decay for name in SETTINGS}
    assert decays == SETTINGS
