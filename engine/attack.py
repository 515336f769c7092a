"""Projected gradient descent on a model's input (Madry et al., ICLR 2018), for any objective.

    x_0 = clean + noise;   x_{t+1} = clip(project(x_t + step * sign(grad objective(model(x_t)))))

Only input gradients are computed. The mode of every module is put back as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from retemper.engine.losses import Objective
from retemper.kernels import pgd_step_, random_start_


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
    """Put every module of `model` in "eval" or "train" mode inside the block, and each back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(mode == "train")
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def pgd(
    model: nn.Module,
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
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Return images inside the ball of radius `eps` around `clean` that raise `objective(model(x))`.

    Args:
        model: images to logits. Its parameters and the modes of its modules are left as they were.
        clean: (B, C, H, W); fp32, fp16 or bf16; contiguous or channels-last; pixels in [0, 1].
        objective: (B, K) logits to a scalar. Sum it over the batch: a mean can underflow in half precision. One that
            has a method `gradient`, from logits to their gradient, is not differentiated (`KlObjective`).
        steps: how many steps are taken.
        step, eps: in pixel units (8/255, not 8); a float, or (B,) for a radius of each image.
        start: "uniform" in the ball, "normal" (0.001 times a Gaussian, as TRADES), "none" (the clean image), or
            a tensor like `clean` to start from.
        bn_mode: "eval" (running statistics, left alone) or "train" (batch statistics; the running ones move).
        seed: the seed of the random start: an int, a one-element int64 tensor on the device, or None to draw one from
            torch's generator.
        clip_start: whether the random start is clipped to [0, 1].
        rows: which rows of a larger batch these are, as `random_start_` takes them.
        watch: is called with each iterate before its step, and the logits there. The iterate is then overwritten.
        norm: "linf" or "l2".
    Returns:
        The last iterate, like `clean`, without gradient.
    Raises:
        ValueError: an unknown start, mode or norm; a start unlike `clean`; no gradient reaches the input.
    """
    if bn_mode not in ("eval", "train"):
        raise ValueError(f"bn_mode = {bn_mode!r}: it must be 'eval' or 'train'")
    clean = clean.detach()
    adv = _start(clean, start, eps, seed, clip_start, rows)
    with module_mode(model, bn_mode), torch.enable_grad():
        for _ in range(steps):
            adv.requires_grad_(True)
            logits = model(adv)
            if watch is not None:
                watch(adv.detach(), logits.detach())
            (grad,) = _input_gradient(logits, adv, objective)
            if grad.stride() != adv.stride():  # some convolutions answer in the other memory format
                grad = torch.empty_like(adv).copy_(grad)
            adv = pgd_step_(adv.detach(), grad, clean, step, eps, norm=norm)
    return adv


def _input_gradient(logits: Tensor, adv: Tensor, objective: Objective) -> tuple[Tensor, ...]:
    """Return the gradient of the objective with respect to `adv`; no parameter's gradient is computed."""
    gradient = getattr(objective, "gradient", None)
    raised = logits if gradient else objective(logits)
    if not raised.requires_grad:
        raise ValueError("objective: no gradient reaches the input; is the model under no_grad or detached?")
    return torch.autograd.grad(raised, adv, gradient(logits) if gradient else None)


def _start(
    clean: Tensor,
    start: str | Tensor,
    eps: float | Tensor,
    seed: int | Tensor | None,
    clip: bool,
    rows: tuple[int, int],
) -> Tensor:
    """Return the first iterate, a fresh tensor in the memory format of `clean`."""
    adv = torch.empty_like(clean)
    if isinstance(start, Tensor):
        if start.shape != clean.shape:
            raise ValueError(f"start has shape {tuple(start.shape)}, clean {tuple(clean.shape)}: they must agree")
        return adv.copy_(start)
    if start == "none":
        return adv.copy_(clean)
    if start not in ("normal", "uniform"):
        raise ValueError(f"start = {start!r}: it must be 'uniform', 'normal', 'none' or a tensor like clean")
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=clean.device)
    return random_start_(adv, clean, eps, noise=start, seed=seed, clip=clip, rows=rows)


def predicts(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return (B,) bool: whether each row is largest at its label. A row that is not finite predicts nothing."""
    return (logits_BK.argmax(1) == label_B) & logits_BK.isfinite().all(1)
