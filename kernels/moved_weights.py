"""Weights of many tensors moved in one launch: averages of a network, and adversarial perturbation.

    follow    average <- average + share (w - average)      (Tarvainen and Valpola, NeurIPS 2017)
              share = 1                                      while the average is not active
                      1 / (count + 1)                        of all so far (Izmailov et al., UAI 2018), and at first
                      rate                                   where one is given,
                      max(rate, 9 / (count + 10))            with a warm-up (Wang et al., ICML 2023)
    perturb   kept <- w;   w <- w + gamma ||w|| g / (||g|| + 1e-12)       (Wu et al., NeurIPS 2020)
              where a gradient g is not finite, its weight stays

The numbers that say how far stay on the device. PyTorch takes such numbers for many tensors from the host, or goes from
tensor to tensor, with two launches each. Bound by memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import tl, triton
from retemper.kernels.operators import operator
from retemper.kernels.runtime import EXACT, launching
from retemper.kernels.tables import Row, Tables, lie_alike

CHUNK = 2048  # values of a program, 16 a thread of 4 warps. Chosen from the code for sm_90, not yet measured on a GPU.
TINY = tl.constexpr(1e-12)


def follow_reference(
    average: Sequence[Tensor],
    weight: Sequence[Tensor],
    active: Tensor,
    count: Tensor,
    rate: float | None,
    warm_up: bool = False,
) -> None:
    """Move the averages in plain PyTorch: the truth for the tests, and the path on a CPU. Args: as for `follow_`."""
    share = 1 / (count + 1)
    if rate is not None:
        least = (9 / (count + 10)).clamp(min=rate) if warm_up else rate
        share = torch.where(count > 0, least, share)
    share = torch.where(active > 0, share, 1.0)
    torch._foreach_lerp_([*average], [*weight], [share] * len(average))  # pyright: ignore[reportPrivateImportUsage]


def perturb_reference(
    weight: Sequence[Tensor],
    gradient: Sequence[Tensor],
    kept: Sequence[Tensor],
    weight_norm: Tensor,
    gradient_norm: Tensor,
    gamma: Tensor,
) -> None:
    """Move the weights in plain PyTorch: the truth for the tests, and the path on a CPU. Args: as for `perturb_`."""
    for w, g, before, size, slope in zip(weight, gradient, kept, weight_norm, gradient_norm, strict=True):
        before.copy_(w)
        w += torch.where(slope.isfinite(), gamma * size / (slope + TINY.value) * g, 0)


@triton.jit
def _at(row_ptr, like_ptr):
    """Return the address in a table as a pointer like another, at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(row_ptr).to(like_ptr.dtype), 16)


@triton.jit
def _follow_piece(average_ptr, weight_ptr, share, inside):
    """Move a program's values; `inside` is None where all exist, which lets an access have 16 bytes."""
    average = tl.load(average_ptr, mask=inside).to(tl.float32)
    weight = tl.load(weight_ptr, mask=inside).to(tl.float32)
    apart = weight - average
    near, far = average + share * apart, weight - apart * (1.0 - share)  # each is exact at its own end
    tl.store(average_ptr, tl.where(share < 0.5, near, far).to(average_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _follow_kernel(
    table_ptr, average_ptr, weight_ptr, active_ptr, count_ptr, rate, WARM_UP: tl.constexpr, CHUNK: tl.constexpr
):
    row_ptr, place = table_ptr + tl.program_id(0) * 4, tl.arange(0, CHUNK)
    count = tl.load(count_ptr)
    share = tl.div_rn(1.0, count + 1.0)
    if rate is not None:
        least = tl.maximum(tl.div_rn(9.0, count + 10.0), rate) if WARM_UP else rate
        share = tl.where(count > 0, least, share)
    share = tl.where(tl.load(active_ptr) > 0, share, 1.0)
    values = tl.load(row_ptr)
    average_ptr, weight_ptr = _at(row_ptr + 1, average_ptr) + place, _at(row_ptr + 2, weight_ptr) + place
    if values == CHUNK:
        _follow_piece(average_ptr, weight_ptr, share, None)
    else:
        _follow_piece(average_ptr, weight_ptr, share, place < values)


@triton.jit
def _perturb_piece(weight_ptr, gradient_ptr, kept_ptr, by, fine, inside):
    """Move and keep a program's values; `inside` is None where all exist."""
    weight = tl.load(weight_ptr, mask=inside)
    tl.store(kept_ptr, weight, mask=inside)
    move = tl.where(fine, by * tl.load(gradient_ptr, mask=inside).to(tl.float32), 0.0)
    tl.store(weight_ptr, (weight.to(tl.float32) + move).to(weight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _perturb_kernel(
    table_ptr,
    weight_ptr,
    gradient_ptr,
    kept_ptr,
    weight_norm_ptr,
    gradient_norm_ptr,
    gamma_ptr,
    CHUNK: tl.constexpr,
):
    row_ptr, place = table_ptr + tl.program_id(0) * 5, tl.arange(0, CHUNK)
    number = tl.load(row_ptr + 4)
    size = tl.load(weight_norm_ptr + number).to(tl.float32)
    slope = tl.load(gradient_norm_ptr + number).to(tl.float32)
    by = tl.div_rn(tl.load(gamma_ptr).to(tl.float32) * size, slope + TINY)
    fine = slope - slope == 0.0  # of infinity and NaN the difference is NaN
    values = tl.load(row_ptr)
    weight_ptr, gradient_ptr = _at(row_ptr + 1, weight_ptr) + place, _at(row_ptr + 2, gradient_ptr) + place
    kept_ptr = _at(row_ptr + 3, kept_ptr) + place
    if values == CHUNK:
        _perturb_piece(weight_ptr, gradient_ptr, kept_ptr, by, fine, None)
    else:
        _perturb_piece(weight_ptr, gradient_ptr, kept_ptr, by, fine, place < values)


def _chunks(*lists: Sequence[Tensor]) -> list[Row] | None:
    """Return for each piece of a tensor how many values are left, the address in each list, and the tensor's number."""
    rows = []
    for number, given in enumerate(zip(*lists, strict=True)):
        if not lie_alike(*given) or any(one.data_ptr() % 16 for one in given):
            return None
        for start in range(0, given[0].numel(), CHUNK):
            places = (one.data_ptr() + start * one.element_size() for one in given)
            rows.append((min(CHUNK, given[0].numel() - start), *places, number))
    return rows


_FOLLOWED, _PERTURBED = Tables(_chunks), Tables(_chunks)


@operator(
    "follow_(Tensor(a!)[] average, Tensor[] weight, Tensor active, Tensor count, float? rate, bool warm_up) -> ()",
    fake=lambda *_: None,
)
def _follow_op(
    average: list[Tensor], weight: list[Tensor], active: Tensor, count: Tensor, rate: float | None, warm_up: bool
) -> None:
    table = _FOLLOWED(average, weight)
    if table is None:
        follow_reference(average, weight, active, count, rate, warm_up)
        return
    options: dict[str, Any] = {"WARM_UP": warm_up, "CHUNK": CHUNK, **EXACT}
    with launching(active):
        _follow_kernel[(len(table),)](table, average[0], weight[0], active, count, rate, **options)


@operator(
    "perturb_(Tensor(a!)[] weight, Tensor[] gradient, Tensor(b!)[] kept, Tensor weight_norm, Tensor gradient_norm,"
    " Tensor gamma) -> ()",
    fake=lambda *_: None,
)
def _perturb_op(
    weight: list[Tensor],
    gradient: list[Tensor],
    kept: list[Tensor],
    weight_norm: Tensor,
    gradient_norm: Tensor,
    gamma: Tensor,
) -> None:
    table = _PERTURBED(weight, gradient, kept)
    if table is None:
        perturb_reference(weight, gradient, kept, weight_norm, gradient_norm, gamma)
        return
    options: dict[str, Any] = {"CHUNK": CHUNK, **EXACT}
    with launching(gamma):
        _perturb_kernel[(len(table),)](
            table, weight[0], gradient[0], kept[0], weight_norm, gradient_norm, gamma, **options
        )


def follow_(
    average: Sequence[Tensor],
    weight: Sequence[Tensor],
    active: Tensor,
    count: Tensor,
    rate: float | None = None,
    warm_up: bool = False,
) -> None:
    """Take weights into their averages, as in the module docstring. Computes in float32, float64 for float64.

    Args:
        average: float tensors of any shapes; overwritten. All keep their places from call to call.
        weight: of the same shapes.
        active, count: 0-dim float32, or float64 with float64 weights.
        rate: of an exponential average, a fraction of 1; none where it is the mean of all.
        warm_up: whether it is larger at first, so that an early weight is forgotten sooner.
    """
    _follow_op([*average], [*weight], active, count, rate, warm_up)


def perturb_(
    weight: Sequence[Tensor],
    gradient: Sequence[Tensor],
    kept: Sequence[Tensor],
    weight_norm: Tensor,
    gradient_norm: Tensor,
    gamma: Tensor,
) -> None:
    """Move weights up their gradients, as in the module docstring. Computes in float32, float64 for float64.

    Args:
        weight: float tensors of any shapes; overwritten. All keep their places from call to call.
        gradient: of the same shapes.
        kept: of the same shapes; the weights before are written there.
        weight_norm, gradient_norm: (N,), of each weight and gradient.
        gamma: 0-dim.
    """
    _perturb_op([*weight], [*gradient], [*kept], weight_norm, gradient_norm, gamma)
