"""A second network that is trained beside the student, from scratch: a teacher that learns from the student's attacks.

Dimension key: B batch, C channels, H, W, K classes.
"""

import torch
from torch import Tensor, nn

from retemper.engine.attack import module_mode
from retemper.engine.speed.fold import Folded
from retemper.engine.speed.together import Together


class Peer:
    """The peer of a student: it answers clean images before the attack, and learns from the attacked ones after it.

    Attributes:
        network: what is trained, on its device.
        eyes: what answers in eval mode: its folded twin, or the network itself.
        joined: the network as its training forward runs; None where it runs as it is.
    """

    def __init__(self, network: nn.Module, eyes: nn.Module, joined: Together | None) -> None:
        self.network, self.eyes, self.joined = network, eyes, joined

    @torch.no_grad()
    def answer(self, image: Tensor) -> Tensor:
        """Return the (B, K) logits of (B, C, H, W) images, of the weights as they are now, without gradient."""
        if isinstance(self.eyes, Folded):
            return self.eyes.refresh()(image)
        with module_mode(self.eyes, "eval"):
            return self.eyes(image)

    def learn(self, image: Tensor, *, idle: bool) -> Tensor:
        """Return the (B, K) logits of (B, C, H, W) images in training mode, with gradient; its statistics move.

        Args:
            idle: whether the images count for nothing, so that no statistics may move.
        """
        self.network.train(not idle)
        return self.network(image) if idle or self.joined is None else self.joined(image, 1, (0,))
