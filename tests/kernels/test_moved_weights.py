"""Averages and perturbed weights of many tensors: against float64, and to the bit on a CPU."""

import math

import pytest
import torch
from torch import Tensor

from retemper.kernels.moved_weights import CHUNK, follow_, perturb_

SHAPES = [(3, 5, 3, 3), (7,), (), (2, CHUNK), (CHUNK + 1,), (0, 4), (6, 8, 1, 1)]
# a few roundings of values of about 1, and one to the dtype
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}
each_path = pytest.mark.parametrize("path", ["triton", "reference"], indirect=True)


def tensors(seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    made = [torch.rand(shape, generator=gen, dtype=torch.float64).to(device, dtype) for shape in SHAPES]
    return [made[0].to(memory_format=torch.channels_last), *made[1:]]


def number(value: float, like: Tensor) -> Tensor:
    return torch.tensor(
        value, device=like.device, dtype=torch.float64 if like.dtype is torch.float64 else torch.float32
    )


@each_path
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("active", "count", "rate", "warm_up", "share"),
    [(0.0, 0.0, 0.1, False, 1.0), (0.0, 4.0, None, False, 1.0), (1.0, 0.0, 0.1, False, 1.0),
     (1.0, 2.0, 0.1, False, 0.1), (1.0, 2.0, 0.7, False, 0.7), (1.0, 3.0, None, False, 0.25),
     (1.0, 1.0, None, False, 0.5), (0.0, 0.0, 0.1, True, 1.0), (1.0, 0.0, 0.1, True, 1.0),
     (1.0, 2.0, 0.1, True, 1 - 3 / 12), (1.0, 80.0, 0.1, True, 0.1), (1.0, 81.0, 0.1, True, 0.1)],
)  # fmt: skip
def test_an_average_moves_by_its_share(
    active: float,
    count: float,
    rate: float | None,
    warm_up: bool,
    share: float,
    dtype: torch.dtype,
    path: str,
    device: torch.device,
) -> None:
    average, weight = tensors(0, device, dtype), tensors(1, device, dtype)
    before = [one.double().clone() for one in average]
    follow_(average, weight, number(active, weight[0]), number(count, weight[0]), rate, warm_up)
    for own, was, w in zip(average, before, weight, strict=True):
        torch.testing.assert_close(own.double(), was + share * (w.double() - was), rtol=0, atol=TOLERANCE[dtype])
        assert share < 1 or torch.equal(own, w), "it is the network itself, to the bit"


@pytest.mark.usefixtures("reference_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cpu_gets_the_bits_of_a_tensor_at_a_time(dtype: torch.dtype) -> None:
    device = torch.device("cpu")
    average, weight, gradient = (tensors(seed, device, dtype) for seed in range(3))
    expected = [torch.lerp(a, w, number(0.1, w)) for a, w in zip(average, weight, strict=True)]
    follow_(average, weight, number(1, weight[0]), number(2, weight[0]), 0.1)
    assert all(map(torch.equal, average, expected))
    gamma, kept = number(0.05, weight[0]), [torch.empty_like(w) for w in weight]
    moved = [w + gamma * w.norm() / (g.norm() + 1e-12) * g for w, g in zip(weight, gradient, strict=True)]
    before = [w.clone() for w in weight]
    sizes, slopes = (torch.stack([one.norm() for one in many]) for many in (weight, gradient))
    perturb_(weight, gradient, kept, sizes, slopes, gamma)
    assert all(map(torch.equal, weight, moved)) and all(map(torch.equal, kept, before))


@each_path
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [math.inf, math.nan, None])
def test_a_perturbation_is_the_formula_but_where_a_gradient_overflows(
    bad: float | None, dtype: torch.dtype, path: str, device: torch.device
) -> None:
    weight, gradient = tensors(0, device, dtype), tensors(1, device, dtype)
    kept = [torch.full_like(one, math.nan) for one in weight]
    if bad is not None:
        gradient[3][1, 5] = bad
    before = [one.clone() for one in weight]
    sizes, slopes = (torch.stack([one.norm() for one in many]) for many in (weight, gradient))
    perturb_(weight, gradient, kept, sizes, slopes, number(0.05, weight[0]))
    for i, (own, was, g, room) in enumerate(zip(weight, before, gradient, kept, strict=True)):
        assert torch.equal(room, was)
        move = 0.05 * was.double().norm() / (g.double().norm() + 1e-12) * g.double()
        expected = was.double() if i == 3 and bad is not None else was.double() + move
        torch.testing.assert_close(own.double(), expected, rtol=0, atol=4 * TOLERANCE[dtype])


def test_the_operators_keep_to_their_schemas(device: torch.device) -> None:
    weight, gradient, kept = (tensors(seed, device) for seed in range(3))
    one, norms = torch.ones((), device=device), torch.ones(len(weight), device=device)
    for rate in (0.1, None):
        torch.library.opcheck(torch.ops.retemper.follow_.default, (kept, weight, one, one, rate, rate is not None))
    torch.library.opcheck(torch.ops.retemper.perturb_.default, (weight, gradient, kept, norms, norms, one))
