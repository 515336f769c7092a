"""A network with the layer before it that normalises its images.

Dimension key: B batch, C channels, H W image, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Values = Sequence[float] | Tensor


class Normalised(nn.Module):
    """The network of images (image - mean) / std.

    Its state_dict has the network's own names, and "mean" and "std" beside them.

    Args:
        network: from (B, C, H, W) normalised pixels to (B, K) logits.
        mean, std: of the pixels, each 1 or C values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Values, std: Values) -> None:
        super().__init__()
        self.network = network
        dtype = next((weight.dtype for weight in network.parameters()), torch.float32)
        self.register_buffer("mean", torch.as_tensor(mean, dtype=dtype).view(1, -1, 1, 1))
        self.register_buffer("std", torch.as_tensor(std, dtype=dtype).view(1, -1, 1, 1))
        self.register_state_dict_post_hook(self._drop_prefix)
        self.register_load_state_dict_pre_hook(self._add_prefix)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels in [0, 1] to (B, K) logits."""
        normal = (image - self.mean) / self.std
        return self.network(normal.to(image.dtype))  # float32 in between where the images are of half precision

    @staticmethod
    def _drop_prefix(_: nn.Module, state: dict[str, Any], prefix: str, *__: object) -> None:
        inner = f"{prefix}network."
        for name in [name for name in state if name.startswith(inner)]:
            state[prefix + name.removeprefix(inner)] = state.pop(name)

    @staticmethod
    def _add_prefix(_: nn.Module, state: dict[str, Any], prefix: str, *__: object) -> None:
        own = (f"{prefix}mean", f"{prefix}std")
        for name in [name for name in state if name.startswith(prefix) and name not in own]:
            state[f"{prefix}network.{name.removeprefix(prefix)}"] = state.pop(name)
