"""A network's gradients, and the loss, in one tensor: what processes add up in every step, in one call.

No wrapper around the network: two forwards before one backward are then no trouble (PyTorch issue 175024), the attack
sees the network itself, and a CUDA graph may hold the call.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn

from retemper.engine.distributed.ranks import Ranks

ALIGNED = 32  # values: every gradient begins at a multiple of 128 bytes, as fresh tensors do


class GradientBucket:
    """Each weight's gradient is a view of `flat` with the weight's own strides, written in place and never replaced.

    Args:
        network: where it is to be trained; its weights have one dtype.
    """

    def __init__(self, network: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        ends = list(accumulate(-(-weight.numel() // ALIGNED) * ALIGNED for weight in weights))
        self.flat = torch.zeros(ends[-1] + 1, dtype=weights[0].dtype, device=weights[0].device)
        for weight, first in zip(weights, [0, *ends], strict=False):
            weight.grad = self.flat.as_strided(weight.shape, weight.stride(), first)

    def all_reduce(self, loss: Tensor) -> Tensor:
        """Add the gradients of all processes, and their shares of the loss: the sum of those, 0-dim."""
        self.flat[-1] = loss
        self.ranks.all_reduce_(self.flat)
        return self.flat[-1].clone()

    def clear(self) -> None:
        """Before the next step."""
        self.flat.zero_()
