"""MobileNetV2 for small images (Sandler et al., CVPR 2018; the CIFAR form that ARD, RSLAD, Fair-ARD and ABSLD release).

Against the paper: stride 1 in the stem and in the second stage, ReLU instead of ReLU6, and a 1x1 convolution as the
shortcut where a block of stride 1 changes the number of channels.
Dimension key: B batch, C channels, H W image, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine.models.blocks import conv3x3, projection

STAGES = (  # expansion, channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """The block: widen by 1x1, filter each channel by 3x3, narrow by 1x1 without a ReLU; at stride 1 a shortcut."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = expansion * inputs
        self.conv1 = nn.Conv2d(inputs, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = nn.Conv2d(wide, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.shortcut = nn.Sequential()
        if stride == 1 and inputs != outputs:
            self.shortcut = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class MobileNetV2(nn.Module):
    """The stem, 17 inverted residuals in `layers`, and 1280 features.

    Args:
        num_classes: K.
        channels: of the input; 3 for colour, 1 for grey.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, 32)
        self.bn1 = nn.BatchNorm2d(32)
        blocks, inputs = [], 32
        for expansion, outputs, depth, stride in STAGES:
            for i in range(depth):
                blocks.append(InvertedResidual(inputs, outputs, expansion, stride if i == 0 else 1))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(inputs, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels of any H and W to (B, K) logits."""
        x = F.relu(self.bn1(self.conv1(image_BCHW)))
        x = F.relu(self.bn2(self.conv2(self.layers(x))))
        return self.linear(x.mean((2, 3)))


def mobilenet_v2(num_classes: int, channels: int = 3) -> MobileNetV2:
    """Return MobileNetV2: 2,296,922 parameters for 10 classes, 0.091 GMAC for a 32x32 image."""
    return MobileNetV2(num_classes, channels)
