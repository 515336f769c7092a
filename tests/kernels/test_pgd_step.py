"""The fused step against its reference, and the promises an attack relies on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linf_is_eager_to_the_bit(shape: tuple[int, ...], device: torch.device) -> None:
    adv, grad, clean = batch(shape, torch.float32, device)
    released = adv + STEP * torch.sign(grad)  # as in the code of TRADES and all that follow it
    released = torch.min(torch.max(released, clean - EPS), clean + EPS)
    assert torch.equal(pgd_step_reference(adv, grad, clean, STEP, EPS), released.clamp(0, 1))
    assert torch.equal(pgd_step_(adv, grad, clean, STEP, EPS), released.clamp(0, 1))


@pytest.mark.parametrize("mixed", [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_margin_may_be_a_number_while_the_other_is_not(
    mixed: tuple[bool, bool], dtype: torch.dtype, device: torch.device
) -> None:
    adv, grad, clean = batch((3, 5), dtype, device)
    step, eps = (torch.full((3,), v, device=device) if one else v for v, one in zip((0.25, 0.5), mixed, strict=True))
    expected = pgd_step_(adv.clone(), grad, clean, 0.25, 0.5)
    assert torch.equal(pgd_step_(adv, grad, clean, step, eps), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32), eps=st.floats(1e-4, 1), step=st.floats(-1, 1), scale=st.sampled_from([1e-30, 1.0, 1e30])
)
def test_stays_in_the_ball_and_the_image(
    norm: str, seed: int, eps: float, step: float, scale: float, device: torch.device
) -> None:
    gen = torch.Generator().manual_seed(seed)
    clean, adv, grad = (torch.rand(2, 3, 5, 7, generator=gen).to(device) for _ in range(3))
    lower, upper = 0.25, 0.75
    clean = clean.clamp(lower, upper)
    pgd_step_(adv, scale * (grad - 0.5), clean, step, eps, norm=norm, lower=lower, upper=upper)
    delta = (adv - clean).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.square().sum(1).sqrt()
    assert length.max() <= eps + 2e-7  # clean + eps is rounded, to half an ulp of 1
    assert lower <= adv.min() and adv.max() <= upper


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_pixel_that_is_not_a_number_stays_so(dtype: torch.dtype, device: torch.device) -> None:
    adv = torch.tensor([[0.5, float("nan")]], device=device, dtype=dtype)
    out = pgd_step_(adv, torch.ones_like(adv), torch.full_like(adv, 0.5), STEP, EPS)
    assert out.isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0)])
def test_takes_an_empty_batch(shape: tuple[int, ...], device: torch.device) -> None:
    empty = torch.zeros(shape, device=device)
    eps = torch.zeros(shape[:1], device=device)
    assert pgd_step_(empty, empty.clone(), empty.clone(), STEP, eps, norm="l2").shape == shape


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    with pytest.raises(ValueError, match=r"grad: shape \(1, 3, 8, 8\), but adv"):
        pgd_step_(adv, grad[:1], clean, STEP, EPS)
    with pytest.raises(ValueError, match=r"clean: strides .* one dense layout"):
        pgd_step_(adv, grad, clean.contiguous(memory_format=torch.channels_last), STEP, EPS)
    with pytest.raises(ValueError, match=r"grad: torch.bfloat16, but adv is torch.float32"):
        pgd_step_(adv, grad.bfloat16(), clean, STEP, EPS)
    with pytest.raises(ValueError, match="norm: 'l1'; needs one of linf, l2"):
        pgd_step_(adv, grad, clean, STEP, EPS, norm="l1")
    with pytest.raises(ValueError, match=r"step: .* shape \(3,\); needs a float, or floats \(2,\)"):
        pgd_step_(adv, grad, clean, torch.ones(3, device=device), EPS)
    with pytest.raises(ValueError, match=r"eps: torch.int64"):
        pgd_step_(adv, grad, clean, STEP, torch.ones(2, device=device, dtype=torch.int64))
    for eps in (-0.1, 8, float("nan")):
        with pytest.raises(ValueError, match=rf"eps: {eps}.*; needs 0 to 1, .* 8/255, not 8"):
            pgd_step_(adv, grad, clean, STEP, eps)
    with pytest.raises(ValueError, match=r"step: 2.0; needs 0 to 1"):
        pgd_step_(adv, grad, clean, 2, EPS)
    with pytest.raises(ValueError, match=r"lower: 1.0, upper: 0.0; the range of a pixel is empty"):
        pgd_step_(adv, grad, clean, STEP, EPS, lower=1.0, upper=0.0)
    pgd_step_(adv, grad, clean, 2, 8, lower=0.0, upper=255.0)  # other units
    pgd_step_(adv, grad, clean, 2, 8, norm="l2")  # 192 pixels: the ball is longer than any one of them
    with pytest.raises(ValueError, match=r"adv: requires grad .* adv.detach\(\)"):
        pgd_step_(adv.requires_grad_(), grad, clean, STEP, EPS)
    with torch.no_grad():
        pgd_step_(adv, grad, clean, STEP, EPS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_is_a_well_formed_op(layout: torch.memory_format, by_sample: bool, norm: str, device: torch.device) -> None:
    adv, grad, clean = (t.contiguous(memory_format=layout) for t in batch((2, 3, 8, 8), torch.float32, device))
    step, eps = margins(2, device) if by_sample else (None, None)
    torch.library.opcheck(
        torch.ops.retemper.pgd_step_.default, (adv, grad, clean, STEP, EPS, 0.0, 1.0, norm, step, eps)
    )


def test_compiles_into_one_graph(device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    step, eps = margins(2, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def two_steps(adv: Tensor) -> Tensor:
        pgd_step_(adv, grad, clean, STEP, EPS)
        return pgd_step_(adv, grad, clean, step, eps, norm="l2") + 1

    expected = pgd_step_(adv.clone(), grad, clean, STEP, EPS)
    expected = pgd_step_(expected, grad, clean, step, eps, norm="l2")
    assert torch.equal(two_steps(adv), expected + 1)
    assert torch.equal(adv, expected)
