"""Saving beside the training: what is copied, what the thread does with it, and what is seen of its errors."""

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retemper.cli import run
from retemper.engine.run import train
from retemper.engine.run.host_memory import HostMemory
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.saving import Saver
from retemper.engine.run.state_file import unpack, write_state
from retemper.engine.run.writer import Writer

Start = Callable[..., Any]
STEPS = 4  # an epoch
WORDS = (
    "train sat:digits --device cpu --epochs 2 --attack-steps 1 --holdout-per-class 5 --select-steps 1 "
    "--batch-size 300 --select-every 1 --select-from 1 --out"
).split()
PASS_ON = "retemper.engine.run.state_file._Sink._pass_on"  # the thread calls it for every tensor of a state
LIMIT_S = 600.0


def position(out: Path) -> tuple[int, int]:
    """The epoch and the step that the newest state is behind."""
    state = unpack(out / "last.state")
    return state["epoch"], state["step"]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def require_consistent(out: Path) -> None:
    """Check that a folder's files are of one epoch: at least those that a state needs are there."""
    epoch, _ = position(out)
    written = [line["epoch"] for line in lines(out)] if epoch else []
    assert written[:epoch] == list(range(1, epoch + 1))
    assert not epoch or ((out / "last.safetensors").exists() and (out / "best.safetensors").exists())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run([*WORDS, str(out)]) == 0
    return out


def require_same(one: Path, two: Path) -> None:
    """Check that two runs end in the same bits."""
    states = [unpack(folder / "last.state") for folder in (one, two)]
    for name in ("student", "optimizer", "best"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)


# the memory on the host


def test_a_copy_stays_as_it_was_and_its_memory_is_kept(device: torch.device) -> None:
    memory = HostMemory(device)
    weight = torch.rand(4, 3, 2, 2, device=device).to(memory_format=torch.channels_last)
    first = memory.copy({"one": [{"weight": weight, "rate": 0.1}], "two": {"weight": torch.ones(2)}})
    memory.wait()
    kept, before = first["one"][0]["weight"], weight.tolist()
    weight.zero_()
    assert kept.tolist() == before and kept.stride() == weight.stride() and first["one"][0]["rate"] == 0.1
    assert kept.device.type == "cpu" and kept.is_pinned() == (device.type == "cuda")
    second = memory.copy({"one": [{"weight": weight}]})
    memory.wait()
    assert second["one"][0]["weight"] is kept and not kept.any(), "no second state is held in memory"
    grown = memory.copy({"one": [{"weight": torch.ones(5, device=device)}]})
    memory.wait()
    assert grown["one"][0]["weight"].tolist() == [1.0] * 5


# the thread


def test_the_thread_does_one_thing_after_another_and_its_caller_goes_on() -> None:
    writer, go, done = Writer(), threading.Event(), []
    writer.begin(lambda: done.append(go.wait(LIMIT_S)))
    writer.look()
    assert not done, "it is not waited for"
    threading.Timer(0.01, go.set).start()
    writer.begin(lambda: done.append(threading.current_thread() is not threading.main_thread()))
    assert done[0] is True, "the second one comes behind the first"
    writer.settle()
    writer.settle()
    assert done == [True, True]
    writer.close()


def test_what_failed_is_done_before_anything_newer() -> None:
    writer, done, full = Writer(), [], True

    def older() -> None:
        if full:
            raise OSError("no room")
        done.append("older")

    writer.begin(older)
    while writer.running is not None and not writer.running.done():
        time.sleep(0.001)
    with pytest.raises(OSError, match="no room"):
        writer.look()
    writer.look()  # it is told once
    with pytest.raises(OSError, match="no room"):
        writer.begin(lambda: done.append("newer"))
    full = False
    writer.begin(lambda: done.append("newer"))
    writer.close()
    assert done == ["older", "newer"]


def test_a_signal_while_the_thread_is_waited_for_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, go, done = Writer(), threading.Event(), []
    writer.begin(lambda: done.append(go.wait(LIMIT_S)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("retemper.engine.run.writer.wait", lambda _: signal.raise_signal(signal.SIGINT))
        writer.settle()
    go.set()
    writer.settle()
    assert done == [True]


# the file


class Disk:
    """A file that takes so many bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.taken = room, b""

    def write(self, data: bytes) -> None:
        if len(self.taken) + len(data) > self.room:
            raise OSError(28, "No space left on device")
        self.taken += data


def test_a_disk_that_fills_up_while_a_state_is_written_is_told_as_such() -> None:
    """torch's writer would make another error of it, and write on while it is destroyed."""
    state, whole = {"weight": torch.ones(1000), "epoch": 1}, Disk(1 << 20)
    write_state(whole, state)  # pyright: ignore[reportArgumentType]
    for room in (0, 1, 70, 3000, len(whole.taken) - 1):
        with pytest.raises(OSError, match="No space left on device"):
            write_state(Disk(room), state)  # pyright: ignore[reportArgumentType]


# runs


def test_the_training_goes_on_while_an_epoch_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first epoch's state is not written before the second step of the next one is reached."""
    reached, steps = threading.Event(), []
    save_state, take = RunFolder.save_state, Saver.look

    def saved_later(self: RunFolder, state: dict[str, Any]) -> None:
        assert reached.wait(LIMIT_S), "the training waits for the thread"
        save_state(self, state)

    def look(self: Saver) -> None:
        steps.append((self.finished, self.done))
        if steps[-1] == (1, 2):
            assert position_or_none(tmp_path / "run") is None
            reached.set()
        take(self)

    monkeypatch.setattr(RunFolder, "save_state", saved_later)
    monkeypatch.setattr(Saver, "look", look)
    assert run([*WORDS, str(tmp_path / "run")]) == 0
    assert (1, 2) in steps and position(tmp_path / "run") == (2, 0)


def position_or_none(out: Path) -> tuple[int, int] | None:
    return position(out) if (out / "last.state").exists() else None


@pytest.mark.parametrize("often", [False, True], ids=["once", "always"])
def test_a_write_that_fails_is_told_as_soon_as_it_is_known_and_loses_nothing(
    often: bool, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is tried again before the run leaves; where that works, what was trained since is saved too."""
    out, failed = tmp_path / "run", []

    def fails(file: Any, state: dict[str, Any]) -> None:
        if state["epoch"] == 1 and (often or not failed):
            failed.append(state)
            raise OSError(28, "No space left on device")
        write_state(file, state)

    with monkeypatch.context() as patch:
        patch.setattr("retemper.engine.run.run_folder.write_state", fails)
        assert run([*WORDS, str(out), "--save-every", "0"]) == 3
    said = capsys.readouterr().err
    assert said.count("retemper: error") == 1 and "Traceback" not in said
    assert f"cannot write {out / 'last.state'} (No space left on device): mend that and run the same" in said
    assert not list(out.glob(".*.tmp"))
    require_consistent(out)
    assert position(out) == (0, STEPS) if often else position(out)[0] == 1
    assert run([*WORDS, str(out)]) == 0
    require_same(out, whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "asked"])
def test_a_run_that_ends_while_a_state_is_half_written_goes_on(
    number: int, whole: Path, start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for call in (5, 61, 250):  # of the thread's: in the first state, and in later ones
        process = start(*WORDS, out, "--save-every", 0, place=PASS_ON, at={call: number})
        code, said = process.wait()
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL, said
        else:
            assert code == 75 and "retemper: interrupted; saved at " in said, said
            assert not list(out.glob(".*.tmp")), "the process did not end before the thread had written"
        if (out / "last.state").exists():
            require_consistent(out)
    assert start(*WORDS, out).wait()[0] == 0
    require_same(out, whole)


def test_the_seconds_of_an_epoch_are_all_that_a_user_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts once: those of held-out images in the epoch that they judge, those of its save in the next one."""
    clock, late_s = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + late_s[0])

    def lasts(owner: Any, name: str, seconds: float) -> None:
        function = getattr(owner, name)

        def lasting(*words: Any, **options: Any) -> Any:
            late_s[0] += seconds
            return function(*words, **options)

        monkeypatch.setattr(owner, name, lasting)

    lasts(train, "judge", 1e4)
    lasts(Saver, "save_epoch", 1e5)
    assert run([*WORDS, str(tmp_path / "run")]) == 0
    first, second = lines(tmp_path / "run")
    assert 1e4 <= first["seconds"] < 2e4 and 1.1e5 <= second["seconds"] < 1.2e5
    images = [round(line["images_per_second"] * line["seconds"]) for line in (first, second)]
    assert images[0] == images[1] > 1000
