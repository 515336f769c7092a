"""A network with the layer before it that normalises its images, as its checkpoint says.

Dimension key: B batch, C channels, H, W, K classes.
"""

from torch import Tensor, nn

from retemper.engine.checkpoints.unwrap import Pixels


class Normalised(nn.Module):
    """The network of images (image - mean) / std.

    Args:
        network: from (B, C, H, W) normalised pixels to (B, K) logits.
        pixels: the mean and the deviation, each of 1 or C values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, pixels: Pixels) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", pixels.mean.view(1, -1, 1, 1))
        self.register_buffer("std", pixels.std.view(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels in [0, 1] to (B, K) logits."""
        normal = (image - self.mean) / self.std
        return self.network(normal.to(image.dtype))  # float32 in between where the images are of half precision
