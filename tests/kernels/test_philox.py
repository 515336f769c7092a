"""Philox-4x64-10: known answers, and the same words from NumPy and from PyTorch."""

import pytest
import torch

from retemper.kernels import philox, philox_reference, random_start_

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63)]


def bits(*words: int) -> list[torch.Tensor]:
    return [torch.tensor([word - 2**64 if word >= 2**63 else word]) for word in words]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # kat_vectors of Random123 (Salmon et al.), philox4x64 10
        (
            [0, 0, 0, 0],
            [0, 0],
            [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
        ),
        (
            [0xFFFFFFFFFFFFFFFF] * 4,
            [0xFFFFFFFFFFFFFFFF] * 2,
            [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
        ),
        (
            [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
            [0x452821E638D01377, 0xBE5466CF34E90C6C],
            [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
        ),
    ],
)
def test_gives_the_published_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    word0, word1, word2, word3 = bits(*counter)
    key0, key1 = bits(*key)
    words = philox_reference((word0, word1, word2, word3), (key0, key1))
    assert [word.item() % 2**64 for word in words] == answer


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows", [(0, 1), (3, 1), (1, 2), (3, 2**27)], ids=str)
def test_numpy_and_pytorch_draw_the_same(rows: tuple[int, int], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    args = (torch.tensor([seed]), rows, 5, 7)
    words = philox.random_words(*args)
    assert words.shape == (5, 56) and words.dtype == torch.int32
    fast = words.float()
    philox.to_normal(fast)
    with monkeypatch.context() as patch:
        patch.setattr(philox, "_numpy", lambda: None)
        assert torch.equal(philox.random_words(*args), words)
        draws = words.float()
        philox.to_normal(draws)
    torch.testing.assert_close(fast, draws, rtol=1e-5, atol=1e-6)
    assert philox._numpy() is numpy


@pytest.mark.usefixtures("reference_path")
def test_a_start_needs_no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = torch.rand(3, 1, 3, 5)
    expected = random_start_(torch.empty_like(clean), clean, 0.1, seed=1)
    monkeypatch.setattr(philox, "_numpy", lambda: None)
    assert torch.equal(random_start_(torch.empty_like(clean), clean, 0.1, seed=1), expected)


def test_a_word_of_0_has_a_logarithm() -> None:
    for dtype in (torch.float32, torch.float64):
        draws = torch.zeros(1, 8, dtype=dtype)
        philox.to_normal(draws)
        assert draws.isfinite().all() and draws.abs().max() < 6.7
