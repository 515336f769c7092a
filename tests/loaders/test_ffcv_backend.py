"""FFCV itself: the same bits as the resident loader, and each of its traps."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from retemper.loaders import Batch, DataError, Split, ViewSpace, convert, split_of_arrays
from retemper.loaders import ffcv_backend as module
from retemper.loaders.ffcv_backend import FfcvLoader
from retemper.loaders.loader import Plan
from retemper.loaders.resident import ResidentLoader

pytestmark = pytest.mark.usefixtures("ffcv")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INDICES = np.arange(1, 130)  # 129 images: batches of 32 and one of 1
PLAN = Plan(INDICES, 32, 5, ViewSpace(4, True))


@pytest.fixture(scope="module")
def path(split: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ffcv") / "toy.beton"
    convert(split, path, progress=False)
    return path


@pytest.fixture(scope="module")
def loader(split: Split, path: Path) -> Iterator[FfcvLoader]:
    """Return one loader for all tests, since every loader compiles anew."""
    loader = FfcvLoader(split, path, PLAN, DEVICE, "a test")
    yield loader
    loader.close()


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        for name, tensor in vars(one).items():
            torch.testing.assert_close(tensor, vars(two)[name], rtol=0, atol=0)  # values, dtype, shape, device


def pumps() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "Pump"]


def test_batches_are_those_of_the_resident_loader_bit_for_bit(loader: FfcvLoader, split: Split) -> None:
    resident = ResidentLoader(split, PLAN, DEVICE, "a test")
    for epoch in (0, 1, 0, 17):  # in any order: FFCV's own count does not matter
        # a list: batches that shared FFCV's buffers would have been overwritten by its end
        batches = list(loader.epoch(epoch))
        assert [len(batch.label) for batch in batches] == [32, 32, 32, 32, 1]
        assert_same(batches, list(resident.epoch(epoch)))
    for start in (1, 4, 5):
        assert_same(list(loader.epoch(1, start)), list(resident.epoch(1, start)))
    asked = np.array([0, 129, 0, 3])
    assert_same(list(loader.walk(asked)), list(resident.walk(asked)))
    assert list(loader.walk(asked[:0])) == []
    assert len(loader) == 5 and loader.num_images == 129
    assert loader.description == f"loader: ffcv from {loader.path} (a test)"


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3)])
def test_grey_and_colour_over_several_pages(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    n = 2_000 if shape[2] == 3 else 40_000  # more than one page of 2 MiB
    images = np.random.default_rng(1).integers(0, 256, (n, *shape), dtype=np.uint8)
    split = split_of_arrays("toy", "train", images, np.arange(n) % 10, tuple("0123456789"), "")
    convert(split, tmp_path / "toy.beton", progress=False)
    plan = Plan(np.arange(n), 1024, 0, ViewSpace(0, False))
    loader = FfcvLoader(split, tmp_path / "toy.beton", plan, DEVICE, "a test")
    assert_same(list(loader.epoch(0)), list(ResidentLoader(split, plan, DEVICE, "a test").epoch(0)))


def test_processes_share_every_batch(split: Split, path: Path) -> None:
    """There are 129 images in batches of 64: the second process gets nothing of the last one."""
    plan = Plan(INDICES, 64, 5, ViewSpace(4, True), rank=1, world_size=2)
    loader = FfcvLoader(split, path, plan, DEVICE, "a test")
    batches = list(loader.epoch(0))
    assert [len(batch.label) for batch in batches] == [32, 32, 0]
    assert_same(batches, list(ResidentLoader(split, plan, DEVICE, "a test").epoch(0)))
    assert [len(batch.label) for batch in loader.epoch(0, 2)] == [0]


def test_leaving_an_epoch_early_leaves_no_thread(loader: FfcvLoader) -> None:
    for taken in range(4):
        batches = loader.epoch(taken)
        for _ in range(taken):
            next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert not pumps()
    for _ in loader.epoch(0):
        break  # the generator is dropped, and closed with it
    assert not pumps()
    assert len(list(loader.epoch(0))) == 5


def test_what_is_not_wanted_is_not_read(loader: FfcvLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    pump, read = module._pump_class(), []
    whole = pump.run_pipeline
    monkeypatch.setattr(pump, "run_pipeline", lambda *args: (read.append(1), whole(*args))[1])
    batches = loader.walk(np.zeros(100 * 32, np.int64))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(read) <= 8  # one given, three waiting, one at work, and what began meanwhile


def test_closing_stops_the_thread(loader: FfcvLoader) -> None:
    batches = loader.epoch(0)
    next(batches)
    assert pumps()
    loader.close()
    assert not pumps()
    del batches


def test_torchs_thread_count_is_kept(split: Split, path: Path, loader: FfcvLoader) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        FfcvLoader(split, path, PLAN, DEVICE, "a test")
        counts = [torch.get_num_threads() for _ in loader.epoch(0)]
        inside: list[int] = []
        thread = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert {*counts, *inside, torch.get_num_threads()} == {3}
    finally:
        torch.set_num_threads(before)


def test_a_dead_reader_is_an_error_at_once(loader: FfcvLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV alone would print a traceback and wait for ever."""
    pump = module._pump_class()
    whole = pump.run_pipeline

    def fails_at_2(self: object, batch: int, *rest: object) -> object:
        if batch == 2:
            raise ValueError("negative dimensions are not allowed")
        return whole(self, batch, *rest)

    monkeypatch.setattr(pump, "run_pipeline", fails_at_2)
    batches = loader.epoch(0)
    assert [len(next(batches).label) for _ in range(2)] == [32, 32]  # what was read before is still given
    with pytest.raises(DataError, match=r"FFCV stopped reading .*negative dimensions.*use --loader resident") as error:
        next(batches)  # not the error of the time limit
    assert isinstance(error.value.__cause__, ValueError)
    assert not pumps()


def test_a_stalled_reader_is_an_error_after_the_time_limit(loader: FfcvLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(module._pump_class(), "run_pipeline", lambda *args: go_on.wait(600))
    monkeypatch.setattr(loader, "_timeout_s", 0.5)
    monkeypatch.setattr(module, "STOP_S", 0.2)
    with pytest.raises(DataError, match=r"FFCV gave no batch of .*toy.beton for 0.5 s"):
        next(loader.epoch(0))
    go_on.set()
    for thread in pumps():
        thread.join(60)
    assert not pumps()


def test_an_epoch_that_ends_too_early_is_an_error(loader: FfcvLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(self: object, batch: int, *rest: object) -> object:
        raise StopIteration

    monkeypatch.setattr(module._pump_class(), "run_pipeline", stops)
    with pytest.raises(DataError, match="ended the epoch"):
        next(loader.epoch(0))


def test_other_images_than_asked_for_are_an_error(loader: FfcvLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    pump = module._pump_class()
    whole = pump.run_pipeline

    def shifted(self: object, batch: int, indices: np.ndarray, *rest: object) -> object:
        return whole(self, batch, indices - 1, *rest)

    monkeypatch.setattr(pump, "run_pipeline", shifted)
    with pytest.raises(DataError, match="gave other images"):
        next(loader.epoch(0))


def test_a_damaged_file_or_another_set_is_refused(split: Split, path: Path, tmp_path: Path) -> None:
    def opened(split: Split, path: Path) -> None:
        FfcvLoader(split, path, PLAN, DEVICE, "a test")

    copy = tmp_path / "copy.beton"
    copy.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "copy.beton.json").write_bytes(path.with_name("toy.beton.json").read_bytes())
    with pytest.raises(DataError, match="truncated at"):
        opened(split, copy)
    renamed = split_of_arrays("toy2", "train", split.images, split.labels, split.classes, "")
    with pytest.raises(DataError, match="holds another data set than toy2 train"):
        opened(renamed, path)
    relabelled = split_of_arrays("toy", "train", split.images, split.labels[::-1], split.classes, "")
    with pytest.raises(DataError, match="has other labels"):
        opened(relabelled, path)


ALONE = """
import sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(3)
from retemper.loaders import ViewSpace, ffcv_problem, make_loader, split_of_arrays

assert ffcv_problem() is None
assert torch.get_num_threads() == 3, "importing FFCV changed it"
images = np.random.default_rng(0).integers(0, 256, (130, 6, 5, 3), dtype=np.uint8)
split = split_of_arrays("toy", "train", images, np.arange(130) % 4, tuple("abcd"), "f" * 64)
cpu, path = torch.device("cpu"), Path(sys.argv[1])
loader = make_loader("ffcv", split, batch_size=4, seed=0, views=ViewSpace(), device=cpu, beton=path)
for batch in loader.epoch(0):
    raise SystemExit(7)
"""


def test_a_process_that_dies_within_an_epoch_ends(path: Path) -> None:
    """It is run from import to exit in a process of its own, which must not hang, nor FFCV change torch's threads."""
    run = subprocess.run([sys.executable, "-c", ALONE, str(path)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 7, run.stderr
    assert run.stderr == "FFCV is compiling its pipeline (some seconds, once a run)\n"
    assert run.stdout == ""
