"""What a kernel finds out of rows of logits, against PyTorch in float64."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.kernels.language import tl, triton
from retemper.kernels.logit_rows import MOST_STEPS, PER_THREAD, WARPS, row_log2_total, row_logits, row_peak, row_tiles
from retemper.kernels.numerics import LOG2E
from retemper.kernels.runtime import launching

pytestmark = pytest.mark.triton
CLASSES = [1, 2, 10, 100, 1501]  # less than a step, one step, several, and more than one pass over the row


def _measure(
    logits_ptr,
    rate_ptr,
    peak_ptr,
    total_ptr,
    loaded_ptr,
    B,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, B - 1)
    row_ptr = logits_ptr + real * K
    peak = row_peak(row_ptr, K, ROWS, LANES, STEPS)
    total = row_log2_total(row_ptr, peak, tl.load(rate_ptr + real), K, ROWS, LANES, STEPS)
    tl.store(peak_ptr + row, peak, mask=row < B)
    tl.store(total_ptr + row, total, mask=row < B)
    first = row_logits(row_ptr, 0, K, LANES, STEPS)[0]
    tl.store(loaded_ptr + row[:, None] * LANES + tl.arange(0, LANES), first, mask=(row < B)[:, None])


@cache
def kernel() -> Any:
    """The compiled or interpreted function: made once a test runs, when conftest.py has said which."""
    return triton.jit(_measure)


def measure(logits: Tensor, temperature: Tensor, width: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return the peaks (B,), log2 totals (B,) and the first block (B, LANES) of (B, K) logits."""
    batch, classes = logits.shape
    options: dict[str, Any] = row_tiles(classes, width)
    peak, total = logits.new_empty(batch, dtype=torch.float32), logits.new_empty(batch, dtype=torch.float32)
    loaded = logits.new_empty((batch, options["LANES"]), dtype=torch.float32)
    rate = LOG2E.value / temperature
    with launching(logits):
        kernel()[(triton.cdiv(batch, options["ROWS"]),)](logits, rate, peak, total, loaded, batch, **options)
    return peak, total, loaded


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("classes", [*CLASSES, 1000, 100_000])
def test_a_tile_covers_a_row_and_fills_its_warps(classes: int, width: int) -> None:
    tile = row_tiles(classes, width)
    threads = tile["LANES"] // width
    assert tile["LANES"] % width == 0 and threads * tile["ROWS"] == 32 * WARPS
    assert tile["STEPS"] <= MOST_STEPS and tile["STEPS"] * width <= PER_THREAD
    whole_row = tile["STEPS"] * tile["LANES"] >= classes
    assert whole_row or threads == 32 * WARPS  # only a row that fills a program is read in several passes
    assert (tile["STEPS"] - 1) * tile["LANES"] < classes  # no step has nothing to do


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_peak_and_total_are_those_of_the_softmax(classes: int, dtype: torch.dtype, device: torch.device) -> None:
    gen = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, classes, generator=gen)).to(device, dtype)
    temperature = torch.tensor([0.05, 0.3, 1, 7, 50], device=device)
    peak, total, loaded = measure(logits, temperature)
    wide = logits.double()
    assert torch.equal(peak.double(), wide.amax(1))
    tempered = (wide - wide.amax(1, keepdim=True)) / temperature.double()[:, None]
    rest, peaks = torch.where(tempered == 0, 0, tempered.exp()).sum(1), (tempered == 0).sum(1)
    expected = (rest + (peaks - 1)).log1p() * LOG2E.value
    # of its own value: exp(-x) to x 2**-22, and x is at most 100 where float32 holds exp(-x)
    torch.testing.assert_close(total.double(), expected, rtol=100 * 2**-22, atol=2**-126)
    lanes = min(classes, loaded.shape[1])
    assert torch.equal(loaded[:, :lanes], logits[:, :lanes].float()) and (loaded[:, lanes:] == -torch.inf).all()


def test_a_sure_row_keeps_the_digits_of_its_rest(device: torch.device) -> None:
    logits = torch.full((3, 10), -20.0, device=device)
    logits[:, 4] = 0
    logits[1, 5] = 0
    _, total, _ = measure(logits, torch.ones(3, device=device))
    rest = torch.tensor([9, 8, 9], dtype=torch.float64) * torch.exp(torch.tensor(-20.0, dtype=torch.float64))
    expected = (torch.tensor([1, 2, 1], dtype=torch.float64) + rest).log2()
    expected[[0, 2]] = rest[[0, 2]].log1p() * LOG2E.value
    torch.testing.assert_close(total.double().cpu(), expected, rtol=2**-20, atol=0)


def test_a_row_that_has_no_softmax_is_nan(device: torch.device) -> None:
    logits = torch.zeros(4, 10, device=device)
    logits[0, 3], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 1:] = -torch.inf
    _, total, _ = measure(logits, torch.ones(4, device=device))
    assert total[:3].isnan().all() and total[3] == 0
