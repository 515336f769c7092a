"""WideResNet (Zagoruyko and Komodakis, BMVC 2016), in the form and with the names of TRADES (Zhang et al., ICML 2019).

TRADES' class also builds `sub_block1`, 2,102,112 parameters that no forward pass reads. It is left out here, and
`load_checkpoint` drops it from the files that hold it.
Dimension key: B batch, C channels, H W image, K classes.
"""

import math
from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine.models.blocks import conv3x3, stage


class WideBlock(nn.Module):
    """The block: bn-relu-conv twice. A shortcut that changes the number of channels is conv1x1(relu(bn1 x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class WideResNet(nn.Module):
    """Three stages of 16, 32 and 64 times `widen` channels.

    Args:
        num_classes: K.
        channels: of the input; 3 for colour, 1 for grey.
        depth: 6 n + 4, for n blocks a stage.
        widen: the widening factor.
    Raises:
        ValueError: no network has this depth.
    """

    def __init__(self, num_classes: int, channels: int, depth: int, widen: int) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6 n + 4, such as 28 or 34, not {depth}")
        blocks = (depth - 4) // 6
        self.conv1 = conv3x3(channels, 16)
        self.block1 = _named_stage(16, 16 * widen, blocks, stride=1)
        self.block2 = _named_stage(16 * widen, 32 * widen, blocks, stride=2)
        self.block3 = _named_stage(32 * widen, 64 * widen, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels of any H and W to (B, K) logits."""
        x = self.block3(self.block2(self.block1(self.conv1(image_BCHW))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def _named_stage(inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
    """Return a stage whose blocks stand under the name `layer`, as in the released files."""
    return nn.Sequential(OrderedDict(layer=stage(WideBlock, inputs, outputs, depth, stride)))


def wrn34_10(num_classes: int, channels: int = 3) -> WideResNet:
    """Return WRN-34-10: 46,160,474 parameters for 10 classes, 6.659 GMAC for a 32x32 image."""
    return WideResNet(num_classes, channels, depth=34, widen=10)


def wrn34_20(num_classes: int, channels: int = 3) -> WideResNet:
    """Return WRN-34-20, AdaAD's teacher: 184,531,674 parameters for 10 classes, 26.582 GMAC for a 32x32 image."""
    return WideResNet(num_classes, channels, depth=34, widen=20)
