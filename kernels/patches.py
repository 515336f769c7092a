"""The kernels in other packages: their attacks keep their names, settings and random draws, and take our step.

torchattacks (Kim, arXiv 2010.01950) writes an attack's loop in one method, `forward`. `patch_torchattacks` puts a loop
of ours in its place where the arithmetic is the same. It is the same to the bit for FGSM and BIM. It is the same to
rounding for FFGSM, RFGSM, PGD, EOTPGD, MIFGSM and DIFGSM, where torchattacks projects by clean + clamp(adv - clean) and
so rounds a pixel once more; and for PGDL2 and TPGD, where sums are taken in another order.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels.class_temperature_kl import class_temperature_kl
from retemper.kernels.pgd_step import pgd_step_
from retemper.kernels.pixels import batch_first
from retemper.kernels.random_start import random_start_

TRIED = ("3.5.1",)  # the versions of torchattacks whose loops were read, and compared with ours
DRAWS = ("torch", "kernel")

Forward = Callable[..., Tensor]  # an attack's method: itself, images, labels -> images
Start = Callable[[Any, Tensor], Tensor]  # the attack, clean images -> a new tensor of images
Slope = Callable[[Tensor], Tensor]  # images that require grad -> the gradient there
Seen = Callable[[Tensor], Tensor]  # images -> what the model gets


class Patch:
    """What `patch_torchattacks` put in place. As a context manager it is undone at the end of the block."""

    def __init__(self, forwards: dict[Any, Forward]) -> None:
        self._forwards = forwards
        self._before = {attack: attack.forward for attack in forwards}
        for attack, forward in forwards.items():
            attack.forward = forward

    def undo(self) -> None:
        """Give the attacks back the methods that they had before. A second call does nothing.

        Raises:
            RuntimeError: an attack has been patched again since.
        """
        if any(attack.forward is not self._forwards[attack] for attack in self._before):
            raise RuntimeError("an attack has been patched again since; undo that patch first")
        while self._before:
            attack, forward = self._before.popitem()
            attack.forward = forward

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch_torchattacks(*, draws: str = "torch") -> Patch:
    """Give torchattacks' FGSM, FFGSM, RFGSM, BIM, PGD, EOTPGD, MIFGSM, DIFGSM, PGDL2 and TPGD our fused step.

    Attacks that were made before are changed too, and so are subclasses that inherit `forward`. Targets, normalisation
    and the modes of the model stay torchattacks' own. Three things differ. `eps` or `alpha` that are not in pixel units
    (8 for 8/255) are a ValueError. PGDL2 goes the whole step along a gradient of length 1e-10, where torchattacks goes
    half of it. MIFGSM and DIFGSM leave an image without a gradient where it is.

    Args:
        draws: "torch", where PyTorch's generator draws the starts, as without the patch; or "kernel", where
            `random_start_` does, in one launch, and its seed comes from PyTorch's generator on the device. The starts
            have the same distribution then, but for PGDL2, which starts uniformly in the ball, and RFGSM, whose starts
            stay PyTorch's.

    Returns:
        The patch: `patch.undo()`, or `with patch_torchattacks():`.

    Raises:
        ImportError: torchattacks is not installed, or is a version whose loops were not compared with ours.
        ValueError: unknown draws.
    """
    if draws not in DRAWS:
        raise ValueError(f"draws: {draws!r}; needs one of {', '.join(DRAWS)}")
    import torchattacks  # pyright: ignore[reportMissingImports]

    if torchattacks.__version__ not in TRIED:
        raise ImportError(
            f"torchattacks {torchattacks.__version__}: its loops were not compared with ours;"
            f" pip install torchattacks=={TRIED[-1]}, or use retemper.kernels.pgd_step_ in a loop of your own"
        )
    by_kernel = draws == "kernel"
    uniform = _uniform_by_kernel if by_kernel else _uniform
    forwards = {
        "FGSM": _loop(_at_clean, _of_label),
        "FFGSM": _loop(_uniform_by_kernel if by_kernel else _uniform_after_normal, _of_label),
        "RFGSM": _loop(_at_corners, _of_label),
        "BIM": _loop(_at_clean, _of_label),
        "PGD": _loop(uniform, _of_label),
        "EOTPGD": _loop(uniform, _summed),
        "MIFGSM": _loop(_at_clean, _of_label, has_momentum=True),
        "DIFGSM": _loop(uniform, _of_diverse_inputs, has_momentum=True),
        "PGDL2": _loop(_in_l2_ball_by_kernel if by_kernel else _in_l2_ball, _of_label, norm="l2"),
        "TPGD": _loop(_near_by_kernel if by_kernel else _near, _of_clean_prediction),
    }
    return Patch({getattr(torchattacks, name): forward for name, forward in forwards.items()})


def _loop(start: Start, objective: Callable[..., Slope], *, has_momentum: bool = False, norm: str = "linf") -> Forward:
    """Return an attack's method: from a start, steps along the objective's gradient."""

    def forward(self: Any, images: Tensor, labels: Tensor | None = None) -> Tensor:
        clean = batch_first(images.detach().to(self.device))
        slope = objective(self, clean, None if labels is None else labels.detach().to(self.device))
        adv = start(self, clean)  # after the targets, which may be drawn too
        options: dict[str, Any] = {"norm": norm}
        if has_momentum:
            options |= {"momentum": torch.zeros_like(adv), "decay": self.decay}
        step = getattr(self, "alpha", self.eps)  # FGSM goes to the border
        for _ in range(getattr(self, "steps", 1)):
            grad = slope(adv.requires_grad_())
            adv = pgd_step_(adv.detach(), grad, clean, step, self.eps, **options)
        return adv

    return forward


def _of_label(self: Any, clean: Tensor, labels: Tensor, seen: Seen = lambda adv: adv) -> Slope:
    """The gradient of the cross-entropy to the label, or of its negative to the target."""
    goal = self.get_target_label(clean, labels) if self.targeted else labels

    def slope(adv: Tensor) -> Tensor:
        cost = F.cross_entropy(self.get_logits(seen(adv)), goal)
        return torch.autograd.grad(-cost if self.targeted else cost, adv)[0]

    return slope


def _summed(self: Any, clean: Tensor, labels: Tensor) -> Slope:
    """The sum of several such gradients, for a model that draws."""
    once = _of_label(self, clean, labels)

    def slope(adv: Tensor) -> Tensor:
        grad = once(adv)
        for _ in range(1, self.eot_iter):
            grad += once(adv)
        return grad

    return slope


def _of_diverse_inputs(self: Any, clean: Tensor, labels: Tensor) -> Slope:
    """Such a gradient through the attack's random resizing."""
    return _of_label(self, clean, labels, self.input_diversity)


def _of_clean_prediction(self: Any, clean: Tensor, labels: Tensor | None) -> Slope:
    """The gradient of the KL divergence from the prediction to that of the clean images."""
    target = self.get_logits(clean).detach()

    def slope(adv: Tensor) -> Tensor:
        cost = class_temperature_kl(self.get_logits(adv), target, reduction="sum")
        return torch.autograd.grad(cost, adv)[0]

    return slope


def _at_clean(self: Any, clean: Tensor) -> Tensor:
    return clean.clone()


def _at_corners(self: Any, clean: Tensor) -> Tensor:
    return (clean + self.alpha * torch.randn_like(clean).sign()).clamp_(0, 1)


def _uniform(self: Any, clean: Tensor) -> Tensor:
    """Uniform in the ball, where the attack has a random start."""
    if not self.random_start:
        return clean.clone()
    return torch.empty_like(clean).uniform_(-self.eps, self.eps).add_(clean).clamp_(0, 1)


def _uniform_after_normal(self: Any, clean: Tensor) -> Tensor:
    """Uniform in the ball; FFGSM draws normal numbers first, and overwrites them."""
    return torch.randn_like(clean).uniform_(-self.eps, self.eps).add_(clean).clamp_(0, 1)


def _in_l2_ball(self: Any, clean: Tensor) -> Tensor:
    """A direction drawn evenly and a length drawn evenly."""
    if not self.random_start:
        return clean.clone()
    noise = torch.empty_like(clean).normal_()
    length = noise.flatten(1).norm(dim=1).view(-1, *[1] * (clean.dim() - 1))
    share = torch.empty_like(length).uniform_(0, 1)
    return noise.mul_(share / length * self.eps).add_(clean).clamp_(0, 1)


def _near(self: Any, clean: Tensor) -> Tensor:
    return torch.randn_like(clean).mul_(0.001).add_(clean).clamp_(0, 1)


def _uniform_by_kernel(self: Any, clean: Tensor) -> Tensor:
    return _by_kernel(self, clean) if getattr(self, "random_start", True) else clean.clone()


def _in_l2_ball_by_kernel(self: Any, clean: Tensor) -> Tensor:
    return _by_kernel(self, clean, norm="l2") if self.random_start else clean.clone()


def _near_by_kernel(self: Any, clean: Tensor) -> Tensor:
    return _by_kernel(self, clean, noise="normal")


def _by_kernel(self: Any, clean: Tensor, **options: Any) -> Tensor:
    seed = torch.empty(1, dtype=torch.int64, device=clean.device).random_()
    return random_start_(torch.empty_like(clean), clean, self.eps, seed=seed, **options)
