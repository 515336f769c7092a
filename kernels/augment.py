"""A crop of the padded image and a flip, the augmentation of CIFAR since He et al., CVPR 2016.

    out[b, c, y, x] = padded[index[b]][y + dy, (W - 1 - x if flip else x) + dx, c] / 255
    view            = (dy (2 p + 1) + dx) 2 + flip,   dy, dx in 0 ... 2 p

p is the padding: of zeros, or of the image's reflection, in which the pixels of the border are not repeated. One
integer, the view, says which crop and whether to flip. One pass over uint8 images that stay on the device gathers,
crops, flips, scales and writes channels-last. The numbers are those of torchvision's RandomCrop, RandomHorizontalFlip
and ToTensor, to the bit. Bound by memory: one byte read and four written for each value.
"""

import torch
from torch import Tensor

from retemper.kernels.language import cdiv, next_power_of_2, tl, triton
from retemper.kernels.launch import Launch, launch_prepared
from retemper.kernels.operators import operator
from retemper.kernels.runtime import (
    TRITON_FLOATS,
    require_one_device,
    require_vector,
    runs_triton,
)

# The values of a program's tile, its warps, and the widths that a tile may have. Chosen from the code for sm_90, not
# yet measured on a GPU. Each thread of the one warp gathers 32 bytes. Their addresses take 140 instructions a thread
# and 7 a byte, so 11 a byte in all (14 to bf16); a flat index takes 50. The memory leaves time for 34 (21 to bf16).
# The smallest width is one sector of bytes.
TILE = 1024
WARPS = 1
COLS = (128, 64, 32)

# 1/255 in two parts. A byte times the first part is exact, so that the sum alone is rounded, and each byte gets the
# bits of byte / 255. A division would take 11 instructions more.
WHOLE = tl.constexpr(257 / 65536)
REST = tl.constexpr(1 / 255 - 257 / 65536)

PADDING_MODES = ("zeros", "reflect")


def num_views(padding: int) -> int:
    """Return the number of views of an image with that padding, in pixels: their ids are 0 to one less."""
    return 2 * (2 * padding + 1) ** 2


def identity_view(padding: int) -> int:
    """Return the id of the view that leaves an image as it is."""
    return (padding * (2 * padding + 1) + padding) * 2


def augment_reference(
    image: Tensor,
    view: Tensor,
    *,
    index: Tensor | None = None,
    padding: int = 4,
    padding_mode: str = "zeros",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the views in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args and Returns: as for `augment`. Nothing is checked.
    """
    if index is not None:
        image = image[index.clamp(0, image.shape[0] - 1)]
    batch, height, width, channels = image.shape
    view, side = view.clamp(0, num_views(padding) - 1), 2 * padding + 1
    if padding_mode == "reflect":
        rows, columns = (_reflected_places(length, padding, image.device) for length in (height, width))
        padded = image.index_select(1, rows).index_select(2, columns)  # torch's pad reflects no bytes
    else:
        padded = torch.nn.functional.pad(image, (0, 0, padding, padding, padding, padding))
    down, along = padded.stride(1), padded.stride(2)
    crops = padded.as_strided(  # all crops of all images, without a copy
        (batch, side, side, height, width * channels), (padded.stride(0), down, along, down, 1)
    )
    sample = torch.arange(batch, device=image.device)
    crop = crops[sample, view // 2 // side, view // 2 % side].view(batch, height, width, channels)
    crop = torch.where((view % 2 == 1)[:, None, None, None], crop.flip(2), crop)  # still bytes: a quarter of the memory
    return crop.float().div_(255).to(dtype).permute(0, 3, 1, 2)


def _reflected_places(length: int, padding: int, device: torch.device) -> Tensor:
    """Return where each pixel of a padded line of `length` pixels comes from, (length + 2 padding,) int64."""
    place = torch.arange(-padding, length + padding, device=device)
    return length - 1 - (length - 1 - place.abs()).abs()


def view_tile(height: int, row: int) -> dict[str, int]:
    """Return the constants of the kernel, ROWS, COLS and num_warps: a program fills a tile of one image.

    Args:
        height: rows of an image.
        row: values of a row: width times channels.
    """
    wide = [cols for cols in COLS if 8 * (-row % cols) <= row]  # longer runs of bytes are worth an eighth of padding
    cols = wide[0] if wide else min(COLS, key=lambda cols: -row % cols)
    cols = min(cols, next_power_of_2(row))
    return {"ROWS": min(TILE // cols, next_power_of_2(height)), "COLS": cols, "num_warps": WARPS}


@triton.jit
def reflected(place, last: tl.constexpr):
    """Return the place in 0 ... last that an outer one mirrors; it lies outside by at most `last`."""
    return tl.minimum(tl.abs(place), 2 * last - tl.abs(place))


@triton.jit
def _augment_kernel(
    image_ptr,
    view_ptr,
    index_ptr,
    out_ptr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    N,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row: tl.constexpr = WIDTH * CHANNELS
    across: tl.constexpr = (row + COLS - 1) // COLS
    tiles: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS * across
    sample = (tl.program_id(0) // tiles).to(tl.int64)  # int64: a batch may pass 2**31 values
    tile = tl.program_id(0) % tiles
    side: tl.constexpr = 2 * PADDING + 1
    view = tl.minimum(tl.maximum(tl.load(view_ptr + sample), 0), 2 * side * side - 1).to(tl.int32)
    source = sample
    if index_ptr is not None:
        source = tl.minimum(tl.maximum(tl.load(index_ptr + sample), 0), N - 1)

    col = tile % across * COLS + tl.arange(0, COLS)
    mirrored = row - CHANNELS - col + 2 * (col % CHANNELS)  # the pixels change order, the channels of one do not
    from_col = tl.where(view % 2 == 1, mirrored, col) + (view // 2 % side - PADDING) * CHANNELS
    y = tile // across * ROWS + tl.arange(0, ROWS)
    down = view // 2 // side - PADDING
    from_y = y
    if MODE == "reflect":
        inside = (y < HEIGHT)[:, None] & (col < row)
        from_y, down = reflected(y + down, HEIGHT - 1), 0
        channel = col % CHANNELS
        from_col = reflected(from_col - channel, row - CHANNELS) + channel
    else:
        inside = ((y + down >= 0) & (y + down < HEIGHT))[:, None] & ((from_col >= 0) & (from_col < row))
    # a column's address, computed once for all rows, plus a row's constant: in int64, so that no sum needs widening
    column_ptr = image_ptr + source * (HEIGHT * row) + down * row + from_col.to(tl.int64)
    pixel = tl.load(column_ptr + (from_y.to(tl.int64) * row)[:, None], mask=inside, other=0).to(tl.float32)
    pixel = tl.fma(pixel, WHOLE, pixel * REST)
    place = sample * (HEIGHT * row) + (y * row)[:, None] + col
    tl.store(out_ptr + place, pixel.to(out_ptr.dtype.element_ty), mask=(y < HEIGHT)[:, None] & (col < row))


def _fake(image: Tensor, view: Tensor, index: Tensor | None, padding: int, dtype: torch.dtype, *_: object) -> Tensor:
    return image.new_empty((view.shape[0], *image.shape[1:]), dtype=dtype).permute(0, 3, 1, 2)


@operator(
    "augment(Tensor image, Tensor view, Tensor? index, SymInt padding, ScalarType dtype, str padding_mode='zeros')"
    " -> Tensor",
    fake=_fake,
)
def _augment_op(
    image: Tensor, view: Tensor, index: Tensor | None, padding: int, dtype: torch.dtype, padding_mode: str = "zeros"
) -> Tensor:
    if not runs_triton(image) or image.dim() != 4 or view.dim() != 1:
        check_images(image, view, index, dtype, padding, padding_mode)
        return augment_reference(image, view, index=index, padding=padding, padding_mode=padding_mode, dtype=dtype)
    out = _fake(image, view, index, padding, dtype)
    launch_prepared(_prepared, image, view, index, out, padding, padding_mode)
    return out


def _prepared(
    image: Tensor, view: Tensor, index: Tensor | None, out: Tensor, padding: int, padding_mode: str
) -> Launch | None:
    """Check the arguments, and return the launch."""
    check_images(image, view, index, out.dtype, padding, padding_mode)
    if not out.numel():
        return None
    images, height, width, channels = image.shape
    tile = view_tile(height, width * channels)
    tiles = cdiv(height, tile["ROWS"]) * cdiv(width * channels, tile["COLS"])
    shape = {"N": images, "HEIGHT": height, "WIDTH": width, "CHANNELS": channels}
    return Launch(_augment_kernel, (view.shape[0] * tiles,), {**shape, **tile})


def check_images(
    image: Tensor, view: Tensor, index: Tensor | None, dtype: torch.dtype, padding: int, padding_mode: str
) -> None:
    if image.dim() != 4 or image.dtype != torch.uint8:
        raise ValueError(f"image: {image.dtype} of shape {tuple(image.shape)}; needs uint8 (N, H, W, C)")
    if not image.is_contiguous():
        raise ValueError(f"image: strides {image.stride()}; call .contiguous() on it")
    require_one_device(image=image, view=view, index=index)
    batch = view.shape[0] if view.dim() else 0
    require_vector("view", view, batch, torch.int64)
    require_vector("index", index, batch, torch.int64)
    if index is None and batch != image.shape[0]:
        raise ValueError(f"view: {batch} ids for {image.shape[0]} images; needs one each, or give an index")
    if batch and image.numel() == 0:
        raise ValueError(f"image: shape {tuple(image.shape)} holds nothing to look at")
    if dtype not in TRITON_FLOATS:
        raise ValueError(f"dtype: {dtype}; needs one of {', '.join(map(str, TRITON_FLOATS))}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode: {padding_mode!r}; needs one of {', '.join(PADDING_MODES)}")
    if padding < 0:
        raise ValueError(f"padding: {padding}; needs 0 or more")
    side = min(image.shape[1:3])
    if padding_mode == "reflect" and 0 < side <= padding:
        raise ValueError(f"padding: {padding}; must be below {side} to reflect an image of {side} pixels a side")


def augment(
    image: Tensor,
    view: Tensor,
    *,
    index: Tensor | None = None,
    padding: int = 4,
    padding_mode: str = "zeros",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Crop, flip and scale images: one view of each, as pixels in [0, 1]. The formula is in the module docstring.

    Args:
        image: (N, H, W, C) uint8, contiguous, H and W at least 1.
        view: (B,) int64, ids below `num_views(padding)`; others are clamped to the range.
        index: (B,) int64, the image of each view, clamped to the range; without it, B is N and the order is kept.
        padding: pixels on each side; a crop moves by at most that many.
        padding_mode: "zeros", or "reflect" as in numpy.pad, where the padding must be below H and W.
        dtype: float32, float16 or bfloat16.

    Returns:
        (B, C, H, W) of `dtype` in channels-last layout.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; no such padding.
    """
    return _augment_op(image, view, index, padding, dtype, padding_mode)
