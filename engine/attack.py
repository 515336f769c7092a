"""Projected gradient descent on a model's input (Madry et al., ICLR 2018), for any objective.

    x_0 = clean + noise;   x_{t+1} = clip(project(x_t + step * sign(grad objective(model(x_t)))))

Only input gradients are computed. The mode of every module is put back as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from retemper.engine.attack_plan import (
    Plan,
    checked_images,
    claims,
    direction,
    finite,
    first_iterate,
    require_fits,
    step_options,
)
from retemper.engine.losses import Claim, Objective, require_claims
from retemper.kernels import pgd_step_
from retemper.kernels.pixels import named_norm


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
    norm: str | float = "linf",
    lower: float | Tensor = 0.0,
    upper: float | Tensor = 1.0,
    mask: Tensor | None = None,
    momentum: float | None = None,
    restarts: int = 1,
    keep: str = "last",
    start_eps: float | Tensor | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Return images inside the ball of radius `eps` around `clean` that raise `objective(model(x))`.

    What is given is checked. Values are read once, after the first forward, and not while a graph is captured.

    Steps are launched one by one, since any model is taken as it is; `CapturedAttack` replays them from a CUDA graph.

    Args:
        model: images to logits: a network or any other callable. Its parameters and the modes of its modules are left
            as they were.
        clean: (B, C, H, W), or of other dimensions behind B; fp64, fp32, fp16 or bf16; pixels in [lower, upper].
        objective: what the model returns, (B, K) logits, to a scalar. Sum it over the batch: a mean can underflow in
            half precision. One that has a method `gradient`, from logits to their gradient, is not differentiated
            (`KlObjective`).
        steps: how many steps are taken.
        step, eps: in the units of a pixel (8/255, not 8): a number, (B,) or (B, 1, ...) for one of each image, or
            (C, 1, ...) for one of each channel. A negative step lowers the objective: with the cross-entropy against
            the labels to be predicted, the attack is targeted.
        start: "uniform" in the ball, "normal" (0.001 times a Gaussian, as TRADES), "none" (the clean image), or
            a tensor like `clean` to start from.
        bn_mode: "eval" (running statistics, left alone), "train" (batch statistics; the running ones move), or "keep"
            for the modes as they are.
        seed: the seed of the random start: an int, a one-element int64 tensor on the device, or None to draw one from
            torch's generator. Each restart adds 1.
        clip_start: whether the random start is clipped to [lower, upper].
        rows: which rows of a larger batch these are, as `random_start_` takes them.
        norm: "linf" or "l2", or as others write them, math.inf or 2.
        lower, upper: the range of a pixel: numbers, or (C,) or (C, 1, ...) for a range of each channel.
        mask: bool, (B,) or what broadcasts to `clean`: where it is False, a pixel stays that of `clean`.
        momentum: the decay of MI-FGSM (Dong et al., CVPR 2018), 1 in the paper: each step follows the sum of the
            gradients so far, each divided by its L1 norm. None for a step along the gradient.
        restarts: how many attacks are made, each from a random start of its own. Of each image, the one with the
            highest objective (the lowest, where the step is negative) is returned.
        keep: "last" for the last iterate of an attack, or "best" for the one, its start included, with the highest
            objective of each image. `restarts` and "best" need an objective with a method `rows`, from logits to the
            values of the images, (B,): this library's have one, and `RowsObjective` makes one of a function. They take
            one forward more for each attack, and values that are NaN are passed over.
        start_eps: the radius that a random start is drawn in, as `eps`; None for `eps` itself. A larger one, with an
            `eps` that holds no iterate back, is N-FGSM (de Jorge et al., NeurIPS 2022): start_eps = 2 eps, one step
            of eps, eps = 1.
        watch: is called with each iterate before its step, and the logits there. The iterate is then overwritten.
    Returns:
        The last iterate, or the one that `keep` and `restarts` choose; like `clean`, without gradient.
    Raises:
        TypeError: the images or the objective's value are no tensor, or the steps no whole number.
        ValueError: a dtype, shape or device does not fit; pixels lie outside [lower, upper]; a length is not in the
            units of a pixel; labels, temperatures or logits are none that the objective can take; the objective is no
            scalar, or has no `rows` where they are needed; a start, mode or norm is unknown; no gradient reaches the
            input.
    """
    begin: dict[str, Any] = dict(start=start, seed=seed, clip_start=clip_start, rows=rows, restarts=restarts)
    begin["start_eps"] = start_eps
    climb: dict[str, Any] = dict(steps=steps, step=step, momentum=momentum, bn_mode=bn_mode, keep=keep)
    ball: dict[str, Any] = dict(eps=eps, norm=named_norm(norm), lower=lower, upper=upper, mask=mask)
    return _checked(model, checked_images(clean), Plan(**begin, **climb, **ball), objective, watch)


def _checked(
    model: Callable[[Tensor], Any],
    clean: Tensor,
    plan: Plan,
    objective: Objective,
    watch: Callable[[Tensor, Tensor], None] | None,
) -> Tensor:
    """Return what `ascend` returns, or raise where the arguments do not fit one another."""
    require_fits(plan, clean)
    if plan.picks and not hasattr(objective, "rows"):
        raise ValueError("objective: restarts and keep = 'best' need one with a method rows; RowsObjective makes one")
    if not clean.numel():
        plan = replace(plan, steps=0, restarts=1, keep="last")  # which asks the model for nothing
    if not isinstance(model, nn.Module):
        model, plan = _in_mode(model, plan.bn_mode), replace(plan, bn_mode="keep")
    wanted = [] if is_recorded() else claims(plan, clean)
    leave = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with leave, _telling_of_changed_images():
        adv = ascend(model, clean, plan, objective=objective, watch=watch, look=_reader(wanted, objective))
    require_claims(wanted)  # of no step
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


def _reader(wanted: list[Claim], objective: Objective) -> Callable[[Any], None]:
    """Return what reads, once, the claims on the images and on the first logits."""

    def look(logits: Any) -> None:
        if wanted:
            own = getattr(objective, "claims", None)
            require_claims([*wanted, *([] if own is None else own(logits)), *finite("the model's logits", logits)])
            wanted.clear()

    return look


def ascend(
    model: Callable[[Tensor], Any],
    clean: Tensor,
    plan: Plan,
    *,
    objective: Objective,
    watch: Callable[[Tensor, Tensor], None] | None = None,
    look: Callable[[Any], None] | None = None,
) -> Tensor:
    """Return what `pgd` returns, of arguments that are known to fit; no value is read on the host.

    Args: as for `pgd`, and
        look: is called with what the model returns, before the objective is.
    """
    clean = clean.detach()
    best = Best(objective, direction(clean, plan)) if plan.picks else None

    def see(adv: Tensor, logits: Any) -> None:
        if look is not None:
            look(logits)
        if watch is not None:
            watch(adv.detach(), logits.detach())
        if best is not None and plan.keep == "best":
            best.see(adv, logits)

    moded = module_mode(model, plan.bn_mode) if isinstance(model, nn.Module) else nullcontext()
    with moded, torch.enable_grad():
        if best is None:
            return _climb(model, clean, plan, objective, see)
        for restart in range(plan.restarts):
            adv = _climb(model, clean, plan, objective, see, restart)
            with torch.no_grad():
                logits = model(adv)
            if look is not None:
                look(logits)
            best.see(adv, logits)
    return best.adv


def _climb(
    model: Callable[[Tensor], Any],
    clean: Tensor,
    plan: Plan,
    objective: Objective,
    see: Callable[[Tensor, Any], None],
    restart: int = 0,
) -> Tensor:
    """Return the last iterate of one attack. `see` is called with each before, and what the model returns there."""
    adv, options = first_iterate(clean, plan, restart), step_options(clean, plan)
    for _ in range(plan.steps):
        grad = _gradient_at(model, adv, objective, see)
        adv = pgd_step_(adv.detach(), grad, clean, plan.step, plan.eps, **options)
    return adv


def _gradient_at(
    model: Callable[[Tensor], Any], adv: Tensor, objective: Objective, see: Callable[[Tensor, Any], None]
) -> Tensor:
    """Return the gradient of the objective at `adv`, in the precision in which the model sees images."""
    as_seen = getattr(model, "as_seen", None)  # the step reads a gradient of half precision as it is
    shown = adv.requires_grad_(True) if as_seen is None else as_seen(adv.detach()).requires_grad_(True)
    logits = model(shown)
    see(adv, logits)
    return _input_gradient(logits, shown, objective)


def gradient_at(
    model: nn.Module, adv: Tensor, objective: Objective, bn_mode: str, watch: Callable[[Tensor, Tensor], None] | None
) -> Tensor:
    """Return the gradient of `objective(model(adv))` with respect to `adv`, a fresh tensor; arguments as for `pgd`."""

    def see(adv: Tensor, logits: Any) -> None:
        if watch is not None:
            watch(adv.detach(), logits.detach())

    with module_mode(model, bn_mode), torch.enable_grad():
        return _gradient_at(model, adv.detach(), objective, see)


class Best:
    """The iterate of each image with the highest objective so far, or the lowest.

    Args:
        objective: one with a method `rows`.
        sign: 1 for the highest, -1 for the lowest; a number, or (B,).
    Attributes:
        adv: the iterates, (B, C, H, W).
    """

    def __init__(self, objective: Any, sign: float | Tensor) -> None:
        self._objective, self._sign = objective, sign
        self._value_B: Tensor | None = None

    @torch.no_grad()
    def see(self, adv: Tensor, logits: Any) -> None:
        """Take the images that are better than those before; `adv` may be overwritten then. NaN is worse than all.

        Raises:
            ValueError: the objective's rows are not one value for each image.
        """
        value_B = self._sign * self._objective.rows(logits)
        if value_B.shape != (len(adv),):
            raise ValueError(f"objective: its rows have shape {tuple(value_B.shape)}; needs ({len(adv)},)")
        value_B = value_B.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        if self._value_B is None:
            self.adv, self._value_B = adv.clone(), value_B
            return
        better_B = value_B > self._value_B
        self._value_B = torch.where(better_B, value_B, self._value_B)
        self.adv = torch.where(better_B.view(-1, *[1] * (adv.dim() - 1)), adv, self.adv)


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


def predicts(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return (B,) bool: whether each row is largest at its label. A row that is not finite predicts nothing."""
    return (logits_BK.argmax(1) == label_B) & logits_BK.isfinite().all(1)


def is_recorded() -> bool:
    """Say whether no value can be read, because the work is captured or compiled."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


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
