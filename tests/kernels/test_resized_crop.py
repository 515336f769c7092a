"""Resized crops: what torchvision makes of floats, the same bits on both paths, and the boxes that it draws."""

import math
import random
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import resized_crop, resized_crop_reference
from retemper.kernels.resized_crop import _weighed, is_wide
from retemper.kernels.view_draws import box_draws

module = import_module("retemper.kernels.resized_crop")


def images(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random_views(number: int) -> Tensor:
    return torch.randint(2**63 - 1, (number,), generator=torch.Generator().manual_seed(1))


def by_torch(image: Tensor, view: Tensor, size: int, least_area: float) -> Tensor:
    """Return the views by PyTorch's own antialiased resizing in float64, (B, C, S, S)."""
    height, width = image.shape[1:3]
    drawn = box_draws(view, height, width, size, least_area=least_area, flip=True)
    seen = []
    for one, (flip, top, left, tall, wide) in zip(image, torch.stack(drawn, 1).tolist(), strict=True):
        part = one[top : top + tall, left : left + wide].permute(2, 0, 1)[None].double()
        part = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
        seen.append(part.flip(3) if flip else part)
    return torch.cat(seen) / 255


@pytest.mark.parametrize(
    ("shape", "size", "least_area"),
    [((24, 40, 40, 3), 33, 0.08), ((24, 20, 31, 1), 20, 0.3), ((24, 31, 20, 3), 3, 0.08), ((4, 300, 300, 1), 8, 0.5)],
)
def test_is_bilinear_resizing_of_a_box_with_antialias(shape: tuple[int, ...], size: int, least_area: float) -> None:
    image, view = images(shape), random_views(shape[0])
    out = resized_crop_reference(image, view, size=size, least_area=least_area)
    assert out.shape == (shape[0], shape[3], size, size) and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), by_torch(image, view, size, least_area), rtol=0, atol=2e-7)


def random_boxes(height: int, width: int, number: int) -> Tensor:
    """Return (N, 4) float64 top, left, height, width, drawn by the steps of RandomResizedCrop in Python's floats."""
    draw, boxes = random.Random(0), []
    for _ in range(number):
        tall, wide = height, round(height * 4 / 3)  # of an image as wide as the test's, where no try fits
        top, left = 0, (width - wide) // 2
        for _ in range(10):
            area, ratio = height * width * draw.uniform(0.08, 1), math.exp(draw.uniform(*map(math.log, (3 / 4, 4 / 3))))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                tall, wide, top, left = down, across, draw.randint(0, height - down), draw.randint(0, width - across)
                break
        boxes.append([top, left, tall, wide])
    return torch.tensor(boxes, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_view_below_0_is_the_middle_as_it_is(dtype: torch.dtype) -> None:
    image = images((2, 11, 14, 3))
    out = resized_crop_reference(image, torch.tensor([-1, -(2**62)]), size=8, dtype=dtype)
    assert torch.equal(out, (image[:, 1:9, 3:11].permute(0, 3, 1, 2) / 255).to(dtype))


def test_boxes_are_drawn_as_torchvision_draws_them() -> None:
    height, width, view = 64, 96, random_views(20_000)
    box = box_draws(view, height, width, 32, least_area=0.08, flip=True)
    area, ratio = box.tall * box.wide / (height * width), (box.wide / box.tall).log()
    whole = (box.tall == 64) & (box.wide == 85)  # where no try fits; but for those, both are uniform
    assert (box.top >= 0).all() and (box.top + box.tall <= height).all()
    assert (box.left >= 0).all() and (box.left + box.wide <= width).all()
    assert 0.075 < float(area.min()) and float(area.max()) <= 1 and 0 < float(whole.float().mean()) < 0.02
    assert abs(float(ratio.abs().max()) - math.log(4 / 3)) < 0.06
    ours, theirs = torch.stack(box[1:], 1).double(), random_boxes(height, width, 5_000)
    error = theirs.std(0) / len(theirs) ** 0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.05, atol=0)


def test_half_of_the_views_are_mirrored() -> None:
    image, view = images((1, 9, 9, 3)), random_views(200)
    how: dict[str, Any] = {"size": 9, "index": torch.zeros(200, dtype=torch.int64), "least_area": 1.0}
    flip = box_draws(view, 9, 9, 9, least_area=1.0, flip=True).flip
    seen, plain = (resized_crop_reference(image, view, **how, flip=flip) for flip in (True, False))
    assert 70 < int(flip.sum()) < 130
    assert torch.equal(seen, torch.where(flip[:, None, None, None] == 1, plain.flip(3), plain))


@pytest.mark.triton
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((3, 12, 12, 3), 9), ((2, 9, 15, 1), 4)])
def test_both_paths_agree_to_the_bit(
    shape: tuple[int, ...], size: int, wide: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_wide", lambda *_: wide)  # sums in 64 bits
    view, index = random_views(4), torch.arange(4) - 1  # some out of range: clamped
    view[0] = -1
    given = images(shape).to(device), view.to(device)
    how: dict[str, Any] = {"size": size, "index": index.to(device), "flip": not wide, "least_area": 0.2}
    assert torch.equal(resized_crop(*given, **how), resized_crop_reference(*given, **how))


def test_knows_which_sums_pass_32_bits() -> None:
    most = {}
    for side, size in ((256, 224), (500, 224), (64, 64), (90, 7)):
        lengths, place = torch.arange(1, side + 1), torch.arange(size).expand(side, -1)
        weight = _weighed(place, lengths * 0, lengths, side, size, torch.int64)[1].sum(2)
        assert (weight > 0).all() and not is_wide(side, side, size)
        most[side, size] = int(weight.max())
        assert 255 * most[side, size] ** 2 < 2**31
    assert is_wide(1200, 1200, 224) and most[64, 64] == 128


@pytest.mark.triton
def test_is_a_well_formed_op(device: torch.device) -> None:
    given = images((3, 6, 6, 3)).to(device), random_views(3).to(device), None, 5, torch.float32, 0.08, True
    torch.library.opcheck(torch.ops.retemper.resized_crop.default, given)


def test_compiles_into_one_graph(device: torch.device) -> None:
    image, view = images((3, 6, 6, 3)).to(device), random_views(3).to(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def views(image: Tensor, view: Tensor) -> Tensor:
        return resized_crop(image, view, size=5, index=view % 3, dtype=torch.float16) * 2

    expected = resized_crop(image, view, size=5, index=view % 3, dtype=torch.float16) * 2
    out = views(image, view)
    assert torch.equal(out, expected) and out.stride() == expected.stride()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 13}, "size: 13; needs 1 ... 12, the shorter side of the images"),
        ({"size": 0}, "size: 0"),
        ({"least_area": 0.0}, "least_area: 0.0; needs a share above 0, and at most 1"),
        ({"view": torch.zeros(3).long()}, "view: 3 ids for 2 images"),
        ({"image": torch.zeros(2, 12, 12, 3)}, "image: torch.float32"),
        ({"dtype": torch.float64}, "dtype: torch.float64"),
    ],
)
@pytest.mark.triton
def test_says_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"image": images((2, 12, 12, 3)), "view": torch.zeros(2).long(), "size": 8} | change
    with pytest.raises(ValueError, match=message):
        resized_crop(**given)
