"""Random numbers that depend on a seed and a place, and on nothing else: uniform ones and normal ones.

They are made from the words of Philox-4x64-10 (Salmon et al., SC 2011). The seed is its key. One counter gives four
words of 64 bits, so eight of 32, the lower half of each before its upper half. The same words come from three places:
from Triton on a GPU, from NumPy's generator on a CPU, and from plain PyTorch where NumPy is missing or the seed is on a
GPU.

A draw is a word of 32 bits taken as a signed number, rounded to float32 and divided by 2**31: it lies in [-1, 1]. Two
draws a and b make two normal numbers (Box and Muller, 1958): sqrt(-2 ln |a|) times the cosine and the sine of pi b.
They are at most sqrt(-2 ln 2**-32) = 6.7.
"""

import math
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import tl, triton

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)  # of words 0 and 2
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # the golden ratio and sqrt(3) - 1, in 64 bits
ROUNDS = 10
LOW = 0xFFFFFFFF  # the lower 32 bits of an int64
WORD = 0xFFFFFFFFFFFFFFFF  # the 64 bits of a word
EMPTY = {"buffer": [0] * 4, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}  # what NumPy keeps of words it has drawn
DRAWS = tl.constexpr(8)  # words of 32 bits that one counter gives
UNIT = tl.constexpr(2.0**-31)
HALF_TURN = tl.constexpr(math.pi / 2)
SMALLEST = tl.constexpr(2.0**-32)  # a draw of 0 is taken as this one where a logarithm is needed


def philox_reference(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox-4x64-10 (Salmon et al., SC 2011), ten rounds on four words of 64 bits.

    Args:
        counter, key: int64 tensors of one shape, or of shapes that broadcast: the bits of words in [0, 2**64).

    Returns:
        Four int64 tensors with the bits of random words in [0, 2**64).
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(word0, MULTIPLIERS[0])
        high2, low2 = _multiply(word2, MULTIPLIERS[1])
        word0, word1, word2, word3 = high2 ^ word1 ^ key0, low2, high0 ^ word3 ^ key1, low0
        key0, key1 = key0 + _signed(KEY_STEPS[0]), key1 + _signed(KEY_STEPS[1])  # int64 wraps around as unsigned ones
    return word0, word1, word2, word3


def _signed(word: int) -> int:
    """Return the int64 that has the bits of a number in [0, 2**64)."""
    return word - 2**64 if word >= 2**63 else word


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 64 bits of a product of 128, from products of halves of 32 bits."""
    low, high = word & LOW, word >> 32 & LOW
    factor_low, factor_high = factor & LOW, factor >> 32
    cross, across = low * factor_high, high * factor_low
    carry = (low * factor_low >> 32 & LOW) + (cross & LOW) + (across & LOW)
    upper = high * factor_high + (cross >> 32 & LOW) + (across >> 32 & LOW) + (carry >> 32)
    return upper, word * _signed(factor)


@cache
def _numpy() -> Any:
    """Return NumPy, or None where it is not installed or PyTorch cannot share memory with it."""
    try:
        import numpy.random  # here, since the kernels are imported without NumPy too

        torch.from_numpy(numpy.empty(0))
    except (ImportError, RuntimeError):
        return None
    return numpy


class _Generator(threading.local):
    """NumPy's generator, one for each thread: to make one takes as long as all else of a small start."""

    source: Any = None

    def at(self, numpy: Any, key: int, counter: int) -> Any:
        """Return the generator, which draws the words of this counter next."""
        if self.source is None:
            self.source = numpy.random.Philox(0)
        before = (counter - 1) % 2**256  # it counts up before it draws
        state = {"counter": [before >> place & WORD for place in (0, 64, 128, 192)], "key": [key, 0]}
        self.source.state = {"bit_generator": "Philox", "state": state, **EMPTY}
        return self.source


_generator = _Generator()


def random_words(seed: Tensor, rows: tuple[int, int], batch: int, counters: int) -> Tensor:
    """Return random words for some rows of a larger batch.

    Args:
        seed: one int64: the key. On a CPU its value is read.
        rows: (first, apart): the rows are first, first + apart, ... of the larger batch.
        batch: how many rows there are.
        counters: how many counters a row takes: row r those from r * counters on.

    Returns:
        (batch, 8 * counters) int32: the lower half of each word of 64 bits, then its upper half.
    """
    numpy = _numpy() if seed.device.type == "cpu" else None
    if numpy is None:
        return _words_of_torch(seed, rows, batch, counters)
    first, apart = rows
    source = _generator.at(numpy, int(seed) & WORD, first * counters)
    if apart == 1 or batch == 1:
        return torch.from_numpy(source.random_raw(4 * counters * batch).view("int32")).view(batch, -1)
    parts = []
    for _ in range(batch):
        parts.append(torch.from_numpy(source.random_raw(4 * counters).view("int32")))
        source.advance((apart - 1) * counters)
    return torch.stack(parts)


def _words_of_torch(seed: Tensor, rows: tuple[int, int], batch: int, counters: int) -> Tensor:
    """Return what `random_words` returns, computed in plain PyTorch on the seed's device."""
    row = rows[0] + rows[1] * torch.arange(batch, device=seed.device)
    counter = row[:, None] * counters + torch.arange(counters, device=seed.device)
    zero = torch.zeros_like(counter)
    words = philox_reference((counter, zero, zero, zero), (seed.reshape(()), zero[0, 0]))
    return torch.stack(words, -1).view(torch.int32).view(batch, -1)


def to_normal(draws: Tensor) -> None:
    """Turn words of 32 bits, (B, 2 n) floats, into normal numbers, in place: the first half of a row with its second.

    NumPy has the same functions as PyTorch, and on a CPU computes those of float32 three times as fast.
    """
    numpy = _numpy() if draws.device.type == "cpu" else None
    library, rows = (torch, draws) if numpy is None else (numpy, draws.numpy())
    first, second = rows[:, : rows.shape[1] // 2], rows[:, rows.shape[1] // 2 :]
    length = library.abs(first)
    length *= UNIT.value
    library.clip(length, SMALLEST.value, 1, out=length)
    library.log(length, out=length)
    length *= -2
    library.sqrt(length, out=length)
    angle = second * (math.pi * UNIT.value)
    library.multiply(library.cos(angle), length, out=first)
    library.multiply(library.sin(angle), length, out=second)


@triton.jit
def _draw(word):
    """Return the draw that the lower 32 bits of a word make."""
    return word.to(tl.uint32).to(tl.int32, bitcast=True).to(tl.float32) * UNIT


@triton.jit
def _normal_pairs(first, second):
    """Return the normal numbers that pairs of draws make, by series for |angle| <= pi/2, to 2**-23.

    The angle is halved and the result doubled. tl.sin takes any angle, and may need stack memory for the large ones.
    """
    length = tl.sqrt(-2 * tl.log(tl.maximum(tl.abs(first), SMALLEST)))
    half = second * HALF_TURN
    square = half * half
    sine = tl.fma(square, 1 / 6227020800, -1 / 39916800)
    sine = tl.fma(square, sine, 1 / 362880)
    sine = tl.fma(square, sine, -1 / 5040)
    sine = tl.fma(square, sine, 1 / 120)
    sine = tl.fma(square, sine, -1 / 6)
    sine = half * tl.fma(square, sine, 1.0)
    cosine = tl.fma(square, 1 / 479001600, -1 / 3628800)
    cosine = tl.fma(square, cosine, 1 / 40320)
    cosine = tl.fma(square, cosine, -1 / 720)
    cosine = tl.fma(square, cosine, 1 / 24)
    cosine = tl.fma(square, cosine, -1 / 2)
    cosine = tl.fma(square, cosine, 1.0)
    twice = 2 * length * sine
    return length - twice * sine, twice * cosine


@triton.jit
def uniform_draws(seed, counter, BLOCK: tl.constexpr):
    """Return the draws in [-1, 1] of BLOCK / 8 counters, those of one side by side."""
    zero = counter * 0
    word0, word1, word2, word3 = tl.philox(seed, counter, zero, zero, zero)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # (BLOCK / 8, 2, 2), in their order
    return tl.reshape(tl.join(_draw(words), _draw(words >> 32)), (BLOCK,))


@triton.jit
def normal_draws(seed, counter, apart, BLOCK: tl.constexpr):
    """Return the normal numbers of BLOCK / 8 counters and of those `apart` from them, those of one side by side."""
    return _normal_pairs(uniform_draws(seed, counter, BLOCK), uniform_draws(seed, counter + apart, BLOCK))
