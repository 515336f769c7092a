"""The kernels of the step against its reference: every dtype, layout and branch, and gradients of any size."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.kernels import pgd_step_, pgd_step_reference

STEP, EPS = 2 / 255, 8 / 255
SHAPES = [(1,), (7,), (1, 1, 1, 1), (2, 3, 32, 32), (3, 3, 31, 33), (2, 2, 2, 2, 2)]  # one; whole blocks; ragged tails
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# values in [0, 1]: four roundings of half an ulp in float32; one ulp in the others, since the interpreter truncates
TOLERANCE = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def batch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    clean = torch.rand(shape, generator=gen)
    adv = (clean + EPS * (2 * torch.rand(shape, generator=gen) - 1)).clamp(0, 1)
    grad = torch.randn(shape, generator=gen).mul(2).round() / 2  # round: some exact zeros
    return adv.to(device, dtype), grad.to(device, dtype), clean.to(device, dtype)


def margins(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return steps and radii that differ by sample, one radius of zero."""
    eps = torch.linspace(0, 2 * EPS, size + 1, device=device)[:size]
    return eps / 4 + STEP, eps


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_sample", [False, True])
def test_agrees_with_reference(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
    norm: str,
    by_sample: bool,
    device: torch.device,
) -> None:
    tensors = batch(shape, dtype, device)
    if len(shape) == 4:
        tensors = [t.contiguous(memory_format=layout) for t in tensors]
    adv, grad, clean = tensors
    step, eps = margins(shape[0], device) if by_sample else (STEP, EPS)
    expected = pgd_step_reference(adv.double(), grad.double(), clean.double(), step, eps, norm=norm).to(dtype)
    out = pgd_step_(adv, grad, clean, step, eps, norm=norm)
    assert out is adv and out.stride() == clean.stride()
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_no_gradient_no_move(norm: str, dtype: torch.dtype, device: torch.device) -> None:
    adv, grad, clean = batch((4, 3, 8, 8), dtype, device)
    clean, adv = clean.clamp(0.1, 0.9), clean.clamp(0.1, 0.9) + 0.01  # inside the ball and the image
    grad[0] = 0
    grad[1] = float("nan")
    grad[2, :, ::2] = float("nan")
    moved = pgd_step_(adv.clone(), grad, clean, STEP, 1.0, norm=norm)
    assert torch.equal(moved[:2], adv[:2])
    assert torch.equal(moved[2, :, ::2], adv[2, :, ::2])
    still = torch.zeros_like(grad)
    assert torch.equal(pgd_step_(moved.clone(), still, clean, STEP, 1.0, norm=norm), moved)  # no drift


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_l2_moves_by_the_step_whatever_the_gradient_measures(
    scale: float, dtype: torch.dtype, device: torch.device
) -> None:
    clean = torch.full((2, 3, 20, 20), 0.5, device=device, dtype=dtype)
    grad = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean) * scale
    grad[0, 0, 0, 0], grad[0, 0, 0, 1] = float("inf"), float("nan")
    delta = (pgd_step_(clean.clone(), grad, clean, 0.25, 1.0, norm="l2") - clean).flatten(1)
    torch.testing.assert_close(delta.square().sum(1).sqrt(), torch.full_like(delta[:, 0], 0.25), rtol=1e-5, atol=0)
    assert (delta[0, :2] == 0).all()


def test_infinite_gradients_have_a_sign(device: torch.device) -> None:
    adv = torch.full((1, 2), 0.5, device=device)
    pgd_step_(adv, torch.tensor([[float("inf"), -float("inf")]], device=device), adv.clone(), 0.25, 1.0)
    assert adv.tolist() == [[0.75, 0.25]]


def in_another_layout(image: Tensor) -> list[Tensor]:
    """Return images of the same values, of other strides."""
    order = [*range(image.dim())]
    wide = image.new_zeros(*image.shape[:-1], 2 * image.shape[-1])
    wide[..., ::2] = image
    return [
        image.permute(order[::-1]).contiguous().permute(order[::-1]),
        wide[..., ::2],
        image.flip(-1).contiguous().flip(-1),
    ]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 5), (2, 3, 8, 5), (2, 2, 3, 2, 3)], ids=str)
def test_gradient_and_centre_may_lie_otherwise(shape: tuple[int, ...], norm: str, device: torch.device) -> None:
    for layout in LAYOUTS if len(shape) == 4 else LAYOUTS[:1]:
        adv, grad, clean = (t.contiguous(memory_format=layout) for t in batch(shape, torch.float32, device))
        more: dict[str, Any] = {"mask": grad > -0.5, "momentum": torch.rand_like(adv), "previous": clean.clone()}
        expected = [adv.clone(), more["momentum"].clone(), more["previous"].clone()]
        same = more | {"momentum": expected[1], "previous": expected[2]}
        pgd_step_(expected[0], grad, clean, STEP, EPS, norm=norm, **same)
        for others in zip(*(in_another_layout(t) for t in (grad, clean, *more.values())), strict=True):
            out, (mask, momentum, previous) = adv.clone(), others[2:]
            result = [out, momentum.clone(), previous.clone()]
            pgd_step_(
                out, others[0], others[1], STEP, EPS, norm=norm, mask=mask, momentum=result[1], previous=result[2]
            )
            for one, other in zip(result, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0 if norm == "linf" else 2**-22)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float64, torch.float32),
    ],
)
def test_dtypes_may_differ(dtypes: tuple[torch.dtype, ...], norm: str, device: torch.device) -> None:
    adv, grad, clean = (
        t.to(dtype) for t, dtype in zip(batch((2, 3, 8, 8), torch.float32, device), dtypes, strict=True)
    )
    expected = pgd_step_reference(adv.double(), grad.double(), clean.double(), STEP, EPS, norm=norm).to(dtypes[0])
    out = pgd_step_(adv, grad, clean, STEP, EPS, norm=norm)
    assert out.dtype == dtypes[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[dtypes[0]])


MASKS = {"rows": (2,), "pixels": (2, 3, 8, 8), "places": (8, 8), "channels": (3, 1, 1)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("of", MASKS)
def test_a_masked_pixel_stays_exactly(of: str, norm: str, dtype: torch.dtype, device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), dtype, device)
    adv[0, 0, 0, :4], adv[1] = 7.0, adv[1] + 3  # far outside, where only a mask leaves it
    mask = (torch.arange(math.prod(MASKS[of])) % 2 == 0).view(MASKS[of]).to(device)
    whole = (mask.view(2, 1, 1, 1) if of == "rows" else mask).expand(adv.shape)
    out = pgd_step_(adv.clone(), grad, clean, STEP, EPS, norm=norm, mask=mask)
    assert torch.equal(out[~whole], adv[~whole]) and not torch.equal(out[whole], adv[whole])
    # its gradient and its distance count 0: as if it lay at the centre, without a gradient
    alone = pgd_step_(torch.where(whole, adv, clean), grad * whole, clean, STEP, EPS, norm=norm)
    torch.testing.assert_close(out[whole], alone[whole], rtol=0, atol=TOLERANCE.get(dtype, 1e-12))


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_follows_the_momentum(
    norm: str, dtype: torch.dtype, momentum_dtype: torch.dtype | None, device: torch.device
) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), dtype, device)
    momentum = torch.zeros_like(adv, dtype=momentum_dtype)
    total = torch.zeros_like(grad, dtype=torch.float64)
    for turn in (1, 2):
        grad = grad.roll(1, -1) * (1e-15 if dtype == torch.float32 else 1)
        total = 0.5 * total + grad.double() / grad.double().abs().sum((1, 2, 3), keepdim=True)
        before = adv.clone()
        pgd_step_(adv, grad, clean, STEP, EPS, norm=norm, momentum=momentum, decay=0.5)
        rounding = torch.finfo(momentum.dtype).eps
        torch.testing.assert_close(momentum.double(), total, rtol=max(turn * rounding, 1e-6), atol=rounding / 50)
        assert torch.equal(adv, pgd_step_(before, momentum, clean, STEP, EPS, norm=norm))


def test_momentum_is_not_poisoned(device: torch.device) -> None:
    adv, grad, clean = batch((3, 2, 4, 4), torch.float32, device)
    grad[0], grad[1, 0, 0, 0], grad[1, 0, 0, 1], grad[2] = 0, float("nan"), float("inf"), 1e38
    momentum = torch.zeros_like(adv)
    pgd_step_(adv, grad, clean, STEP, EPS, momentum=momentum)
    assert momentum.isfinite().all() and (momentum[0] == 0).all()
    torch.testing.assert_close(momentum.abs().sum((1, 2, 3))[1:], torch.ones(2, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_l2_with_inertia(masked: bool, dtype: torch.dtype, device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), dtype, device)
    previous = (adv + 0.05 * torch.randn(adv.shape).to(adv)).clamp(0, 1)
    mask = (grad > -0.5) if masked else None
    eps = torch.tensor([0.5, 0.02], device=device)  # inside the ball, and outside it
    wide = adv.double(), grad.double(), clean.double()
    reached = pgd_step_reference(*wide, 0.25, eps, norm="l2", mask=mask)
    gone_on = wide[0] + (reached - wide[0]) * 0.75 + (wide[0] - previous.double()) * 0.25
    if mask is not None:
        gone_on = torch.where(mask, gone_on, wide[0])
    expected = pgd_step_reference(gone_on, torch.zeros_like(gone_on), wide[2], 0.0, eps, norm="l2", mask=mask).to(dtype)
    old = adv.clone()
    pgd_step_(adv, grad, clean, 0.25, eps, norm="l2", previous=previous, mask=mask)
    torch.testing.assert_close(adv, expected, rtol=0, atol=TOLERANCE.get(dtype, 1e-12))
    assert torch.equal(previous, old)
