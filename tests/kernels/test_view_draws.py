"""The draws of views: as the authors and torchvision draw them, from the words of SplitMix64."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from retemper.kernels.view_draws import _words, view_draws

MANY = 200_000


def random_views(number: int) -> Tensor:
    return torch.randint(2**63 - 1, (number,), generator=torch.Generator().manual_seed(0))


def share_of(values: Tensor, expected: dict[int, float]) -> None:
    """Check how often each whole number occurs: within five standard deviations."""
    count, number = Counter(values.tolist()), len(values)
    assert count.keys() <= expected.keys()
    for value, share in expected.items():
        assert abs(count[value] - number * share) <= 5 * math.sqrt(number * share * (1 - share)) + 1e-9, value


def uniform(values: Tensor, low: float, high: float) -> None:
    """Check that numbers are uniform in a range, by the largest distance of their distribution."""
    place = ((values.double() - low) / (high - low)).sort().values
    rank = (torch.arange(len(place)) + 0.5) / len(place)
    assert place[0] >= 0 and place[-1] <= 1 and (place - rank).abs().max() < 2.2 / math.sqrt(len(place))


def test_words_are_those_of_splitmix64() -> None:
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert _words(torch.tensor([1234567]))[0, :5].tolist() == [word >> 32 for word in known]


@pytest.mark.parametrize("side", [32, 8])
def test_crop_shift_is_drawn_as_the_authors_draw_it(side: int) -> None:
    drawn, most = view_draws(random_views(MANY), side, side, "cropshift"), 10 * side // 32
    cut_x, cut_y = side - (drawn.right - drawn.left), side - (drawn.bottom - drawn.top)
    share_of(drawn.flip, {0: 0.5, 1: 0.5})
    share_of(cut_x + cut_y, dict.fromkeys(range(most + 1), 1 / (most + 1)))
    for cut in range(most + 1):
        share_of(cut_x[cut_x + cut_y == cut], dict.fromkeys(range(cut + 1), 1 / (cut + 1)))
    for first, shift, lost in ((drawn.left, drawn.shift_x, cut_x), (drawn.top, drawn.shift_y, cut_y)):
        for cut in range(most + 1):
            here = lost == cut
            for place in (first[here], (first + shift)[here]):  # where it lies, and where it was
                share_of(place, dict.fromkeys(range(cut + 1), 1 / (cut + 1)))
    assert torch.corrcoef(torch.stack([drawn.left.float(), (drawn.left + drawn.shift_x).float()]))[0, 1] < 0.6


@pytest.mark.parametrize(
    ("policy", "shares", "shear", "turns", "erased"),
    [
        ("idbh-weak", [0.125] * 8, 0.15, 10, 0.5),
        ("idbh-strong", [0.125] * 8, 0.15, 10, 1.0),
        ("idbh-svhn", [0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.3, 0.3], 0.35, 30, 1.0),
    ],
)
def test_operations_are_drawn_as_the_authors_draw_them(
    policy: str, shares: list[float], shear: float, turns: int, erased: float
) -> None:
    drawn = view_draws(random_views(MANY), 32, 32, policy)
    operation, strength = drawn.operation, drawn.strength
    share_of(operation, dict(enumerate(shares)))
    for kind, low in ((0, 0.1), (1, 0.5), (2, 0.5), (3, 0.1)):
        uniform(strength[operation == kind], low, 1.9)
    slope = (drawn.x_by_y + drawn.y_by_x)[operation == 6].double() / 2**32
    uniform(slope.abs().atan(), 0.05 - 1e-5, shear + 1e-5)
    share_of((slope > 0).long(), {0: 0.5, 1: 0.5})
    share_of((drawn.x_by_y[operation == 6] != 0).long(), {0: 0.5, 1: 0.5})
    degrees = (drawn.y_by_x[operation == 7].double() / 2**32).asin() * 180 / math.pi
    share_of(degrees.round().long(), {sign * d: 0.5 / turns for sign in (-1, 1) for d in range(1, turns + 1)})
    found = float((drawn.erase_height > 0).double().mean())
    assert abs(found - erased) < (0.006 if erased < 1 else 5e-5)  # six tries may all fail
    assert drawn.scale[operation < 6].unique().tolist() == [2**32]


@pytest.mark.parametrize(("policy", "most", "side"), [("idbh-strong", 0.33, 32), ("idbh-svhn", 0.5, 8)])
def test_rectangles_are_drawn_as_torchvision_draws_them(policy: str, most: float, side: int) -> None:
    drawn, generator = view_draws(random_views(MANY), side, side, policy), torch.Generator().manual_seed(1)
    area, ratio = torch.rand(2, 2 * MANY, generator=generator, dtype=torch.float64)
    area, ratio = side * side * (0.02 + (most - 0.02) * area), (0.3 * (3.3 / 0.3) ** ratio)
    tall, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (tall < side) & (wide < side)
    expected = (tall * side + wide)[fits].bincount(minlength=side * side).double() / fits.sum()
    found = (drawn.erase_height * side + drawn.erase_width).bincount(minlength=side * side).double() / MANY
    assert (found - expected).abs().max() < 5 * math.sqrt(2 * float(expected.max()) / MANY)
    for first, length in ((drawn.erase_y, drawn.erase_height), (drawn.erase_x, drawn.erase_width)):
        share_of(first[length == side // 4], dict.fromkeys(range(side - side // 4 + 1), 1 / (side - side // 4 + 1)))


def test_cutout_lies_around_any_pixel() -> None:
    drawn = view_draws(random_views(MANY), 9, 5, "crop", cutout=4)
    share_of(drawn.cutout_y, dict.fromkeys(range(-2, 7), 1 / 9))
    share_of(drawn.cutout_x, dict.fromkeys(range(-2, 3), 1 / 5))
