"""A run's folder after processes that died or failed at every one of their system calls, and what is refused of it."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from retemper.cli import run
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError, UsageError

CALLS = ("fsync", "replace", "link", "unlink", "open")
KEPT = [".lock", "last.1.state", "last.state", "metrics.jsonl"]


def state(epoch: int) -> dict[str, Any]:
    empty: dict[str, Any] = {name: {} for name in ("student", "optimizer", "scaler", "class_state", "generators")}
    return empty | {"epoch": epoch, "step": 0, "best": {"score": -1.0, "epoch": 0}, "weight": torch.ones(3)}


def save(path: Path, epoch: int) -> None:
    folder = RunFolder(path)
    with folder.locked():
        folder.load_state()
        folder.save_state(state(epoch))


@contextmanager
def at_call(number: int, act: Callable[[], object]) -> Iterator[list[int]]:
    """Call `act` before the system call of that number, from 0; yield a list with how many there were."""
    made, whole = [0], {name: getattr(os, name) for name in CALLS}

    def instead(name: str) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            made[0] += 1
            if made[0] == number + 1:
                act()
            return whole[name](*words, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, instead(name))
        yield made


def fail() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["dies", "fails"])
def test_a_process_that_ends_at_any_system_call_of_a_save_loses_nothing_and_leaves_nothing(
    how: str, tmp_path: Path
) -> None:
    with at_call(-1, fail) as made:
        for epoch in (1, 2, 3):
            save(tmp_path / "whole", epoch)
    calls = made[0] // 3
    assert calls > 5
    for number in range(calls + 1):
        path = tmp_path / f"{number}"
        save(path, 1)
        save(path, 2)
        if how == "fails":
            with at_call(number, fail):
                try:
                    save(path, 3)
                except (DataError, UsageError) as error:
                    assert str(error).startswith("cannot write ") and str(path) in str(error)
        elif not (pid := os.fork()):
            with at_call(number, lambda: os._exit(1)):
                save(path, 3)
            os._exit(0)
        else:
            os.waitpid(pid, 0)
        found = RunFolder(path).load_state()
        assert found is not None and found["epoch"] in (2, 3), number
        save(path, 4)
        assert sorted(os.listdir(path)) == KEPT, number
        assert (path / "last.1.state").stat().st_nlink == 1


def test_a_folder_taken_away_at_any_system_call_of_a_save_is_an_error_that_names_what_was_written(
    tmp_path: Path,
) -> None:
    with at_call(-1, fail) as made:
        for epoch in (1, 2):
            save(tmp_path / "counted", epoch)
    for number in range(made[0]):
        path, elsewhere = tmp_path / f"run{number}", tmp_path / f"elsewhere{number}"
        with at_call(number, partial(path.rename, elsewhere)):
            with pytest.raises((DataError, UsageError), match=f"cannot write (to )?{path}"):
                for epoch in (1, 2):
                    save(path, epoch)
                pytest.fail("a folder that is gone was written to")


def test_a_start_that_fails_leaves_no_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "absld:digits", "--device", "cpu", "--teacher", str(tmp_path / "none"), "--out"]
    assert run([*words, str(tmp_path / "runs/a")]) == 3
    assert not (tmp_path / "runs/a").exists()
    (tmp_path / "mine").mkdir()
    assert run([*words, str(tmp_path / "mine")]) == 3
    assert (tmp_path / "mine").is_dir()
    assert "none does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "0"}, 'seed is "0", not a whole number'),
        ({"classes": [1]}, "classes[0] is 1, not text"),
        ({"teacher": {"path": "x", "model": 3, "sha256": ""}}, "teacher.model is 3, not text"),
        ({"data_root": "a\0b"}, "data_root is"),
        ({"recipe": {"student": "s", "dataset": "d", "eps": -1}}, "eps = -1: it must not be negative"),
        ({"recipe": {"student": "s", "dataset": "d", "eps": True}}, "eps is true, not a number"),
        ({"recipe": {"student": "s", "dataset": "d", "eps": 0.1, "image_size": 10**9}}, "image_size = 1000000000"),
    ],
)
def test_a_wrong_field_of_config_json_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    recipe = {"student": "tiny_resnet", "dataset": "digits", "eps": 0.1}
    whole = {"method": "sat", "setting": "digits", "recipe": recipe, "seed": 0, "classes": ["a"], "teacher": None}
    folder = RunFolder(tmp_path)
    folder.config.write_text(json.dumps(whole))
    assert folder.read_config()["recipe"]["eps"] == 0.1
    folder.config.write_text(json.dumps(whole | change))
    with pytest.raises(DataError) as error:
        folder.read_config()
    said = str(error.value)
    assert said.startswith(f"{folder.config} is damaged (") and words in said and "\n" not in said
