"""The teacher's answers: the same whether asked at once, ahead, or read from the table of an earlier run."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retemper.cli import run
from retemper.engine.run.teacher_logits import TeacherLogits
from retemper.engine.run.teacher_table import TeacherTable, require_room
from retemper.kernels import augment
from retemper.loaders import Batch, DataError, Loader, ViewSpace, make_loader, split_of_arrays

CPU = torch.device("cpu")
IMAGES, CLASSES, BATCH = 50, 3, 8
WEIGHT = torch.randn(27, CLASSES, generator=torch.Generator().manual_seed(0))


class Teacher:
    """A linear one; counts what it is asked, and in which sizes."""

    def __init__(self) -> None:
        self.asked, self.sizes = 0, set[int]()

    def __call__(self, image: Tensor, view: Tensor, index: Tensor) -> Tensor:
        self.asked += len(index)
        self.sizes.add(len(index))
        return augment(image, view, index=index, padding=1).flatten(1) @ WEIGHT


@pytest.fixture
def loader() -> Loader:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, 3, 3, 3), dtype=np.uint8)
    split = split_of_arrays("digits", "train", images, np.arange(IMAGES) % 3, ("a", "b", "c"), "x")
    return make_loader("resident", split, batch_size=BATCH, seed=0, views=ViewSpace(1), device=CPU)


def table_in(folder: Path, **facts: str) -> TeacherTable:
    return TeacherTable(folder, IMAGES, ViewSpace(1).count, CLASSES, {"teacher": "linear"} | facts)


def logits(teacher: Teacher, table: TeacherTable | None = None, ahead: int = 3) -> TeacherLogits:
    return TeacherLogits(teacher, CLASSES, CPU, ahead=ahead, rows=BATCH, at_once=2 * BATCH, table=table)


def epoch(found: TeacherLogits, loader: Loader, number: int) -> Iterator[tuple[Batch, Tensor]]:
    return found.epoch(loader.epoch(number), *loader.schedule(number))


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_every_batch_has_the_logits_of_its_own_views(loader: Loader, ahead: int) -> None:
    seen = 0
    for batch, found in epoch(logits(Teacher(), ahead=ahead), loader, 1):
        expected = augment(batch.image, batch.view, padding=1).flatten(1) @ WEIGHT
        torch.testing.assert_close(found, expected)
        seen += len(batch.label)
    assert seen == IMAGES


def test_a_table_is_filled_as_views_are_drawn_and_read_afterwards(loader: Loader, tmp_path: Path) -> None:
    teacher, table = Teacher(), table_in(tmp_path)
    found = logits(teacher, table)
    first = [(batch.index, answer.clone()) for batch, answer in epoch(found, loader, 1)]
    asked = teacher.asked
    assert asked >= IMAGES and found.known_share == 0 and table.known.sum() == IMAGES
    for (index, expected), (batch, answer) in zip(first, epoch(found, loader, 1), strict=True):
        assert torch.equal(index, batch.index) and torch.equal(answer, expected)
    assert teacher.asked == asked and found.known_share == 1


def test_the_table_is_complete_and_exact(loader: Loader, tmp_path: Path) -> None:
    """Every entry of the table, after enough epochs, is the teacher's answer to that view."""
    table = table_in(tmp_path)
    found = logits(Teacher(), table)
    for number in range(1, 150):
        for _ in epoch(found, loader, number):
            pass
    assert table.known.mean() > 0.99
    images = torch.cat([batch.image for batch in loader.walk(np.arange(IMAGES))])
    index, view = np.nonzero(table.known)
    at = torch.from_numpy(index)
    expected = augment(images, torch.from_numpy(view.copy()), index=at.contiguous(), padding=1).flatten(1) @ WEIGHT
    torch.testing.assert_close(torch.from_numpy(table.logits[index, view]), expected)


def test_the_next_run_finds_it_and_another_teacher_does_not(loader: Loader, tmp_path: Path) -> None:
    for _ in epoch(logits(Teacher(), table_in(tmp_path)), loader, 1):
        pass
    teacher = Teacher()
    for _ in epoch(logits(teacher, table_in(tmp_path)), loader, 1):
        pass
    assert teacher.asked == 0
    assert table_in(tmp_path, teacher="another").known.sum() == 0


def test_an_epoch_cut_short_keeps_nothing_and_spoils_nothing(loader: Loader, tmp_path: Path) -> None:
    table = table_in(tmp_path)
    cut = epoch(logits(Teacher(), table), loader, 1)
    next(cut)
    cut.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert table.known.sum() == 0


def test_answers_are_kept_while_the_epoch_goes_on(loader: Loader, tmp_path: Path) -> None:
    """Not all at its end, where the device would wait."""
    table = table_in(tmp_path)
    cut, known = epoch(logits(Teacher(), table), loader, 1), [0]
    for _ in cut:
        known.append(int(table.known.sum()))
    assert 0 < known[-1] < int(table.known.sum()) and known == sorted(known)


def test_few_shapes_reach_the_teacher(loader: Loader, tmp_path: Path) -> None:
    teacher, table = Teacher(), table_in(tmp_path)
    found = logits(teacher, table)
    for number in range(1, 12):
        for _ in epoch(found, loader, number):
            pass
    assert teacher.sizes <= {BATCH, 2 * BATCH}


def test_a_table_of_another_size_is_refused(tmp_path: Path) -> None:
    table = table_in(tmp_path)
    with open(table.folder / "checksums.u32", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="delete"):
        table_in(tmp_path)


def test_what_an_earlier_process_did_not_allocate_is_allocated(tmp_path: Path) -> None:
    table = table_in(tmp_path)
    with open(table.folder / "logits.f32", "ab") as file:
        file.truncate(100)
    assert table_in(tmp_path).logits.shape == (IMAGES, 18, CLASSES)


def test_a_full_disk_keeps_a_table_that_is_there(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in epoch(logits(Teacher(), table_in(tmp_path)), loader, 1):
        pass
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("retemper.engine.run.teacher_table.shutil.disk_usage", lambda _: full)
    assert table_in(tmp_path).known.sum() == IMAGES
    with pytest.raises(OSError, match="no room"):
        table_in(tmp_path, teacher="another")


def test_room_is_looked_for_where_the_folder_will_be(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(OSError, match="no room"):
        require_room(tmp_path, 2**60)


COMMAND = "train rslad:digits --epochs 2 --attack-steps 1 --holdout-per-class 0 --batch-size 256 --teacher".split()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "last.safetensors")


def test_a_run_is_the_same_with_and_without_it(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs are equal to the bit on a CPU; the second run with a table asks the teacher nothing twice."""
    cache = ["--cache", str(tmp_path / "cache")]
    ways = {
        "none": ["--teacher-table", "off"],
        "asked-within": ["--teacher-ahead", "0"],
        "filled": ["--teacher-table", "on"],
        "read": ["--teacher-table", "on"],
    }
    for name, options in ways.items():
        assert run([*COMMAND, str(teacher), "--out", str(tmp_path / name), *cache, *options]) == 0
    said = capsys.readouterr().err
    assert "0.0% known so far" in said and said.count("known so far") == 2
    first, *others = (weights(tmp_path / name) for name in ways)
    for other in others[1:]:  # asked within the step, the last batch is not padded
        assert all(torch.equal(first[key], other[key]) for key in first)
    assert all(torch.allclose(first[key].float(), others[0][key].float(), atol=1e-4) for key in first)


def test_where_views_change_the_teacher_is_asked_ahead_and_no_table_is_kept(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose teacher is asked ahead, cut between two epochs, and another asked within the step: one training."""
    command = [*COMMAND, str(teacher), "--cache", str(tmp_path / "cache"), "--augment", "idbh-weak", "--cutout", "2"]
    assert run([*command, "--out", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().err
    assert said.count("the views change in every epoch: no table of the teacher's answers is kept") == 1
    assert not (tmp_path / "cache/teacher_logits").exists()
    assert run([*command, "--out", str(tmp_path / "cut"), "--max-steps", "9"]) == 0
    assert run([*command, "--out", str(tmp_path / "cut")]) == 0
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert run([*command, "--out", str(tmp_path / "within"), "--teacher-ahead", "0"]) == 0
    within = weights(tmp_path / "within")
    assert all(torch.allclose(whole[key].float(), within[key].float(), atol=1e-4) for key in whole)
    assert run([*command, "--out", str(tmp_path / "on"), "--teacher-table", "on"]) == 2
    assert "too many for a table" in capsys.readouterr().err and not (tmp_path / "on").exists()


def filled_by_a_run(teacher: Path, tmp_path: Path) -> tuple[list[str], TeacherTable]:
    """A command that fills a table but for its --out, after one run of it; and the table."""
    cache = tmp_path / "cache"
    command = [*COMMAND, str(teacher), "--cache", str(cache), "--teacher-table", "on", "--out"]
    assert run([*command, str(tmp_path / "one")]) == 0
    (folder,) = (cache / "teacher_logits").iterdir()
    facts = json.loads((folder / "facts.json").read_text())
    table = TeacherTable(cache, facts.pop("images"), facts.pop("views"), facts.pop("classes"), facts)
    assert table.folder == folder
    return command, table


def test_a_table_that_is_not_the_teachers_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, table = filled_by_a_run(teacher, tmp_path)
    index, view = np.nonzero(table.known)
    table.keep(index, view, table.logits[index, view] + 0.1)
    assert run([*command, str(tmp_path / "two")]) == 3
    assert "does not hold this teacher's answers" in capsys.readouterr().err


def test_another_border_is_another_table(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The views of reflected images have the ids of the others; two seeds of one mode share a table."""
    command, table = filled_by_a_run(teacher, tmp_path)
    assert run([*command, str(tmp_path / "reflected"), "--padding-mode", "reflect"]) == 0
    (other,) = set(table.folder.parent.iterdir()) - {table.folder}
    assert json.loads((other / "facts.json").read_text())["padding_mode"] == "reflect"
    assert capsys.readouterr().err.count(" 0.0% known so far") == 2
    assert run([*command, str(tmp_path / "zeros"), "--seed", "1"]) == 0
    assert " 0.0% known" not in capsys.readouterr().err and len([*table.folder.parent.iterdir()]) == 2


def test_damaged_answers_are_told_of_and_asked_for_again(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, table = filled_by_a_run(teacher, tmp_path)
    table.logits.view(np.uint32)[:] ^= 1  # the lowest bit of every number: 1e-7 of it
    assert run([*command, str(tmp_path / "two")]) == 0
    assert "are damaged (their checksums differ): the teacher is asked again" in capsys.readouterr().err
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    index, view = np.nonzero(table.known)
    right, _ = table.look_up(index, view)
    assert right.all(), "what was asked again is kept"


def test_a_resaved_teacher_is_the_same_teacher(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run goes on and its answers are known, whatever file its tensors are in; other tensors are another's."""
    (tmp_path / "first.safetensors").write_bytes((teacher / "best.safetensors").read_bytes())
    command, table = filled_by_a_run(tmp_path / "first.safetensors", tmp_path)
    state = load_file(teacher / "best.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "again.pt")
    command[command.index(str(tmp_path / "first.safetensors"))] = str(tmp_path / "again.pt")
    assert run([*command, str(tmp_path / "one")]) == 0  # goes on
    assert run([*command, str(tmp_path / "two")]) == 0
    assert [*table.folder.parent.iterdir()] == [table.folder]
    assert all(torch.equal(value, weights(tmp_path / "one")[key]) for key, value in weights(tmp_path / "two").items())
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "again.pt")
    assert run([*command, str(tmp_path / "one")]) == 2
    assert "holds another run (teacher: " in capsys.readouterr().err


def test_what_an_earlier_version_knew_by_the_file_alone_is_found(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, table = filled_by_a_run(teacher, tmp_path)
    config = json.loads((tmp_path / "one/config.json").read_text())
    digest = config["teacher"].pop("sha256")
    del config["teacher"]["tensors"]
    (tmp_path / "one/config.json").write_text(json.dumps(config | {"teacher": config["teacher"] | {"sha256": digest}}))
    text = json.dumps(
        json.loads((table.folder / "facts.json").read_text()) | {"teacher": digest}, indent=1, sort_keys=True
    )
    earlier = table.folder.with_name(hashlib.sha256(text.encode()).hexdigest()[:16])
    table.folder.rename(earlier)
    for out in ("one", "two"):
        assert run([*command, str(tmp_path / out)]) == 0
    assert [*earlier.parent.iterdir()] == [earlier]
    assert f"kept in {earlier}, {table.known.mean():.1%} known so far" in capsys.readouterr().err


def test_every_flipped_bit_of_a_table_is_found(loader: Loader, tmp_path: Path) -> None:
    table = table_in(tmp_path)
    for _ in epoch(logits(Teacher(), table), loader, 1):
        pass
    index, view = np.nonzero(table.known)
    assert table.look_up(index, view)[0].all()
    for array in (table.logits.view(np.uint32), table.checksums):
        for bit in range(32):
            row = bit % len(index)
            array[index[row], view[row]] ^= np.uint32(1 << bit)
            right, _ = table.look_up(index, view)
            assert not right[row] and right.sum() == len(index) - 1
            array[index[row], view[row]] ^= np.uint32(1 << bit)
    swapped = table.logits[index[:2], view[:2]][::-1].copy(), table.checksums[index[:2], view[:2]][::-1].copy()
    table.logits[index[:2], view[:2]], table.checksums[index[:2], view[:2]] = swapped
    assert not table.look_up(index[:2], view[:2])[0].any(), "rows of other views, whole in themselves"


def test_what_was_asked_for_before_a_cut_is_kept_where_the_run_saves(loader: Loader, tmp_path: Path) -> None:
    """The resumed run asks the teacher for the rest alone."""
    table, teacher = table_in(tmp_path), Teacher()
    found = logits(teacher, table, ahead=2)
    cut = epoch(found, loader, 1)
    for _ in range(3):
        next(cut)
    found.keep()
    assert table.known.sum() == 4 * BATCH  # the second pair of batches was asked for with its first
    teacher.asked = 0
    rest = found.epoch(loader.epoch(1, 2), *loader.schedule(1, 2))
    assert sum(len(batch.label) for batch, _ in rest) == IMAGES - 2 * BATCH
    assert table.known.sum() == IMAGES and IMAGES - 4 * BATCH <= teacher.asked < IMAGES - 3 * BATCH
