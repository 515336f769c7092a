"""Numbers and masks by sample, channel or pixel, the names of norms, and tensors of another layout than the image."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.kernels import pixels

NUMBERS = torch.tensor([0.25, 0.5, 1.0])
IMAGE = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("numbers", "shape", "by"),
    [
        (NUMBERS[0], (1, 1), "one"),
        (NUMBERS[:1], (1, 1), "one"),
        (NUMBERS[:2], (2, 1), "sample"),
        (NUMBERS[:2].view(2, 1, 1, 1), (2, 1), "sample"),
        (NUMBERS[None, :2], (2, 1), "sample"),
        (NUMBERS, (1, 3), "channel"),
        (NUMBERS.view(3, 1, 1), (1, 3), "channel"),
        (NUMBERS.view(1, 3, 1, 1), (1, 3), "channel"),
        (torch.rand(2, 3, 1, 1), (2, 3), "both"),
        (torch.rand(4, dtype=torch.float64)[::2], (2, 1), "sample"),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, Tensor) else None,
)
def test_numbers_are_rows_and_columns_beside_an_image(numbers: Tensor, shape: tuple[int, int], by: str) -> None:
    made = pixels.grid("eps", numbers, IMAGE)
    assert made.shape == shape and made.is_contiguous() and made.dtype == numbers.dtype
    assert torch.equal(made.flatten(), numbers.flatten()) and pixels.differs_by(made) == by
    whole = pixels.spread(made, IMAGE, torch.float32).expand_as(IMAGE)
    assert torch.equal(whole[:, :, 0, 0], made.float().expand(2, 3))


def test_as_many_samples_as_channels_are_told_apart_by_the_shape() -> None:
    image, numbers = torch.zeros(3, 3, 2, 2), torch.rand(3)
    for of_samples in (numbers, numbers[:, None, None, None]):
        assert pixels.grid("eps", of_samples, image).shape == (3, 1)
    for of_channels in (numbers[:, None, None], numbers[None, :, None, None]):
        assert pixels.grid("eps", of_channels, image).shape == (1, 3)
    assert pixels.grid("lower", numbers, image, by_sample=False).shape == (1, 3)
    assert pixels.grid("eps", numbers, image[:, 0, 0, 0]).shape == (3, 1)
    with pytest.raises(ValueError, match="lower"):
        pixels.grid("lower", numbers[:, None, None, None], image, by_sample=False)


def test_numbers_that_fit_nothing_are_named() -> None:
    assert pixels.differs_by(None) == "none" and pixels.split("eps", 1) == (1.0, None)
    for numbers in (torch.rand(4), torch.rand(3, 2, 1, 1), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"eps: .*; needs a number, or floats \(2,\) by sample or \(3, 1, 1\)"):
            pixels.grid("eps", numbers, IMAGE)
    with pytest.raises(ValueError, match=r"upper: .*; needs a number, or floats \(3, 1, 1\) by channel"):
        pixels.grid("upper", NUMBERS[:2], IMAGE, by_sample=False)
    with pytest.raises(TypeError, match="step: a str; needs a number or a tensor of floats"):
        pixels.split("step", "small")  # pyright: ignore[reportArgumentType]


def test_norms_go_by_other_names() -> None:
    for norm, aliases in {"linf": (math.inf, "inf", "Linf", "linf"), "l2": (2, 2.0, "2", "L2", "l2")}.items():
        assert {pixels.named_norm(alias) for alias in aliases} == {norm}
    others: list[Any] = ["l1", 1, 3, "l3", None]
    for other in others:
        with pytest.raises(ValueError, match=rf"norm: {other!r}; needs one of linf, l2"):
            pixels.named_norm(other)
    with pytest.raises(ValueError, match="its projection sorts them, which is not done here"):
        pixels.named_norm(1)


def layouts(image: Tensor) -> dict[str, Tensor]:
    """Return tensors of the same values, of other strides."""
    wide = image.new_zeros(*image.shape[:-1], 2 * image.shape[-1])
    wide[..., ::2] = image
    reversed_ = image.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    return {"last": image.contiguous(memory_format=torch.channels_last), "gaps": wide[..., ::2], "reversed": reversed_}


@pytest.mark.parametrize("layout", ["last", "gaps", "reversed"])
def test_a_tensor_of_another_layout_is_read_where_it_lies(layout: str) -> None:
    image = torch.arange(120.0).view(2, 3, 4, 5)
    other = layouts(image)[layout]
    assert pixels.strides_beside(other, image) == ((3, 4, 5), other.stride())
    laid_out = pixels.laid_out(other, image)
    assert laid_out.stride() == image.stride() and torch.equal(laid_out, image)


def test_a_tensor_that_lies_as_the_image_does_has_no_strides_beside_it() -> None:
    image = layouts(torch.rand(2, 3, 4, 5))["last"]
    assert pixels.strides_beside(image.clone(), image) is None and pixels.laid_out(image, image) is image
    lone = torch.zeros(1, 3, 4, 5).as_strided((1, 3, 4, 5), (7, 20, 5, 1))  # a stride nobody takes
    assert pixels.strides_beside(lone, torch.zeros(1, 3, 4, 5)) is None
    deep = torch.rand(2, 2, 2, 2, 2)
    copied = pixels.laid_out(deep.transpose(1, 2), deep)
    assert copied.is_contiguous() and torch.equal(copied, deep.transpose(1, 2))


def test_a_mask_is_of_samples_or_broadcasts() -> None:
    rows = torch.tensor([True, False])
    assert torch.equal(pixels.rows_or_pixels(rows, IMAGE), rows.view(2, 1, 1, 1).expand(2, 3, 4, 5))
    for shape in ((2, 3, 4, 5), (4, 5), (3, 1, 1), ()):
        mask = torch.rand(shape) > 0.5
        assert torch.equal(pixels.rows_or_pixels(mask, IMAGE), mask.expand(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"mask: shape \(3,\), which does not broadcast to \(2, 3, 4, 5\)"):
        pixels.rows_or_pixels(torch.ones(3, dtype=torch.bool), IMAGE)
    with pytest.raises(ValueError, match=r"mask: torch.float32; needs torch.bool"):
        pixels.rows_or_pixels(torch.ones(2), IMAGE)
