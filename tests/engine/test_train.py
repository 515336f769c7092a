"""Runs: what they leave behind, that they learn by class, and that no kill loses or changes anything."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retemper.cli import run
from retemper.engine import create_model, load_checkpoint, save_weights
from retemper.engine.checkpoints.header import read_header
from retemper.engine.run.changed import flat_options
from retemper.engine.run.run_folder import RunFolder
from retemper.recipes.absld import next_temperature

Train = Callable[..., int]

STEPS = 5  # an epoch


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """An undisturbed ABSLD run of three epochs."""
    out = tmp_path_factory.mktemp("whole") / "absld"
    assert run(["train", *command(teacher, out)]) == 0
    return out


def command(teacher: Path, out: Path) -> list[str]:
    short = ["--attack-steps", "2", "--holdout-per-class", "5", "--select-steps", "2", "--batch-size", "256"]
    where = ["absld:digits", "--teacher", str(teacher), "--out", str(out), "--device", "cpu"]
    return [*where, "--epochs", "3", "--select-every", "1", "--select-from", "1", *short]


def test_the_folder_holds_what_the_contract_says(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert (config["method"], config["setting"], config["seed"]) == ("absld", "digits", 0)
    assert config["recipe"]["optim"]["epochs"] == 3 and config["recipe"]["attack"]["eps"] == 0.15
    assert {"retemper", "torch", "triton"} <= config["versions"].keys() and "device" in config and "commit" in config
    for number, line in enumerate(lines(whole), 1):
        assert line["epoch"] == number
        assert {"loss", "lr", "images_per_second", "seconds"} <= line.keys() and line["peak_memory_mib"] > 10
        for name in ("class_loss", "class_accuracy", "temperature_adv", "temperature_clean"):
            assert len(line[name]) == 10
    for name in ("last", "best"):
        load_checkpoint(whole / f"{name}.safetensors", create_model("tiny_resnet", 10))
    assert torch.load(whole / "last.state", weights_only=True)["epoch"] == 3


def test_temperatures_follow_the_classes_losses(whole: Path) -> None:
    first, second, _ = lines(whole)
    assert first["temperature_adv"] == [1.0] * 10
    expected = next_temperature(torch.ones(10), torch.tensor(first["class_loss"]), 0.3)
    torch.testing.assert_close(torch.tensor(second["temperature_adv"]), expected)
    assert max(abs(value - 1) for value in second["temperature_adv"]) == pytest.approx(0.3)


def test_the_best_epoch_is_the_one_with_the_largest_average_and_worst(whole: Path) -> None:
    scores = [line["holdout"]["average"] + line["holdout"]["worst"] for line in lines(whole)]
    best = torch.load(whole / "last.state", weights_only=True)["best"]
    assert best["epoch"] == scores.index(max(scores)) + 1
    assert best["score"] == pytest.approx(max(scores))


def test_no_epoch_before_the_chosen_first_one_is_the_best(train: Train, tmp_path: Path) -> None:
    options = ["--epochs", "3", "--select-every", "1", "--select-from", "3", "--lr-drops", "1", "--lr-factor", "1e-9"]
    assert train("rslad:digits", tmp_path / "run", *options) == 0  # nothing moves after the first epoch: equal scores
    assert torch.load(tmp_path / "run/last.state", weights_only=True)["best"]["epoch"] == 3
    assert all("holdout" in line for line in lines(tmp_path / "run"))


def test_the_same_command_again_changes_nothing(whole: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert run(["train", *command(teacher, whole)]) == 0
    assert "all 3 epochs are done" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_two_seeds_differ_and_one_seed_repeats(train: Train, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train("rslad:digits", tmp_path / name, "--seed", seed, "--epochs", "1") == 0
    a, b, c = (load_file(tmp_path / name / "last.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_kill_9_loses_at_most_an_epoch_and_changes_no_bit(
    whole: Path, teacher: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    words = ["train", *command(teacher, out), "--cache", str(tmp_path / "cache")]
    for epoch, step in enumerate((3, STEPS + 3, STEPS + 3), 1):  # in the middle of each epoch; each begins anew
        assert start(*words, at={step: signal.SIGKILL}).wait()[0] == -signal.SIGKILL
        assert not (out / "metrics.jsonl").exists() or len(lines(out)) == epoch - 1
    with open(out / "metrics.jsonl", "a") as metrics:  # as if killed between the metrics and the state, or in a write
        metrics.write(json.dumps({"epoch": 3, "loss": -1.0}) + '\n{"epoch": 2, "lo')
    assert start(*words).wait()[0] == 0
    undisturbed, resumed = (load_file(path / "last.safetensors") for path in (whole, out))
    assert all(torch.equal(undisturbed[key], resumed[key]) for key in undisturbed)
    for one, other in zip(lines(whole), lines(out), strict=True):
        for name in ("seconds", "images_per_second", "peak_memory_mib"):
            del one[name], other[name]
        assert one == other
    states = [torch.load(path / "last.state", weights_only=True) for path in (whole, out)]
    assert states[0]["best"] == states[1]["best"]
    for name, value in states[0]["class_state"].items():
        assert torch.equal(value, states[1]["class_state"][name])


def test_a_run_is_not_continued_as_another(
    whole: Path, teacher: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = (whole / "last.state").read_bytes()
    assert run(["train", *command(teacher, whole), "--lr", "0.05", "--seed", "4"]) == 2
    message = capsys.readouterr().err
    assert "lr: 0.1, now 0.05" in message and "seed: 0, now 4" in message
    assert run(["train", *command(tmp_path / "nowhere", whole)]) == 3
    assert (whole / "last.state").read_bytes() == before


def test_a_folder_from_before_a_field_was_there_is_gone_on_with(
    whole: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "older"
    shutil.copytree(whole, older)
    config = json.loads((older / "config.json").read_text())
    config["recipe"] = flat_options(config["recipe"])  # as it was before there were groups
    for name in ("batch_norm", "average"):
        del config["recipe"][name]
    (older / "config.json").write_text(json.dumps(config))
    assert run(["train", *command(teacher, older)]) == 0
    assert "epochs are done" in capsys.readouterr().err
    config["recipe"]["batch_norm"] = "synced"
    (older / "config.json").write_text(json.dumps(config))
    assert run(["train", *command(teacher, older)]) == 2
    assert "batch_norm: synced, now local" in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(whole: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(whole).locked():
        assert run(["train", *command(teacher, whole)]) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hot"
    assert train("sat:digits", out, "--teacher", "x") == 2  # SAT has no teacher
    code = run(["train", "sat:digits", "--out", str(out), "--epochs", "20", "--attack-steps", "1", "--lr", "1e30"])
    assert code == 4
    assert "the loss is" in capsys.readouterr().err
    assert not (out / "last.state").exists()


def test_a_last_step_that_diverges_is_not_saved(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hot"
    words = ["--epochs", "1", "--attack-steps", "1", "--batch-size", "5000", "--lr", "1e38", "--weight-decay", "10"]
    assert run(["train", "sat:digits", "--out", str(out), *words]) == 4
    assert "not finite after epoch 1" in capsys.readouterr().err
    assert not (out / "last.state").exists() and not (out / "best.safetensors").exists()


def test_a_best_saved_just_before_a_kill_is_known_after_it(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--epochs", "3", "--select-every", "1", "--select-from", "1"]
    assert train("rslad:digits", out, *options) == 0
    state = torch.load(out / "last.state", weights_only=True)
    state["epoch"], state["best"] = 2, {"score": -0.5, "epoch": 1}
    torch.save(state, out / "last.state")  # as it stood before epoch 3 was saved, but for the weights
    header = dict(read_header(out / "best.safetensors"), epoch="3", score="1.9")
    save_weights(out / "best.safetensors", load_file(out / "best.safetensors"), header)
    assert train("rslad:digits", out, *options) == 0
    best = torch.load(out / "last.state", weights_only=True)["best"]
    assert best == {"score": 1.9, "epoch": 3}


def test_a_damaged_state_is_named_not_half_loaded(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train("rslad:digits", out, "--epochs", "1") == 0
    content = (out / "last.state").read_bytes()
    (out / "last.state").write_bytes(content[: len(content) // 2])
    assert train("rslad:digits", out, "--epochs", "1") == 3
    assert "last.state is damaged" in capsys.readouterr().err


def test_a_run_without_a_teacher_trains_one_once_and_shares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("retemper.engine.run.teachers.find_setting", short_teacher)
    options = ["--epochs", "1", "--attack-steps", "1", "--holdout-per-class", "0"]
    for method in ("rslad", "absld"):
        assert run(["train", f"{method}:digits", "--out", str(tmp_path / method), *options]) == 0
    assert capsys.readouterr().err.count("no --teacher given") == 1
    sources = [json.loads((tmp_path / m / "config.json").read_text())["teacher"] for m in ("rslad", "absld")]
    assert sources[0] == sources[1] and Path(sources[0]["path"]).parent == tmp_path


def short_teacher(name: str) -> Any:
    from dataclasses import replace

    from retemper.engine.catalogue import find_setting

    method, setting, found = find_setting(name)
    recipe = found.recipe.replace(epochs=1, attack_steps=1, holdout_per_class=0)
    return method, setting, replace(found, recipe=recipe)


def test_a_teacher_that_takes_days_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "absld:cifar10_resnet18"]) == 2
    assert "retemper train trades:cifar10_wrn34_10" in capsys.readouterr().err


def test_processes_that_cannot_meet_are_refused_not_ignored(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train("rslad:digits", tmp_path / "run") == 2
    assert "MASTER_ADDR, MASTER_PORT not: start the processes with torchrun" in capsys.readouterr().err
    assert run(["bench", "step"]) == 2
    assert "torchrun is for retemper train and evaluate" in capsys.readouterr().err


def test_selection_on_the_test_images_is_an_option(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train("rslad:digits", out, "--epochs", "1", "--select-on", "test") == 0
    assert json.loads((out / "config.json").read_text())["recipe"]["selection"]["select_on"] == "test"
    assert "holdout" in lines(out)[0]


def test_fp16_with_its_scaler_trains_on_a_gpu(train: Train, tmp_path: Path, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("fp16 training needs a GPU")
    assert train("absld:digits", tmp_path / "run", "--precision", "fp16") == 0
