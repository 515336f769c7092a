"""What the authors' training scripts have in common, written out in plain PyTorch for the references of this folder."""

from collections.abc import Callable

import torch
from torch import Tensor

from retemper.engine import TrainingAttack


def climb(
    image: Tensor,
    start: Tensor,
    attack: TrainingAttack,
    value: Callable[[Tensor], Tensor],
    *,
    eps: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor:
    """Return where the signed steps of an attack lead that raises `value`, a scalar of images, from `start`.

    Args:
        eps, step: (B,), where each image has its own.
    """
    radius, length = attack.eps if eps is None else by_image(eps), attack.step if step is None else by_image(step)
    at = start
    for _ in range(attack.steps):
        at = at.detach().requires_grad_()
        (grad,) = torch.autograd.grad(value(at), at)
        at = at.detach() + length * grad.sign()
        at = torch.min(torch.max(at, image - radius), image + radius).clamp(0, 1)
    return at.detach()


def by_image(value_B: Tensor) -> Tensor:
    """Return (B,) values as (B, 1, 1, 1), a number for each image."""
    return value_B[:, None, None, None]
