"""A depthwise convolution with its shift and ReLU, against PyTorch's in float64, and its input gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels.depthwise import depthwise, depthwise_grad

CASES = [  # shape, kernel, stride, padding
    ((2, 16, 6, 5), 3, 1, 1),
    ((2, 48, 7, 7), 3, 2, 1),
    ((1, 7, 8, 4), 3, 2, 0),
    ((3, 80, 4, 4), 5, 1, 2),
    ((2, 5, 1, 1), 1, 1, 0),
    ((2, 32, 20, 20), 3, 2, 1),
]
# sums of up to 25 products of eighths: exact in float32; one ulp in the others, since the interpreter truncates
TOLERANCE = {torch.float32: 0, torch.float16: 2**-8, torch.bfloat16: 2**-5}

each_case = pytest.mark.parametrize(("shape", "size", "stride", "padding"), CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def made(shape: tuple[int, ...], size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, the weight and the shift, in quarters and halves."""
    gen = torch.Generator().manual_seed(0)
    x, weight, shift = (
        torch.randint(-4, 5, of, generator=gen).to(device, dtype) / 4
        for of in (shape, (shape[1], 1, size, size), (shape[1],))
    )
    return x.contiguous(memory_format=torch.channels_last), weight / 2, shift.float()


@each_case
@each_dtype
def test_is_the_convolution_of_each_channel(
    shape: tuple[int, ...], size: int, stride: int, padding: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, shift = made(shape, size, device, dtype)
    for relu in (True, False):
        y = depthwise(x, weight, shift, stride, padding, relu)
        expected = F.conv2d(x.double(), weight.double(), shift.double(), stride, padding, groups=shape[1])
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), expected.relu() if relu else expected, rtol=0, atol=TOLERANCE[dtype])


@each_case
@each_dtype
def test_the_gradient_is_autograds(
    shape: tuple[int, ...], size: int, stride: int, padding: int, dtype: torch.dtype, device: torch.device
) -> None:
    before, weight, shift = made(shape, size, device, dtype)
    wide = before.double().requires_grad_()
    x = wide.relu()
    y = F.conv2d(x, weight.double(), shift.double(), stride, padding, groups=shape[1]).relu()
    grad = torch.randint(-4, 5, y.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype) / 4
    of_x, of_before = torch.autograd.grad(y, (x, wide), grad.double())
    given = (weight, x.to(dtype) + 0, stride, padding)
    found = depthwise_grad(grad, y.to(dtype) + 0, *given, False)
    torch.testing.assert_close(found.double(), of_x, rtol=0, atol=TOLERANCE[dtype])
    masked = depthwise_grad(grad, y.to(dtype) + 0, *given, True)
    torch.testing.assert_close(masked.double(), of_before, rtol=0, atol=TOLERANCE[dtype])
    assert masked.is_contiguous(memory_format=torch.channels_last)
    plain = F.conv2d(wide, weight.double(), None, stride, padding, groups=shape[1])
    (expected,) = torch.autograd.grad(plain, wide, grad.double())
    without = depthwise_grad(grad, None, *given, False)
    torch.testing.assert_close(without.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_nan_passes_both_ways(device: torch.device) -> None:
    x, weight, shift = made((1, 16, 4, 4), 3, device, torch.float32)
    x[0, 3, 1, 1] = torch.nan
    y = depthwise(x, weight + 1, shift, 1, 1, True)
    assert y[0, 3].isnan().sum() == 9 and not y[0, :3].isnan().any()
    grad = depthwise_grad(torch.full_like(y, torch.nan), torch.ones_like(y), weight, x, 1, 1, True)
    assert torch.equal(grad.isnan(), (x > 0) | x.isnan())


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    x, weight, shift = made((2, 16, 4, 4), 3, device, torch.float32)
    for message, args in [
        (r"x: .* channels-last", (x.contiguous(), weight, shift)),
        (r"weight: .* needs torch.float32 \(16, 1, K, K\)", (x, weight[:8], shift)),
        (r"weight: torch.float16", (x, weight.half(), shift)),
        (r"shift: shape \(8,\)", (x, weight, shift[:8])),
    ]:
        with pytest.raises(ValueError, match=message):
            depthwise(*args, 1, 1, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_are_well_formed_ops(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, shift = made((2, 16, 5, 4), 3, device, dtype)
    y = depthwise(x, weight, shift.to(dtype), 2, 1, True)
    ops = torch.ops.retemper
    torch.library.opcheck(ops.depthwise.default, (x, weight, shift.to(dtype), 2, 1, True))
    torch.library.opcheck(ops.depthwise_backward.default, (y.contiguous(), y, weight, x, 2, 1, True))
    torch.library.opcheck(ops.depthwise_backward.default, (y, None, weight, x, 2, 1, False))
