"""ResNet for images of 224 pixels (He et al., CVPR 2016), with torchvision's names: its checkpoints load as they are.

A 7x7 stem of stride 2 and a pooling divide the image by four; each later stage halves it. Dimension key: B batch, C
channels, H W image, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine.models.blocks import MakeBlock, conv3x3, projection, stage


class Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the first has the stride."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 beside a shortcut, of a quarter of the channels; the 3x3 one has the stride."""

    expansion = 4

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(out)) + shortcut)


class ImageNetResNet(nn.Module):
    """Four stages, `layer1` to `layer4`.

    Args:
        num_classes: K.
        channels: of the input.
        block: `Basic` or `Bottleneck`.
        expansion: how many times as many channels as its width a stage has.
        depths: blocks of each stage.
    """

    def __init__(
        self, num_classes: int, channels: int, block: MakeBlock, expansion: int, depths: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        first, second, third, fourth = depths
        self.layer1 = stage(block, 64, 64 * expansion, first, stride=1)
        self.layer2 = stage(block, 64 * expansion, 128 * expansion, second, stride=2)
        self.layer3 = stage(block, 128 * expansion, 256 * expansion, third, stride=2)
        self.layer4 = stage(block, 256 * expansion, 512 * expansion, fourth, stride=2)
        self.fc = nn.Linear(512 * expansion, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels of any H and W to (B, K) logits."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image_BCHW))), 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def imagenet_resnet18(num_classes: int, channels: int = 3) -> ImageNetResNet:
    """Return ResNet-18: 11,689,512 parameters for 1000 classes, 1.81 GMAC for an image of 224 px."""
    return ImageNetResNet(num_classes, channels, Basic, Basic.expansion, (2, 2, 2, 2))


def imagenet_resnet50(num_classes: int, channels: int = 3) -> ImageNetResNet:
    """Return ResNet-50: 25,557,032 parameters for 1000 classes, 4.09 GMAC for an image of 224 px."""
    return ImageNetResNet(num_classes, channels, Bottleneck, Bottleneck.expansion, (3, 4, 6, 3))
