"""A random box of an image, resized to one size, and a flip: the augmentation of ImageNet since Inception.

    out[b, c, i, j] = sum_yx u_iy v_jx image[index[b], y, x, c] / (255 sum_y u_iy sum_x v_jx)
    u_iy            = max(0, 2 m - |(2 (y - top) + 1) S - (2 i + 1) tall|),    m = max(tall, S)

S is the size; v is as u, of the columns. Rows and columns outside the box count nothing. The weights are those of
torchvision's RandomResizedCrop with antialias, bilinear over the pixels that an output pixel covers, but as whole
numbers: so are the sums, whose bits are the same on every device, and the quotient is rounded once. torchvision rounds
the result to bytes where it is given bytes, this does not. One integer, the view, says which box and whether to flip
(`view_draws.py`); one below 0 is the middle, S pixels a side, as it is. Source: Szegedy et al., CVPR 2015.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.augment import check_images, view_tile
from retemper.kernels.language import cdiv, tl, triton
from retemper.kernels.launch import Launch, launch_prepared
from retemper.kernels.operators import operator
from retemper.kernels.runtime import runs_triton
from retemper.kernels.view_draw_kernels import box
from retemper.kernels.view_draws import box_draws, middle_box

LONGEST = 2**13  # pixels of a side: places in units of 1 / 2 S are whole numbers of 32 bits
TOGETHER = 8  # tiles of a program: the draws take as long as one
WARPS = 2  # of a tile; one would take 255 registers a thread


def taps(side: int, size: int) -> int:
    """Return the most pixels of a side that one output pixel sees, at any crop of it."""
    return cdiv(2 * max(side, size), size)


def is_wide(height: int, width: int, size: int) -> bool:
    """Say whether sums may pass 2**31: those of the weights are at most 2 m**2 / S + S."""
    down, along = (2 * max(side, size) ** 2 // size + size + 1 for side in (height, width))
    return 255 * down * along >= 2**31


def resized_crop_reference(
    image: Tensor,
    view: Tensor,
    *,
    size: int,
    index: Tensor | None = None,
    least_area: float = 0.08,
    flip: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the views in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args and Returns: as for `resized_crop`. Nothing is checked.
    """
    images, height, width, channels = image.shape
    drawn = box_draws(view, height, width, size, least_area=least_area, flip=flip)
    kind = torch.int64 if is_wide(height, width, size) else torch.int32
    place = torch.arange(size, device=view.device).expand(len(view), -1)
    y, down_BST = _weighed(place, drawn.top, drawn.tall, height, size, kind)
    place = torch.where(drawn.flip[:, None] == 1, size - 1 - place, place)
    x, along_BST = _weighed(place, drawn.left, drawn.wide, width, size, kind)
    source = torch.arange(len(view), device=view.device) if index is None else index.clamp(0, images - 1)
    along_BTV = along_BST.mT.repeat_interleave(channels, 2)  # of each value of a row
    along_sum, down_sum = along_BTV.sum(1, dtype=kind), 255 * down_BST.sum(2, dtype=kind)
    out = image.new_empty((len(view), size, size, channels), dtype=dtype)
    line, wide = (image.new_empty((height, size * channels), dtype=kind) for _ in range(2))  # again for every image
    total, tall = (image.new_empty((size, size * channels), dtype=kind) for _ in range(2))
    for row in range(len(view)):
        one = image[row] if index is None else image.index_select(0, source[row : row + 1])[0]
        line.zero_()
        for k in range(along_BTV.shape[1]):  # first the columns, while the values are bytes
            wide.copy_(one.index_select(1, x[row, :, k]).view(line.shape))
            line.addcmul_(wide, along_BTV[row, k])
        total.zero_()
        for k in range(down_BST.shape[2]):
            total.addcmul_(torch.index_select(line, 0, y[row, :, k], out=tall), down_BST[row, :, k, None])
        torch.mul(down_sum[row, :, None], along_sum[row], out=tall)
        torch.div(total.float(), tall.float(), out=out[row].view(total.shape))
    return out.permute(0, 3, 1, 2)


def _weighed(
    place: Tensor, first: Tensor, length: Tensor, side: int, size: int, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return which pixels of a side each output place sees, (B, S, T) int64, and their weights, of `kind`.

    Args:
        place: (B, S) int64, in 0 ... S - 1.
        first, length: (B,), the part of the side that is seen.
    """
    length, number = length[:, None], taps(side, size)
    reach, centre = 2 * length.clamp(min=size), (2 * place + 1) * length
    begin = (centre - reach - size).div(2 * size, rounding_mode="floor") + 1
    pixel = begin[..., None] + torch.arange(number, device=place.device)
    weight = (reach[..., None] - ((2 * pixel + 1) * size - centre[..., None]).abs()).clamp_(min=0)
    weight *= (pixel >= 0) & (pixel < length[..., None])
    pixel = pixel.clamp(min=0).minimum(length[..., None] - 1)
    return pixel + first[:, None, None], weight.to(kind)


@triton.jit
def _weight(pixel, centre, length, SIZE: tl.constexpr):
    """Return the weights of pixels of a box's side, int32."""
    weight = 2 * tl.maximum(length, SIZE) - tl.abs((2 * pixel + 1) * SIZE - centre)
    return tl.where((pixel >= 0) & (pixel < length), tl.maximum(weight, 0), 0)


@triton.jit
def _begin(centre, length, SIZE: tl.constexpr, TAPS: tl.constexpr):
    """Return the first pixel that an output place sees; TAPS keeps what is divided above 0."""
    reach = 2 * tl.maximum(length, SIZE)
    return (centre - reach - SIZE + 2 * SIZE * (TAPS + 1)) // (2 * SIZE) - TAPS


@triton.jit
def _resized_crop_kernel(
    image_ptr,
    view_ptr,
    index_ptr,
    out_ptr,
    least,
    span,
    MIRROR: tl.constexpr,
    SIZE: tl.constexpr,
    N,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    MOST_TALL: tl.constexpr,
    MOST_WIDE: tl.constexpr,
    DOWN: tl.constexpr,
    ALONG: tl.constexpr,
    SUM: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    across: tl.constexpr = (SIZE * CHANNELS + COLS - 1) // COLS
    sample = (tl.program_id(0) // PARTS).to(tl.int64)  # int64: a batch may pass 2**31 values
    view, source = tl.load(view_ptr + sample), sample
    if index_ptr is not None:
        source = tl.minimum(tl.maximum(tl.load(index_ptr + sample), 0), N - 1)
    flip, top, left, tall, wide = box(view, least, span, MIRROR, HEIGHT, WIDTH, SIZE, MOST_TALL, MOST_WIDE)
    image_ptr += source * (HEIGHT * WIDTH * CHANNELS) + (top * WIDTH + left) * CHANNELS
    out_ptr += sample * (SIZE * SIZE * CHANNELS)

    for part in range(TILES):
        tile = tl.program_id(0) % PARTS * TILES + part
        y = tile // across * ROWS + tl.arange(0, ROWS)
        col = tile % across * COLS + tl.arange(0, COLS)
        channel, x = col % CHANNELS, col // CHANNELS
        y_centre = (2 * y + 1) * tall
        x_centre = (2 * tl.where(flip == 1, SIZE - 1 - x, x) + 1) * wide
        first_y, first_x = _begin(y_centre, tall, SIZE, DOWN), _begin(x_centre, wide, SIZE, ALONG)
        inside = (y < SIZE)[:, None] & (col < SIZE * CHANNELS)
        total = tl.zeros((ROWS, COLS), SUM)
        down_sum, along_sum = tl.zeros((ROWS,), SUM), tl.zeros((COLS,), SUM)
        for down in range(DOWN):
            line = tl.zeros((ROWS, COLS), SUM)
            from_y = first_y + down
            row_ptr = image_ptr + tl.minimum(tl.maximum(from_y, 0), tall - 1) * (WIDTH * CHANNELS)
            for along in range(ALONG):
                from_x = first_x + along
                weight = _weight(from_x, x_centre, wide, SIZE).to(SUM)
                place = tl.minimum(tl.maximum(from_x, 0), wide - 1) * CHANNELS + channel
                line += tl.load(row_ptr[:, None] + place, mask=inside, other=0).to(SUM) * weight
                if down == 0:
                    along_sum += weight
            weight = _weight(from_y, y_centre, tall, SIZE).to(SUM)
            down_sum += weight
            total += line * weight[:, None]
        most = (255 * down_sum[:, None] * along_sum).to(tl.float32)
        pixel = tl.div_rn(total.to(tl.float32), tl.where(inside, most, 1.0))
        place = (y * (SIZE * CHANNELS))[:, None] + col
        tl.store(out_ptr + place, pixel.to(out_ptr.dtype.element_ty), mask=inside)


def _fake(image: Tensor, view: Tensor, index: Tensor | None, size: int, dtype: torch.dtype, *_: object) -> Tensor:
    return image.new_empty((view.shape[0], size, size, image.shape[3]), dtype=dtype).permute(0, 3, 1, 2)


@operator(
    "resized_crop(Tensor image, Tensor view, Tensor? index, SymInt size, ScalarType dtype, float least_area, bool flip)"
    " -> Tensor",
    fake=_fake,
)
def _resized_crop_op(
    image: Tensor, view: Tensor, index: Tensor | None, size: int, dtype: torch.dtype, least_area: float, flip: bool
) -> Tensor:
    if not 0 < least_area <= 1:
        raise ValueError(f"least_area: {least_area}; needs a share above 0, and at most 1")
    if runs_triton(image) and image.dim() == 4 and view.dim() == 1 and size > 0:
        out = _fake(image, view, index, size, dtype)
        launch_prepared(_prepared, image, view, index, out, float(least_area), 1 - least_area, flip, size)
        return out
    _check(image, view, index, dtype, size)
    how: dict[str, Any] = {"size": size, "index": index, "least_area": least_area, "flip": flip, "dtype": dtype}
    return resized_crop_reference(image, view, **how)


def _prepared(
    image: Tensor,
    view: Tensor,
    index: Tensor | None,
    out: Tensor,
    least: float,
    span: float,
    flip: bool,
    size: int,
) -> Launch | None:
    """Check the arguments, and return the launch."""
    _check(image, view, index, out.dtype, size)
    if not out.numel():
        return None
    constants = crop_constants(image.shape, size)
    return Launch(_resized_crop_kernel, (view.shape[0] * constants["PARTS"],), constants)


def crop_constants(shape: tuple[int, ...], size: int) -> dict[str, Any]:
    """Return the constants of the kernel for images (N, H, W, C), and its warps."""
    images, height, width, channels = shape
    tile = view_tile(size, size * channels)
    tiles = cdiv(size, tile["ROWS"]) * cdiv(size * channels, tile["COLS"])
    together = min(TOGETHER, tiles)
    (tall, wide), sums = middle_box(height, width), tl.int64 if is_wide(height, width, size) else tl.int32
    known = {"N": images, "HEIGHT": height, "WIDTH": width, "CHANNELS": channels, "MOST_TALL": tall, "MOST_WIDE": wide}
    seen = {"DOWN": taps(height, size), "ALONG": taps(width, size), "SUM": sums}
    return {**known, **seen, "PARTS": cdiv(tiles, together), "TILES": together, **tile, "num_warps": WARPS}


def _check(image: Tensor, view: Tensor, index: Tensor | None, dtype: torch.dtype, size: int) -> None:
    check_images(image, view, index, dtype, 0, "zeros")
    if max(image.shape[1:3]) > LONGEST:
        raise ValueError(f"image: shape {tuple(image.shape)}; a side may have {LONGEST:,} pixels at most")
    if not 1 <= size <= min(image.shape[1:3]):
        raise ValueError(f"size: {size}; needs 1 ... {min(image.shape[1:3])}, the shorter side of the images")


def resized_crop(
    image: Tensor,
    view: Tensor,
    *,
    size: int,
    index: Tensor | None = None,
    least_area: float = 0.08,
    flip: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Show a random box of each image at one size: pixels in [0, 1]. The formula is in the module docstring.

    The box has a uniform share of the area, `least_area` to all of it, and a ratio of its sides from 3/4 to 4/3 with a
    uniform logarithm; of ten tries the first that fits, else as much of the middle as the ratio allows.

    Args:
        image: (N, H, W, C) uint8, contiguous, H and W at most 8,192.
        view: (B,) int64; each number is another draw, one below 0 shows the middle, `size` pixels a side, as it is.
        size: the side of what is shown, in pixels, at most H and W.
        index: (B,) int64, the image of each view, clamped to the range; without it, B is N and the order is kept.
        least_area: the least share of the area that a box has.
        flip: whether half of the images are mirrored.
        dtype: float32, float16 or bfloat16.

    Returns:
        (B, C, size, size) of `dtype` in channels-last layout; its bits are the same on every device.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; no such size or share.
    """
    return _resized_crop_op(image, view, index, size, dtype, least_area, flip)
