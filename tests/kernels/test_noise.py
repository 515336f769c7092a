"""The noise of random starts: what the draws look like in either norm, and how many there are."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.kernels import noise, random_start_


def started(clean: Tensor, eps: float, **options: Any) -> Tensor:
    return random_start_(torch.empty_like(clean), clean, eps, **options)


def test_a_sample_takes_whole_counters() -> None:
    assert [noise.halves(numbers) for numbers in (1, 16, 17, 3072)] == [1, 1, 2, 192]  # two halves of 8 draws each
    kinds = [("uniform", "linf"), ("normal", "linf"), ("normal", "l2"), ("uniform", "l2")]
    assert [noise.spare(*kind) for kind in kinds] == [0, 0, 0, 2]


@pytest.mark.usefixtures("reference_path")  # which draws the same, and quickly
def test_the_moments_are_those_of_the_distribution(device: torch.device) -> None:
    clean = torch.full((4, 50_000), 0.5, device=device)
    uniform = started(clean, 0.25, seed=1) - clean
    normal = started(clean, 0.5, seed=1, noise="normal", scale=0.0625) - clean
    for draw, deviation, fourth in ((uniform, 0.25 / math.sqrt(3), 1.8), (normal, 0.0625, 3.0)):
        standard = draw.double().flatten() / deviation  # 200,000 draws: bounds of five standard errors
        assert abs(standard.mean()) < 5 / math.sqrt(standard.numel())
        assert abs(standard.square().mean() - 1) < 5 * math.sqrt((fourth - 1) / standard.numel())
        assert abs(standard.pow(4).mean() - fourth) < 0.13
        for values in (standard, standard.square() - 1):  # the two numbers of a pair share a length, but no size
            lagged = (values[1:] * values[:-1]).mean()
            assert abs(lagged) < 5 * values.square().mean() / math.sqrt(standard.numel())


@pytest.mark.usefixtures("reference_path")
def test_normal_noise_is_normal(device: torch.device) -> None:
    clean = torch.zeros(1, 200_000, device=device, dtype=torch.float64)
    draw = started(clean, 1.0, seed=1, noise="normal", scale=0.125, clip=False)[0].div(0.125).sort().values
    share = torch.arange(1, 200_001, device=device) / 200_000
    distance = (torch.special.ndtr(draw) - share).abs().max()
    assert distance < 1.95 / math.sqrt(200_000)  # Kolmogorov and Smirnov, at 1 in 1,000


@pytest.mark.usefixtures("reference_path")
@pytest.mark.parametrize("pixels", [1, 2, 5, 48])
def test_a_start_in_l2_is_uniform_in_the_ball(pixels: int, device: torch.device) -> None:
    clean = torch.zeros(20_000, pixels, device=device, dtype=torch.float64)
    adv = started(clean, 0.75, seed=4, norm="l2", lower=-1, upper=1)
    share = (adv.norm(dim=1) / 0.75).pow(pixels).sort().values  # of the ball's volume: uniform in [0, 1]
    distance = (share - torch.arange(1, 20_001, device=device) / 20_000).abs().max()
    assert distance < 1.95 / math.sqrt(20_000)  # Kolmogorov and Smirnov, at 1 in 1,000
    direction = adv / adv.norm(dim=1, keepdim=True)
    assert direction.mean(0).abs().max() < 5 / math.sqrt(20_000 * pixels)
    second = direction.t() @ direction / 20_000 - torch.eye(pixels, device=device) / pixels
    assert second.abs().max() < 5 / math.sqrt(20_000) / pixels * math.sqrt(2)


@pytest.mark.usefixtures("reference_path")
def test_seeds_are_independent(device: torch.device) -> None:
    clean = torch.full((1, 50_000), 0.5, device=device)
    draws = [started(clean, 0.5, seed=s).sub(0.5).flatten().double() for s in (0, 1, 2**32, -1)]
    correlation = torch.corrcoef(torch.stack(draws))
    assert (correlation - torch.eye(4, device=device)).abs().max() < 5 / math.sqrt(50_000)


def test_the_draws_of_the_papers_fit_the_ball(device: torch.device) -> None:
    clean = torch.full((1, 10_000), 0.5, device=device)
    near, far = (started(clean, eps, seed=3, noise="normal") for eps in (0.007, 8 / 255))
    assert torch.equal(near, far)
