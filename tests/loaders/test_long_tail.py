"""Long tails against the published sizes, on classes of equal and of unequal size."""

import numpy as np
import pytest

from retemper.loaders import UsageError, long_tail
from retemper.loaders.long_tail import tail_sizes


@pytest.mark.parametrize(
    ("factor", "sizes"),
    [
        (100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
        (50, [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]),
        (10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]),
    ],
)
def test_sizes_are_those_of_the_long_tailed_cifar10(factor: float, sizes: list[int]) -> None:
    assert tail_sizes(np.full(10, 5000), factor).tolist() == sizes


def test_the_factor_holds_where_classes_are_of_unequal_size() -> None:
    assert tail_sizes(np.array([90, 20, 40]), 4).tolist() == [40, 20, 10]  # the second class allows no more
    assert tail_sizes(np.array([5, 9, 4]), 1).tolist() == [4, 4, 4]
    assert tail_sizes(np.array([7]), 100).tolist() == [7]
    assert tail_sizes(np.full(3, 4), 100).tolist() == [4, 0, 0]


def test_images_are_drawn_the_same_in_every_run_and_a_longer_tail_is_a_part() -> None:
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 60))
    found = long_tail(label, 4, 8)
    assert np.bincount(label[found]).tolist() == [60, 30, 15, 7]
    assert found.tolist() == sorted(set(found.tolist())) and found.dtype == np.int64
    assert np.array_equal(found, long_tail(label, 4, 8))
    assert set(long_tail(label, 4, 50)) < set(found)
    last = np.flatnonzero(label == 3)
    assert set(found[label[found] == 3]) not in (set(last[:7]), set(last[-7:]))


@pytest.mark.parametrize(("factor", "said"), [(0.01, "1 or more, not 0.01"), (2, "class 2 has none")])
def test_what_is_no_long_tail_is_refused(factor: float, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        long_tail(np.array([0, 1, 1, 0]), 3, factor)
