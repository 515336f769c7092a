"""Folded batch norms of many layers at once: against float64, to the bit on a CPU, and where a table is made."""

import pytest
import torch
from torch import Tensor

from retemper.kernels.fold_weights import fold_norms_, scale_rows_

CHANNELS = [3, 128, 129, 300, 129]  # fewer than a program takes, whole blocks, ragged ones
SHORTCUTS = [-1, -1, 4, -1, -1]
WEIGHTS = [(3, 5, 3, 3), (16, 1, 3, 3), (40, 70, 3, 3), (9, 600, 1, 1), (8, 512, 1, 1), (10, 4)]
# two or three roundings of a value of about 1 before the one to the dtype; shifts add two of them
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def norms(device: torch.device, dtype: torch.dtype) -> list[list[Tensor]]:
    """gamma, beta, mean and var of each norm."""
    gen = torch.Generator().manual_seed(0)
    made = [[torch.rand(c, generator=gen, dtype=torch.float64) + 0.1 for c in CHANNELS] for _ in range(4)]
    return [[one.to(device, dtype) for one in of_each] for of_each in made]


def fold(given: list[list[Tensor]], scale: Tensor, shift: Tensor) -> None:
    eps = torch.full_like(given[0][0], 1e-5)[:1].expand(sum(CHANNELS)).contiguous()
    gamma, beta, mean, var = given
    fold_norms_(gamma, beta, mean, var, eps, scale, shift, SHORTCUTS)


@pytest.mark.parametrize("path", ["triton", "reference"], indirect=True)
@pytest.mark.parametrize("to", TOLERANCE, ids=str)
def test_norms_are_the_formula(path: str, to: torch.dtype, device: torch.device) -> None:
    source = torch.float64 if to is torch.float64 else torch.float32
    given = norms(device, source)
    scale, shift = (
        torch.empty(sum(CHANNELS), device=device, dtype=source),
        torch.empty(sum(CHANNELS), device=device, dtype=to),
    )
    fold(given, scale, shift)
    scales, shifts = [], []
    for gamma, beta, mean, var in zip(*[[t.double() for t in one] for one in given], strict=True):
        scales.append(gamma / (var + 1e-5).sqrt())
        shifts.append(beta - scales[-1] * mean)
    shifts[2] = shifts[2] + shifts[4]
    torch.testing.assert_close(scale.double(), torch.cat(scales), rtol=max(1e-14, TOLERANCE[source] / 4), atol=0)
    torch.testing.assert_close(shift.double(), torch.cat(shifts), rtol=0, atol=2 * TOLERANCE[to])


def weights(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    gen = torch.Generator().manual_seed(1)
    made = [torch.rand(shape, generator=gen, dtype=torch.float64).to(device, dtype) for shape in WEIGHTS]
    made = [
        one.to(memory_format=torch.channels_last) if i % 2 and one.dim() == 4 else one for i, one in enumerate(made)
    ]
    return made, [torch.rand(len(one), generator=gen, dtype=torch.float64).to(device, dtype) for one in made]


@pytest.mark.parametrize("path", ["triton", "reference"], indirect=True)
@pytest.mark.parametrize("to", TOLERANCE, ids=str)
def test_every_row_is_scaled(path: str, to: torch.dtype, device: torch.device) -> None:
    source, scale = weights(device, torch.float64 if to is torch.float64 else torch.float32)
    folded = [torch.empty_like(one, dtype=to) for one in source]
    scale_rows_(source, scale, folded)
    for own, weight, by in zip(folded, source, scale, strict=True):
        expected = weight.double() * by.double().view(-1, *[1] * (weight.dim() - 1))
        torch.testing.assert_close(own.double(), expected, rtol=TOLERANCE[to], atol=1e-7 if to is torch.float16 else 0)
        assert own.stride() == weight.stride()


@pytest.mark.usefixtures("reference_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cpu_gets_the_bits_of_a_chain_layer_by_layer(dtype: torch.dtype) -> None:
    given = norms(torch.device("cpu"), dtype)
    scale, shift = torch.empty(2, sum(CHANNELS), dtype=dtype)
    fold(given, scale, shift)
    scales, shifts = [], []
    for gamma, beta, mean, var in zip(*given, strict=True):
        scales.append(gamma * torch.rsqrt(var + torch.tensor(1e-5, dtype=dtype)))
        shifts.append(beta - scales[-1] * mean)
    shifts[2] = shifts[2] + shifts[4]
    assert torch.equal(scale, torch.cat(scales)) and torch.equal(shift, torch.cat(shifts))


def test_what_lies_in_another_order_takes_plain_pytorch(device: torch.device) -> None:
    weight, scale = torch.rand(4, 3, 3, 3, device=device), torch.rand(4, device=device)
    odd = [weight, weight.transpose(0, 1), weight.expand(4, 3, 3, 3)[:, :, ::2]]
    folded = [
        torch.empty_like(weight).to(memory_format=torch.channels_last),
        *(torch.empty(w.shape, device=device) for w in odd[1:]),
    ]
    scales = [scale[: len(one)] for one in odd]
    scale_rows_(odd, scales, folded)
    for own, source, by in zip(folded, odd, scales, strict=True):
        assert torch.equal(own, source * by[:, None, None, None])


def test_the_operators_keep_to_their_schemas(device: torch.device) -> None:
    given = norms(device, torch.float32)
    eps, scale, shift = torch.full((3, sum(CHANNELS)), 1e-5, device=device)
    torch.library.opcheck(torch.ops.retemper.fold_norms_.default, (*given, eps, SHORTCUTS, scale, shift))
    source, of_row = weights(device, torch.float32)
    folded = [torch.empty_like(one) for one in source]
    torch.library.opcheck(torch.ops.retemper.scale_rows_.default, (source, of_row, folded))


def test_a_half_network_of_two_dtypes_takes_plain_pytorch(device: torch.device) -> None:
    source = [torch.rand(4, 3, device=device), torch.rand(4, 3, device=device).half()]
    scale = [torch.rand(4, device=device), torch.rand(4, device=device)]
    folded = [torch.empty_like(one) for one in source]
    scale_rows_(source, scale, folded)
    for own, weight, by in zip(folded, source, scale, strict=True):
        torch.testing.assert_close(own, (weight * by[:, None]).to(own.dtype))
