"""A trained network on disk: a run's folder, or a checkpoint file with the facts that its file or the user gives."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from retemper.engine.checkpoints.weights import load_checkpoint
from retemper.engine.models import channels_last, create_model
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError, UsageError


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a network's weights do not say about themselves. None where nobody said it."""

    model: str | None = None
    num_classes: int | None = None
    channels: int | None = None
    image_size: int | None = None
    dataset: str | None = None
    eps: float | None = None

    def or_else(self, other: "Facts") -> "Facts":
        """These facts, completed from `other`."""
        fields = Facts.__dataclass_fields__
        return Facts(**{f: getattr(other, f) if getattr(self, f) is None else getattr(self, f) for f in fields})

    def as_metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        return {f: str(getattr(self, f)) for f in Facts.__dataclass_fields__ if getattr(self, f) is not None}


def weights_of(target: Path, which: str = "best") -> Path:
    """The checkpoint file that `target` means: itself, or a run folder's `which` weights.

    Raises:
        DataError: there is no such file.
    """
    if not target.is_dir():
        if not target.exists():
            raise DataError(f"{target} does not exist: name a run's folder or a checkpoint file")
        return target
    path = target / f"{which}.safetensors"
    if not path.exists():
        raise DataError(f"{target} holds no {path.name}: it is no run's folder, or the run has not finished an epoch")
    return path


def header_of(weights: Path) -> dict[str, str]:
    """The header of a safetensors file; empty if it is none: loading the weights says what is wrong with it."""
    if weights.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open  # here, not above: the benchmarks run without it

    try:
        with safe_open(weights, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def facts_of(weights: Path) -> Facts:
    """What a checkpoint file says of itself: the header that runs write into their safetensors files."""
    header = header_of(weights)
    try:
        number, size = header.get("num_classes"), header.get("eps")
        return Facts(
            model=header.get("model"),
            num_classes=int(number) if number else None,
            channels=int(header["channels"]) if "channels" in header else None,
            image_size=int(header["image_size"]) if "image_size" in header else None,
            dataset=header.get("dataset"),
            eps=float(size) if size else None,
        )
    except ValueError:
        return Facts()


def load_trained(weights: Path, facts: Facts, device: torch.device) -> nn.Module:
    """The network in `weights`: channels-last, frozen, in eval mode.

    Raises:
        UsageError: its architecture or number of classes is not known.
        DataError: the file does not hold that architecture's weights, or they are not finite.
    """
    if facts.model is None or facts.num_classes is None:
        raise UsageError(
            f"{weights} does not say what it is: name its architecture and data set with --model and --dataset"
        )
    try:
        model = create_model(facts.model, facts.num_classes, channels=facts.channels)
    except ValueError as error:
        raise UsageError(str(error)) from None
    load_checkpoint(weights, model)
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise DataError(f"{weights} holds weights that are not finite: the run that made it diverged")
    return channels_last(model, device).eval().requires_grad_(False)


def require_same_images(whose: str, facts: Facts, classes: int, channels: int) -> None:
    """Refuse a network for other images.

    Raises:
        DataError: it knows another number of classes or channels.
    """
    for what, own, there in (("classes", facts.num_classes, classes), ("channels", facts.channels, channels)):
        if own not in (None, there):
            raise DataError(f"{whose} knows {own} {what}, the data has {there}: give one of the same data set")


def is_run(target: Path) -> bool:
    """Whether `target` is a run's folder."""
    return os.path.isdir(target) and RunFolder(target).config.exists()
