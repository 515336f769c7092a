"""Networks of the package timm, by name: timm:vit_tiny_patch16_224.

They have fresh weights. Nothing is downloaded; weights come from a file, whose tensors have timm's names.
Dimension key: B batch, C channels, H W image, K classes.
"""

import difflib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from retemper.console import say
from retemper.engine.models.normalised import Normalised
from retemper.engine.models.silu_resnets import NormalisingNetwork
from retemper.errors import UsageError
from retemper.options import TIMM
from retemper.packages import import_package

INSTALL = "pip install 'retemper[timm]'"


class TimmNetwork(NormalisingNetwork):
    """A network of timm behind the normalisation that timm has for it; its state_dict has timm's own names.

    Args:
        network: from (B, C, H, W) normalised pixels to (B, K) logits.
        mean, std: of pixels in [0, 1], each 1 or C values.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(mean, std)
        self.network = network
        self.register_state_dict_post_hook(Normalised._drop_prefix)
        self.register_load_state_dict_pre_hook(Normalised._add_prefix)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels in [0, 1] to (B, K) logits."""
        return self.network(self.normal(image))


def is_timm(name: str | None) -> bool:
    """Say whether a network's name is one of timm's, as timm:NAME."""
    return TIMM.fullmatch(str(name)) is not None


def one_side(name: str, side: int) -> int | None:
    """Return the pixels a side of the images, where a network is built for them and takes no others; else None."""
    return side if is_timm(name) and _facts(name)["fixed_input_size"] else None


def timm_keywords(name: str, num_classes: int, channels: int, side: int | None) -> dict[str, Any]:
    """Return what `timm.create_model` is given beside the name.

    Args:
        side: pixels of the images, which are square; None means those that timm has for the network.
    """
    sized = {"img_size": side} if side is not None and _facts(name)["fixed_input_size"] else {}
    return dict(num_classes=num_classes, in_chans=channels) | sized


def timm_network(name: str, num_classes: int, channels: int, side: int | None) -> TimmNetwork:
    """Build a network with fresh weights, without dropout and stochastic depth.

    Args:
        name: timm:NAME.
        side: as `timm_keywords` takes it.
    Raises:
        UsageError: timm is not installed, has no network of this name, or does not build it for such images.
    """
    timm, facts = _timm(name), _facts(name)
    try:
        network = timm.create_model(_bare(name), pretrained=False, **timm_keywords(name, num_classes, channels, side))
    except Exception as error:  # each network has its own conditions, and its own errors
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{name} cannot be built for images of {channels} x {side} x {side} ({why})") from None
    for module in network.modules():
        rates = {nn.Dropout: "p", timm.layers.DropPath: "drop_prob"}
        for rate in (rate for kind, rate in rates.items() if isinstance(module, kind)):
            setattr(module, rate, 0.0)
    mean, std = facts["mean"], facts["std"]
    if len(mean) != channels:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    if side not in (None, own := facts["input_size"][-1]):
        how = "is built for" if facts["fixed_input_size"] else "takes"
        _tell(f"note: {name} {how} images of {side} x {side}; timm's own weights are for {own} x {own}")
    return TimmNetwork(network, mean, std)


@cache
def _tell(note: str) -> None:
    """Say something once."""
    say(note)


def _bare(name: str) -> str:
    """Return timm's name of a network."""
    return name.removeprefix("timm:")


@cache
def _timm(name: str) -> ModuleType:
    """Return the package, once it is known to have a network of this name. Raises UsageError."""
    try:
        timm = import_package("timm")
    except ImportError as error:
        raise UsageError(f"{name} needs the package timm ({error}): {INSTALL}") from None
    if not timm.is_model(_bare(name)):
        near = difflib.get_close_matches(_bare(name), timm.list_models(), n=1, cutoff=0.0)
        raise UsageError(f"timm has no network {_bare(name)!r}; the nearest is timm:{near[0]}")
    return timm


@cache
def _facts(name: str) -> dict[str, Any]:
    """Return the input size, the mean and the deviation that timm has for a network. Raises UsageError."""
    timm = _timm(name)
    try:
        known = timm.get_pretrained_cfg(_bare(name))
    except RuntimeError as error:  # of a tag that is none
        raise UsageError(f"{name}: {error}") from None
    facts = {} if known is None else known.to_dict()
    usual = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return usual | {"fixed_input_size": False} | {key: value for key, value in facts.items() if value is not None}
