"""Runs on real images and a pool: labels that a teacher gives, the same bits after a stop, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from retemper.cli import run
from retemper.engine.catalogue import find_setting
from retemper.engine.models import create_model
from retemper.engine.run.commands import train_again
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.teacher_logits import TeacherLogits
from retemper.engine.run.teacher_table import TeacherTable
from retemper.engine.state import State
from retemper.engine.step import train_step
from retemper.kernels import augment
from retemper.loaders import Extra, ViewSpace, load_split, make_loader, open_pool, split_of_arrays

CPU = torch.device("cpu")
Train = Callable[..., int]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy digits, in files of their own: labelled, without labels, and other ones."""
    folder, split = tmp_path_factory.mktemp("pools"), load_split("digits", "train")
    rng = np.random.default_rng(0)
    at = rng.integers(0, len(split), 400)
    image = np.clip(split.images[at].astype(int) + rng.integers(-20, 21, (400, 8, 8, 1)), 0, 255).astype(np.uint8)
    np.savez(folder / "labelled.npz", image=image, label=split.labels[at])
    np.savez(folder / "bare.npz", image=image)
    np.savez(folder / "other.npz", image=image[::-1], label=split.labels[at])
    return folder


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "last.safetensors") | load_file(out / "best.safetensors")


def test_a_run_that_was_cut_ends_in_the_same_bits(
    train: Train, pools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight steps an epoch, on images without labels: cut within the first epoch and within the second."""
    words = ["--extra", str(pools / "bare.npz"), "--extra-fraction", "0.7", "--images-per-class", "30"]
    words += ["--batch-size", "128", "--attack-steps", "1", "--select-steps", "1"]
    assert train("fair_rslad:digits", tmp_path / "whole", *words) == 0
    for steps in ("3", "11", "1000"):
        more = ["--max-steps", steps, "--extra-on", "device" if steps == "11" else "disk"]
        assert train("fair_rslad:digits", tmp_path / "cut", *words, *more) == 0
    one, two = (weights(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["recipe"]["data"]["extra_fraction"] == 0.7
    assert (config["extra"]["images"], config["extra"]["unlabelled"]) == (400, 400)
    again = train_again(RunFolder(tmp_path / "cut").read_config(), tmp_path / "cut")
    assert run(["export", str(tmp_path / "cut"), "--out", str(tmp_path / "given")]) == 0
    card = (tmp_path / "given" / "README.md").read_text()
    assert "70 % of each training batch came from bare.npz, 400 extra images" in card and str(pools) not in card
    assert f"--extra {pools / 'bare.npz'}" in again and "--extra-fraction 0.7" in again
    capsys.readouterr()
    assert train("fair_rslad:digits", tmp_path / "cut", *words, "--extra", str(pools / "other.npz")) == 2
    assert "holds another run (extra: " in capsys.readouterr().err


@pytest.mark.parametrize("method", ["rslad", "saad", "mtard"])
@pytest.mark.parametrize("asked_ahead", [False, True])
def test_the_teacher_stands_in_for_labels_and_its_classes_are_not_counted(method: str, asked_ahead: bool) -> None:
    """The step is that of the same batch under the teacher's labels; of both, the known labels alone are counted."""
    recipe = find_setting(f"{method}:digits")[2].recipe.replace(attack_steps=1)
    label = torch.tensor([3, 1, 4, -1, -1, -1])
    clean = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def step(label_B: torch.Tensor, lacks: bool) -> tuple[State, torch.Tensor]:
        torch.manual_seed(5)
        networks = [create_model("tiny_resnet", 10, channels=1) for _ in range(3)]
        student, teacher, other = networks
        for frozen in (teacher, other):
            frozen.eval().requires_grad_(False)
        second = other if recipe.networks.clean_teacher_model else None
        state = State(recipe, student, teacher, 10, CPU, second)
        state.lacks_labels = lacks
        state.start_epoch(recipe, 1, 0)
        state.begin_step(recipe, 1, 0, 5)
        with torch.no_grad():
            answers = teacher(clean)
        filled = torch.where(label_B < 0, answers.argmax(1), label_B) if not lacks else label_B
        train_step(state, recipe, clean, filled, answers if asked_ahead else None)
        return state, filled

    (ours, _), (theirs, filled) = step(label, True), step(label, False)
    for one, two in zip(ours.student.parameters(), theirs.student.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    for name, sums in ours.sums.items():
        assert sums.count_K.tolist() == np.bincount([3, 1, 4], minlength=10).tolist()
        assert theirs.sums[name].count_K.tolist() == np.bincount(filled.tolist(), minlength=10).tolist()


def test_the_table_of_answers_holds_real_images_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (23, 3, 3, 3), dtype=np.uint8)
    split = split_of_arrays("digits", "train", images[:9], np.arange(9) % 3, ("a", "b", "c"), "x")
    np.savez(tmp_path / "pool.npz", image=images[9:])
    pool = open_pool(tmp_path / "pool.npz", split, tmp_path)
    loader = make_loader(
        "resident", split, batch_size=4, seed=0, views=ViewSpace(1), device=CPU, extra=Extra(pool, 0.5)
    )
    weight, asked = torch.randn(27, 3, generator=torch.Generator().manual_seed(0)), []

    def ask(image: torch.Tensor, view: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        asked.append(len(index))
        return augment(image, view, index=index, padding=1).flatten(1) @ weight

    table = TeacherTable(tmp_path, 9, ViewSpace(1).count, 3, {})
    for share in (0.0, 9 / 18):  # the second time around, the same epoch's real half is known
        found = TeacherLogits(ask, 3, CPU, ahead=2, rows=4, at_once=4, table=table)
        for batch, logits in found.epoch(loader.epoch(1), *loader.schedule(1)):
            whole = augment(batch.image, batch.view, padding=1).flatten(1) @ weight
            torch.testing.assert_close(logits, whole)
        assert found.known_share == share and table.known.sum() == 9


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--extra-fraction", "0.7"], 2, "of which images? Name their .npz with --extra"),
        (["--extra", "labelled.npz"], 2, "say with --extra-fraction, as 0.7"),
        (["--extra", "labelled.npz", "--extra-fraction", "1"], 2, "it must be below 1"),
        (["--extra", "labelled.npz", "--extra-fraction", "1.5"], 2, "it must lie between 0 and 1"),
        (["--extra", "bare.npz", "--extra-fraction", "0.5"], 2, "none has a label, and this method has no teacher"),
        (["--extra", "labelled.npz", "--extra-fraction", "0.5", "--attack", "pgi"], 2, "take nfgsm, or leave out"),
        (["--extra", "labelled.npz", "--extra-fraction", "0.001"], 2, "give a larger --batch-size"),
        (["--extra", "missing.npz", "--extra-fraction", "0.5"], 3, "missing.npz does not exist"),
        (["--extra-on", "disk", "--show"], 0, "note: --extra-on is of --extra, so it changes nothing"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_one_line(
    pools: Path, tmp_path: Path, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named: list[Any] = [pools / word if word.endswith(".npz") else word for word in words]
    assert run(["train", "sat:digits", "--out", str(tmp_path / "run"), *map(str, named)]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and len(lines) == 1 and not (tmp_path / "run").exists()


def test_a_pool_is_looked_at_before_a_teacher_is_trained(
    pools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.npz"
    np.savez(bad, image=np.zeros((5, 9, 9, 1), np.uint8), label=np.zeros(5, np.int64))
    words = ["--extra", str(bad), "--extra-fraction", "0.5", "--out", str(tmp_path / "runs" / "run")]
    assert run(["train", "rslad:digits", *words]) == 3
    assert "its images are 9 x 9 x 1, those of the run 8 x 8 x 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_pool_beside_images_that_are_stored_larger_than_they_are_seen_is_refused() -> None:
    recipe = find_setting("absld:imagenet100_resnet18")[2].recipe
    with pytest.raises(ValueError, match=r"extra_fraction.*resized-crop"):
        recipe.replace(extra_fraction=0.7)
