"""Stops a run before an update by numbers that are not finite, without waiting for the device.

A step whose loss or gradient is not finite changes no weight, and neither does any step after it: the optimizer's
kernel looks at a flag on the device. The host reads when that was together with the loss, now and then.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


class Guard:
    """All on the device, written in place.

    Attributes:
        seed: (1,) int64, the noise seed of the first step that was stopped, which tells the step; -1 before.
        loss: 0-dim, that step's loss.
        found_inf: 0-dim float, 1 from then on, as fused optimizers take it.
        poison: 0-dim, NaN from then on, 0 before: added to a loss, it makes a gradient scaler skip the step.
    """

    def __init__(self, device: torch.device) -> None:
        self.seed = torch.full((1,), -1, dtype=torch.int64, device=device)
        self.loss, self.found_inf, self.poison = torch.zeros(3, device=device)

    def look(self, loss: Tensor, gradients: Sequence[Tensor], seed: Tensor) -> None:
        """At a step's loss and gradients before its update; a gradient whose norm overflows is not finite either."""
        finite = loss.isfinite()
        if gradients:
            finite = finite & get_total_norm(gradients).isfinite()
        first = ~finite & (self.seed < 0).view(())
        self.seed.copy_(torch.where(first, seed, self.seed))
        self.loss.copy_(torch.where(first, loss, self.loss))
        self.found_inf.copy_((self.seed >= 0).view(()))
        self.poison.masked_fill_(self.found_inf > 0, torch.nan)
