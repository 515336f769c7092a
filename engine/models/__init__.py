"""The networks of the literature, by name; their parameters have the shapes and names of the released code.

Dimension key: B batch, C channels, H W image, K classes.
"""

import difflib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from retemper.engine.models.cifar_resnet import resnet56
from retemper.engine.models.mobilenet_v2 import mobilenet_v2
from retemper.engine.models.normalised import Normalised
from retemper.engine.models.pixels import PIXELS, normalising
from retemper.engine.models.preact_resnet import preact_resnet18, preact_resnet18_frl, preact_resnet34
from retemper.engine.models.resnet import resnet18, small_resnet, tiny_resnet
from retemper.engine.models.wide_resnet import wrn34_10, wrn34_20

__all__ = ["MODELS", "PIXELS", "Normalised", "channels_last", "create_model", "normalising"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
    "wrn34_10": wrn34_10,
    "wrn34_20": wrn34_20,
    "preact_resnet18": preact_resnet18,
    "preact_resnet18_frl": preact_resnet18_frl,
    "preact_resnet34": preact_resnet34,
    "resnet56": resnet56,
    "tiny_resnet": tiny_resnet,
    "tiny_resnet_wide": partial(tiny_resnet, width=32),  # the teacher of the small settings
    "small_resnet": small_resnet,
    "small_resnet_wide": partial(small_resnet, width=32),  # the teacher of cifar10_small
}


def create_model(
    name: str, num_classes: int, *, channels: int | None = None, normalise: str | None = None
) -> nn.Module:
    """Build a network with fresh weights: float32, on the CPU, in training mode.

    Args:
        name: a key of `MODELS`.
        num_classes: K.
        channels: of the input; None means 1 (grey) for the tiny networks and 3 (colour) for all others.
        normalise: the data set, a key of `PIXELS`, whose mean the network first subtracts from its pixels and by whose
            deviation it divides them; None for one that takes its pixels as they are.
    Returns:
        A network from (B, C, H, W) pixels in [0, 1] to (B, K) logits. H and W are free: 28, 32 and 64 pixels all work.
    Raises:
        ValueError: no network or data set has this name, or `num_classes` or `channels` is below 1.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown model {name!r}; the nearest is {near!r}, all are {', '.join(MODELS)}")
    if num_classes < 1 or (channels is not None and channels < 1):
        raise ValueError(f"num_classes and channels must be at least 1, not {num_classes} and {channels}")
    network = MODELS[name](num_classes) if channels is None else MODELS[name](num_classes, channels)
    return network if normalise is None else normalising(network, normalise)


def channels_last(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to `device`, and lay its convolutions out channels-last; return it."""
    return model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # absent in the stub
