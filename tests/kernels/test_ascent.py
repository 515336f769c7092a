"""The step in plain PyTorch: the released code's to the bit, float64's in L2, and what it leaves alone."""

import pytest
import torch
from torch import Tensor

from retemper.kernels import pgd_step_, pgd_step_reference
from retemper.kernels.ascent import go_on

STEP, EPS = 2 / 255, 8 / 255
SHAPES = [(1,), (1, 1, 1, 1), (2, 3, 32, 32), (2, 2, 2, 2, 2)]

pytestmark = pytest.mark.usefixtures("reference_path")


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    clean = torch.rand(shape, generator=gen)
    adv = (clean + EPS * (2 * torch.rand(shape, generator=gen) - 1)).clamp(0, 1)
    return adv, torch.randn(shape, generator=gen).mul(2).round() / 2, clean  # round: some exact zeros


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_released_code_to_the_bit(shape: tuple[int, ...]) -> None:
    adv, grad, clean = batch(shape)
    released = adv + STEP * torch.sign(grad)  # as in the code of TRADES and all that follow it
    released = torch.min(torch.max(released, clean - EPS), clean + EPS).clamp(0, 1)
    before = adv.clone()
    assert torch.equal(pgd_step_reference(adv, grad, clean, STEP, EPS), released) and torch.equal(adv, before)
    assert pgd_step_(adv, grad, clean, STEP, EPS) is adv and torch.equal(adv, released)


def test_gradient_and_centre_are_left_alone() -> None:
    for norm in ("linf", "l2"):
        for dtype in (torch.float32, torch.bfloat16):  # in place, and by a copy that is overwritten
            adv, grad, clean = (one.to(dtype) for one in batch((2, 3, 8, 8)))
            given = grad.clone(), clean.clone()
            pgd_step_(adv, grad, clean, STEP, EPS, norm=norm, mask=grad > 0)
            assert torch.equal(grad, given[0]) and torch.equal(clean, given[1])


def test_inertia_weighs_this_move_and_the_last() -> None:
    before, old, new = torch.tensor([0.0]), torch.tensor([0.5]), torch.tensor([0.75])
    go_on(new, old, before, 0.75)
    assert new.item() == 0.5 + 0.75 * 0.25 + 0.25 * 0.5


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l2_of_a_cpu_is_that_of_float64(shape: tuple[int, ...], scale: float) -> None:
    adv, grad, clean = batch(shape)
    eps = torch.linspace(0, EPS, len(adv))
    for chosen in (eps, 0.3, 1.0):
        wide = adv.double(), grad.double() * scale, clean.double()
        expected = pgd_step_reference(*wide, 0.25, chosen, norm="l2").float()
        torch.testing.assert_close(
            pgd_step_(adv.clone(), grad * scale, clean, 0.25, chosen, norm="l2"), expected, rtol=0, atol=2**-22
        )
