"""The attack and the loss of FGSM-PGI (Jia et al., ECCV 2022), from what kept.py keeps of each image.

    loss + pgi_weight mean (student(x') - student(start))^2

The loss is the method's own; the authors' is the cross-entropy of x'. The mean is over the images and classes, of the
logits. Both sides have a gradient, and both forwards are in training mode, as in the authors' code.

Dimension key: B batch, C channels, H, W, K classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from retemper.engine.attack import Watcher, gradient_at
from retemper.engine.attack_plan import Plan
from retemper.engine.groups import TrainingAttack
from retemper.engine.kept import Kept
from retemper.engine.losses import Objective, at_least_float32
from retemper.kernels import pgd_step_


def images_from_kept(
    kept: Kept,
    seen: tuple[Tensor, Tensor],
    chosen: TrainingAttack,
    attacked: nn.Module,
    clean_BCHW: Tensor,
    plan: Plan,
    objective: Objective,
    watch: Watcher | None,
) -> dict[str, Tensor]:
    """Return the attacked images as "adv", and keep what the next epoch begins with.

    Args:
        seen: (B,) int64 each, the images' positions in the data set, and their views.
        plan: of the step: its length, the radius, and the mode of batch norm.
    Returns:
        "start" besides, where the attack began, if `chosen.pgi_weight` is above 0.
    """
    start, momentum = kept.read(clean_BCHW, *seen)
    start.add_(clean_BCHW).clamp_(0, 1)
    grad = gradient_at(attacked, start, objective, plan.bn_mode, watch)
    images = {"adv": pgd_step_(start.clone(), grad, clean_BCHW, plan.step, plan.eps)}
    if chosen.pgi_weight:
        images["start"] = start.clone()
    options: dict[str, Any] = dict(momentum=momentum, decay=chosen.pgi_decay)
    following = pgd_step_(start, grad, clean_BCHW, plan.step, plan.eps, **options)
    kept.write(*seen, following.sub_(clean_BCHW), momentum)
    return images


def held_near(loss: Callable[[Mapping[str, Tensor]], Tensor], weight: float, logits: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of the logits, (B, K) by the names of their images, with the term of the module docstring."""
    own = {name: logits_BK for name, logits_BK in logits.items() if name != "start"}
    apart_BK = at_least_float32(logits["adv"]) - at_least_float32(logits["start"])
    return loss(own) + weight * apart_BK.square().mean()
