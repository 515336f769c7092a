"""What the authors' training scripts have in common, written out in plain PyTorch for the references of this folder."""

from collections.abc import Callable

import torch
from torch import Tensor


def climb(
    image: Tensor,
    start: Tensor,
    value: Callable[[Tensor], Tensor],
    *,
    eps: float | Tensor,
    step: float | Tensor,
    steps: int,
) -> Tensor:
    """Return where signed gradient steps from `start` lead, inside the ball around `image`; they raise `value`.

    Args:
        eps, step: a number, or (B,) or (B, 1, 1, 1) where each image has its own.
    """
    eps, step = (one[:, None, None, None] if isinstance(one, Tensor) and one.dim() == 1 else one for one in (eps, step))
    at = start
    for _ in range(steps):
        at = at.detach().requires_grad_()
        (grad,) = torch.autograd.grad(value(at), at)
        at = at.detach() + step * grad.sign()
        at = torch.min(torch.max(at, image - eps), image + eps).clamp(0, 1)
    return at.detach()
