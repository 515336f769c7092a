"""The arithmetic of epilogue.py in Triton, over words of 16 bytes."""

import math
from typing import Any

from torch import Tensor

from retemper.kernels.language import cdiv, tl, triton
from retemper.kernels.launch import Launch
from retemper.kernels.runtime import access_width

# How many words of 16 bytes a program reads of each tensor: two for each thread of 4 warps. Chosen from the code for
# sm_90, not yet measured on a GPU. It takes 11 instructions a value in fp32 and 8 in bf16, 13 and 11 with a residual, 6
# and 5 for the gradient, and at most 40 registers. A tile of pixels by channels takes 12, 8, 15 and 12, and leaves
# lanes idle where C is no power of two. The memory leaves time for 55, 28, 83 and 41.
WORDS = 256


@triton.jit
def _places(words, plane, channels, WORD: tl.constexpr, SPAN: tl.constexpr, WORDS: tl.constexpr, INDEX: tl.constexpr):
    """Return the offsets of a program's values (WORDS, WORD), their channels (WORDS, SPAN), and a mask of real words.

    A word is WORD values side by side: either SPAN = WORD channels of one pixel, or one channel (SPAN = 1) of WORD
    pixels. So one division finds the channels of a whole word, and one access loads its scale.
    """
    word = tl.program_id(0).to(INDEX) * WORDS + tl.arange(0, WORDS)
    channel = (word // plane % channels * SPAN)[:, None] + tl.arange(0, SPAN)[None, :]
    place = word.to(tl.int64)[:, None] * WORD + tl.arange(0, WORD)[None, :]
    return place, channel, (word < words)[:, None]


@triton.jit
def epilogue_kernel(
    x_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    sum_ptr,
    y_ptr,
    RELU: tl.constexpr,
    words,
    plane,
    channels,
    WORD: tl.constexpr,
    SPAN: tl.constexpr,
    WORDS: tl.constexpr,
    INDEX: tl.constexpr,
):
    place, channel, inside = _places(words, plane, channels, WORD, SPAN, WORDS, INDEX)
    y = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if sum_ptr is not None:  # the shortcut comes first, and its sum is wanted too
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        y = y.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, y, mask=inside)
        y = y.to(tl.float32)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + channel).to(tl.float32)
    y += tl.load(shift_ptr + channel).to(tl.float32)
    if residual_ptr is not None and sum_ptr is None:
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def epilogue_grad_kernel(
    grad_ptr,
    second_ptr,
    y_ptr,
    scale_ptr,
    sum_grad_ptr,
    x_grad_ptr,
    residual_grad_ptr,
    PIXELS: tl.constexpr,  # of an image, where grad is that of the mean of y over them; else None
    words,
    plane,
    channels,
    WORD: tl.constexpr,
    SPAN: tl.constexpr,
    WORDS: tl.constexpr,
    INDEX: tl.constexpr,
):
    place, channel, inside = _places(words, plane, channels, WORD, SPAN, WORDS, INDEX)
    if PIXELS is None:
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    else:
        word = tl.program_id(0).to(INDEX) * WORDS + tl.arange(0, WORDS)
        width: tl.constexpr = PIXELS * SPAN // WORD  # how many words of an image have the same channels
        row = word // (channels * width) * channels * SPAN
        grad = tl.load(grad_ptr + row[:, None] + channel, mask=inside, other=0.0)
        grad = (grad.to(tl.float32) * (1.0 / PIXELS)).to(y_ptr.dtype.element_ty)
    if second_ptr is not None:
        second = tl.load(second_ptr + place, mask=inside, other=0.0)
        grad = (grad.to(tl.float32) + second.to(tl.float32)).to(y_ptr.dtype.element_ty)
    grad = tl.where(tl.load(y_ptr + place, mask=inside, other=0.0) <= 0, 0.0, grad)  # <= 0, so that NaN stays
    if residual_grad_ptr is not None:
        tl.store(residual_grad_ptr + place, grad, mask=inside)
    if scale_ptr is not None:
        grad = grad.to(tl.float32) * tl.load(scale_ptr + channel).to(tl.float32)
    if sum_grad_ptr is not None:
        grad = grad.to(tl.float32) + tl.load(sum_grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_grad_ptr + place, grad.to(x_grad_ptr.dtype.element_ty), mask=inside)


def _word_sizes(x: Tensor, *others: Tensor | None) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the arguments (words, plane, channels) of a kernel over x and `others`, and its constants.

    x is (B, C, H, W), contiguous or channels-last; the others have its shape and layout.
    """
    _, channels, height, width = x.shape
    plane = height * width if x.is_contiguous() else 1  # from one channel to the next, in memory
    starts = [t.data_ptr() // t.element_size() for t in (x, *others) if t is not None]  # a slice may start anywhere
    word = math.gcd(access_width(channels if plane == 1 else plane, x), *starts)
    words = x.numel() // word
    constants = {"WORD": word, "WORDS": WORDS, "INDEX": tl.int32 if words < 2**31 - WORDS else tl.int64}
    if plane == 1:
        return (words, 1, channels // word), {**constants, "SPAN": word}
    return (words, plane // word, channels), {**constants, "SPAN": 1}


def over_words(kernel: Any, x: Tensor, *others: Tensor | None) -> Launch | None:
    """Return the launch of a kernel over x and `others`, or None if they are empty."""
    if not x.numel():
        return None
    (words, plane, channels), constants = _word_sizes(x, *others)
    return Launch(kernel, (cdiv(words, WORDS),), {"words": words, "plane": plane, "channels": channels, **constants})
