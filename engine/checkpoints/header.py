"""A trained network on disk: which file holds its weights, what is known about it, and how it is built again."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retemper.engine.checkpoints.content import Misfit, few, read_content
from retemper.engine.checkpoints.external import build_student, require_same_source
from retemper.engine.checkpoints.unwrap import fits, nearest_state
from retemper.engine.checkpoints.weights import load_with_pixels
from retemper.engine.models import MODELS, Normalised, channels_last
from retemper.errors import DataError, UsageError


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a network that its weights do not show. A field is None where it is not known.

    Attributes:
        model: the name of its architecture: of a checkpoint file, a key of `MODELS`, timm:NAME or net.py:build.
        channels, image_size: of the images that it was trained on; pixels a side.
        max_side: that its views were cut from, and the middle is taken of; None where they are not.
        dataset: that it was trained on.
        eps: the radius that it was trained for, in pixel units.
        side: pixels a side that it is built for, if it takes no others.
        source: the SHA-256 of the user's file that builds it.
    """

    model: str | None = None
    num_classes: int | None = None
    channels: int | None = None
    image_size: int | None = None
    max_side: int | None = None
    dataset: str | None = None
    eps: float | None = None
    side: int | None = None
    source: str | None = None

    def or_else(self, other: "Facts") -> "Facts":
        """Return these facts, with those of `other` where a field is None."""
        return Facts(**vars(other) | self._known())

    def as_metadata(self) -> dict[str, str]:
        """Return the known fields as the header of a safetensors file, which `read_facts` reads back."""
        return {name: str(value) for name, value in self._known().items()}

    def _known(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


SUFFIXES = (".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin")  # that checkpoints usually have
KINDS = {
    "model": str,
    "num_classes": int,
    "channels": int,
    "image_size": int,
    "max_side": int,
    "dataset": str,
    "eps": float,
    "side": int,
    "source": str,
}


def is_run(target: Path) -> bool:
    """Say whether `target` is the folder of a run."""
    return os.path.exists(target / "config.json")


def find_weights(target: Path, which: str = "best") -> Path:
    """Return the checkpoint file that `target` means: the file itself, or the `which` weights of a run's folder.

    Raises:
        DataError: there is no such file.
    """
    if not target.is_dir():
        if not target.exists():
            raise DataError(f"{target} does not exist: name a run's folder or a checkpoint file")
        if not target.is_file():
            raise DataError(f"{target} is neither a file nor a folder: name a run's folder or a checkpoint file")
        return target
    path = target / f"{which}.safetensors"
    if not path.exists():
        others = sorted(other.name for other in target.iterdir() if other.suffix in SUFFIXES)
        why = "it is no run's folder, or the run has not finished an epoch"
        if is_run(target) and "last.safetensors" in others:
            why = "no epoch of the run was judged yet; its newest weights: --weights last"
        elif others and not is_run(target):
            why = f"it is no run's folder, but holds {few(others)}: name the file"
        raise DataError(f"{target} holds no {path.name}: {why}")
    return path


def read_header(weights: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; it is empty for a file of another kind or one that is damaged."""
    if weights.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open  # here, not above: the benchmarks run without it

    try:
        with safe_open(weights, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):  # loading the weights says what is wrong
        return {}


def read_facts(weights: Path) -> Facts:
    """Return what the header of a checkpoint file says about the network; runs write it (`Facts.as_metadata`)."""
    header = read_header(weights)
    try:
        return Facts(**{name: kind(header[name]) for name, kind in KINDS.items() if header.get(name)})
    except ValueError:
        return Facts()


def load_network(weights: Path, facts: Facts, device: torch.device, entry: str | None = None) -> nn.Module:
    """Build the network that `facts` describe, with the weights of a file: channels-last, frozen, in eval mode.

    Args:
        entry: the name of the weights in the file, where the user chose it.
    Returns:
        A network on `device`, from (B, C, H, W) pixels in [0, 1] to (B, K) logits.
    Raises:
        UsageError: `facts` do not name its architecture or number of classes, or no network has that name.
        DataError: the file does not hold that architecture's weights, or they are not finite.
    """
    if facts.model is None or facts.num_classes is None:
        name = "name its architecture and data set with --model and --dataset"
        raise UsageError(f"{weights} does not say what it is: {name}")
    require_same_source(facts.model, facts.source)
    try:
        dataset = read_facts(weights).dataset or facts.dataset  # that of its training comes first
        how: dict[str, Any] = {"channels": facts.channels, "dataset": dataset, "side": facts.side}
        model = build_student(facts.model, facts.num_classes, **how)
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        pixels = load_with_pixels(weights, model, entry)
    except Misfit as error:
        raise Misfit(f"{error}{_whose_tensors(weights, facts.model)}") from None
    require_finite(weights, model)
    model = model if pixels is None else Normalised(model, pixels.mean, pixels.std)
    return channels_last(model, device).eval().requires_grad_(False)


def fitting_models(weights: Path) -> list[str]:
    """Return the names in `MODELS` whose tensors are all in a file, each of its shape. Raises as `read_content`.

    A network that is another one without some of its tensors is left out where that fits.
    """
    content = read_content(weights)
    fitting = {name: names for name in MODELS if (names := _fitting(name, content))}
    return [name for name, names in fitting.items() if not any(names < others for others in fitting.values())]


def _whose_tensors(weights: Path, model: str) -> str:
    """Return in words which network of `MODELS` the tensors in a file are of, or most of them; empty for `model`."""
    if model in (fitting := fitting_models(weights)):
        return ""
    if fitting:
        return f"; its tensors are those of {' or '.join(fitting)}"
    content, share = read_content(weights), dict[str, float]()
    for name in MODELS:
        own = _tensors(MODELS[name], 10)
        state = nearest_state(content, own)
        share[name] = sum(value.shape == own[name].shape for name, value in state.items()) / len(own)
    nearest = max(share, key=lambda name: share[name])
    near = nearest != model and share[nearest] > 0.5
    return f"; the nearest network is {nearest}, {share[nearest]:.0%} of whose tensors it has" if near else ""


def _fitting(model: str, content: object) -> set[str]:
    """Return the names of a model's tensors where all are in the content of a file, and none where one is lacking.

    The model is built for as many classes and channels as that has.
    """
    own = _tensors(MODELS[model], 10)
    state = nearest_state(content, own)
    if {name for name in own if not name.endswith("num_batches_tracked")} - state.keys():
        return set()
    first = next(state[name] for name, value in own.items() if value.dim() == 4)  # (features, channels, ...)
    last = next(state[name] for name, value in reversed(own.items()) if value.dim() == 2)  # (classes, features)
    classes, channels = max(1, last.shape[0]), max(1, first.shape[1]) if first.dim() == 4 else 1
    return set(own) if fits(state, _tensors(MODELS[model], classes, channels)) else set()


@cache
def _tensors(make: Callable[..., nn.Module], *counts: int) -> dict[str, Tensor]:
    """Return the tensors, without their values, of the network that a function of `MODELS` makes."""
    with torch.device("meta"):
        return make(*counts).state_dict()


def require_finite(weights: Path, model: nn.Module) -> None:
    """Check the weights that `model` has from a file. Raises DataError if some are not finite."""
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise DataError(f"{weights} holds weights that are not finite: the run that made it diverged")


def require_same_images(whose: str, facts: Facts, classes: int, channels: int) -> None:
    """Check that a network was trained on images of so many classes and channels, where its facts say it.

    Args:
        whose: the network in words, to begin the message with.
    Raises:
        DataError: it was trained on others.
    """
    for what, own, there in (("classes", facts.num_classes, classes), ("channels", facts.channels, channels)):
        if own not in (None, there):
            raise DataError(f"{whose} knows {own} {what}, the data has {there}: give one of the same data set")
