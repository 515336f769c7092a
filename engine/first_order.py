"""A frozen network to first order around an image, in the logit of the label y alone.

    T'_y(x') = T_y(x) + c <dT_y/dx, x' - x>,   T'_k(x') = T_k(x) for every other class k

It costs one forward and one backward of the network, however many images x' it is asked about. Dimension key: B batch,
C channels, H, W, K classes.
"""

import torch
from torch import Tensor, nn

from retemper.engine.losses import at_least_float32, is_label


def slope_at(network: nn.Module, image_BCHW: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return a network's logits on images, (B, K), and the gradient there of each label's, (B, C, H, W).

    Args:
        network: in eval mode; its parameters get no gradient.
        label_B: int64.
    """
    with torch.enable_grad():
        image = image_BCHW.detach().requires_grad_(True)
        logits_BK = network(image)
        (slope,) = torch.autograd.grad(logits_BK, image, is_label(logits_BK, label_B).to(logits_BK.dtype))
    return logits_BK.detach(), slope


class FirstOrder(nn.Module):
    """The network to first order, in float32 or wider.

    Args:
        clean_BCHW: x above.
        logits_BK: its logits there.
        slope_BCHW: the gradient there of each label's logit, times c.
        label_B: int64.
    """

    def __init__(self, clean_BCHW: Tensor, logits_BK: Tensor, slope_BCHW: Tensor, label_B: Tensor) -> None:
        super().__init__()
        self.clean_BCHW, self.slope_BCHW, self.logits_BK = clean_BCHW, slope_BCHW, at_least_float32(logits_BK)
        self.own_BK = is_label(logits_BK, label_B).to(self.logits_BK.dtype)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return (B, K) logits of images near the clean ones, differentiable in them."""
        moved_B = (self.slope_BCHW * (image_BCHW - self.clean_BCHW)).sum((1, 2, 3))
        return torch.addcmul(self.logits_BK, self.own_BK, moved_B[:, None])
