"""Batches with a share of a pool: what is drawn, by whom, and that the disk and the device give the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retemper.loaders import Batch, Extra, Loader, Pool, Split, UsageError, ViewSpace, convert, make_loader, open_pool
from retemper.loaders.mixed import MixedPlan, read_ahead

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VIEWS = ViewSpace(2, True)
IMAGE = np.random.default_rng(3).integers(0, 256, (50, 6, 5, 3), dtype=np.uint8)
LABEL = np.arange(50) % 4


@pytest.fixture
def pool(split: Split, tmp_path: Path) -> Pool:
    for number in (0, 1):
        np.savez(tmp_path / f"part{number}.npz", image=IMAGE[25 * number :][:25], label=LABEL[25 * number :][:25])
    return open_pool(tmp_path, split, tmp_path)


def mixed(split: Split, pool: Pool, where: Any = "disk", fraction: float = 0.7, **options: Any) -> Loader:
    given: dict[str, Any] = dict(batch_size=20, seed=7, views=VIEWS, device=DEVICE) | options
    return make_loader(given.pop("kind", "resident"), split, extra=Extra(pool, fraction, where), **given)


def rows(batches: list[Batch]) -> list[tuple[int, int, int, bytes]]:
    return [
        (int(index), int(label), int(view), image.cpu().numpy().tobytes())
        for batch in batches
        for image, label, index, view in zip(batch.image, batch.label, batch.index, batch.view, strict=True)
    ]


def test_a_batch_holds_its_share_of_the_pool_and_an_epoch_every_real_image_once(split: Split, pool: Pool) -> None:
    """130 images, 6 a batch, make 21 batches of 20 and one of 4 real rows and round(4 * 14 / 6) = 9 others."""
    loader = mixed(split, pool)
    batches = list(loader.epoch(3))
    assert len(loader) == 22 and loader.num_images == 21 * 20 + 13
    assert [len(batch.label) for batch in batches] == [20] * 21 + [13]
    assert [int((batch.index < 0).sum()) for batch in batches] == [14] * 21 + [9]
    assert all(bool((batch.index[:6] >= 0).all()) for batch in batches[:-1])
    real = [row for row in rows(batches) if row[0] >= 0]
    plain = rows(list(make_loader("resident", split, batch_size=9, seed=7, views=VIEWS, device=DEVICE).epoch(3)))
    assert real == plain  # their order and views are those of a run without a pool
    assert all(
        row[1:2] + row[3:] == (LABEL[-1 - row[0]], IMAGE[-1 - row[0]].tobytes()) for row in rows(batches) if row[0] < 0
    )


def test_draws_are_uniform_over_the_whole_pool_with_views_of_their_own() -> None:
    plan = MixedPlan(np.arange(5000), 20, 7, VIEWS, pool_images=50, fraction=0.7)
    index, view = plan.draw(5000, 1)
    assert plan.num_rows == len(index) == 833 * 20 + 2 + 5
    drawn = index < 0
    counts = np.bincount(-1 - index[drawn], minlength=50)
    expected = counts.sum() / 50
    assert (
        len(counts) == 50 and ((counts - expected) ** 2 / expected).sum() < 96
    )  # chi squared, 49 degrees: 1 in 10,000
    assert len({*view[drawn].tolist()}) == VIEWS.count
    again = {epoch: plan.draw(5000, epoch)[0] for epoch in (1, 2)}
    assert np.array_equal(again[1], index) and not np.array_equal(again[2][drawn], index[drawn])
    other = MixedPlan(np.arange(5000), 20, 8, VIEWS, pool_images=50, fraction=0.7).draw(5000, 1)
    assert not np.array_equal(other[0][drawn], index[drawn])


def test_an_epoch_can_be_resumed_at_any_batch(split: Split, pool: Pool) -> None:
    loader = mixed(split, pool)
    whole = [rows([batch]) for batch in loader.epoch(4)]
    for start in (0, 1, 20, 21, 22):
        assert [rows([batch]) for batch in loader.epoch(4, start)] == whole[start:]


@pytest.mark.parametrize(("batch_size", "fraction"), [(20, 0.7), (12, 0.25), (14, 0.5)])
def test_processes_share_every_batch(split: Split, pool: Pool, batch_size: int, fraction: float) -> None:
    def given(**part: Any) -> list[list[tuple[int, int, int, bytes]]]:
        loader = mixed(split, pool, fraction=fraction, batch_size=batch_size, **part)
        return [rows([batch]) for batch in loader.epoch(1)]

    alone, parts = given(), [given(rank=rank, world_size=2) for rank in (0, 1)]
    extra = round(fraction * batch_size)
    for number, batch in enumerate(alone):
        assert parts[0][number] == batch[0::2] and parts[1][number] == batch[1::2]
        if number < len(alone) - 1:
            assert all(abs(sum(row[0] < 0 for row in part[number]) - extra / 2) <= 1 / 2 for part in parts)


@pytest.mark.parametrize("chunk", [1, 1000, 2**24])
def test_the_disk_and_the_device_give_the_same_bits(
    chunk: int, split: Split, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retemper.loaders.mixed.CHUNK", chunk)
    on_disk, resident = (mixed(split, pool, where) for where in ("disk", "device"))
    assert rows(list(on_disk.epoch(2))) == rows(list(resident.epoch(2)))
    assert "14 of 20 images a batch" in on_disk.description and "on the disk, read ahead" in on_disk.description
    assert f"50 images on {DEVICE}" in resident.description
    assert [row[0] for row in rows(list(on_disk.walk(np.array([3, 1, 2]))))] == [3, 1, 2]
    on_disk.close()
    resident.close()


def test_ffcv_serves_the_real_images_beside_a_pool(split: Split, pool: Pool, tmp_path: Path, ffcv: None) -> None:
    convert(split, tmp_path / "toy.beton", progress=False)
    loader = mixed(split, pool, kind="ffcv", beton=tmp_path / "toy.beton", indices=np.arange(3, 40))
    assert rows(list(loader.epoch(1, 2))) == rows(list(mixed(split, pool, indices=np.arange(3, 40)).epoch(1, 2)))
    loader.close()


def test_reading_ahead_ends_with_the_reader_and_hands_its_error_on(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [np.arange(3), np.empty(0, np.int64), np.arange(4), *[np.arange(2)] * 9]
    assert [len(image) for image in read_ahead(pool, drawn, CPU)] == [len(one) for one in drawn]
    taken: list[int] = []
    take = Pool.take

    def failing(self: Pool, index: np.ndarray, out: np.ndarray) -> None:
        taken.append(len(index))
        if len(taken) == 6:
            raise OSError("the disk is gone")
        take(self, index, out)

    monkeypatch.setattr(Pool, "take", failing)
    reader = read_ahead(pool, drawn, CPU)
    next(reader)
    reader.close()
    assert len(taken) <= 4  # buffers
    taken.clear()
    with pytest.raises(OSError, match="the disk is gone"):
        list(read_ahead(pool, drawn, CPU))


@pytest.mark.parametrize(("fraction", "world_size"), [(0.01, 1), (0.99, 1), (0.9, 4)])
def test_a_batch_without_room_for_both_kinds_is_refused(fraction: float, world_size: int) -> None:
    with pytest.raises(
        UsageError, match=f"--extra-fraction {fraction:g} makes a batch of 20 one of .* larger --batch-size"
    ):
        MixedPlan(np.arange(9), 20, 0, VIEWS, 0, world_size, pool_images=5, fraction=fraction)
