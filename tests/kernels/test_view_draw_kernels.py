"""The draws of the kernel are those of the reference, number for number."""

# pyright: reportArgumentType=false
# (Triton declares that a constant is no number.)

from typing import Any

import pytest
import torch

from retemper.kernels.language import tl, triton
from retemper.kernels.runtime import EXACT, launching
from retemper.kernels.view_draw_kernels import crop, erased, operation_of, shift, strength_of, turn
from retemper.kernels.view_draws import FROM_X, FROM_Y, POLICIES, TO_Y, view_draws

pytestmark = pytest.mark.triton


def _draws(
    view_ptr,
    whole_ptr,
    strength_ptr,
    SIDE: tl.constexpr,
    UNTIL: tl.constexpr,
    SHEAR_RANGE: tl.constexpr,
    TURNS: tl.constexpr,
    SHARE: tl.constexpr,
    RANGE: tl.constexpr,
):
    row = tl.program_id(0)
    view = tl.load(view_ptr + row)
    operation = operation_of(view, UNTIL)
    scale, x_by_y, y_by_x = turn(view, operation, SHEAR_RANGE, TURNS)
    y, x, height, width = erased(view, SHARE, RANGE, SIDE, SIDE)
    moved, _, _ = crop(view, FROM_X, SIDE, 4, "zeros")
    down, top, _ = shift(view, FROM_Y, TO_Y, SIDE, 5)
    tl.store(strength_ptr + row, strength_of(view, operation))
    whole_ptr += row * 11
    tl.store(whole_ptr, operation)
    tl.store(whole_ptr + 1, scale)
    tl.store(whole_ptr + 2, x_by_y)
    tl.store(whole_ptr + 3, y_by_x)
    tl.store(whole_ptr + 4, y)
    tl.store(whole_ptr + 5, x)
    tl.store(whole_ptr + 6, height)
    tl.store(whole_ptr + 7, width)
    tl.store(whole_ptr + 8, moved)
    tl.store(whole_ptr + 9, down)
    tl.store(whole_ptr + 10, top)


def kernel() -> Any:
    """The compiled or interpreted function: made once a test runs, when conftest.py has said which."""
    return triton.jit(_draws)


@pytest.mark.parametrize("policy", ["idbh-weak", "idbh-svhn"])
def test_the_draws_are_those_of_the_reference(policy: str, device: torch.device) -> None:
    view = torch.randint(2**63 - 1, (60,), generator=torch.Generator().manual_seed(0))
    view[0] = -1
    rule, side = POLICIES[policy], 28
    whole = torch.zeros(len(view), 11, dtype=torch.int64, device=device)
    strength, given = torch.zeros(len(view), device=device), view.to(device)
    with launching(given):
        kernel()[(len(view),)](
            given, whole, strength, side, rule.until, rule.shear, rule.turns, rule.erase, rule.erase_range, **EXACT
        )
    drawn = view_draws(view, side, side, policy)
    names = ["operation", "scale", "x_by_y", "y_by_x", "erase_y", "erase_x", "erase_height", "erase_width"]
    for column, name in enumerate(names):
        assert torch.equal(whole[:, column].cpu(), getattr(drawn, name)), name
    colour = drawn.operation < 4
    assert torch.equal(strength.cpu()[colour], drawn.strength[colour])
    assert torch.equal(whole[:, 8].cpu(), view_draws(view, side, side, "crop", padding=4).shift_x)
    assert whole[1:, 10].max() <= 5 and whole[1:, 9].abs().max() <= 5
