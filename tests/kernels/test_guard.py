"""The guard of a step: the first bad one is remembered, later ones change nothing, and every step is counted."""

import math

import pytest
import torch
from torch import Tensor

from retemper.kernels.guard import BLOCK, guard_

NAMES = ("next_seed", "seed", "loss_at", "found", "poison", "total")


def state(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    seeds = {"next_seed": torch.tensor([5], device=device), "seed": torch.tensor([-1], device=device)}
    numbers = dict.fromkeys(("loss_at", "found", "poison"), torch.float32) | {"total": dtype}
    return seeds | {name: torch.zeros((), device=device, dtype=kind) for name, kind in numbers.items()}


def look(held: dict[str, Tensor], loss: float, norms: list[float] | None, rows: int = 3) -> None:
    total = held["total"]
    found = None if norms is None else torch.tensor(norms, device=total.device)
    guard_(torch.tensor(loss, device=total.device, dtype=total.dtype), found, rows, **held)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("loss, norms", [
    (math.nan, [1.0]), (math.inf, None), (-math.inf, [1.0]), (1.0, [1.0, math.inf]), (1.0, [math.nan, 1.0, 2.0]),
    (1.0, [1.0] * BLOCK + [math.inf]), (1.0, [1e19, 1e19, 1e19, 1e19]), (math.nan, None),
])  # fmt: skip
def test_the_first_bad_step_is_the_one_that_is_named(
    loss: float, norms: list[float] | None, device: torch.device
) -> None:
    held = state(device)
    for fine in ([0.5, 3.0], None, [1e18], [0.0] * (BLOCK + 1)):
        look(held, 2.0, fine)
    assert held["next_seed"].item() == 9 and held["seed"].item() == -1 and held["total"].item() == 24
    assert [held[name].item() for name in ("loss_at", "found", "poison")] == [0, 0, 0]
    for later in (False, True):
        look(held, 7.0 if later else loss, [1.0] if later else norms)
        assert held["seed"].item() == 9 and held["found"].item() == 1 and held["poison"].isnan()
        torch.testing.assert_close(held["loss_at"].cpu(), torch.tensor(loss), equal_nan=True)
    look(held, math.nan, [math.nan])  # a second fault is not the first
    assert held["seed"].item() == 9 and held["next_seed"].item() == 12


@pytest.mark.usefixtures("path")
def test_a_batch_without_rows_adds_nothing(device: torch.device) -> None:
    held = state(device)
    look(held, 0.1, [1.0], rows=7)
    before = held["total"].clone()
    assert torch.equal(before, torch.tensor(0.1, device=device) * 7)
    look(held, 0.3, [1.0], rows=0)
    assert torch.equal(held["total"], before)


def test_float64_stays_float64(device: torch.device) -> None:
    held = state(device, torch.float64)
    look(held, 0.1, [1.0], rows=3)
    assert held["total"].item() == 0.1 * 3 and held["total"].dtype is torch.float64


def test_the_operator_keeps_to_its_schema(device: torch.device) -> None:
    held, loss = state(device), torch.tensor(1.0, device=device)
    for norms in (None, torch.ones(3, device=device)):
        torch.library.opcheck(torch.ops.retemper.guard_.default, (loss, norms, 3, *(held[name] for name in NAMES)))
