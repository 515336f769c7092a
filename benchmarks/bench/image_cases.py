"""The cases of the kernels on images: pgd_step_, random_start_, augment and epilogue."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.bench.case import Case, Contender, equal_to, near_to
from retemper.bench.kernel_cases import CHECKED, OURS, KernelSize, bytes_of
from retemper.kernels import (
    augment,
    augment_reference,
    epilogue,
    num_views,
    pgd_step_,
    pgd_step_reference,
    random_start_,
)

STEP, EPS = 2 / 255, 8 / 255
STEP_L2, EPS_L2 = 15 / 255, 128 / 255
SCALE = 0.01  # of normal noise; bf16 rounds the 0.001 of the papers away
EPILOGUES = {  # what is done -> how many tensors are read and written
    "shift relu": 2,
    "shift residual relu": 3,
    "scale shift residual relu": 3,
    "shift residual relu, forward and backward": 6,
}


def eager_pgd_step(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
    moved = adv + STEP * grad.sign()
    return torch.min(torch.max(moved, clean - EPS), clean + EPS).clamp(0, 1)


def eager_pgd_step_l2(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
    delta = adv + STEP_L2 * grad / (length(grad) + 1e-10) - clean
    return (clean + delta * (EPS_L2 / (length(delta) + 1e-10)).clamp(max=1)).clamp(0, 1)


def length(x: Tensor) -> Tensor:
    """Return the L2 norm of each sample, (B, 1, 1, 1)."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)


def pgd_case(size: KernelSize) -> Case:
    """Return the case of a step of PGD in the ball of the norm that the form names; our kernel works in place."""
    clean = size.images()
    adv, grad = (clean + 0.02 * torch.randn_like(clean)).clamp_(0, 1), torch.randn_like(clean)
    few_adv, few_grad, few_clean = (part[:CHECKED].cpu() for part in (adv, grad, clean))
    own = adv.clone()
    if size.form == "l2":
        chain, step, eps, norm = eager_pgd_step_l2, STEP_L2, EPS_L2, "l2"
        expected = pgd_step_reference(few_adv.double(), few_grad, few_clean, step, eps, norm=norm)
        exactness, check = "rounding", size.near(expected)
    else:
        chain, step, eps, norm = eager_pgd_step, STEP, EPS, "linf"
        expected = pgd_step_reference(few_adv, few_grad, few_clean, step, eps)
        exactness, check = "bitwise", equal_to(expected, lambda result: result[:CHECKED])
    ours = Contender(
        name=OURS,
        call=lambda: pgd_step_(own, grad, clean, step, eps, norm=norm),
        exactness=exactness,
        check=check,
        prepare=lambda: own.copy_(adv),
    )
    return size.case(ours, chain, (adv, grad, clean), size.near(expected), 4 * bytes_of(clean))


def eager_start(clean: Tensor) -> Tensor:
    return (clean + torch.empty_like(clean).uniform_(-EPS, EPS)).clamp_(0, 1)


def gaussians(clean: Tensor) -> Tensor:
    """Return normal numbers in contiguous memory, which a CPU fills 7 times as fast as channels-last memory."""
    return torch.randn(clean.shape, dtype=clean.dtype, device=clean.device)


def eager_start_normal(clean: Tensor) -> Tensor:
    return (clean + SCALE * gaussians(clean)).clamp_(0, 1)


def eager_start_l2(clean: Tensor) -> Tensor:
    noise = gaussians(clean)
    radius = EPS_L2 * torch.rand_like(noise[:, :1, :1, :1]) ** (1 / clean[0].numel())
    return (clean + noise * (radius / length(noise))).clamp_(0, 1)


def start_case(size: KernelSize) -> Case:
    """Return the case of a random start; the form is "uniform", "normal" or "l2", uniform in the ball of L2.

    Draws differ: range, ball and mean size of the noise are checked.
    """
    clean = size.images().mul_(0.8).add_(0.1)
    adv, seed = torch.empty_like(clean), torch.zeros(1, dtype=torch.int64, device=size.device)
    pixels = clean[0].numel()
    chain, eps, mean, options = {
        "uniform": (eager_start, EPS, EPS / 2, {"noise": "uniform"}),
        "normal": (eager_start_normal, 4 * EPS, SCALE * math.sqrt(2 / math.pi), {"noise": "normal", "scale": SCALE}),
        "l2": (eager_start_l2, EPS_L2, EPS_L2 * pixels / (pixels + 1), {"norm": "l2"}),
    }[size.form]
    rounded = 2**-8 if size.precision == "bf16" else 1e-6

    def check(result: Any) -> str | None:
        noise = (result[:CHECKED].double() - clean[:CHECKED].double()).abs()
        if size.form == "l2":
            noise = noise.flatten(1).norm(dim=1)
        most = eps + rounded * (math.sqrt(pixels) if size.form == "l2" else 1)
        if float(noise.max()) > most or float(result.min()) < 0 or float(result.max()) > 1:
            return "it leaves the ball or the range of pixels"
        found = float(noise.mean()) / mean
        near = abs(found - 1) < 0.1 + 4 / math.sqrt(noise.numel())
        return None if near else f"the mean size of its noise is {found:.2f} of what it should be"

    call = partial(random_start_, adv, clean, eps, seed=seed, **options)
    exactness = "different algorithm"  # a counter-based generator, the same draws on every device
    ours = Contender(name=OURS, call=call, exactness=exactness, check=check)
    return size.case(ours, chain, (clean,), check, 2 * bytes_of(clean))


def eager_augment(image: Tensor, view: Tensor, dtype: torch.dtype, mode: str) -> Tensor:
    """Pad, then gather by index, as a data set on the device is usually cropped and flipped."""
    side = image.shape[1]
    place = torch.arange(side, device=image.device)
    x = torch.where((view % 2 == 1)[:, None], place.flip(0), place) + (view // 2 % 9)[:, None]
    y = place + (view // 18)[:, None]
    if mode == "reflect":  # by index, since torch reflects no bytes
        x, y = (side - 1 - (side - 1 - (at - 4).abs()).abs() for at in (x, y))
    else:
        image = F.pad(image, (0, 0, 4, 4, 4, 4))
    sample = torch.arange(len(image), device=image.device)[:, None, None]
    return (image[sample, y[:, :, None], x[:, None, :]].float() / 255).to(dtype).permute(0, 3, 1, 2)


def augment_case(size: KernelSize) -> Case:
    """Return the case of the random crop and flip of bytes, padded by 4, and their conversion to pixels in [0, 1].

    The form is the padding's mode.
    """
    image = torch.randint(256, (size.batch, size.side, size.side, 3), dtype=torch.uint8, device=size.device)
    view = torch.randint(num_views(4), (size.batch,), device=size.device)
    few = image[:CHECKED].cpu(), view[:CHECKED].cpu()
    expected = augment_reference(*few, padding_mode=size.form, dtype=size.dtype)
    ours = Contender(
        name=OURS,
        call=lambda: augment(image, view, padding_mode=size.form, dtype=size.dtype),
        exactness="bitwise",
        check=equal_to(expected, lambda result: result[:CHECKED]),
    )
    must_move = image.numel() * (1 + size.dtype.itemsize) + 8 * size.batch
    return size.case(ours, eager_augment, (image, view, size.dtype, size.form), size.near(expected), must_move)


def eager_epilogue(x: Tensor, shift: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    return F.relu(before_relu(x, shift, scale, residual))


def before_relu(x: Tensor, shift: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    y = (x if scale is None else x * scale[:, None, None]) + shift[:, None, None]
    return y if residual is None else y + residual


def epilogue_case(size: KernelSize) -> Case:
    """Return the case of one of EPILOGUES, after a convolution. With "backward" a call gives the gradient of x.

    The gradient is not compared where rounding decides on which side of 0 a value lies.
    """

    def fresh() -> Tensor:
        x = torch.randn(size.batch, size.channels, size.side, size.side, device=size.device, dtype=size.dtype)
        return x.to(memory_format=torch.channels_last)

    backward = size.form.endswith("backward")
    x, grad = fresh().requires_grad_(backward), fresh()
    residual = fresh() if "residual" in size.form else None
    shift = torch.randn(size.channels, device=size.device)
    scale = torch.rand(size.channels, device=size.device) + 0.5 if "scale" in size.form else None
    own_shift, own_scale = shift.to(x.dtype), None if scale is None else scale.to(x.dtype)  # or they widen the result

    def whole(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return (lambda: torch.autograd.grad(forward(), x, grad)[0]) if backward else forward

    few = slice(0, 16)
    wide_scale = None if scale is None else scale.double()
    wide_residual = None if residual is None else residual[few].double()
    y = before_relu(x.detach()[few].double(), shift.double(), wide_scale, wide_residual)
    sure = (y.abs() > size.tolerance * y.abs().max()) | (not backward)
    expected = sure * (grad[few].double() * (y > 0) if backward else y.relu())
    check = near_to(expected, size.tolerance, lambda result: sure * result[few])
    call = whole(lambda: epilogue(x, shift, scale=scale, residual=residual))
    ours = Contender(name=OURS, call=call, exactness="rounding", check=check)
    given = (x, own_shift, own_scale, residual)
    return size.case(ours, eager_epilogue, given, check, EPILOGUES[size.form] * bytes_of(x), wrap=whole)
