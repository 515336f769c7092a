"""TensorBoard shows metrics.jsonl, no more and no less, however often a run went on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retemper.engine.run.metrics import Board, scalars
from retemper.engine.run.run_folder import RunFolder

Train = Callable[..., int]
Shown = dict[str, list[tuple[int, Any]]]


def shown(out: Path) -> Shown:
    """Return steps and values by tag, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(out: Path) -> Shown:
    found: Shown = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        for name, value in scalars(line, "0123456789"):
            found.setdefault(name, []).append((line["epoch"], pytest.approx(value)))
    return found


def test_it_shows_every_number_of_the_metrics_once(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train("absld:digits", out, "--select-every", "1", "--epochs", "3", "--tensorboard") == 0
    tags = shown(out)
    assert tags == expected(out)
    assert {
        "loss",
        "lr",
        "images_per_second",
        "class_accuracy/7",
        "temperature_adv/3",
        "holdout/average",
    } <= tags.keys()
    assert [step for step, _ in tags["loss"]] == [1, 2, 3] and "epoch" not in tags


def test_a_run_that_goes_on_shows_no_epoch_twice(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def epochs(*losses: float) -> list[dict[str, float]]:
        lines = [{"epoch": number, "loss": loss} for number, loss in enumerate(losses, 1)]
        folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return lines

    first = Board(folder, "ab")
    for losses in ([3.0], [3.0, 2.0], [3.0, 2.0, 1.0]):
        first.write(epochs(*losses)[-1])
    second = Board(folder, "ab")  # killed after epoch 3 was written, before it was saved: it is trained again
    second.write(epochs(3.0, 2.0, 0.5)[-1])
    second.write(epochs(3.0, 2.0, 0.5, 0.25)[-1])
    assert shown(tmp_path) == {"loss": [(1, 3.0), (2, 2.0), (3, 0.5), (4, 0.25)]}


def test_numbers_are_named_by_their_class() -> None:
    line = {
        "epoch": 1,
        "loss": 2.0,
        "w": [0.5, None],
        "rate": [0.1],
        "three": [1, 2, 3],
        "holdout": {"accuracy": [1, 0]},
    }
    assert dict(scalars(line, ("T-shirt/top", "Coat"))) == {
        "loss": 2.0,
        "w/T-shirt-top": 0.5,
        "rate": 0.1,
        **{f"three/{i}": i + 1 for i in range(3)},
        "holdout/accuracy/T-shirt-top": 1,
        "holdout/accuracy/Coat": 0,
    }


def test_the_package_is_asked_for_before_any_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train("rslad:digits", tmp_path / "run", "--tensorboard") == 2
    assert "pip install 'retemper[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run/config.json").exists()
