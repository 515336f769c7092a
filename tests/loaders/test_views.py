"""The randomness of an epoch: a function of seed, epoch and position, the same for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retemper.loaders import UsageError, ViewSpace, epoch_order, holdout_split
from retemper.loaders.views import ORDER, VIEW, random_words

SEEDS = st.integers(0, 2**63)
EPOCHS = st.integers(0, 10_000)


@given(n=st.integers(0, 300), seed=SEEDS, epoch=EPOCHS)
def test_an_epoch_visits_every_image_once(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


@given(padding=st.integers(0, 8), flip=st.booleans(), n=st.integers(1, 300), seed=SEEDS, epoch=EPOCHS)
def test_a_view_depends_on_seed_epoch_and_position_only(
    padding: int, flip: bool, n: int, seed: int, epoch: int
) -> None:
    space = ViewSpace(padding, flip)
    view = space.draw(n, seed, epoch)
    assert view.dtype == np.int64
    assert 0 <= view.min() and view.max() < space.count
    np.testing.assert_array_equal(view, space.draw(2 * n, seed, epoch)[:n])
    if not flip:
        assert not (view % 2).any()


@pytest.mark.parametrize(("padding", "flip", "drawn"), [(4, True, 162), (4, False, 81), (0, True, 2), (0, False, 1)])
def test_every_view_is_drawn_equally_often(padding: int, flip: bool, drawn: int) -> None:
    space, n = ViewSpace(padding, flip), 100_000
    times = np.bincount(space.draw(n, 0, 0), minlength=space.count)
    assert np.count_nonzero(times) == drawn
    expected = n / drawn
    assert np.abs(times[times > 0] - expected).max() <= 5 * expected**0.5  # five standard deviations


@given(n=st.integers(1, 300), seed=SEEDS, epoch=EPOCHS)
def test_a_strong_view_is_a_number_of_63_bits_of_its_own(n: int, seed: int, epoch: int) -> None:
    space = ViewSpace(strong=True)
    view = space.draw(n, seed, epoch)
    assert view.dtype == np.int64 and 0 <= view.min() and len(set(view.tolist())) == n
    np.testing.assert_array_equal(view, space.draw(2 * n, seed, epoch)[:n])
    np.testing.assert_array_equal(view, (random_words(n, seed, epoch, VIEW) >> np.uint64(1)).astype(np.int64))
    assert space.identity == -1 and space.count == 2**63


def test_seeds_and_epochs_differ_and_so_do_order_and_view() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    views = {tuple(ViewSpace().draw(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == len(views) == 16
    assert not set(random_words(1000, 0, 0, ORDER)) & set(random_words(1000, 0, 0, VIEW))
    same = ViewSpace().draw(1000, 0, 0) == random_words(1000, 0, 0, ORDER) % np.uint64(162)
    assert same.mean() < 0.05  # the views are not those of the stream that orders


def test_the_streams_are_fixed_for_ever() -> None:
    assert epoch_order(8, seed=1, epoch=2).tolist() == [5, 1, 3, 4, 6, 2, 7, 0]
    assert ViewSpace(4, True).draw(6, seed=1, epoch=2).tolist() == [145, 52, 95, 25, 118, 115]
    assert ViewSpace(strong=True).draw(2, seed=1, epoch=2).tolist() == [8014723384741760304, 3988491134056317440]
    assert holdout_split(np.arange(12) % 2, 2)[1].tolist() == [4, 5, 8, 9]


def test_the_identity_is_the_middle_crop_unflipped() -> None:
    space = ViewSpace(4, True)
    dy, dx, flip = space.identity // 18, space.identity // 2 % 9, space.identity % 2
    assert (dy, dx, flip) == (4, 4, 0)
    assert ViewSpace(0, False).identity == 0


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="negative"):
        ViewSpace(-1)
    with pytest.raises(UsageError, match="negative"):
        epoch_order(3, -1, 0)
    with pytest.raises(UsageError, match="negative"):
        ViewSpace().draw(3, 0, -1)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=200), per_class=st.integers(0, 5), seed=st.integers(0, 99)
)
def test_the_held_out_part_is_balanced_and_apart(labels: list[int], per_class: int, seed: int) -> None:
    label_N = np.array(labels)
    if min(np.unique(label_N, return_counts=True)[1]) <= per_class:
        with pytest.raises(UsageError, match="cannot hold out"):
            holdout_split(label_N, per_class, seed)
        return
    train, held = holdout_split(label_N, per_class, seed)
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all() and (np.diff(held) > 0).all()
    assert all((label_N[held] == k).sum() == per_class for k in np.unique(label_N))


@pytest.mark.parametrize(
    ("place", "train", "held"), [("start", [4, 5, 6], [0, 1, 2, 3]), ("end", [0, 1, 3], [2, 4, 5, 6])]
)
def test_the_held_out_part_can_be_the_start_or_the_end_of_each_class(
    place: str, train: list[int], held: list[int]
) -> None:
    labels = np.array([0, 1, 1, 0, 0, 1, 0])
    assert [part.tolist() for part in holdout_split(labels, 2, place=place)] == [train, held]
    assert holdout_split(labels, 0, place=place)[1].tolist() == []


def test_the_held_out_part_follows_its_seed() -> None:
    labels = np.arange(1000) % 10
    assert len({tuple(holdout_split(labels, 10, seed)[1]) for seed in (0, 0, 1)}) == 2
    with pytest.raises(UsageError, match="negative"):
        holdout_split(labels, -1)
