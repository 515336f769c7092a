"""Projected gradient descent on a model's input (Madry et al., ICLR 2018), for any objective.

    x_0 = clean + noise;   x_{t+1} = clip(project(x_t + step * sign(grad objective(model(x_t)))))

Only input gradients are computed. The mode of every module is put back as it was.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from retemper.engine.losses import Claim, Objective, require_claims
from retemper.kernels import pgd_step_, random_start_
from retemper.kernels.pgd_step import NORMS
from retemper.kernels.runtime import FLOATS, is_dense_batch_first, per_sample, require_pixel_units


class Watcher:
    """An onlooker at an attack, which may choose images from inside it."""

    def __call__(self, adv_BCHW: Tensor, logits_BK: Tensor) -> None:
        """See an iterate before its step, (B, C, H, W), and the logits there; the iterate is then overwritten."""
        raise NotImplementedError

    def images(self, adv_BCHW: Tensor) -> dict[str, Tensor]:
        """Return images for the student's training forwards by name, each like the last iterate `adv_BCHW`.

        They are added to "clean" and "adv", or take their place. None by default.
        """
        return {}


@contextmanager
def module_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Put every module of `model` in "eval" or "train" mode inside the block, and each back afterwards; or "keep"."""
    before = [(module, module.training) for module in model.modules()]
    if mode != "keep":
        model.train(mode == "train")
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def pgd(
    model: Callable[[Tensor], Any],
    clean: Tensor,
    *,
    objective: Objective,
    steps: int,
    step: float | Tensor,
    eps: float | Tensor,
    start: str | Tensor = "uniform",
    bn_mode: str = "eval",
    seed: int | Tensor | None = None,
    clip_start: bool = True,
    rows: tuple[int, int] = (0, 1),
    norm: str = "linf",
    lower: float = 0.0,
    upper: float = 1.0,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Return images inside the ball of radius `eps` around `clean` that raise `objective(model(x))`.

    What is given is checked. Values are read once, after the first forward, and not while a graph is captured.

    Args:
        model: images to logits: a network or any other callable. Its parameters and the modes of its modules are left
            as they were.
        clean: (B, C, H, W), or of other dimensions behind B; fp64, fp32, fp16 or bf16; pixels in [lower, upper].
        objective: what the model returns, (B, K) logits, to a scalar. Sum it over the batch: a mean can underflow in
            half precision. One that has a method `gradient`, from logits to their gradient, is not differentiated
            (`KlObjective`).
        steps: how many steps are taken.
        step, eps: in the units of a pixel (8/255, not 8); a float, or (B,) for a radius of each image.
        start: "uniform" in the ball, "normal" (0.001 times a Gaussian, as TRADES), "none" (the clean image), or
            a tensor like `clean` to start from.
        bn_mode: "eval" (running statistics, left alone), "train" (batch statistics; the running ones move), or "keep"
            for the modes as they are.
        seed: the seed of the random start: an int, a one-element int64 tensor on the device, or None to draw one from
            torch's generator.
        clip_start: whether the random start is clipped to [lower, upper].
        rows: which rows of a larger batch these are, as `random_start_` takes them.
        norm: "linf" or "l2".
        lower, upper: the range of a pixel.
        watch: is called with each iterate before its step, and the logits there. The iterate is then overwritten.
    Returns:
        The last iterate, like `clean`, without gradient.
    Raises:
        TypeError: the images or the objective's value are no tensor, or the steps no whole number.
        ValueError: a dtype, shape or device does not fit; pixels lie outside [lower, upper]; a length is not in the
            units of a pixel; labels, temperatures or logits are none that the objective can take; the objective is no
            scalar; a start, mode or norm is unknown; no gradient reaches the input.
    """
    clean = _checked_images(clean)
    _check_settings(clean, steps, step, eps, norm, bn_mode, lower, upper)
    if not isinstance(model, nn.Module):
        model, bn_mode = _in_mode(model, bn_mode), "keep"
    claims = [] if _is_recorded() else _claims(clean, start, {"step": step, "eps": eps}, norm, lower, upper)
    options: dict[str, Any] = dict(step=step, eps=eps, start=start, bn_mode=bn_mode, seed=seed, clip_start=clip_start)
    options |= dict(rows=rows, norm=norm, lower=lower, upper=upper, watch=watch, look=_reader(claims, objective))
    leave = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with leave, _telling_of_changed_images():
        adv = ascend(model, clean, objective=objective, steps=steps if clean.numel() else 0, **options)
    require_claims(claims)  # of no step, which asks the model for nothing
    return adv


@contextmanager
def _telling_of_changed_images() -> Iterator[None]:
    """Raise ValueError, with what to do, where a model changes the images that it is given."""
    try:
        yield
    except RuntimeError as error:
        if "leaf Variable that requires grad is being used in an in-place operation" not in str(error):
            raise
        raise ValueError("the model changes its images in place: begin it with image = image.clone()") from error


def _reader(claims: list[Any], objective: Objective) -> Callable[[Any], None]:
    """Return what reads, once, the claims on the images and on the first logits."""

    def look(logits: Any) -> None:
        if claims:
            own = getattr(objective, "claims", None)
            require_claims([*claims, *([] if own is None else own(logits)), *_finite("the model's logits", logits)])
            claims.clear()

    return look


def ascend(
    model: Callable[[Tensor], Any],
    clean: Tensor,
    *,
    objective: Objective,
    steps: int,
    step: float | Tensor,
    eps: float | Tensor,
    start: str | Tensor = "uniform",
    bn_mode: str = "eval",
    seed: int | Tensor | None = None,
    clip_start: bool = True,
    rows: tuple[int, int] = (0, 1),
    norm: str = "linf",
    lower: float = 0.0,
    upper: float = 1.0,
    watch: Callable[[Tensor, Tensor], None] | None = None,
    look: Callable[[Any], None] | None = None,
) -> Tensor:
    """Return what `pgd` returns, of arguments that are known to fit; no value is read on the host.

    Args: as for `pgd`, and
        look: is called with what the model returns, before the objective is.
    """
    clean = clean.detach()
    adv = _start(clean, start, eps, seed, clip_start, rows, norm, lower, upper)
    moded = module_mode(model, bn_mode) if isinstance(model, nn.Module) else nullcontext()
    with moded, torch.enable_grad():
        for _ in range(steps):
            adv.requires_grad_(True)
            logits = model(adv)
            if look is not None:
                look(logits)
            if watch is not None:
                watch(adv.detach(), logits.detach())
            grad = _input_gradient(logits, adv, objective)
            if grad.stride() != adv.stride():  # some convolutions answer in the other memory format
                grad = torch.empty_like(adv).copy_(grad)
            adv = pgd_step_(adv.detach(), grad, clean, step, eps, norm=norm, lower=lower, upper=upper)
    return adv


def _input_gradient(logits: Any, adv: Tensor, objective: Objective) -> Tensor:
    """Return the gradient of the objective with respect to `adv`; no parameter's gradient is computed."""
    gradient = getattr(objective, "gradient", None)
    raised = logits if gradient else objective(logits)
    if not isinstance(raised, Tensor):
        whose = "the model" if gradient else "objective"
        raise TypeError(f"{whose}: it returns a {type(raised).__name__}; needs a tensor")
    if not gradient and raised.numel() != 1:
        raise ValueError(f"objective: it returns shape {tuple(raised.shape)}; needs a scalar, so sum it over the batch")
    grad = None
    if raised.requires_grad:
        (grad,) = torch.autograd.grad(raised, adv, gradient(logits) if gradient else None, allow_unused=True)
    if grad is None:
        raise ValueError("objective: no gradient reaches the input; is the model under no_grad or detached?")
    return grad


def _start(
    clean: Tensor,
    start: str | Tensor,
    eps: float | Tensor,
    seed: int | Tensor | None,
    clip: bool,
    rows: tuple[int, int],
    norm: str,
    lower: float,
    upper: float,
) -> Tensor:
    """Return the first iterate, a fresh tensor in the memory format of `clean`."""
    adv = torch.empty_like(clean)
    if isinstance(start, Tensor):
        if start.shape != clean.shape or start.dtype != clean.dtype:
            shapes = (f"{tuple(one.shape)} of {one.dtype}" for one in (start, clean))
            raise ValueError("start has shape {}, clean {}: they must agree".format(*shapes))
        return adv.copy_(start)
    if start == "none":
        return adv.copy_(clean)
    if start not in ("normal", "uniform"):
        raise ValueError(f"start = {start!r}: it must be 'uniform', 'normal', 'none' or a tensor like clean")
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=clean.device)
    if norm == "l2":  # a cube as wide as the range of a pixel holds every image of the ball
        eps_of_cube = eps.clamp(max=upper - lower) if isinstance(eps, Tensor) else min(eps, upper - lower)
    else:
        eps_of_cube = eps
    random_start_(adv, clean, eps_of_cube, noise=start, seed=seed, clip=clip, rows=rows, lower=lower, upper=upper)
    if norm == "l2":  # the noise fills the cube around the ball
        adv = pgd_step_(adv, torch.zeros_like(adv), clean, 0.0, eps, norm=norm, lower=-torch.inf, upper=torch.inf)
    return adv


def predicts(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return (B,) bool: whether each row is largest at its label. A row that is not finite predicts nothing."""
    return (logits_BK.argmax(1) == label_B) & logits_BK.isfinite().all(1)


def _checked_images(clean: Tensor) -> Tensor:
    """Return images side by side in memory, the batch outermost: a copy where they lie otherwise."""
    if not isinstance(clean, Tensor):
        raise TypeError(f"clean: it is a {type(clean).__name__}, and must be a tensor")
    if clean.dim() < 2 or clean.dtype not in FLOATS:
        raise ValueError(f"clean: {clean.dtype} of shape {tuple(clean.shape)}; needs floats (B, C, H, W): image / 255")
    clean = clean.detach()
    return clean if is_dense_batch_first(clean) else clean.contiguous()


def _check_settings(
    clean: Tensor,
    steps: int,
    step: float | Tensor,
    eps: float | Tensor,
    norm: str,
    bn_mode: str,
    lower: float,
    upper: float,
) -> None:
    """Raise TypeError or ValueError where what the host knows of the arguments does not fit."""
    if norm not in NORMS:
        raise ValueError(f"norm = {norm!r}: it must be one of {', '.join(NORMS)}")
    if bn_mode not in ("eval", "train", "keep"):
        raise ValueError(f"bn_mode = {bn_mode!r}: it must be 'eval', 'train' or 'keep'")
    if operator.index(steps) < 0:
        raise ValueError(f"steps = {steps}: it must be at least 0")
    if isinstance(lower, Tensor) or isinstance(upper, Tensor):
        raise TypeError("lower, upper: they are numbers, the same for every pixel")
    batch, pixels = len(clean), clean[:1].numel() if norm == "l2" and clean.numel() else 1
    numbers = {name: per_sample(name, value, batch)[0] for name, value in (("step", step), ("eps", eps))}
    require_pixel_units(lower, upper, pixels, **numbers)


def _is_recorded() -> bool:
    """Say whether no value can be read, because the work is captured or compiled."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _claims(
    clean: Tensor, start: str | Tensor, numbers: Mapping[str, float | Tensor], norm: str, lower: float, upper: float
) -> list[Claim]:
    """Return what must hold of the values of the arguments; `numbers` are the step and the radius by name."""
    if not clean.numel():
        return []
    least, most = clean.aminmax()
    slack = 1e-6 * (upper - lower)  # images that were resized or scaled are rounded
    inside = (least >= lower - slack) & (most <= upper + slack)
    found = [
        (inside, f"clean: pixels outside [{lower}, {upper}], or not finite; scale the images, or give lower, upper")
    ]
    longest = (upper - lower) * (math.sqrt(clean[:1].numel()) if norm == "l2" else 1)
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            wrong = f"{name}: it must lie in 0 .. {longest:g} for each image, as pixels have a range (8/255, not 8)"
            found.append((((value >= 0) & (value <= longest)).all(), wrong))
    return found + (_finite("start", start) if isinstance(start, Tensor) else [])


def _finite(name: str, value: Any) -> list[Claim]:
    """Return the claim that no value is NaN or +inf; -inf is the logit of a class that is ruled out."""
    known = isinstance(value, Tensor) and value.is_floating_point()
    return [((value < torch.inf).all(), f"{name}: not finite")] if known else []


def _in_mode(function: Callable[[Tensor], Any], mode: str) -> Callable[[Tensor], Any]:
    """Return `function`, inside which every module that it calls is in the mode of that name."""
    if mode == "keep":
        return function
    thread, training = get_ident(), mode == "train"

    def answer(image: Tensor) -> Any:
        before: dict[nn.Module, bool] = {}

        def enter(module: nn.Module, _: Any) -> None:
            if get_ident() == thread:
                before.setdefault(module, module.training)
                module.training = training

        hook = register_module_forward_pre_hook(enter)
        try:
            return function(image)
        finally:
            hook.remove()
            for module, was in before.items():
                module.training = was

    return answer
