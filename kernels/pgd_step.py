"""One projected-gradient step inside the eps ball (Madry et al., ICLR 2018), in place.

    L-inf:  adv <- clip(min(max(adv + step sign(grad), clean - eps), clean + eps), lower, upper)
    L2:     moved = adv + step grad / ||grad||;  delta = moved - clean
            adv <- clip(clean + delta min(1, eps / ||delta||), lower, upper)

The L2 norms are those of a sample. Bound by memory: L-inf reads 3 tensors and writes 1 in one launch, where eager
PyTorch takes six launches, reads 9 and writes 6. L2 passes over each sample four times, mostly in the cache.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.language import tl, triton
from retemper.kernels.operators import operator, overwritten
from retemper.kernels.runtime import (
    EXACT,
    FLOATS,
    clamp,
    compute_dtype,
    launching,
    locate,
    per_sample,
    pixel_runs,
    require_one_device,
    require_one_layout,
    require_pixel_units,
    require_vector,
    require_writable,
    runs_triton,
)

NORMS = ("linf", "l2")

# The pixels of a program: 8 for each thread of 4 warps, so two loads of 16 bytes of each fp32 tensor. Chosen from the
# code for sm_90, not yet measured on a GPU. It takes 17 instructions a pixel, where the memory leaves time for 110, and
# 32 registers, so that 64 warps fit. With 512 pixels it takes 20 instructions a pixel, with 2048 it takes 16.
BLOCK = 1024


def pgd_step_reference(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step: float | Tensor,
    eps: float | Tensor,
    *,
    norm: str = "linf",
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """Compute the step in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args: as for `pgd_step_`, but nothing is checked.

    Returns:
        A new tensor of the shape and dtype of `adv`.
    """
    compute = compute_dtype(adv)
    wide_adv, wide_grad, wide_clean = adv.to(compute), grad.to(compute), clean.to(compute)
    step = _column(step, wide_adv) if isinstance(step, Tensor) else step
    eps = _column(eps, wide_adv) if isinstance(eps, Tensor) else eps
    if norm == "linf":
        moved = wide_grad.sign().mul_(step).add_(wide_adv)  # the sign of NaN is 0: such a pixel stays
        bound = wide_clean - eps  # reused below: on a CPU, new memory takes ten times as long as the arithmetic
        torch.maximum(moved, bound, out=moved)
        torch.minimum(moved, torch.add(wide_clean, eps, out=bound), out=moved)
    else:
        moved = wide_adv + step * _direction(wide_grad)
        delta = moved - wide_clean
        length = _length(delta)
        moved = torch.where(length > eps, wide_clean + delta * (eps / length), moved)
    return moved.clamp_(lower, upper).to(adv.dtype)


def _column(value: Tensor, like: Tensor) -> Tensor:
    """Return the (B,) numbers as (B, 1, ...) of the dtype of `like`."""
    return value.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _length(x: Tensor) -> Tensor:
    """Return the L2 norm of each sample, as (B, 1, ...)."""
    return _column(x[..., None].flatten(1).square().sum(1).sqrt(), x)


def _direction(grad: Tensor) -> Tensor:
    """Return grad / ||grad||, entries that are not finite taken as 0; zeros for a sample without a gradient."""
    grad = torch.where(grad.isfinite(), grad, 0)
    peak = grad[..., None].flatten(1).abs().amax(1)
    grad = grad / _column(torch.where(peak > 0, peak, 1), grad)  # float32 cannot hold the square of 1e-30 or 1e30
    length = _length(grad)
    return grad / torch.where(length > 0, length, 1)


@triton.jit
def _linf_kernel(
    adv_ptr, grad_ptr, clean_ptr, step_ptr, eps_ptr, step, eps, lower, upper, pixels, blocks, BLOCK: tl.constexpr
):
    sample, offset, inside = locate(pixels, blocks, BLOCK)
    if step_ptr is not None:
        step = tl.load(step_ptr + sample).to(tl.float32)
    if eps_ptr is not None:
        eps = tl.load(eps_ptr + sample).to(tl.float32)
    adv = tl.load(adv_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    clean = tl.load(clean_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    moved = adv + tl.where(grad > 0, step, tl.where(grad < 0, -step, 0.0))
    moved = clamp(clamp(moved, clean - eps, clean + eps), lower, upper)
    tl.store(adv_ptr + offset, moved.to(adv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finite(grad_ptr, offset, inside):
    """Load the gradient as float32, with 0 for entries that are not finite."""
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    return tl.where(tl.abs(grad) < float("inf"), grad, 0.0)


@triton.jit
def _l2_kernel(
    adv_ptr,
    grad_ptr,
    clean_ptr,
    step_ptr,
    eps_ptr,
    step,
    eps,
    lower,
    upper,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    base = sample * PIXELS
    if step_ptr is not None:
        step = tl.load(step_ptr + sample).to(tl.float32)
    if eps_ptr is not None:
        eps = tl.load(eps_ptr + sample).to(tl.float32)

    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        peak = tl.maximum(peak, tl.abs(_finite(grad_ptr, base + pixel, pixel < PIXELS)))
    unit = tl.max(peak, 0)  # divides the gradient, since float32 cannot hold the square of 1e-30 or 1e30
    unit = tl.where(unit == 0, 1.0, unit)

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        grad = tl.math.div_rn(_finite(grad_ptr, base + pixel, pixel < PIXELS), unit)
        squares += grad * grad
    length = tl.math.sqrt_rn(tl.sum(squares, 0))
    length = tl.where(length == 0, 1.0, length)

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        moved, clean = _moved(adv_ptr, grad_ptr, clean_ptr, base + pixel, pixel < PIXELS, unit, length, step)
        squares += (moved - clean) * (moved - clean)
    distance = tl.math.sqrt_rn(tl.sum(squares, 0))
    shrink = eps / tl.where(distance > eps, distance, 1.0)

    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        moved, clean = _moved(adv_ptr, grad_ptr, clean_ptr, base + pixel, pixel < PIXELS, unit, length, step)
        moved = tl.where(distance > eps, clean + (moved - clean) * shrink, moved)  # inside the ball nothing changes
        moved = clamp(moved, lower, upper)
        tl.store(adv_ptr + base + pixel, moved.to(adv_ptr.dtype.element_ty), mask=pixel < PIXELS)


@triton.jit
def _moved(adv_ptr, grad_ptr, clean_ptr, offset, inside, unit, length, step):
    """Load pixels, and return them moved along the gradient but not projected, and the clean ones."""
    adv = tl.load(adv_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    clean = tl.load(clean_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.math.div_rn(tl.math.div_rn(_finite(grad_ptr, offset, inside), unit), length)
    return adv + step * grad, clean


@operator(
    "pgd_step_(Tensor(a!) adv, Tensor grad, Tensor clean, float step, float eps,"
    " Tensor? step_per_sample, Tensor? eps_per_sample, str norm, float lower, float upper) -> ()",
    fake=lambda *_: None,
)
def _pgd_step_op(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step: float,
    eps: float,
    step_per_sample: Tensor | None,
    eps_per_sample: Tensor | None,
    norm: str,
    lower: float,
    upper: float,
) -> None:
    require_one_layout(adv=adv, grad=grad, clean=clean)
    require_one_device(adv=adv, step=step_per_sample, eps=eps_per_sample)
    batch = adv.shape[0]
    require_vector("step", step_per_sample, batch, *FLOATS)
    require_vector("eps", eps_per_sample, batch, *FLOATS)
    if norm not in NORMS:
        raise ValueError(f"norm: {norm!r}; needs one of {', '.join(NORMS)}")
    if adv.numel() == 0:
        return
    if not runs_triton(adv):
        step_or_steps = step if step_per_sample is None else step_per_sample
        eps_or_epses = eps if eps_per_sample is None else eps_per_sample
        adv.copy_(
            pgd_step_reference(adv, grad, clean, step_or_steps, eps_or_epses, norm=norm, lower=lower, upper=upper)
        )
        return
    by_sample = step_per_sample is not None or eps_per_sample is not None
    pixels, blocks, block, programs = pixel_runs(adv, BLOCK, by_sample or norm == "l2")
    options: dict[str, Any] = {"BLOCK": block, **EXACT}
    arguments = (adv, grad, clean, step_per_sample, eps_per_sample, step, eps, lower, upper)
    with launching(adv):
        if norm == "linf":
            _linf_kernel[(programs,)](*arguments, pixels, blocks, **options)
        else:
            options["PIXELS"] = pixels
            _l2_kernel[(batch,)](*arguments, **options)
    overwritten(adv)


def pgd_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step: float | Tensor,
    eps: float | Tensor,
    *,
    norm: str = "linf",
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """Move `adv` one step along `grad`, in place, and project it to the eps ball around `clean` and to valid pixels.

    A pixel whose gradient is zero or NaN does not move. With L2, neither does one whose gradient is infinite, and a
    sample inside the ball is not rescaled. In float16 and bfloat16 the result is rounded after the projection, so it
    may leave the ball by half an ulp. The formula and its source are in the module docstring.

    Args:
        adv, grad, clean: (B, ...), one float dtype, one dense layout with the batch outermost.
        step, eps: in pixel units (8/255, not 8); a number, or floats (B,) with one number for each sample; eps >= 0. A
            number of either may not be above the width of the range (or 1) with "linf", nor its sqrt(pixels)-fold with
            "l2".
        norm: "linf" or "l2".
        lower, upper: the range of a valid pixel.

    Returns:
        `adv` itself.

    Raises:
        ValueError: the tensors differ in shape, dtype, device or strides; autograd is tracking `adv`; unknown norm; a
            number for step or eps is not one of pixel units; the range of a pixel is empty.
    """
    require_writable("adv", adv)
    batch = adv.shape[0] if adv.dim() else 0
    step_scalar, step_per_sample = per_sample("step", step, batch)
    eps_scalar, eps_per_sample = per_sample("eps", eps, batch)
    pixels = 1 if norm == "linf" or not adv.numel() else adv.numel() // batch
    require_pixel_units(lower, upper, pixels, step=abs(step_scalar), eps=eps_scalar)
    _pgd_step_op(adv, grad, clean, step_scalar, eps_scalar, step_per_sample, eps_per_sample, norm, lower, upper)
    return adv
