"""The functions of one number against float64, where the plain formula would keep no digit."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.kernels.language import tl, triton
from retemper.kernels.numerics import LN2, LOG2E, exp2_m1, log2_1m, log2_total
from retemper.kernels.runtime import launching

pytestmark = pytest.mark.triton
SMALL = 10.0 ** torch.linspace(-9, -2, 500, dtype=torch.float64)
WIDE = torch.linspace(0, 1, 501, dtype=torch.float64)[1:-1]
# Of the result: what the series leave out and their last roundings come to 2 ulp. Beyond them the error of 1 +- x,
# 2**-24, is divided by the smallest result there is, 0.03.
SERIES, BEYOND = 2**-22, 2**-18


def _apply(x_ptr, out_ptr, N: tl.constexpr, FUNCTION: tl.constexpr):
    place = tl.arange(0, N)
    x = tl.load(x_ptr + place)
    if FUNCTION == "log2_total":
        out = log2_total(x, 1.0)
    elif FUNCTION == "log2_total of three peaks":
        out = log2_total(x, 3.0)
    elif FUNCTION == "exp2_m1":
        out = exp2_m1(x)
    else:
        out = log2_1m(x)
    tl.store(out_ptr + place, out)


@cache
def kernel() -> Any:
    """The compiled or interpreted function: made once a test runs, when conftest.py has said which."""
    return triton.jit(_apply)


def apply(function: str, x: Tensor, device: torch.device) -> Tensor:
    """The function's values as float64, at `x` rounded to float32."""
    padded = torch.zeros(triton.next_power_of_2(len(x)), device=device)
    padded[: len(x)] = x.float()
    out = torch.empty_like(padded)
    options: dict[str, Any] = {"N": len(padded), "FUNCTION": function}
    with launching(padded):
        kernel()[(1,)](padded, out, **options)
    return out[: len(x)].double().cpu()


def assert_close(out: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=0)


def test_powers_and_logarithms_of_2_are_those_of_e() -> None:
    assert LN2.value * LOG2E.value == pytest.approx(1, rel=1e-15)
    assert 2**LOG2E.value == pytest.approx(torch.e, rel=1e-15)


@pytest.mark.parametrize(
    ("x", "tolerance"), [(SMALL, SERIES), (0.03 * WIDE, SERIES), (WIDE, BEYOND), (1e3 * WIDE, BEYOND)]
)
def test_log2_total(x: Tensor, tolerance: float, device: torch.device) -> None:
    x = x.float().double()
    expected = x.log1p() / LN2.value
    assert_close(apply("log2_total", x, device), expected, tolerance)
    assert_close(apply("log2_total of three peaks", x, device), (3 + x).log2(), SERIES)


@pytest.mark.parametrize(
    ("x", "tolerance"), [(SMALL, SERIES), (0.144 * WIDE, SERIES), (WIDE, BEYOND), (200 * WIDE, BEYOND)]
)
def test_exp2_m1(x: Tensor, tolerance: float, device: torch.device) -> None:
    x = -x.float().double()
    assert_close(apply("exp2_m1", x, device), (x * LN2.value).expm1(), tolerance)


@pytest.mark.parametrize(("x", "tolerance"), [(SMALL, SERIES), (0.03 * WIDE, SERIES), (WIDE, BEYOND)])
def test_log2_1m(x: Tensor, tolerance: float, device: torch.device) -> None:
    x = x.float().double()
    assert_close(apply("log2_1m", x, device), (-x).log1p() / LN2.value, tolerance)


def test_at_the_ends(device: torch.device) -> None:
    inf, nan = torch.inf, torch.nan
    ends = torch.tensor([0, 1, nan])
    assert apply("log2_1m", ends, device).nan_to_num(nan=7, neginf=-8).tolist() == [0, -8, 7]
    assert apply("exp2_m1", -torch.tensor([0, inf, nan]), device).nan_to_num(nan=7).tolist() == [0, -1, 7]
    assert apply("log2_total", torch.tensor([0, inf, nan]), device).nan_to_num(nan=7, posinf=8).tolist() == [0, 8, 7]
