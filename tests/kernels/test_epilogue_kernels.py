"""How the kernels of the epilogue cut images into words; what they compute is in test_epilogue.py."""

import pytest
import torch

from retemper.kernels.epilogue_kernels import WORDS, epilogue_kernel, over_words

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("shape", "layout", "start", "word", "span"),
    [
        ((2, 16, 4, 4), LAST, 0, 4, 4),  # 16 bytes of float32, of as many channels
        ((2, 6, 4, 4), LAST, 0, 2, 2),
        ((2, 3, 4, 4), LAST, 0, 1, 1),
        ((2, 16, 4, 4), LAST, 2, 2, 2),  # memory that begins amid a word
        ((2, 3, 4, 4), CONTIGUOUS, 0, 4, 1),  # as many pixels of one channel
        ((2, 3, 3, 3), CONTIGUOUS, 0, 1, 1),
    ],
)
def test_a_word_is_as_wide_as_shape_and_address_allow(
    shape: tuple[int, ...], layout: torch.memory_format, start: int, word: int, span: int
) -> None:
    memory = torch.zeros(start + torch.Size(shape).numel())
    assert memory.data_ptr() % 16 == 0
    x = memory[start:].view(shape) if layout is CONTIGUOUS else torch.empty(shape).to(memory_format=layout)
    if layout is LAST:
        x = memory[start:].as_strided(shape, x.stride())
    launch = over_words(epilogue_kernel, x, None)
    assert launch is not None and launch.named["WORD"] == word and launch.named["SPAN"] == span
    assert launch.named["words"] == x.numel() // word and launch.grid == (-(-(x.numel() // word) // WORDS),)


def test_nothing_is_launched_over_nothing() -> None:
    assert over_words(epilogue_kernel, torch.zeros(0, 3, 4, 4)) is None
