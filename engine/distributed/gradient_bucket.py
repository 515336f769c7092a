"""One tensor for all gradients of a network and the loss, which the processes of a group sum in one call per step.

The network has no wrapper: two forwards before one backward are then no trouble (PyTorch issue 175024), the attack
sees the network itself, and a CUDA graph may hold the call.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn

from retemper.engine.distributed.ranks import Ranks

ALIGNED = 32  # values: every gradient begins at a multiple of 128 bytes, as fresh tensors do


class GradientBucket:
    """The gradients of a network as views of one vector; backward passes write them in place.

    Args:
        network: on the device that it is trained on; its weights have one dtype.
        ranks: the process group.

    Attributes:
        flat: (N,), the gradients, each with the strides of its weight, and the loss as its last value.
    """

    def __init__(self, network: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        ends = list(accumulate(-(-weight.numel() // ALIGNED) * ALIGNED for weight in weights))
        self.flat = torch.zeros(ends[-1] + 1, dtype=weights[0].dtype, device=weights[0].device)
        for weight, first in zip(weights, [0, *ends], strict=False):
            weight.grad = self.flat.as_strided(weight.shape, weight.stride(), first)

    def all_reduce(self, loss: Tensor) -> Tensor:
        """Sum the gradients over all processes, and return the sum of `loss`, this process's share of it; 0-dim."""
        self.flat[-1] = loss
        self.ranks.all_reduce_(self.flat)
        return self.flat[-1].clone()

    def clear(self) -> None:
        """Set all gradients to zero."""
        self.flat.zero_()
