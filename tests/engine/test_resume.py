"""A run that is killed or asked to leave at any moment goes on where it was, to the very bits of an undisturbed one."""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retemper.cli import run
from retemper.engine.run.state_file import Damaged, unpack

Start = Callable[..., Any]
STEPS = 14  # an epoch
STEP = "retemper.engine.run.steps.train_step"  # a run calls it once a step
COMMAND = (
    "train absld:digits --device cpu --epochs 2 --attack-steps 2 --holdout-per-class 33 --select-steps 2 "
    "--batch-size 64 --select-every 1 --select-from 1 --average ema --ema-decay 0.9 --joint true"
).split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run([*COMMAND, "--teacher", str(teacher), "--out", str(out)]) == 0
    return out


@pytest.fixture
def words(teacher: Path, tmp_path: Path) -> list[object]:
    """The same command into another folder, with a table of the teacher's answers of its own."""
    return [*COMMAND, "--teacher", teacher, "--out", tmp_path / "run", "--cache", tmp_path / "cache"]


def require_same(whole: Path, run: Path) -> None:
    """Check that the files of two runs are equal, but for the clock."""
    for name in ("last.safetensors", "best.safetensors"):
        one, two = load_file(whole / name), load_file(run / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    for one, two in zip(*(read_lines(folder) for folder in (whole, run)), strict=True):
        assert one == two
    one, two = (unpack(folder / "last.state") for folder in (whole, run))
    for state in (one, two):
        assert state.pop("seconds") == 0 and state.pop("so_far") == {}
        state.pop("generators")
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in line.keys() - {"seconds", "images_per_second", "peak_memory_mib"}} for line in lines
    ]


def position(folder: Path) -> tuple[int, int]:
    """The epoch and the step that the newest state is behind."""
    state = unpack(folder / "last.state")
    return state["epoch"], state["step"]


def test_kill_9_between_and_within_saves_changes_no_bit(
    whole: Path, words: list[object], start: Start, tmp_path: Path
) -> None:
    """The run saves after every step; most of the kills fall into a save, at each thing that it asks of the disk."""
    out, positions = tmp_path / "run", []
    for place, call in (("os.link", 2), (STEP, 3), ("os.fsync", 14), ("os.replace", 11), ("os.link", 9)):
        process = start(*words, "--save-every", 0, place=place, at={call: signal.SIGKILL})
        assert process.wait()[0] == -signal.SIGKILL
        positions.append(position(out))
    assert positions == sorted(positions) and any(0 < step < STEPS for _, step in positions), positions
    code, said = start(*words).wait()
    assert code == 0 and ("(after step" in said) == (positions[-1][1] > 0), said
    require_same(whole, out)
    left = {path.name for path in out.iterdir()}
    assert left == {path.name for path in whole.iterdir()}, "what killed processes had half written is gone"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_75(
    number: int, whole: Path, words: list[object], start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, said = start(*words, at={4: number}).wait()
    assert code == 75, said
    assert said.splitlines()[-1].startswith("retemper: interrupted; saved at ")
    assert said.splitlines()[-1].endswith("; the same command goes on from there") and "Traceback" not in said
    assert position(out) == (0, 4), "a step that was begun is done"
    assert start(*words).wait()[0] == 0
    require_same(whole, out)


def test_a_signal_while_the_best_is_chosen_saves_what_was_trained(
    words: list[object], start: Start, tmp_path: Path
) -> None:
    """The saved state holds nothing that the choice of the best had moved already."""
    out = tmp_path / "run"
    code, said = start(*words, place="retemper.engine.run.selection.predictions", at={1: signal.SIGTERM}).wait()
    assert code == 75, said
    assert position(out) == (0, STEPS)
    assert unpack(out / "last.state")["class_state"]["temperature_adv"].tolist() == [1.0] * 10


def test_a_second_interrupt_leaves_at_once(words: list[object], start: Start, tmp_path: Path) -> None:
    """The attack of a step goes on after the first, and after a SIGTERM, as a cluster may say it again."""
    reached, out = tmp_path / "reached", tmp_path / "run"
    acts = {1: signal.SIGINT, 5: signal.SIGTERM, 9: reached.touch, 10: signal.SIGINT}
    process = start(*words, "--attack-steps", 20, place="retemper.engine.attack.pgd_step_", at=acts)
    assert process.wait()[0] == 130 and reached.exists()  # 75 would say that the step was finished
    assert not list(out.glob("*.state"))


@pytest.fixture
def cut(words: list[object], start: Start, tmp_path: Path) -> Path:
    """A run left within its second epoch, with a state before the newest."""
    assert start(*words, "--save-every", 0, at={STEPS + 4: signal.SIGKILL}).wait()[0] == -signal.SIGKILL
    out = tmp_path / "run"
    assert position(out) in ((1, 2), (1, 3)), "the newest save may have been on its way"
    return out


def test_a_damaged_state_gives_way_to_the_one_before(
    cut: Path, whole: Path, words: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    before = unpack(cut / "last.1.state")
    content = bytearray((cut / "last.state").read_bytes())
    content[len(content) // 2] ^= 1
    (cut / "last.state").write_bytes(content)
    assert run([str(word) for word in words]) == 0
    said = capsys.readouterr().err
    at = f"epoch {before['epoch']}, step {before['step']} of the next"
    assert f"last.state is damaged (its digest differs): going on from the one before it, {at}" in said
    assert (cut / "damaged.state").read_bytes() == content
    (cut / "damaged.state").unlink()
    require_same(whole, cut)


def test_a_best_that_is_damaged_is_not_passed_over(
    cut: Path, whole: Path, words: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    content = (cut / "best.safetensors").read_bytes()
    at = content.index(b'"score":"') + 9
    (cut / "best.safetensors").write_bytes(content[:at] + b"9" + content[at + 1 :])  # a better score than any
    assert run([str(word) for word in words]) == 3
    assert "best.safetensors: damaged" in capsys.readouterr().err
    (cut / "best.safetensors").write_bytes(content)
    assert run([str(word) for word in words]) == 0
    require_same(whole, cut)


def test_every_flipped_byte_and_every_cut_of_a_state_is_found(whole: Path, tmp_path: Path) -> None:
    content, path, rng = (whole / "last.state").read_bytes(), tmp_path / "spoilt", random.Random(0)
    spots = [
        *range(0, 40),
        *range(len(content) - 120, len(content)),
        *(rng.randrange(len(content)) for _ in range(200)),
    ]
    for spot in spots:
        spoilt = bytearray(content)
        spoilt[spot] ^= rng.randrange(1, 256)
        path.write_bytes(spoilt)
        with pytest.raises(Damaged):
            unpack(path)
    for end in (0, 1, 70, len(content) // 2, len(content) - 71, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(Damaged):
            unpack(path)


def test_a_state_that_was_saved_elsewhere_than_here_is_refused(
    cut: Path, words: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of torch.save's without our digest could be anything."""
    for name in ("last.state", "last.1.state"):
        torch.save({"epoch": 1}, cut / name)
    assert run([str(word) for word in words]) == 3
    assert "delete the folder to start the run anew" in capsys.readouterr().err
