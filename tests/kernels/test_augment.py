"""The views of an image against one pixel at a time, and against torchvision's arithmetic."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import augment, augment_reference, identity_view, num_views

MODES: dict[str, Literal["constant", "reflect"]] = {"zeros": "constant", "reflect": "reflect"}  # PyTorch's names
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one ulp below 1 in bfloat16, because the interpreter truncates where a GPU rounds; otherwise to the bit
TOLERANCE = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2**-8}


def images(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)


def pixel_by_pixel(image: Tensor, view: int, padding: int, mode: str) -> Tensor:
    """Return the view of one (H, W, C) image pixel by pixel, of PyTorch's padding: the definition of a view."""
    height, width, channels = image.shape
    side = 2 * padding + 1
    dy, dx, flip = view // 2 // side, view // 2 % side, view % 2
    padded = F.pad(image.permute(2, 0, 1).float(), [padding] * 4, mode=MODES[mode]).permute(1, 2, 0)
    out = torch.zeros(channels, height, width)
    for y in range(height):
        for x in range(width):
            out[:, y, x] = padded[y + dy, (width - 1 - x if flip else x) + dx] / 255
    return out


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    padding=st.integers(0, 5),
    mode=st.sampled_from(["zeros", "reflect"]),
    seed=st.integers(0, 2**32),
    gather=st.booleans(),
)
def test_every_view_is_what_it_says(
    shape: tuple[int, int, int, int], padding: int, mode: str, seed: int, gather: bool, device: torch.device
) -> None:
    if mode == "reflect":  # as far as an image reaches
        padding = min(padding, shape[1] - 1, shape[2] - 1)
    gen = torch.Generator().manual_seed(seed)
    image = images(shape, device)
    number = 3 if gather else shape[0]
    view = torch.randint(num_views(padding), (number,), generator=gen)
    index = torch.randint(shape[0], (number,), generator=gen) if gather else None
    order = range(shape[0]) if index is None else index.tolist()
    expected = torch.stack(
        [pixel_by_pixel(image[i].cpu(), v, padding, mode) for i, v in zip(order, view.tolist(), strict=True)]
    )
    on_device = {"index": None if index is None else index.to(device), "padding": padding, "padding_mode": mode}
    assert torch.equal(augment(image, view.to(device), **on_device).cpu(), expected)
    assert torch.equal(augment_reference(image, view.to(device), **on_device).cpu(), expected)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_the_views_are_as_many_as_ids(padding: int, device: torch.device) -> None:
    count = num_views(padding)
    image = images((1, 9, 10, 2), device)
    view, index = torch.arange(count, device=device), torch.zeros(count, dtype=torch.int64, device=device)
    views = augment(image, view, index=index, padding=padding)
    assert views.flatten(1).unique(dim=0).shape[0] == count == 2 * (2 * padding + 1) ** 2
    identity = views[identity_view(padding)]
    assert torch.equal(identity, image[0].permute(2, 0, 1) / 255)
    assert torch.equal(views[identity_view(padding) + 1], identity.flip(2))


@pytest.mark.parametrize("shape", [(3, 32, 32, 3), (2, 28, 28, 1), (2, 31, 33, 3), (1, 2, 9, 4)], ids=str)
def test_reflects_as_torchvision_does(shape: tuple[int, ...], device: torch.device) -> None:
    image, padding = images(shape, device), min(4, shape[1] - 1)
    count, side = num_views(padding), 2 * padding + 1
    view, index = torch.arange(count, device=device), torch.arange(count, device=device) % shape[0]
    out = augment(image, view, index=index, padding=padding, padding_mode="reflect")
    pixels = image.cpu().permute(0, 3, 1, 2).float().div(255)
    padded = F.pad(pixels, (padding,) * 4, mode="reflect")
    for v in range(count):
        dy, dx = v // 2 // side, v // 2 % side
        crop = padded[v % shape[0], :, dy : dy + shape[1]]
        crop = crop[..., dx : dx + shape[2]] if v % 2 == 0 else crop.flip(2)[..., 2 * padding - dx :][..., : shape[2]]
        assert torch.equal(out[v].cpu(), crop), v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 8, 8, 1), (2, 32, 32, 3), (2, 31, 33, 3)], ids=str)
def test_dtype_and_layout(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    batch, height, width, channels = shape
    image = images(shape, device)
    view = torch.randint(num_views(4), (batch,), generator=torch.Generator().manual_seed(1)).to(device)
    out = augment(image, view, dtype=dtype)
    assert out.shape == (batch, channels, height, width) and out.dtype == dtype
    assert out.stride() == (height * width * channels, 1, width * channels, channels)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = augment_reference(image, view, dtype=dtype)
    assert expected.stride() == out.stride()
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[dtype])


def test_scales_as_torchvision_does(device: torch.device) -> None:
    image = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1)
    view = torch.tensor([identity_view(4)], device=device)
    expected = image.cpu().permute(0, 3, 1, 2).contiguous().to(torch.float32).div(255)  # F.to_tensor
    assert torch.equal(augment(image, view).cpu(), expected)


@pytest.mark.parametrize("op", [augment, augment_reference])
def test_ids_out_of_range_are_clamped(op: Callable[..., Tensor], device: torch.device) -> None:
    image = images((3, 8, 8, 3), device)
    view = torch.tensor([-1, -(2**63), num_views(4), 2**40], device=device)
    index = torch.tensor([-1, 3, 2**40, -(2**63)], device=device)
    near = op(image, view.clamp(0, num_views(4) - 1), index=index.clamp(0, 2))
    assert torch.equal(op(image, view, index=index), near)


def test_takes_an_empty_batch(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for image, index in ((images((3, 8, 8, 3), device), none), (images((0, 8, 8, 3), device), None)):
        out = augment(image, none, index=index)
        assert out.shape == (0, 3, 8, 8)


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    image, view = images((3, 8, 8, 3), device), torch.zeros(3, dtype=torch.int64, device=device)
    for message, args, options in [
        (r"image: torch.float32 of shape", (image.float(), view), {}),
        (r"image: torch.uint8 of shape \(8, 8, 3\); needs uint8 \(N, H, W, C\)", (image[0], view), {}),
        (r"image: strides .* call .contiguous\(\)", (image.permute(0, 2, 1, 3), view), {}),
        (r"image: shape \(0, 8, 8, 3\) holds nothing", (image[:0], view), {"index": view}),
        (r"view: 2 ids for 3 images; needs one each, or give an index", (image, view[:2]), {}),
        (r"view: torch.int32; needs torch.int64", (image, view.int()), {}),
        (r"view: shape \(3, 1\)", (image, view[:, None]), {}),
        (r"index: shape \(2,\); needs \(3,\)", (image, view), {"index": view[:2]}),
        (r"index: torch.int32; needs torch.int64", (image, view), {"index": view.int()}),
        (r"padding: -1; needs 0 or more", (image, view), {"padding": -1}),
        (r"padding: 8; must be below 8 to reflect", (image, view), {"padding": 8, "padding_mode": "reflect"}),
        (r"padding_mode: 'edge'; needs one of zeros, reflect", (image, view), {"padding_mode": "edge"}),
        (r"dtype: torch.float64; needs one of", (image, view), {"dtype": torch.float64}),
    ]:
        with pytest.raises(ValueError, match=message):
            augment(*args, **options)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("gather", [False, True])
def test_is_a_well_formed_op(channels: int, gather: bool, device: torch.device) -> None:
    image = images((3, 8, 8, channels), device)
    view = torch.arange(3, device=device)
    given = image, view, view if gather else None, 4, torch.float32
    for more in ((), ("reflect",)):
        torch.library.opcheck(torch.ops.retemper.augment.default, (*given, *more))


@pytest.mark.parametrize("channels", [1, 3])
def test_compiles_into_one_graph(channels: int, device: torch.device) -> None:
    image = images((3, 8, 8, channels), device)
    view = torch.tensor([5, 80, 161], device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def views(image: Tensor, view: Tensor) -> Tensor:
        return augment(image, view, index=view % 3, dtype=torch.float16) * 2

    expected = augment(image, view, index=view % 3, dtype=torch.float16) * 2
    out = views(image, view)
    assert torch.equal(out, expected) and out.stride() == expected.stride()
