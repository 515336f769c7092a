"""Parts that several networks are made of. Dimension key: B batch, C channels, H W image."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

MakeBlock = Callable[[int, int, int], nn.Module]  # input channels, output channels, stride


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias that keeps H and W, or divides them by `stride`."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return a shortcut that changes the shape by a 1x1 convolution and a batch norm ("option B" of He et al.)."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def stage(block: MakeBlock, inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
    """Return `depth` blocks in a row; the first one takes `inputs` channels and has the stride."""
    rest = (block(outputs, outputs, 1) for _ in range(depth - 1))
    return nn.Sequential(block(inputs, outputs, stride), *rest)


class BasicBlock(nn.Module):
    """The block of ResNet (He et al., CVPR 2016): relu(bn(conv(relu(bn(conv x)))) + shortcut x).

    Args:
        inputs, outputs: channels.
        stride: of the first convolution.
        shortcut: makes the shortcut where the shape changes; elsewhere it is the identity.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: MakeBlock = projection) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential() if same else shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))
