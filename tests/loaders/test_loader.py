"""What both backends promise; here shown by the resident one, and by the plan behind both."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retemper.loaders import Batch, Split, UsageError, ViewSpace, epoch_order
from retemper.loaders.loader import Plan
from retemper.loaders.resident import ResidentLoader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VIEWS = ViewSpace(2, True)


def resident(
    split: Split, batch_size: int, indices: np.ndarray | None = None, rank: int = 0, world_size: int = 1
) -> ResidentLoader:
    chosen = np.arange(len(split)) if indices is None else indices
    return ResidentLoader(split, Plan(chosen, batch_size, 7, VIEWS, rank, world_size), DEVICE, "a test")


def rows(batches: list[Batch]) -> list[tuple[int, int, int, bytes]]:
    """Return (index, label, view, pixels) of every image, in order."""
    return [
        (int(index), int(label), int(view), image.cpu().numpy().tobytes())
        for batch in batches
        for image, label, index, view in zip(batch.image, batch.label, batch.index, batch.view, strict=True)
    ]


def test_an_epoch_is_the_split_in_our_order_and_views(split: Split) -> None:
    loader = resident(split, 32)
    batches = list(loader.epoch(3))
    order, view = epoch_order(130, 7, 3), VIEWS.draw(130, 7, 3)
    assert [len(batch.label) for batch in batches] == [32, 32, 32, 32, 2]
    assert len(loader) == 5 and loader.num_images == 130
    for batch in batches:
        assert batch.image.dtype == torch.uint8 and batch.image.shape[1:] == (6, 5, 3)
        assert batch.label.dtype == batch.index.dtype == batch.view.dtype == torch.int64
        assert all(tensor.device.type == DEVICE.type for tensor in vars(batch).values())
    assert rows(batches) == [(i, split.labels[i], view[i], split.images[i].tobytes()) for i in order]


@pytest.mark.parametrize("batch_size", [1, 7, 130, 200])
def test_the_batch_size_changes_neither_order_nor_views(split: Split, batch_size: int) -> None:
    assert rows(list(resident(split, batch_size).epoch(1))) == rows(list(resident(split, 32).epoch(1)))


def test_a_part_of_the_split_keeps_its_positions_and_views(split: Split) -> None:
    indices = np.arange(3, 130, 3)
    found = rows(list(resident(split, 16, indices).epoch(2)))
    view = VIEWS.draw(130, 7, 2)
    assert sorted(row[0] for row in found) == indices.tolist()
    assert found == [(i, split.labels[i], view[i], split.images[i].tobytes()) for i, *_ in found]
    assert [row[0] for row in found] != indices.tolist()


def test_an_epoch_can_be_resumed_at_any_batch(split: Split) -> None:
    loader = resident(split, 32)
    whole = [rows([batch]) for batch in loader.epoch(4)]
    for start in range(6):
        assert [rows([batch]) for batch in loader.epoch(4, start)] == whole[start:]
    for start in (-1, 6):
        with pytest.raises(UsageError, match=f"cannot start at batch {start}"):
            loader.epoch(4, start)


def test_walking_gives_what_is_asked_for_as_it_is(split: Split) -> None:
    loader, asked = resident(split, 8, np.arange(10)), np.array([129, 0, 64, 64, 5, 6, 7, 8, 9])
    found = list(loader.walk(asked))
    assert [len(batch.label) for batch in found] == [8, 1]
    assert rows(found) == [(i, split.labels[i], VIEWS.identity, split.images[i].tobytes()) for i in asked]
    assert list(loader.walk(asked[:0])) == []
    for position in (-1, 130):
        with pytest.raises(UsageError, match="outside the 130 images"):
            loader.walk(np.array([position]))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_every_batch(split: Split, world_size: int) -> None:
    """There are 130 images in batches of 64: of the last one two of four processes get none."""
    alone = [rows([batch]) for batch in resident(split, 64).epoch(1)]
    parts = [
        [rows([batch]) for batch in resident(split, 64, rank=r, world_size=world_size).epoch(1)]
        for r in range(world_size)
    ]
    for number, batch in enumerate(alone):
        assert sorted(row for part in parts for row in part[number]) == sorted(batch)
    assert {len(part) for part in parts} == {3}
    resumed = [rows([batch]) for batch in resident(split, 64, rank=1, world_size=world_size).epoch(1, 1)]
    assert resumed == parts[1][1:]


@given(n=st.integers(1, 200), local=st.integers(1, 9), world_size=st.integers(1, 5))
def test_the_parts_of_a_plan_make_the_whole(n: int, local: int, world_size: int) -> None:
    size = local * world_size
    plans = [Plan(np.arange(n), size, 0, VIEWS, rank, world_size) for rank in range(world_size)]
    parts = [plan.part(np.arange(n)) for plan in plans]
    for start in range(0, n, size):
        batch = range(start, min(start + size, n))
        at = slice(start // world_size, start // world_size + local)
        assert sorted(i for part in parts for i in part[at]) == list(batch)


def test_impossible_plans_are_refused(split: Split) -> None:
    everything = np.arange(130)
    with pytest.raises(UsageError, match="no images"):
        Plan(everything[:0], 8, 0, VIEWS)
    with pytest.raises(UsageError, match="a batch of 0"):
        Plan(everything, 0, 0, VIEWS)
    with pytest.raises(UsageError, match="a batch of 8 does not divide among 3"):
        Plan(everything, 8, 0, VIEWS, 0, 3)
    with pytest.raises(UsageError, match="process 2 is not one of 2"):
        Plan(everything, 8, 0, VIEWS, 2, 2)
    with pytest.raises(UsageError, match="outside the 130"):
        resident(split, 8, np.array([130]))


def test_the_resident_loader_says_what_it_is(split: Split) -> None:
    loader = resident(split, 8)
    assert loader.description == f"loader: resident on {DEVICE} (a test)"
    loader.close()
