"""The races of the kernels that work on images: the L-inf step, the random start, the augmentation, the epilogue."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine.bench.plan import CHECKED, EAGER, OURS, TOLERANCE, Request, bytes_of, compiled, race
from retemper.engine.bench.timing import Contestant, Race, equal_to, near_to
from retemper.engine.device import DTYPES
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
EPILOGUES = {  # what is done -> how many tensors are read and written
    "shift relu": 2,
    "shift residual relu": 3,
    "scale shift residual relu": 3,
    "shift residual relu, forward and backward": 6,
}


def images(request: Request, precision: str, batch: int) -> Tensor:
    """Random ones, channels-last."""
    image = torch.rand(batch, 3, 32, 32, device=request.device).to(DTYPES[precision])
    return image.to(memory_format=torch.channels_last)


def eager_pgd_step(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
    moved = adv + STEP * grad.sign()
    return torch.min(torch.max(moved, clean - EPS), clean + EPS).clamp(0, 1)


def pgd_race(title: str, request: Request, precision: str, batch: int) -> Race:
    clean = images(request, precision, batch)
    adv, grad = (clean + 0.02 * torch.randn_like(clean)).clamp_(0, 1), torch.randn_like(clean)
    few = slice(0, CHECKED)
    expected = pgd_step_reference(adv[few].cpu(), grad[few].cpu(), clean[few].cpu(), STEP, EPS)
    check = near_to(expected, TOLERANCE[precision], lambda result: result[few])
    own = adv.clone()
    contestants = [
        Contestant(
            name=OURS,
            run=lambda: pgd_step_(own, grad, clean, STEP, EPS),
            exactness="bitwise",
            check=equal_to(expected, lambda result: result[few]),
            prepare=lambda: own.copy_(adv),
        ),
        Contestant(name=EAGER, run=lambda: eager_pgd_step(adv, grad, clean), check=check),
        compiled(request, eager_pgd_step, lambda f: f(adv, grad, clean), check),
    ]
    return race(title, precision, contestants, 4 * bytes_of(clean))


def eager_start(clean: Tensor) -> Tensor:
    return (clean + torch.empty_like(clean).uniform_(-EPS, EPS)).clamp_(0, 1)


def start_race(title: str, request: Request, precision: str, batch: int) -> Race:
    """The draws differ, so that the check is of what any of them must hold: range, ball, and mean size."""
    clean = images(request, precision, batch).mul_(0.8).add_(0.1)
    adv, seed = torch.empty_like(clean), torch.zeros(1, dtype=torch.int64, device=request.device)

    def check(result: Tensor) -> str | None:
        noise = (result[:CHECKED].double() - clean[:CHECKED].double()).abs()
        if (
            float(noise.max()) > EPS + 2**-8 * (precision != "fp32") + 1e-6
            or float(result.min()) < 0
            or float(result.max()) > 1
        ):
            return "it leaves the ball or the range of pixels"
        mean = float(noise.mean()) / (EPS / 2)
        return None if abs(mean - 1) < 0.1 else f"the mean size of its noise is {mean:.2f} of a uniform one's"

    ours = "different algorithm"  # a counter-based generator, the same draws on every device
    contestants = [
        Contestant(
            name=OURS,
            run=lambda: random_start_(adv, clean, EPS, noise="uniform", seed=seed),
            exactness=ours,
            check=check,
        ),
        Contestant(name=EAGER, run=lambda: eager_start(clean), check=check),
        compiled(request, eager_start, lambda f: f(clean), check),
    ]
    return race(title, precision, contestants, 2 * bytes_of(clean))


def eager_augment(image: Tensor, view: Tensor, dtype: torch.dtype) -> Tensor:
    """Pad, then one gather by index: how a data set on the device is usually cropped and flipped."""
    padded = F.pad(image, (0, 0, 4, 4, 4, 4))
    place = torch.arange(image.shape[1], device=image.device)
    x = torch.where((view % 2 == 1)[:, None], place.flip(0), place) + (view // 2 % 9)[:, None]
    y = place + (view // 18)[:, None]
    sample = torch.arange(len(image), device=image.device)[:, None, None]
    return (padded[sample, y[:, :, None], x[:, None, :]].float() / 255).to(dtype).permute(0, 3, 1, 2)


def augment_race(title: str, request: Request, precision: str, batch: int) -> Race:
    device, dtype = request.device, DTYPES[precision]
    image = torch.randint(256, (batch, 32, 32, 3), dtype=torch.uint8, device=device)
    view = torch.randint(num_views(4), (batch,), device=device)
    few = slice(0, CHECKED)
    expected = augment_reference(image[few].cpu(), view[few].cpu(), dtype=dtype)
    check = near_to(expected, TOLERANCE[precision], lambda result: result[few])
    contestants = [
        Contestant(
            name=OURS,
            run=lambda: augment(image, view, dtype=dtype),
            exactness="bitwise",
            check=equal_to(expected, lambda result: result[few]),
        ),
        Contestant(name=EAGER, run=lambda: eager_augment(image, view, dtype), check=check),
        compiled(request, eager_augment, lambda f: f(image, view, dtype), check),
    ]
    return race(title, precision, contestants, image.numel() * (1 + dtype.itemsize) + 8 * batch)


def eager_epilogue(x: Tensor, shift: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    y = (x if scale is None else x * scale[:, None, None]) + shift[:, None, None]
    return F.relu(y if residual is None else y + residual)


def epilogue_race(title: str, request: Request, precision: str, batch: int, form: str) -> Race:
    """One of EPILOGUES. With its gradient, a call gives that of x."""

    def fresh() -> Tensor:
        x = torch.randn(batch, 64, 32, 32, device=request.device, dtype=DTYPES[precision])
        return x.to(memory_format=torch.channels_last)

    backward = form.endswith("backward")
    x, grad = fresh().requires_grad_(backward), fresh()
    residual = fresh() if "residual" in form else None
    shift = torch.randn(64, device=request.device)
    scale = torch.rand(64, device=request.device) + 0.5 if "scale" in form else None
    own_shift, own_scale = shift.to(x.dtype), None if scale is None else scale.to(x.dtype)  # or they widen the result

    def whole(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return (lambda: torch.autograd.grad(forward(), x, grad)[0]) if backward else forward

    few = slice(0, 16)
    wide = [None if part is None else part.detach().double() for part in (scale, residual)]
    wide[1] = None if wide[1] is None else wide[1][few]
    expected = eager_epilogue(x.detach()[few].double(), shift.double(), wide[0], wide[1])
    expected = grad[few].double() * (expected > 0) if backward else expected
    check = near_to(expected, TOLERANCE[precision], lambda result: result[few])
    contestants = [
        Contestant(
            name=OURS,
            run=whole(lambda: epilogue(x, shift, scale=scale, residual=residual)),
            exactness="rounding",
            check=check,
        ),
        Contestant(name=EAGER, run=whole(lambda: eager_epilogue(x, own_shift, own_scale, residual)), check=check),
        compiled(request, eager_epilogue, lambda f: whole(lambda: f(x, own_shift, own_scale, residual))(), check),
    ]
    return race(title, precision, contestants, EPILOGUES[form] * bytes_of(x))


IMAGE_RACES: dict[str, Callable[..., Race]] = {
    "pgd_step_": pgd_race,
    "random_start_": start_race,
    "augment": augment_race,
}
