"""Checkpoints that the literature distils from: the digest or name of each, and the clean accuracy it must reach.

The accuracies are the authors' own, on the whole test set, or RobustBench's for its names. A network that falls short
of its accuracy is another one than the papers used, or is shown other pixels, classes or channels than in its training.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from retemper.console import say
from retemper.engine.predict import ATTACKS, balanced_order, survivors
from retemper.errors import DataError
from retemper.loaders import Split, load_split

IMAGES = 1_000  # that are classified, balanced over the classes: a standard error of about one percentage point
SIGMAS = 4  # standard errors: a network falls as far short by chance once in 30,000 times


@dataclass(frozen=True)
class Published:
    """A published network.

    Attributes:
        known_by: the SHA-256 of its file, or its name at RobustBench.
        title: its name in the literature.
        model: its architecture; a key of `MODELS` for a file.
        dataset: that it was trained on.
        clean_accuracy: the share of the test images that it classifies correctly, a fraction.
    """

    known_by: str
    title: str
    model: str
    dataset: str
    clean_accuracy: float


PUBLISHED = (
    Published(
        "2ede52bd042bbdf40a0c27e8008034afd9cbb0b256b9077a255e555d25f957f4",
        "TRADES' model_cifar_wrn.pt", "wrn34_10", "cifar10", 0.8492,
    ),
    Published(
        "9e1d3395f0a8c34296ca8cd4875b9b5177d53f79e89af9b88e1a6724c6d6c860",
        "MTARD's ResNet-56, its clean CIFAR-10 teacher", "resnet56", "cifar10", 0.9318,
    ),
    Published(
        "robustbench:Zhang2019Theoretically@cifar10/Linf",
        "TRADES' WRN-34-10", "wrn34_10", "cifar10", 0.8492,
    ),
    Published(
        "robustbench:Chen2021LTD_WRN34_20@cifar10/Linf",
        "LTD's WRN-34-20, AdaAD's CIFAR-10 teacher", "wrn34_20", "cifar10", 0.8603,
    ),
    Published(
        "robustbench:Chen2021LTD_WRN34_10@cifar10/Linf",
        "LTD's WRN-34-10 for CIFAR-10", "wrn34_10", "cifar10", 0.8521,
    ),
    Published(
        "robustbench:Chen2021LTD_WRN34_10@cifar100/Linf",
        "LTD's WRN-34-10, AdaAD's CIFAR-100 teacher", "wrn34_10", "cifar100", 0.6407,
    ),
    Published(
        "robustbench:Gowal2020Uncovering@cifar100/Linf",
        "DeepMind's WRN-70-16, the CIFAR-100 teacher of RSLAD and MTARD", "WRN-70-16", "cifar100", 0.6086,
    ),
)  # fmt: skip


def published(known_by: str) -> Published | None:
    """Return the published network with this file digest, or with this name at RobustBench."""
    return next((one for one in PUBLISHED if one.known_by == known_by), None)


def require_stated_accuracy(network: nn.Module, known: Published, data_root: Path | None, device: torch.device) -> None:
    """Check that a network classifies as many test images correctly as is published. No choice depends on it.

    Args:
        network: from (B, C, H, W) pixels to (B, K) logits, in eval mode, on `device`.
        data_root: the folder of the data sets.
    Raises:
        DataError: it falls short by more than chance allows, or the test images are missing.
    """
    split = load_split(known.dataset, "test", data_root)
    accuracy, images = clean_accuracy(network, split, device)
    say(f"{known.title}: {accuracy:.1%} of {images:,} test images, {known.clean_accuracy:.2%} of all are stated")
    if accuracy < known.clean_accuracy - margin(known.clean_accuracy, images):
        raise DataError(
            f"{known.title} should classify {known.clean_accuracy:.2%} of the test images correctly, not "
            f"{accuracy:.1%}: look at the pixels' range, the order of the classes and the data under --data-root"
        )


def clean_accuracy(network: nn.Module, split: Split, device: torch.device) -> tuple[float, int]:
    """Return the share of images that are classified correctly, and the number of images: 1,000 balanced, or all."""
    order = balanced_order(split.labels, IMAGES)
    correct = survivors(network, split, ATTACKS["clean"], eps=0, device=device, indices=order)
    return correct.double().mean().item(), len(order)


def margin(accuracy: float, images: int) -> float:
    """Return how far the share of so many images may lie from `accuracy` by chance: `SIGMAS` binomial errors."""
    return SIGMAS * math.sqrt(accuracy * (1 - accuracy) / images)
