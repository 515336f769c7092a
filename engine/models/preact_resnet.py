"""Pre-activation ResNet for small images (He et al., ECCV 2016; the form of AWP, CFA and the Tiny-ImageNet settings).

No norm after the stem; the shortcut is a 1x1 convolution without a norm, and reads the activated input.
Dimension key: B batch, C channels, H W image, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine.models.blocks import conv3x3, stage


class PreActBlock(nn.Module):
    """The pre-activation block: bn-relu-conv twice. A shortcut that changes the shape is conv1x1(relu(bn1 x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class PreActResNet(nn.Module):
    """Stages `layer1` to `layer4` of 64, 128, 256 and 512 channels, and a final `bn` and ReLU.

    Args:
        num_classes: K.
        channels: of the input; 3 for colour, 1 for grey.
        depths: blocks of each stage.
        final_norm: whether there are a norm and a ReLU between the last block and the pool.
    """

    def __init__(
        self, num_classes: int, channels: int, depths: tuple[int, int, int, int], final_norm: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, 64)
        self.layer1 = stage(PreActBlock, 64, 64, depths[0], stride=1)
        self.layer2 = stage(PreActBlock, 64, 128, depths[1], stride=2)
        self.layer3 = stage(PreActBlock, 128, 256, depths[2], stride=2)
        self.layer4 = stage(PreActBlock, 256, 512, depths[3], stride=2)
        self.bn = nn.BatchNorm2d(512) if final_norm else None
        self.linear = nn.Linear(512, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels of any H and W to (B, K) logits."""
        x = self.layer2(self.layer1(self.conv1(image_BCHW)))
        x = self.layer4(self.layer3(x))
        if self.bn is None:  # the gradient of this pool is channels-last, as both ways of the last block need it
            return self.linear(F.avg_pool2d(x, x.shape[2:]).flatten(1))
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))


def preact_resnet18(num_classes: int, channels: int = 3) -> PreActResNet:
    """Return PreActResNet-18: 11,269,640 parameters for 200 classes, 0.555 GMAC for a 32x32 image."""
    return PreActResNet(num_classes, channels, (2, 2, 2, 2))


def preact_resnet18_frl(num_classes: int, channels: int = 3) -> PreActResNet:
    """Return FRL's PreActResNet-18 (Xu et al., ICML 2021), without the last norm and ReLU: 11,171,146 parameters for 10
    classes, 0.555 GMAC for a 32x32 image.
    """
    return PreActResNet(num_classes, channels, (2, 2, 2, 2), final_norm=False)


def preact_resnet34(num_classes: int, channels: int = 3) -> PreActResNet:
    """Return PreActResNet-34: 21,377,800 parameters for 200 classes, 1.160 GMAC for a 32x32 image."""
    return PreActResNet(num_classes, channels, (3, 4, 6, 3))
