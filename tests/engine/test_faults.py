"""What goes wrong on real machines ends in one clear line, within seconds, and loses nothing; the faults are real."""

import json
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from retemper.cli import run
from retemper.engine import Method, Recipe, State, create_model, save_weights
from retemper.engine.checkpoints.weights import CheckpointError, load_checkpoint
from retemper.engine.run.state_file import unpack
from retemper.engine.run.teacher_table import TeacherTable
from retemper.engine.step import update

Start = Callable[..., Any]
Capture = pytest.CaptureFixture[str]
SHORT = "--device cpu --attack-steps 1 --holdout-per-class 5 --select-steps 1 --batch-size 256 --epochs 2".split()


def error_line(said: str) -> str:
    """The one line of an error; nothing follows it, and no traceback is before it."""
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("retemper: error: ") and said.count("retemper: error") == 1, said
    return last


# numbers that are not finite


def test_an_answer_of_the_teachers_that_is_not_finite_is_named(teacher: Path, tmp_path: Path, capsys: Capture) -> None:
    """A NaN in its table, with a good checksum: it stops the run before the update, and is traced to its image."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    words = ["train", "rslad:digits", "--teacher", str(teacher), "--cache", str(cache), *SHORT]
    assert run([*words, "--out", str(tmp_path / "first")]) == 0
    (folder,) = (cache / "teacher_logits").iterdir()
    facts = json.loads((folder / "facts.json").read_text())
    table = TeacherTable(cache, facts.pop("images"), facts.pop("views"), facts.pop("classes"), facts)
    index, view = np.nonzero(table.known)
    poisoned = int(index[700])
    rows = np.flatnonzero(index == poisoned)  # in both epochs
    table.keep(index[rows], view[rows], np.full((len(rows), 10), np.nan, np.float32))
    code, line = 3, ""
    while code == 3:  # in one of ten cases the answers that are sampled at the start show it
        capsys.readouterr()
        code = run([*words, "--out", str(out), "--save-every", "0"])
        line = error_line(capsys.readouterr().err)
    assert code == 4 and "the loss is nan at epoch 1, step " in line, line
    found = torch.load(out / "diverged.pt", weights_only=True)
    row = found["index"].tolist().index(poisoned)
    assert f"the teacher's answers to image {poisoned} ({found['label'][row]}) are not finite" in line
    assert found["teacher"][row].isnan().all() and found["teacher"].isnan().any(1).sum() == 1
    assert found["image"].shape == (256, 8, 8, 1) and found["image"].dtype is torch.uint8
    if found["step"] > 1:
        before = unpack(out / "last.state")
        assert (before["epoch"], before["step"]) == (0, found["step"] - 1)
        assert all(torch.equal(value, before["student"][name]) for name, value in found["student"].items())


@pytest.mark.parametrize("options", [[], ["--fused-sgd", "false"]], ids=["fused", "plain"])
def test_a_loss_that_is_not_finite_stops_before_the_update(options: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    words = ["train", "sat:digits", "--out", str(out), *SHORT, "--lr", "1e30", "--save-every", "0", *options]
    assert run(words) == 4
    line = error_line(capsys.readouterr().err)
    assert "the loss is nan at epoch 1, step 2, on images " in line and "and 253 more" in line and "--lr" in line
    assert "last.state holds epoch 0 and 1 steps of the next" in line
    found, before = torch.load(out / "diverged.pt", weights_only=True), unpack(out / "last.state")
    assert before["step"] == 1
    assert all(torch.equal(value, before["student"][name]) for name, value in found["student"].items())
    assert run(words) == 4 and "step 2" in error_line(capsys.readouterr().err), "it happens again from what was saved"


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_not_finite_holds_this_update_and_all_later_ones(fused: bool, device: torch.device) -> None:
    recipe = Recipe.of(Method, dataset="digits", student="tiny_resnet", fused_sgd=fused, fold=False, precision="fp32")
    state = State(recipe, create_model("tiny_resnet", 10), None, 10, device)
    assert hasattr(state.optimizer, "found_inf") == fused, "the fused kernel looks at a flag; copies are for others"
    weights = list(state.student.parameters())

    def step(gradient: float, seed: int) -> list[torch.Tensor]:
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        weights[1].grad[0] = gradient  # pyright: ignore[reportOptionalSubscript]  # of a batch norm
        state.noise_seed.fill_(seed)
        update(state, torch.tensor(2.5, device=device))
        return [weight.detach().clone() for weight in weights]

    before, moved = step(1.0, 7), step(1.0, 8)
    assert not torch.equal(before[0], moved[0]) and int(state.guard.seed) == -1
    for seed, gradient in ((9, torch.inf), (10, 1.0), (11, torch.nan)):
        after = step(gradient, seed)
        assert all(torch.equal(one, two) for one, two in zip(moved, after, strict=True))
    assert int(state.guard.seed) == 9 and float(state.guard.loss) == 2.5


# memory


def ask_for_too_much(*_: object, **__: object) -> None:
    """Ask torch's allocator for more than any machine has."""
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("place", ["torch.fx.symbolic_trace", "torch.nn.functional.conv2d", "torch.optim.SGD.step"])
def test_out_of_memory_is_told_in_numbers_with_what_to_try(
    place: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out while the network is folded, while it is called, and while it is trained."""

    def limit() -> None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (8 << 30), -1))
        monkeypatch.setattr(place, ask_for_too_much)  # in the process that is started

    student = "tiny_resnet" if place == "torch.optim.SGD.step" else "wrn34_10"
    words = ["train", "sat:digits", "--out", tmp_path / "run", *SHORT, "--batch-size", 1024, "--student", student]
    code, said = start(*words, prepare=limit).wait()
    line = error_line(said)
    assert code == 2 and "out of memory for 1152921504606846976 bytes" in line, said
    assert (
        f"batch size 1024, digits, {student}" in line
        and "--batch-size 512" in line
        and "GiB" in line
        and "ulimit -v" in line
    )


@pytest.mark.parametrize("place", ["torch.load", "torch.optim.Optimizer.load_state_dict"])
def test_a_state_that_does_not_fit_into_memory_is_not_taken_for_a_damaged_one(
    place: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "sat:digits", "--out", str(tmp_path / "run"), *SHORT]
    assert run(words) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(place, ask_for_too_much)
        assert run(words) == 2
    assert "out of memory for 1152921504606846976 bytes" in error_line(capsys.readouterr().err)
    assert run(words) == 0, "the state is still there"


def test_out_of_memory_of_any_other_verb_is_one_line(
    teacher: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.functional.conv2d", ask_for_too_much)
    assert run(["evaluate", str(teacher), "--attacks", "clean", "--limit", "20", "--out", str(tmp_path)]) == 2
    assert "out of memory" in error_line(capsys.readouterr().err)


# disks


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def disk_words(teacher: Path, out: Path) -> list[str]:
    return ["train", "rslad:digits", "--teacher", str(teacher), "--out", str(out), *SHORT, "--select-every", "1"]


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    small: Path, teacher: Path, tmp_path: Path, capsys: Capture
) -> None:
    """best, last and the first state take 1.3 MB; the second does not fit beside them and a file of somebody else's."""
    assert run(disk_words(teacher, tmp_path / "whole")) == 0
    (small / "others").write_bytes(bytes(400_000))
    capsys.readouterr()
    assert run(disk_words(teacher, small / "run")) == 3
    line = error_line(capsys.readouterr().err)
    assert "cannot write" in line and "No space left on device" in line and "run the same command again" in line
    assert unpack(small / "run/last.state")["epoch"] == 1
    assert not list((small / "run").glob(".*.tmp")), "a file half written is not left behind"
    (small / "others").unlink()
    assert run(disk_words(teacher, small / "run")) == 0
    one, two = (load_file(folder / "last.safetensors") for folder in (tmp_path / "whole", small / "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_read_only_disk_is_one_line_before_anything_is_trained(small: Path, teacher: Path, capsys: Capture) -> None:
    assert run([*disk_words(teacher, small / "run"), "--epochs", "1"]) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    for folder in ("run", "another"):
        capsys.readouterr()
        assert run(disk_words(teacher, small / folder)) == 2
        line = error_line(capsys.readouterr().err)
        assert "Read-only file system" in line and "name another folder with --out" in line


def test_a_file_that_may_not_grow_is_one_line(start: Start, teacher: Path, tmp_path: Path) -> None:
    """A quota, as far as one can have it without root."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code, said = start(*disk_words(teacher, tmp_path / "run"), "--teacher-table", "off", prepare=limit).wait()
    assert code == 3 and "cannot write" in error_line(said) and "File too large" in said


def test_a_folder_that_is_taken_away_is_one_line(start: Start, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*disk_words(teacher, out), "--epochs", 200)
    process.until((out / "last.state").exists)
    os.rename(out, tmp_path / "elsewhere")
    code, said = process.wait()
    line = error_line(said)
    assert code == 3 and "cannot write" in line and "No such file or directory" in line
    assert unpack(tmp_path / "elsewhere/last.state")["epoch"] >= 1


# files


def test_every_flipped_byte_of_weights_is_found_the_header_included(tmp_path: Path) -> None:
    model, path, rng = nn.Linear(20, 30), tmp_path / "w.safetensors", random.Random(0)
    save_weights(path, model, {"score": "1.5", "eps": "0.15", "epoch": "3"})
    load_checkpoint(path, model)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for spot in [*range(header), *(rng.randrange(len(content)) for _ in range(100))]:
        spoilt = bytearray(content)
        spoilt[spot] ^= rng.randrange(1, 256)
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError):
            load_checkpoint(path, model)
    for end in (0, 7, 8, header, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError):
            load_checkpoint(path, model)
