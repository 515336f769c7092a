"""The CIFAR ResNet-56 (He et al., CVPR 2016, section 4.2): thin, deep, and with shortcuts that hold no parameters.

MTARD's clean teacher. Dimension key: B batch, C channels, H W image, K classes.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine.models.blocks import BasicBlock, conv3x3, stage


class PaddedShortcut(nn.Module):
    """The shortcut "option A" of the paper: every second pixel, and zeros for the new channels, half on each side."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        # pooling one pixel is x[:, :, ::2, ::2], and keeps the gradient channels-last, which slicing does not
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, self.pad, self.pad))


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels with `depth` blocks each: 6 * depth + 2 layers.

    Args:
        num_classes: K.
        channels: of the input; 3 for colour, 1 for grey.
        depth: blocks of each stage.
    """

    def __init__(self, num_classes: int, channels: int, depth: int) -> None:
        super().__init__()
        block = partial(BasicBlock, shortcut=PaddedShortcut)
        self.conv1 = conv3x3(channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(block, 16, 16, depth, stride=1)
        self.layer2 = stage(block, 16, 32, depth, stride=2)
        self.layer3 = stage(block, 32, 64, depth, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels of any H and W to (B, K) logits."""
        x = F.relu(self.bn1(self.conv1(image_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet56(num_classes: int, channels: int = 3) -> CifarResNet:
    """Return ResNet-56: 853,018 parameters for 10 classes, 0.126 GMAC for a 32x32 image."""
    return CifarResNet(num_classes, channels, depth=9)
