"""WideResNet and PreActResNet with SiLU, as RobustBench's best networks are built (its DMWideResNet, DMPreActResNet).

Gowal et al. (2020) and Rebuffi et al. (2021) trained the first ones; the parameters have the names of their files. Of
the networks with ReLU they differ in more than that: they normalise the pixels themselves, and a convolution of stride
2 is padded on the right and below alone, as JAX does it. No norm follows the stem.
Dimension key: B batch, C channels, H W image, K classes.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine.models.blocks import conv3x3, stage

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # of CIFAR-10's pixels
MOMENTUM = 0.01  # of the batch norms, with which the published networks were trained


class NormalisingNetwork(nn.Module):
    """A network that begins with (image - mean) / std.

    Both are buffers that the state_dict leaves out. A state_dict that has them, as some released files do, sets them.

    Args:
        mean, std: of pixels in [0, 1], each 1 or C values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.register_load_state_dict_pre_hook(self._take_out_pixels)

    def normal(self, image: Tensor) -> Tensor:
        """Return the normalised images, in the dtype of the images."""
        return ((image - self.mean) / self.std).to(image.dtype)

    def pixels(self) -> dict[str, Tensor]:
        """Return copies of "mean" and "std", each (1,) or (C,)."""
        return {"mean": self.mean.flatten().clone(), "std": self.std.flatten().clone()}

    @torch.no_grad()
    def take_pixels(self, mean: Tensor, std: Tensor) -> None:
        """Normalise by other values from now on, each 1 or C."""
        self.mean.copy_(mean.view(1, -1, 1, 1))
        self.std.copy_(std.view(1, -1, 1, 1))

    @staticmethod
    def _take_out_pixels(network: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        found = [state.pop(prefix + name) for name in ("mean", "std") if prefix + name in state]
        if isinstance(network, NormalisingNetwork) and len(found) == 2:
            network.take_pixels(*found)


def strided_conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    """Return a 3x3 convolution without bias, for images that `padded` has padded."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1 if stride == 1 else 0, bias=False)


def padded(x: Tensor, stride: int) -> Tensor:
    """Return images for `strided_conv3x3`: at stride 2 with a row of zeros below, and a column on the right."""
    return x if stride == 1 else F.pad(x, (0, 1, 0, 1))


def mean_pixel(x: Tensor) -> Tensor:
    """Return the mean over H and W, (B, C); its gradient is channels-last, as that of x.mean((2, 3)) is not."""
    return F.avg_pool2d(x, x.shape[2:]).flatten(1)


def norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm."""
    return nn.BatchNorm2d(channels, momentum=MOMENTUM)


class SiluWideBlock(nn.Module):
    """The block: bn-silu-conv twice. A shortcut that changes the number of channels is conv1x1(silu(bn x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = norm(inputs)
        self.conv_0 = strided_conv3x3(inputs, outputs, stride)
        self.batchnorm_1 = norm(outputs)
        self.conv_1 = conv3x3(outputs, outputs)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        activated = F.silu(self.batchnorm_0(x))
        out = self.conv_0(padded(activated, self.stride))
        out = self.conv_1(F.silu(self.batchnorm_1(out)))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class SiluWideResNet(NormalisingNetwork):
    """Three stages of 16, 32 and 64 times `widen` channels.

    Args:
        num_classes: K.
        channels: of the input; 3 for colour, 1 for grey.
        depth: 6 n + 4, for n blocks a stage.
        widen: the widening factor.
        mean, std: of the pixels.
    Raises:
        ValueError: no network has this depth.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        depth: int,
        widen: int,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__(mean, std)
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6 n + 4, such as 28 or 70, not {depth}")
        widths, stages = (16, 16 * widen, 32 * widen, 64 * widen), []
        for i in range(3):
            blocks = stage(SiluWideBlock, widths[i], widths[i + 1], (depth - 4) // 6, 1 if i == 0 else 2)
            stages.append(nn.Sequential(OrderedDict(block=blocks)))  # under that name in the released files
        self.init_conv = conv3x3(channels, widths[0])
        self.layer = nn.Sequential(*stages)
        self.batchnorm = norm(widths[3])
        self.logits = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.logits.bias)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels of any H and W to (B, K) logits."""
        x = self.layer(self.init_conv(self.normal(image_BCHW)))
        return self.logits(mean_pixel(F.silu(self.batchnorm(x))))


class SiluPreActBlock(nn.Module):
    """The block: bn-silu-conv twice. A shortcut that changes the shape is a 3x3 convolution of x as it comes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = norm(inputs)
        self.conv_2d_1 = strided_conv3x3(inputs, outputs, stride)
        self.batchnorm_1 = norm(outputs)
        self.conv_2d_2 = conv3x3(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else strided_conv3x3(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        out = self.conv_2d_1(padded(F.silu(self.batchnorm_0(x)), self.stride))
        out = self.conv_2d_2(F.silu(self.batchnorm_1(out)))
        return out + (x if self.shortcut is None else self.shortcut(padded(x, self.stride)))


class SiluPreActResNet(NormalisingNetwork):
    """Stages `layer_0` to `layer_3` of 64, 128, 256 and 512 channels.

    Args:
        num_classes: K.
        channels: of the input; 3 for colour, 1 for grey.
        depths: blocks of each stage.
        mean, std: of the pixels.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        depths: tuple[int, int, int, int],
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__(mean, std)
        self.conv_2d = conv3x3(channels, 64)
        self.layer_0 = stage(SiluPreActBlock, 64, 64, depths[0], stride=1)
        self.layer_1 = stage(SiluPreActBlock, 64, 128, depths[1], stride=2)
        self.layer_2 = stage(SiluPreActBlock, 128, 256, depths[2], stride=2)
        self.layer_3 = stage(SiluPreActBlock, 256, 512, depths[3], stride=2)
        self.batchnorm = norm(512)
        self.logits = nn.Linear(512, num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels of any H and W to (B, K) logits."""
        x = self.layer_1(self.layer_0(self.conv_2d(self.normal(image_BCHW))))
        x = self.layer_3(self.layer_2(x))
        return self.logits(mean_pixel(F.silu(self.batchnorm(x))))


def silu_wide_resnet(
    num_classes: int, channels: int = 3, *, depth: int, widen: int, **pixels: Sequence[float]
) -> SiluWideResNet:
    """Return WRN-depth-widen with SiLU; `pixels` are its mean and std."""
    return SiluWideResNet(num_classes, channels, depth, widen, **pixels)


def preact_resnet18_silu(num_classes: int, channels: int = 3, **pixels: Sequence[float]) -> SiluPreActResNet:
    """Return PreActResNet-18 with SiLU; `pixels` are its mean and std."""
    return SiluPreActResNet(num_classes, channels, (2, 2, 2, 2), **pixels)
