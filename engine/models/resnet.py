"""ResNet for small images (He et al., CVPR 2016; the CIFAR form that ARD, RSLAD, Fair-ARD and ABSLD release).

A 3x3 stem without pooling, then stages of basic blocks; the first block of a stage halves the image and widens it.
Dimension key: B batch, C channels, H W image, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine.models.blocks import BasicBlock, conv3x3, stage


class ResNet(nn.Module):
    """Stages `layer1`, `layer2`, ... of basic blocks; every stage after the first halves the image.

    Args:
        num_classes: K.
        channels: of the input; 3 for colour, 1 for grey.
        widths: channels of each stage; the stem has those of the first.
        depths: blocks of each stage.
        stem_stride: 2 halves the image before the first stage.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, widths[0], stem_stride)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = tuple(f"layer{i + 1}" for i in range(len(widths)))
        inputs = widths[0]
        for i, (name, width, depth) in enumerate(zip(self.stages, widths, depths, strict=True)):
            self.add_module(name, stage(BasicBlock, inputs, width, depth, stride=1 if i == 0 else 2))
            inputs = width
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels of any H and W to (B, K) logits."""
        x = F.relu(self.bn1(self.conv1(image_BCHW)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))


def resnet18(num_classes: int, channels: int = 3) -> ResNet:
    """Return ResNet-18: 11,173,962 parameters for 10 classes, 0.556 GMAC for a 32x32 image."""
    return ResNet(num_classes, channels, (64, 128, 256, 512), (2, 2, 2, 2))


def tiny_resnet(num_classes: int, channels: int = 1, width: int = 16) -> ResNet:
    """Return a ResNet that a CPU can train robustly: 3 stages of one block, `width`, 2 `width`, 4 `width` channels."""
    return ResNet(num_classes, channels, (width, 2 * width, 4 * width), (1, 1, 1))


def small_resnet(num_classes: int, channels: int = 3, width: int = 16) -> ResNet:
    """Return a ResNet that a CPU can train robustly on 32x32 images: 308,826 parameters for 10 classes.

    A stem of stride 2, then 4 stages of one block with `width`, 2 `width`, 4 `width` and 8 `width` channels.
    """
    return ResNet(num_classes, channels, (width, 2 * width, 4 * width, 8 * width), (1, 1, 1, 1), stem_stride=2)
