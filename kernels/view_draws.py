"""What a strong view draws: one 63-bit number, the view, decides all of it, on every device alike.

The draws are the words of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) that the view seeds. The k-th serves one
purpose, so that a policy that leaves one out draws the others as before. A whole number below n is the upper half of a
word times n, divided by 2**32. A view below 0 is the image as it is.

    flip              half of the images, if flips are on
    crop              of the image padded by p: moved by -p ... p, in each direction
    CropShift         s of 0 ... S lines are cut, c of 0 ... s of them columns, the others rows; from which side they
                      are cut, and where in the black image the rest is put, is drawn uniformly
    colour and shape  one of eight operations, with a strength
    random erasing    a black rectangle of a share of the area and a ratio of its sides, of six tries the first that
                      fits
    cutout            a black square around any pixel, cut at the border (DeVries and Taylor, 2017)
    resized crop      a box of a share of the area and a ratio of its sides, of ten tries the first that fits, else
                      the middle (torchvision's RandomResizedCrop)

CropShift and the rest are IDBH: Li and Spratling, ICLR 2023. The constants are those of the authors' src/data/idbh.py,
in github.com/TreeLLi/DA-Alone-Improves-AT, and of torchvision's RandomErasing.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retemper.kernels.language import tl

COLOR, BRIGHTNESS, CONTRAST, SHARPNESS, AUTOCONTRAST, EQUALIZE, SHEAR, ROTATE, NOTHING = map(tl.constexpr, range(9))

# which word of a view's generator decides what
FLIP, OPERATION, STRENGTH, SIGN, CUT, CUT_X, FROM_X, FROM_Y, TO_X, TO_Y = map(tl.constexpr, range(10))
ERASE, ERASE_Y, ERASE_X, CUTOUT_Y, CUTOUT_X, TRY = map(tl.constexpr, range(10, 16))
TRIES = tl.constexpr(6)  # at rectangles; torchvision has ten, a difference in one image of 100,000
WORDS = TRY.value + TRIES.value
CROP_TRIES = tl.constexpr(10)  # at the box of a resized crop, from the word TRY on

STEP = tl.constexpr(0x9E3779B97F4A7C15)  # of SplitMix64: the golden ratio in 64 bits
FIRST, SECOND = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)

# torchvision's RandomErasing: the least share of the area, and the half of the logarithm of the ratio, 0.3 to 3.3
ERASE_LOW = tl.constexpr(0.02)
HALF_LOG_LOW = tl.constexpr(math.log(0.3) / 2)
HALF_LOG_RANGE = tl.constexpr(math.log(3.3 / 0.3) / 2)

# torchvision's RandomResizedCrop: the half of the logarithm of the ratio of its sides, 3/4 to 4/3
HALF_LOG_RATIO = tl.constexpr(math.log(3 / 4) / 2)

# strengths of color and sharpness, of brightness and contrast, of shear; and their ranges
WIDE_LOW, WIDE_RANGE = tl.constexpr(0.1), tl.constexpr(1.8)
TONE_LOW, TONE_RANGE = tl.constexpr(0.5), tl.constexpr(1.4)
SHEAR_LOW = tl.constexpr(0.05)
DEGREE = tl.constexpr(math.pi / 180)


class Policy(NamedTuple):
    """What is drawn of a view.

    Attributes:
        cut: the most lines that CropShift cuts, in 32nds of the shorter side; None crops the padded image instead.
        until: of 2**32, where each operation's share ends, in the order of their numbers; empty for no operation.
        shear: the range of the shear, above SHEAR_LOW, in columns a row.
        turns: the angles are 1 ... turns degrees, in either direction.
        erase: of 2**32, how many views are erased.
        erase_range: the range of the erased share of the area, above ERASE_LOW.
    """

    cut: int | None = None
    until: tuple[int, ...] = ()
    shear: float = 0.0
    turns: int = 1
    erase: int = 0
    erase_range: float = 0.31


def _until(*shares: float) -> tuple[int, ...]:
    """Return where each share ends, of 2**32."""
    return tuple(round(sum(shares[: k + 1]) * 2**32) for k in range(len(shares)))


CIFAR = Policy(10, _until(*[1 / 8] * 8), shear=0.1, turns=10)  # colour rather than shape
SVHN = Policy(8, _until(0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.3, 0.3), shear=0.3, turns=30)
POLICIES = {
    "crop": Policy(),
    "cropshift": Policy(10),
    "idbh-weak": CIFAR._replace(erase=2**31),
    "idbh-strong": CIFAR._replace(erase=2**32),
    "idbh-svhn": SVHN._replace(erase=2**32, erase_range=0.48),
}


class Drawn(NamedTuple):
    """What B views show. All are (B,); whole numbers are int64, `strength` is float32.

    Attributes:
        flip: 0, or 1 to mirror the image before all else.
        shift_x, shift_y: pixel (x, y) shows pixel (x + shift_x, y + shift_y) of the mirrored image.
        left, right, top, bottom: columns left ... right - 1 and rows top ... bottom - 1 do; the others are black.
        operation: COLOR ... ROTATE, or NOTHING; it sees the image so far.
        strength: the factor of a colour operation.
        scale, x_by_y, y_by_x: what turns or shears it, in units of 2**-32: about its centre, pixel (x, y) shows pixel
            (scale x + x_by_y y, y_by_x x + scale y).
        erase_y, erase_x, erase_height, erase_width: the rectangle that is erased at the end.
        cutout_y, cutout_x: the first row and column of the square; it may lie outside, in part or as a whole.
    """

    flip: Tensor
    shift_x: Tensor
    left: Tensor
    right: Tensor
    shift_y: Tensor
    top: Tensor
    bottom: Tensor
    operation: Tensor
    strength: Tensor
    scale: Tensor
    x_by_y: Tensor
    y_by_x: Tensor
    erase_y: Tensor
    erase_x: Tensor
    erase_height: Tensor
    erase_width: Tensor
    cutout_y: Tensor
    cutout_x: Tensor


def view_draws(
    view: Tensor,
    height: int,
    width: int,
    policy: str,
    *,
    flip: bool = True,
    padding: int = 4,
    padding_mode: str = "zeros",
    cutout: int = 0,
) -> Drawn:
    """Return what each view of an image of that size shows, computed on the device of `view`.

    Args:
        view: (B,) int64.
        policy, flip, padding, padding_mode, cutout: as for `strong_augment`.
    """
    drawn, seen, rule = _words(view), (view >= 0).long(), POLICIES[policy]
    mirrored = below(drawn[:, FLIP.value], 2) * seen if flip else torch.zeros_like(view)
    if rule.cut is None:
        x = _crop(drawn[:, FROM_X.value], width, padding, padding_mode, seen)
        y = _crop(drawn[:, FROM_Y.value], height, padding, padding_mode, seen)
    else:
        cut = below(drawn[:, CUT.value], most_cut(rule, height, width) + 1) * seen
        cut_x = below(drawn[:, CUT_X.value], cut + 1)
        x = _shift(drawn[:, FROM_X.value], drawn[:, TO_X.value], width, cut_x)
        y = _shift(drawn[:, FROM_Y.value], drawn[:, TO_Y.value], height, cut - cut_x)
    operation, erased = _operation(drawn, rule, seen), _erased(drawn, rule, height, width, seen)
    squares = ((drawn[:, at.value], side) for at, side in ((CUTOUT_Y, height), (CUTOUT_X, width)))
    square = [torch.where(seen == 1, below(word, side) - cutout // 2, side) for word, side in squares]
    return Drawn(mirrored, *x, *y, *operation, *erased, *square)


def most_cut(rule: Policy, height: int, width: int) -> int:
    """Return the most lines that CropShift cuts off an image."""
    return min(height, width) * (rule.cut or 0) // 32


def below(word: Tensor, number: int | Tensor) -> Tensor:
    """Return a whole number in 0 ... number - 1, from the upper half of a word."""
    return word * number >> 32


class Box(NamedTuple):
    """What B resized crops show. All are (B,) int64.

    Attributes:
        flip: 1 to mirror what is seen, or 0.
        top, left: the first row and column.
        tall, wide: how many there are.
    """

    flip: Tensor
    top: Tensor
    left: Tensor
    tall: Tensor
    wide: Tensor


def box_draws(view: Tensor, height: int, width: int, size: int, *, least_area: float, flip: bool) -> Box:
    """Return which box of an image of that size each view shows, computed on the device of `view`.

    Args:
        view: (B,) int64; one below 0 shows the middle, `size` pixels a side.
        least_area, flip: as for `resized_crop`.
    """
    drawn = _words(view, TRY.value + CROP_TRIES.value)
    word = drawn[:, TRY.value :]
    share, ratio = (((half.float() + 0.5) * 2.0**-16) for half in (word >> 16, word & 2**16 - 1))
    side = ((share * (1 - least_area) + least_area) * float(height * width)).sqrt()
    angle = ratio * (-2 * HALF_LOG_RATIO.value) + HALF_LOG_RATIO.value
    wide, tall = (torch.floor(side * _exponential(part) + 0.5).long() for part in (angle, -angle))
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    first, found = fits.byte().argmax(1, keepdim=True), fits.any(1)
    box = [
        torch.where(found, tried.gather(1, first)[:, 0], most)
        for tried, most in zip((tall, wide), middle_box(height, width), strict=True)
    ]
    top, left = (
        torch.where(found, below(drawn[:, at.value], side - length + 1), (side - length) // 2)
        for at, side, length in ((FROM_Y, height, box[0]), (FROM_X, width, box[1]))
    )
    mirrored = below(drawn[:, FLIP.value], 2) if flip else torch.zeros_like(view)
    middle = 0, (height - size) // 2, (width - size) // 2, size, size
    drawn = mirrored, top, left, *box
    return Box(*(torch.where(view < 0, one, given) for one, given in zip(middle, drawn, strict=True)))


def middle_box(height: int, width: int) -> tuple[int, int]:
    """Return the height and the width of what is shown where no try fits: as much as the ratio allows."""
    return min(height, math.floor(width * 4 / 3 + 0.5)), min(width, math.floor(height * 4 / 3 + 0.5))


def _words(view: Tensor, number: int = WORDS) -> Tensor:
    """Return the upper halves of the words that each view seeds, (B, number) int64 in 0 ... 2**32 - 1."""
    word = view[:, None] + torch.arange(1, number + 1, device=view.device) * _signed(STEP.value)  # int64 wraps around
    word = (word ^ (word >> 30 & 2**34 - 1)) * _signed(FIRST.value)
    word = (word ^ (word >> 27 & 2**37 - 1)) * _signed(SECOND.value)
    return (word ^ (word >> 31 & 2**33 - 1)) >> 32 & 2**32 - 1


def _signed(word: int) -> int:
    """Return the int64 that has the bits of a number in [0, 2**64)."""
    return word - 2**64 if word >= 2**63 else word


def _crop(word: Tensor, side: int, padding: int, mode: str, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shift of a crop in one direction, and the first and the last place that it leaves, exclusive."""
    shift = (below(word, 2 * padding + 1) - padding) * seen
    if mode == "reflect":
        return shift, torch.zeros_like(shift), torch.full_like(shift, side)
    return shift, (-shift).clamp(min=0), (side - shift).clamp(max=side)


def _shift(at: Tensor, to: Tensor, side: int, lost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_crop` returns, of CropShift, where `lost` of `side` lines are cut off."""
    first, begin = below(at, lost + 1), below(to, lost + 1)
    return first - begin, begin, begin + side - lost


def _operation(drawn: Tensor, rule: Policy, seen: Tensor) -> tuple[Tensor, ...]:
    """Return the operation and what says how far it goes, as `Drawn` has them."""
    word, sign = drawn[:, STRENGTH.value], below(drawn[:, SIGN.value], 4)
    ends = torch.tensor(rule.until, device=seen.device, dtype=torch.int64)
    operation = (drawn[:, OPERATION.value, None] >= ends).sum(1) if rule.until else torch.full_like(seen, NOTHING.value)
    operation = torch.where(seen == 1, operation, NOTHING.value)
    unit = (word >> 8).float() * 2.0**-24
    tone = (operation == BRIGHTNESS.value) | (operation == CONTRAST.value)
    strength = torch.where(tone, unit * TONE_RANGE.value + TONE_LOW.value, unit * WIDE_RANGE.value + WIDE_LOW.value)
    degrees = (below(word, rule.turns) + 1).double()
    turned = operation == ROTATE.value
    angle = torch.where(turned, degrees * DEGREE.value, unit.double() * rule.shear + SHEAR_LOW.value)
    sine, cosine = _sine_cosine(angle)
    way, one = 1 - 2 * (sign & 1), torch.full_like(seen, 2**32)
    slope = torch.floor(sine / cosine * 2.0**16 + 0.5).long() * way << 16
    sine, cosine = torch.floor(sine * 2.0**32 + 0.5).long() * way, torch.floor(cosine * 2.0**32 + 0.5).long()
    slope = slope * (operation == SHEAR.value)
    x_by_y, y_by_x = slope * (sign >> 1), slope * (1 - (sign >> 1))
    parts = (cosine, one), (-sine, x_by_y), (sine, y_by_x)
    return operation, strength, *(torch.where(turned, turn, other) for turn, other in parts)


def _sine_cosine(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return both of float64 angles up to 0.6, to 2**-52, by series: a GPU's kernel gets the same bits."""
    square = angle * angle
    sine, cosine = torch.ones_like(angle), torch.ones_like(angle)
    for k in range(8, 0, -1):
        sine = 1.0 - square * sine * (1 / (2 * k * (2 * k + 1)))
        cosine = 1.0 - square * cosine * (1 / (2 * k * (2 * k - 1)))
    return sine * angle, cosine


def _erased(drawn: Tensor, rule: Policy, height: int, width: int, seen: Tensor) -> tuple[Tensor, ...]:
    """Return the first row and column, the height and the width of the rectangle that is erased; 0 by 0 for none."""
    found = torch.zeros_like(seen), torch.zeros_like(seen)
    if not rule.erase:
        return *found, *found
    wanted = (drawn[:, ERASE.value] < rule.erase) & (seen == 1)
    word = drawn[:, TRY.value :]
    share, ratio = (((half.float() + 0.5) * 2.0**-16) for half in (word >> 16, word & 2**16 - 1))
    side = ((share * rule.erase_range + ERASE_LOW.value) * float(height * width)).sqrt()
    angle = ratio * HALF_LOG_RANGE.value + HALF_LOG_LOW.value
    tall, wide = (torch.floor(side * _exponential(part) + 0.5).long() for part in (angle, -angle))
    for k in range(TRIES.value - 1, -1, -1):
        fits = (tall[:, k] < height) & (wide[:, k] < width) & wanted
        found = torch.where(fits, tall[:, k], found[0]), torch.where(fits, wide[:, k], found[1])
    places = (ERASE_Y, height - found[0] + 1), (ERASE_X, width - found[1] + 1)
    return *(below(drawn[:, at.value], number) for at, number in places), *found


def _exponential(power: Tensor) -> Tensor:
    """Return e**power of float32 powers up to 0.61, to 2**-22, by its series: a GPU's kernel gets the same bits."""
    result = torch.ones_like(power)
    for k in range(8, 0, -1):
        result = 1.0 + power * result * (1 / k)
    return result
