"""CropShift, IDBH and cutout: the augmentations that keep adversarial training from overfitting, as one pass.

    out[b] = cutout(erased(coloured or turned(cropped(mirrored(image[index[b]])))))  / 255

Source: Li and Spratling, ICLR 2023 (CropShift, IDBH); DeVries and Taylor, 2017 (cutout). What a view shows is in
view_draws.py. The steps are those of torchvision on PIL images, in their order, byte for byte: an image is gathered
once, whatever is done to its geometry, and its bytes are rounded where PIL rounds them. Of images of one channel, the
colour operation changes nothing and the others take the image for its own grey, as PIL does.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.augment import check_images
from retemper.kernels.language import next_power_of_2
from retemper.kernels.launch import Launch, launch_prepared
from retemper.kernels.operators import operator
from retemper.kernels.runtime import runs_triton
from retemper.kernels.strong_augment_kernels import BLOCK, WARPS, _strong_augment_kernel
from retemper.kernels.view_draws import (
    AUTOCONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    POLICIES,
    SHARPNESS,
    Drawn,
    most_cut,
    view_draws,
)

LONGEST = 2**14  # pixels of a side: its places, in units of 2**-16, are whole numbers of 32 bits
GREY = (19595, 38470, 7471)  # the weights of red, green and blue, of 2**16
# of PIL's filter: the sum of its weights, and what the middle has more than its eight neighbours
SMOOTH, CENTRE = 13, 4


def strong_augment_reference(
    image: Tensor,
    view: Tensor,
    *,
    policy: str = "idbh-weak",
    index: Tensor | None = None,
    flip: bool = True,
    padding: int = 4,
    padding_mode: str = "zeros",
    cutout: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the views in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args and Returns: as for `strong_augment`. Nothing is checked.
    """
    height, width = image.shape[1:3]
    how = {"flip": flip, "padding": padding, "padding_mode": padding_mode, "cutout": cutout}
    drawn = view_draws(view, height, width, policy, **how)
    reflect = padding_mode == "reflect" and POLICIES[policy].cut is None
    turns = bool(POLICIES[policy].until)
    pixel = _gathered(image, index, drawn, turns, reflect)
    if turns:
        _change_(pixel, drawn)
    y, x = torch.arange(height, device=view.device), torch.arange(width, device=view.device)
    black = _inside(y, drawn.erase_y, drawn.erase_height)[:, :, None]
    black = black & _inside(x, drawn.erase_x, drawn.erase_width)[:, None]
    if cutout:
        black |= _inside(y, drawn.cutout_y, cutout)[:, :, None] & _inside(x, drawn.cutout_x, cutout)[:, None]
    return pixel.masked_fill_(black[..., None], 0).float().div_(255).to(dtype).permute(0, 3, 1, 2)


def _inside(place: Tensor, first: Tensor, length: int | Tensor) -> Tensor:
    """Say which of P places are in each of B ranges, (B, P) bool."""
    length = length[:, None] if isinstance(length, Tensor) else length
    return (place >= first[:, None]) & (place < first[:, None] + length)


def _gathered(image: Tensor, index: Tensor | None, drawn: Drawn, turns: bool, reflect: bool) -> Tensor:
    """Return the mirrored, cropped and turned images, (B, H, W, C) uint8."""
    images, height, width, channels = image.shape
    batch = torch.arange(len(drawn.flip), device=image.device)
    source = batch if index is None else index.clamp(0, images - 1)
    flip, shift_x, left, right, shift_y, top, bottom = (one.int()[:, None, None] for one in drawn[:7])
    y, x = (torch.arange(side, dtype=torch.int32, device=image.device) for side in (height, width))
    y = y[:, None]
    if turns:
        scale, x_by_y, y_by_x = (one[:, None, None] for one in (drawn.scale, drawn.x_by_y, drawn.y_by_x))
        x, y = _seen_from(x, y, scale, x_by_y, width, height), _seen_from(y, x, scale, y_by_x, height, width)
    across, down = (x >= left) & (x < right), (y >= top) & (y < bottom)  # of one row or column, unless it turns
    x, y = x + shift_x, y + shift_y
    x = torch.where(flip == 1, width - 1 - x, x)
    if reflect:
        x, y = (last - (last - at.abs()).abs() for at, last in ((x, width - 1), (y, height - 1)))
    inside = across & down
    place = y * down * width + x * across + (source * (height * width))[:, None, None]
    pixel = image.view(-1, channels).index_select(0, place.flatten()).view(*inside.shape, channels)
    return pixel.mul_(inside[..., None])


def _seen_from(place: Tensor, other: Tensor, scale: Tensor, skew: Tensor, side: int, other_side: int) -> Tensor:
    """Return which place on one axis each place shows, by PIL's arithmetic in units of 2**-16.

    Args:
        place, other: on this axis, of `side` places, and on the other one.
        scale, skew: what they count, (B, 1, 1) in units of 2**-32.
    """
    begin = side * 2**32 - scale * (side - 1) - skew * (other_side - 1)
    return _fixed(scale, 16) * place + _fixed(skew, 16) * other + _fixed(begin, 17) >> 16


def _fixed(number: Tensor, bits: int) -> Tensor:
    """Return a number divided by 2**bits, rounded as PIL does, half up; int32."""
    return (number + (1 << bits - 1) >> bits).int()


def _rows_with(kind: int, operation: Tensor) -> Tensor:
    """Return which images have an operation, (R,) int64; on a GPU, whose answer would have to be waited for, all."""
    if operation.is_cpu:
        return (operation == kind).nonzero().flatten()
    return torch.arange(len(operation), device=operation.device)


def _change_(pixel: Tensor, drawn: Drawn) -> None:
    """Do the operations of colour in place, as PIL does.

    Args:
        pixel: (B, H, W, C) uint8, C is 1 or 3.
    """
    for kind, change in CHANGES.items():
        rows = _rows_with(kind, drawn.operation)
        value, strength = pixel[rows], drawn.strength[rows, None, None, None]
        here = drawn.operation[rows, None, None, None] == kind
        pixel[rows] = torch.where(here, change(value.int(), strength).byte(), value)


def _blend(worst: Tensor, value: Tensor, strength: Tensor) -> Tensor:
    """Return bytes as far beyond `worst` as `strength` says, int32: 0 gives `worst`, 1 gives `value`."""
    return (worst.float() + strength * (value - worst).float()).clamp_(0, 255).int()


def _grey(value: Tensor) -> Tensor:
    """Return the grey of colours, (B, H, W, 1) int32; of one channel, itself."""
    if value.shape[-1] == 1:
        return value
    red, green, blue = value.split(1, -1)
    return red * GREY[0] + green * GREY[1] + blue * GREY[2] + 2**15 >> 16


def _coloured(value: Tensor, strength: Tensor) -> Tensor:
    return _blend(_grey(value), value, strength)


def _brightened(value: Tensor, strength: Tensor) -> Tensor:
    return _blend(torch.zeros_like(value), value, strength)


def _contrasted(value: Tensor, strength: Tensor) -> Tensor:
    pixels = value.shape[1] * value.shape[2]
    mean = (2 * _grey(value).sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)
    return _blend(mean.int(), value, strength)


def _sharpened(value: Tensor, strength: Tensor) -> Tensor:
    height, width = value.shape[1:3]
    smooth = value.clone()  # as the border stays
    if min(height, width) > 2:
        rows = value[:, :-2] + value[:, 1:-1] + value[:, 2:]
        total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + CENTRE * value[:, 1:-1, 1:-1]
        smooth[:, 1:-1, 1:-1] = (2 * total + SMOOTH) // (2 * SMOOTH)
    return _blend(smooth, value, strength)


def _counts(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how often each byte occurs in each channel of an image, (B, C, 256) int64; the bytes; the largest one."""
    batch, height, width, channels = value.shape
    row = torch.arange(batch * channels, device=value.device).view(batch, 1, channels) * 256
    place = (value.view(batch, height * width, channels) + row).flatten()
    count = torch.zeros(256 * batch * channels, device=value.device, dtype=torch.int64)
    count.scatter_add_(0, place, torch.ones((), device=value.device, dtype=torch.int64).expand(len(place)))
    count, byte = count.view(batch, channels, 256), torch.arange(256, device=value.device, dtype=torch.int32)
    return count, byte, torch.where(count > 0, byte, -1).amax(2, keepdim=True)


def _looked_up(value: Tensor, table: Tensor) -> Tensor:
    """Return what a (B, C, 256) table has for each byte of its channel."""
    return table.gather(2, value.flatten(1, 2).mT.long()).mT.view_as(value)


def _stretched(value: Tensor, strength: Tensor) -> Tensor:
    """Return the images after autocontrast, in the float64 of PIL's Python."""
    count, byte, high = _counts(value)
    low = torch.where(count > 0, byte, 256).amin(2, keepdim=True)
    span = (high - low).double()
    scale = torch.full_like(span, 255).div_(span.clamp(min=1))  # 255 / span would multiply by 1 / span
    table = (byte * scale + -low * scale).clamp_(0, 255).int()
    return _looked_up(value, torch.where(span > 0, table, byte))


def _equalized(value: Tensor, strength: Tensor) -> Tensor:
    count, byte, high = _counts(value)
    step = (value.shape[1] * value.shape[2] - count.gather(2, high.long())) // 255
    before = count.cumsum(2) - count
    table = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=255).int()
    return _looked_up(value, torch.where(step > 0, table, byte))


CHANGES = {
    COLOR.value: _coloured,
    BRIGHTNESS.value: _brightened,
    CONTRAST.value: _contrasted,
    SHARPNESS.value: _sharpened,
    AUTOCONTRAST.value: _stretched,
    EQUALIZE.value: _equalized,
}


def _fake(image: Tensor, view: Tensor, index: Tensor | None, policy: str, dtype: torch.dtype, *_: object) -> Tensor:
    return image.new_empty((view.shape[0], *image.shape[1:]), dtype=dtype).permute(0, 3, 1, 2)


@operator(
    "strong_augment(Tensor image, Tensor view, Tensor? index, str policy, ScalarType dtype, bool flip, SymInt padding,"
    " str padding_mode, SymInt cutout) -> Tensor",
    fake=_fake,
)
def _strong_augment_op(
    image: Tensor,
    view: Tensor,
    index: Tensor | None,
    policy: str,
    dtype: torch.dtype,
    flip: bool,
    padding: int,
    padding_mode: str,
    cutout: int,
) -> Tensor:
    if runs_triton(image) and image.dim() == 4 and view.dim() == 1:
        out = _fake(image, view, index, policy, dtype)
        launch_prepared(_prepared, image, view, index, out, policy, flip, padding, padding_mode, cutout)
        return out
    _check(image, view, index, dtype, policy, padding, padding_mode, cutout)
    how = {"policy": policy, "flip": flip, "padding": padding, "padding_mode": padding_mode, "cutout": cutout}
    return strong_augment_reference(image, view, index=index, dtype=dtype, **how)


def _prepared(
    image: Tensor,
    view: Tensor,
    index: Tensor | None,
    out: Tensor,
    policy: str,
    flip: bool,
    padding: int,
    padding_mode: str,
    cutout: int,
) -> Launch | None:
    """Check the arguments, and return the launch."""
    _check(image, view, index, out.dtype, policy, padding, padding_mode, cutout)
    if not out.numel():
        return None
    return Launch(_strong_augment_kernel, (view.shape[0],), strong_constants(image.shape, policy))


def strong_constants(shape: tuple[int, ...], policy: str) -> dict[str, Any]:
    """Return the constants of the kernel for images (N, H, W, C), and its warps."""
    images, height, width, channels = shape
    rule = POLICIES[policy]
    size = {"N": images, "HEIGHT": height, "WIDTH": width, "CHANNELS": channels, "ROWS": next_power_of_2(channels)}
    drawn = {"UNTIL": rule.until, "SHEAR_RANGE": rule.shear, "TURNS": rule.turns, "SHARE": rule.erase}
    drawn |= {"MOST_CUT": None if rule.cut is None else most_cut(rule, height, width), "RANGE": rule.erase_range}
    block = min(BLOCK, max(128, next_power_of_2(height * width * channels)))
    return {**size, **drawn, "BLOCK": block, "num_warps": max(1, block * WARPS // BLOCK)}


def _check(
    image: Tensor,
    view: Tensor,
    index: Tensor | None,
    dtype: torch.dtype,
    policy: str,
    padding: int,
    padding_mode: str,
    cutout: int,
) -> None:
    if policy not in POLICIES:
        raise ValueError(f"policy: {policy!r}; needs one of {', '.join(POLICIES)}")
    check_images(image, view, index, dtype, padding if POLICIES[policy].cut is None else 0, padding_mode)
    if cutout < 0:
        raise ValueError(f"cutout: {cutout}; needs 0 or more")
    if max(image.shape[1:3]) > LONGEST:
        raise ValueError(f"image: shape {tuple(image.shape)}; a side may have {LONGEST:,} pixels at most")
    if POLICIES[policy].until and image.shape[3] not in (1, 3):
        raise ValueError(f"image: {image.shape[3]} channels; policy {policy!r} needs 3, or 1")


def strong_augment(
    image: Tensor,
    view: Tensor,
    *,
    policy: str = "idbh-weak",
    index: Tensor | None = None,
    flip: bool = True,
    padding: int = 4,
    padding_mode: str = "zeros",
    cutout: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Augment images strongly: one view of each, as pixels in [0, 1]. The steps are in the module docstring.

    Args:
        image: (N, H, W, C) uint8, contiguous, H and W from 1 to 16,384; IDBH needs 1 channel or 3.
        view: (B,) int64; each number is another draw, one below 0 leaves the image as it is.
        policy: "cropshift"; "idbh-weak", "idbh-strong", "idbh-svhn", which include it; "crop" for a random crop.
        index: (B,) int64, the image of each view, clamped to the range; without it, B is N and the order is kept.
        flip: whether half of the images are mirrored.
        padding, padding_mode: of "crop", as for `augment`.
        cutout: the side of a black square, in pixels, around a pixel of each image; 0 for none.
        dtype: float32, float16 or bfloat16.

    Returns:
        (B, C, H, W) of `dtype` in channels-last layout.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; no such policy or padding.
    """
    return _strong_augment_op(image, view, index, policy, dtype, flip, padding, padding_mode, cutout)
