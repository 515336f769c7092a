"""ResNet for small images (He et al., CVPR 2016; the CIFAR form that ARD, RSLAD, Fair-ARD and ABSLD release).

A 3x3 stem without pooling, then stages of basic blocks; the first block of a stage halves the image and widens it.
Dimension key: B batch, C channels, H W image, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv x)))) + shortcut x); the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages `layer1`, `layer2`, ... of basic blocks; every stage after the first halves the image.

    Args:
        num_classes: K.
        channels: of the input; 3 for colour, 1 for grey.
        widths: channels of each stage; the stem has those of the first.
        depths: blocks of each stage.
    """

    def __init__(self, num_classes: int, channels: int, widths: tuple[int, ...], depths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = tuple(f"layer{i + 1}" for i in range(len(widths)))
        inputs = widths[0]
        for i, (name, width, depth) in enumerate(zip(self.stages, widths, depths, strict=True)):
            first = BasicBlock(inputs, width, stride=1 if i == 0 else 2)
            self.add_module(name, nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(depth - 1))))
            inputs = width
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> (B, K) logits; any H and W."""
        x = F.relu(self.bn1(self.conv1(image_BCHW)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))


def resnet18(num_classes: int, channels: int = 3) -> ResNet:
    """ResNet-18: 11,173,962 parameters for 10 classes, 0.556 GMAC for a 32x32 image."""
    return ResNet(num_classes, channels, (64, 128, 256, 512), (2, 2, 2, 2))


def tiny_resnet(num_classes: int, channels: int = 1, width: int = 16) -> ResNet:
    """One block a stage, of `width`, 2 `width` and 4 `width` channels: small enough to train robustly on a CPU."""
    return ResNet(num_classes, channels, (width, 2 * width, 4 * width), (1, 1, 1))
