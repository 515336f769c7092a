"""The CIFAR ResNet-56 (He et al., CVPR 2016, section 4.2): thin, deep, and with shortcuts that hold no parameters.

MTARD's clean teacher. Shortcut "option A": every second pixel, and zeros for the new channels, half on each side.
Dimension key: B batch, C channels, H W image, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv x)))) + shortcut x), with the parameter-free shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        if self.pad:
            # pooling one pixel is x[:, :, ::2, ::2], and keeps the gradient channels-last, which slicing does not
            x = F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(self.bn2(self.conv2(out)) + x)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels with `depth` blocks each: 6 * depth + 2 layers.

    Args:
        num_classes: K.
        channels: of the input; 3 for colour, 1 for grey.
        depth: blocks of each stage.
    """

    def __init__(self, num_classes: int, channels: int, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, depth, stride=1)
        self.layer2 = _stage(16, 32, depth, stride=2)
        self.layer3 = _stage(32, 64, depth, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> (B, K) logits; any H and W."""
        x = F.relu(self.bn1(self.conv1(image_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, 1) for _ in range(depth - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def resnet56(num_classes: int, channels: int = 3) -> CifarResNet:
    """ResNet-56: 853,018 parameters for 10 classes."""
    return CifarResNet(num_classes, channels, depth=9)
