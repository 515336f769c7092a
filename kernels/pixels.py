"""What the operations on images share: numbers that differ by sample or by channel, and images of another layout.

An image is (B, ...): B samples, of which the second dimension is the channels. A number of its pixels (the radius of a
ball, the lowest value of a pixel) is a float, or a tensor with one for all, for each sample or for each channel.
"""

import math
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import tl, triton
from retemper.kernels.runtime import FLOATS, is_dense_batch_first

MOST_DIMENSIONS = 4  # of an image beside which a tensor of another layout can be read
NORMS = ("linf", "l2")
ALIASES = {"linf": "linf", "inf": "linf", math.inf: "linf", "l2": "l2", "2": "l2", 2: "l2"}


def named_norm(norm: str | float) -> str:
    """Return "linf" or "l2" of a norm's name, in any case, or of its order, as others write it: math.inf, "inf", 2.

    Raises:
        ValueError: it is another norm.
    """
    name = ALIASES.get(norm.lower() if isinstance(norm, str) else norm)
    if name is None:
        why = ""
        if norm in (1, "1", "l1", "L1"):
            why = "; a step in L1 moves a few pixels, and its projection sorts them, which is not done here"
        raise ValueError(f"norm: {norm!r}; needs one of {', '.join(NORMS)}{why}")
    return name


def split(name: str, value: float | Tensor, stand_in: float = 0.0) -> tuple[float, Tensor | None]:
    """Split a number, or a tensor of numbers, into what the schema of an operator can carry.

    Returns:
        The number and None; or the stand-in, which nobody reads, and the tensor.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, Tensor):
        return stand_in, value
    try:
        return float(value), None
    except (TypeError, ValueError):
        raise TypeError(f"{name}: a {type(value).__name__}; needs a number or a tensor of floats") from None


def grid(name: str, numbers: Tensor, image: Tensor, by_sample: bool = True) -> Tensor:
    """Return a tensor of numbers as (rows, columns), where rows are 1 or B, and columns 1 or C.

    Args:
        name: what an error calls it.
        numbers: floats, one in all; or (B,), or of another shape that flattens to it, by sample; or (C,), (C, 1, 1) or
            (1, C, 1, 1), by channel; or (B, C, 1, 1). A tensor of one dimension and B = C numbers is by sample.
        image: (B, C, ...), or (B,), which counts as one channel.
        by_sample: whether numbers may differ by sample; if not, B = C numbers are by channel.

    Returns:
        The numbers side by side in memory, in their own dtype.

    Raises:
        ValueError: another shape or dtype.
    """
    batch, channels = image.shape[0], image.shape[1] if image.dim() > 1 else 1
    count, ranks = numbers.numel(), (1, image.dim() - 1, image.dim())
    along_channels = image.dim() > 1 and count == channels and numbers.dim() in ranks
    along_channels = along_channels and numbers.shape[max(0, numbers.dim() - image.dim() + 1)] == channels
    shape = None
    if count == 1:
        shape = (1, 1)
    elif by_sample and count == batch and (numbers.dim() == 1 or not along_channels):
        shape = (batch, 1)
    elif along_channels:
        shape = (1, channels)
    elif by_sample and count == batch * channels and numbers.shape == (batch, channels, *[1] * (image.dim() - 2)):
        shape = (batch, channels)
    if shape is None or numbers.dtype not in FLOATS:
        each = f"floats ({batch},) by sample or " if by_sample else "floats "
        each += f"({', '.join(map(str, [channels, *[1] * (image.dim() - 2)]))}) by channel"
        raise ValueError(f"{name}: {numbers.dtype} of shape {tuple(numbers.shape)}; needs a number, or {each}")
    return numbers.reshape(shape).contiguous()


def spread(numbers: Tensor, image: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that `grid` made, in a dtype, as (rows, columns, 1, ...), to be broadcast to the image."""
    return numbers.to(dtype).view(*numbers.shape[: image.dim()], *[1] * (image.dim() - 2))


def differs_by(numbers: Tensor | None) -> str:
    """Return how the numbers that `grid` made differ, as `number` takes it: "none" where there is no tensor."""
    if numbers is None:
        return "none"
    rows, columns = numbers.shape
    return ("both" if columns > 1 else "sample") if rows > 1 else ("channel" if columns > 1 else "one")


def channels_of(image: Tensor, *by: str) -> tuple[int, int] | None:
    """Return the number of channels and their distance in memory, as `channel_of` takes them.

    Args:
        image: (B, C, ...), dense, the batch outermost.
        by: what `differs_by` says of the numbers; None is returned where none differ by channel.
    """
    return (image.shape[1], image.stride(1)) if "channel" in by or "both" in by else None


@triton.jit
def channel_of(pixel, CHANNELS: tl.constexpr):
    """Return the channel of pixels, given as places in a sample; 0 where it is not asked for."""
    if CHANNELS is None:
        channel = 0
    else:
        channel = pixel // CHANNELS[1] % CHANNELS[0]
    return channel


@triton.jit
def number(value, sample, channel, CHANNELS: tl.constexpr, BY: tl.constexpr):
    """Return the number of a sample's pixels as float32: it is `value`, or where `value` points to."""
    if BY == "none":
        result = tl.full((), value, tl.float32)  # the interpreter would take one that float32 cannot hold as float64
    elif BY == "one":
        result = tl.load(value).to(tl.float32)
    elif BY == "sample":
        result = tl.load(value + sample).to(tl.float32)
    elif BY == "channel":
        result = tl.load(value + channel).to(tl.float32)
    else:
        result = tl.load(value + sample * CHANNELS[0] + channel).to(tl.float32)
    return result


@triton.jit
def radius(value, sample, channel, CHANNELS: tl.constexpr, BY: tl.constexpr):
    """Return `number`, one of a tensor below 0 taken as 0: of those, the host has not seen the sign."""
    result = number(value, sample, channel, CHANNELS, BY)
    if BY != "none":
        result = tl.where(result < 0, 0.0, result)
    return result


def strides_beside(tensor: Tensor, image: Tensor) -> tuple[Any, ...] | None:
    """Return how `place` finds the pixels of a tensor, in the order in which those of the image lie in memory.

    Args:
        tensor: of the shape of the image, with any strides; 0 where it repeats itself.
        image: (B, ...) of at most MOST_DIMENSIONS, dense, the batch outermost.

    Returns:
        The lengths of the image's dimensions after the first, as three, and the tensor's strides, as four. None where
        the tensor lies as the image does.
    """
    layouts = zip(tensor.stride(), image.stride(), image.shape, strict=True)
    if all(own == other or size == 1 for own, other, size in layouts):
        return None
    order = sorted(range(1, image.dim()), key=image.stride, reverse=True)
    missing = [1] * (MOST_DIMENSIONS - image.dim())
    lengths = (*missing, *(image.shape[dim] for dim in order))
    return lengths, (tensor.stride(0), *missing, *(tensor.stride(dim) for dim in order))


def laid_out(tensor: Tensor, image: Tensor) -> Tensor:
    """Return a tensor in the layout of the image, which is dense: itself where it has that layout, else a copy."""
    if tensor.stride() == image.stride() or strides_beside(tensor, image) is None:
        return tensor
    return torch.empty_like(image, dtype=tensor.dtype).copy_(tensor)


@triton.jit
def place(offset, sample, pixel, STRIDES: tl.constexpr):
    """Return where a tensor has pixels, given as places in a sample, that lie at `offset` in the image."""
    if STRIDES is None:
        at = offset
    else:
        inner: tl.constexpr = STRIDES[0][2]
        middle: tl.constexpr = STRIDES[0][1]
        strides: tl.constexpr = STRIDES[1]
        at = (pixel // (middle * inner)) * strides[1] + (pixel // inner % middle) * strides[2]
        at = sample * strides[0] + (at + (pixel % inner) * strides[3])
    return at


def rows_or_pixels(mask: Tensor, image: Tensor) -> Tensor:
    """Return a mask like the image, without a copy.

    Args:
        mask: (B,) bool, of samples; or bool of a shape that broadcasts to that of the image.

    Raises:
        ValueError: another dtype or shape.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: {mask.dtype}; needs torch.bool")
    if mask.shape == image.shape[:1]:
        mask = mask.view(-1, *[1] * (image.dim() - 1))
    try:
        return mask.expand(image.shape)
    except RuntimeError:
        shapes = f"shape {tuple(mask.shape)}, which does not broadcast to {tuple(image.shape)}"
        raise ValueError(f"mask: {shapes}; needs ({image.shape[0]},) or the shape of adv") from None


def finite(name: str, value: float) -> float:
    """Return a number as a float.

    Raises:
        TypeError: it is none.
        ValueError: it is a tensor, or not finite.
    """
    number, tensor = split(name, value)
    if tensor is not None or not -math.inf < number < math.inf:
        raise ValueError(f"{name}: {'a tensor' if tensor is not None else number}; needs a finite number")
    return number


def batch_first(images: Tensor) -> Tensor:
    """Return images side by side in memory, the batch outermost: a copy where they lie otherwise."""
    return images if is_dense_batch_first(images) else images.contiguous()


def overlap(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors of one shape have memory in common, of which one is dense.

    Of two that both have holes, only those that begin at one address are told. Inside a transform of torch.func, which
    has no addresses, any two may overlap.
    """
    try:
        if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
            return False
    except RuntimeError:
        return True
    (begin, end), (other_begin, other_end) = _span(one), _span(other)
    if end - begin > one.nbytes and other_end - other_begin > other.nbytes:
        return begin == other_begin
    return begin < other_end and other_begin < end


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a tensor's first byte, and that after its last one."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def apart(tensor: Tensor, image: Tensor) -> Tensor:
    """Return a tensor that can be read while `image` is overwritten, pixel by pixel, in any order.

    It is copied where it overlaps the image and a pixel of it is another pixel of the image.
    """
    if not overlap(tensor, image):
        return tensor
    same = tensor.data_ptr() == image.data_ptr() and tensor.stride() == image.stride()
    return tensor if same else tensor.clone()
