"""A trained network on disk: a run's folder, or a checkpoint file with the facts that its file or the user gives."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from retemper.engine.models import channels_last, create_model
from retemper.engine.run_folder import RunFolder
from retemper.engine.weights import file_digest, load_checkpoint
from retemper.loaders.errors import DataError, UsageError


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a network's weights do not say about themselves. None where nobody said it."""

    model: str | None = None
    num_classes: int | None = None
    channels: int | None = None
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


def facts_of(weights: Path) -> Facts:
    """What a checkpoint file says of itself: the header that runs write into their safetensors files."""
    if weights.suffix != ".safetensors":
        return Facts()
    try:
        with safe_open(weights, framework="pt") as file:
            header = file.metadata() or {}
        number, size = header.get("num_classes"), header.get("eps")
        return Facts(
            model=header.get("model"),
            num_classes=int(number) if number else None,
            channels=int(header["channels"]) if "channels" in header else None,
            dataset=header.get("dataset"),
            eps=float(size) if size else None,
        )
    except (SafetensorError, OSError, ValueError):
        return Facts()  # loading the weights says what is wrong with the file


def load_trained(weights: Path, facts: Facts, device: torch.device) -> nn.Module:
    """The network in `weights`: channels-last, frozen, in eval mode.

    Raises:
        UsageError: its architecture or number of classes is not known.
        DataError: the file does not hold that architecture's weights.
    """
    if facts.model is None or facts.num_classes is None:
        raise UsageError(
            f"{weights} does not say what it is: name its architecture and data set with --model and --dataset"
        )
    model = create_model(facts.model, facts.num_classes, channels=facts.channels)
    load_checkpoint(weights, model)
    return channels_last(model, device).eval().requires_grad_(False)


def teacher_facts(target: Path, fallback: Facts) -> tuple[Path, Facts, dict[str, str]]:
    """A teacher's weights, what they are, and how config.json names them."""
    weights = weights_of(target)
    facts = facts_of(weights).or_else(fallback)
    return weights, facts, {"path": str(target), "model": str(facts.model), "sha256": file_digest(weights)}


def is_run(target: Path) -> bool:
    """Whether `target` is a run's folder."""
    return os.path.isdir(target) and RunFolder(target).config.exists()
