"""The kernels of batch norm: what they are cut into, digits that they keep, and the same bits in every run."""

import pytest
import torch
from torch import Tensor

from retemper.kernels import batch_norm, batch_norm_kernels


def images(shape: tuple[int, ...], device: torch.device) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.to(device).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(mean: float, device: torch.device) -> None:
    x = images((4, 8, 40, 40), device) + mean
    with torch.no_grad():
        x[:, 3] = mean  # a channel that does not vary
        x[0, 4, 0, 0] = 0.0  # one whose first value is far from all others
        running = [torch.zeros(8, device=device), torch.zeros(8, device=device), torch.tensor(0, device=device)]
        batch_norm(x, torch.ones(8, device=device), torch.zeros(8, device=device), running, momentum=1.0)
    wide = x.double()
    true = wide.var((0, 2, 3))
    torch.testing.assert_close(running[0].double(), wide.mean((0, 2, 3)), rtol=2e-7, atol=0)
    assert running[1][3] == 0
    torch.testing.assert_close(running[1].double(), true, rtol=1e-6, atol=0)


def test_a_group_is_cut_into_slices_that_hold_all_its_rows() -> None:
    for shape, groups in [
        ((4, 5, 3, 3), 2),
        ((8, 16, 1, 1), 2),
        ((256, 64, 32, 32), 2),
        ((256, 512, 4, 4), 2),
        ((3, 1280, 4, 4), 1),
    ]:
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        grid, (rows, words, slice), constants = batch_norm_kernels._cut(x, groups)
        assert rows * groups * words * constants["WORD"] == x.numel()
        assert grid[0] * slice >= rows and grid[1] * constants["BLOCK"] >= shape[1] and grid[2] == groups
        assert grid[0] <= batch_norm_kernels.PARTS and grid[0] & (grid[0] - 1) == 0


def test_the_same_images_give_the_same_bits(device: torch.device) -> None:
    x = images((4, 24, 20, 17), device).bfloat16().requires_grad_()
    runs = []
    for _ in range(2):
        running = [torch.zeros(24, device=device), torch.ones(24, device=device), torch.tensor(0, device=device)]
        weight, bias = (torch.full((24,), value, device=device, requires_grad=True) for value in (1.5, 0.5))
        y = batch_norm(x, weight, bias, running, groups=2, relu=True)
        runs.append([y, *running, *torch.autograd.grad(y.square().sum(), [x, weight, bias])])
    assert all(map(torch.equal, *runs))
