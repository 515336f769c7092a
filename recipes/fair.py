"""What the Fair-ARD family shares: classes that fall to fewer attack steps count more (Yue et al., NeurIPS 2023).

w[k] <- clip(K v[k] / sum v, 5/6, 5/2)   where   v[k] = (1 / (kappa[k] + 1e-5)) ** beta

kappa[k] is the class's mean difficulty over an epoch: how many of the training attack's iterates, the last one apart,
the student still classifies correctly. Of an attack in one step that is its random start alone, so an image counts 0
or 1. The weights are not normalised again after the clip. Every term of an image's loss is multiplied by its class's
weight; in the first epoch all are 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retemper.engine import EpochStats, Method, Recipe, Targets, Watcher, option, require_order
from retemper.engine.attack import predicts

FLOOR = 1e-5  # a class that is never classified correctly has kappa = 0
STEEPEST = 7  # the largest beta: FLOOR ** -8 is more than float32 holds


def class_weight(
    kappa_K: Tensor, beta: float = 2.0, lower: float = 5 / 6, upper: float = 5 / 2, met_K: Tensor | None = None
) -> Tensor:
    """Return the next epoch's class weights.

    Args:
        kappa_K: (K,) float, each in [0, number of attack steps].
        beta: how strongly difficulty counts; 0 weighs all classes alike.
        met_K: (K,) bool, the classes that had images: another weighs 1, and counts in no sum. None: all had.
    Returns:
        (K,), like `kappa_K`, each in [lower, upper].
    Raises:
        ValueError: `kappa_K` is not one-dimensional.
    """
    if kappa_K.dim() != 1:
        raise ValueError(f"kappa_K has shape {tuple(kappa_K.shape)}: it must be (K,)")
    raw_K = (kappa_K + FLOOR).reciprocal() ** beta
    if met_K is not None:
        raw_K = torch.where(met_K, raw_K, raw_K[met_K].mean())
    return (raw_K * kappa_K.numel() / raw_K.sum()).clamp(lower, upper)


class Kappa(Watcher):
    """Counts, during an attack, the iterates at which each image is still classified correctly.

    Attributes:
        count_B: (B,) float32.
    """

    def __init__(self, label_B: Tensor) -> None:
        self.label_B = label_B
        self.count_B = torch.zeros_like(label_B, dtype=torch.float32)

    def __call__(self, adv_BCHW: Tensor, logits_BK: Tensor) -> None:
        self.count_B += predicts(logits_BK, self.label_B)


# what `released` sets in the whole family, and in the methods of it that build on ARD
RELEASED: Mapping[str, Mapping[str, Any]] = {"released": dict(nesterov=True, holdout_per_class=0, precision="fp32")}
RELEASED_BY_ARD: Mapping[str, Mapping[str, Any]] = {"released": dict(RELEASED["released"], lr_drop_of="first")}


@dataclass(frozen=True, kw_only=True)
class Fair(Method):
    """The class weights, for a method that multiplies its loss by `targets.state["class_weight"]`."""

    # released: the authors' code takes Nesterov's momentum, which the methods that it builds on do not. It divides a
    # class's sum of kappa by N / K, which is the number of its images where classes are of equal size. It trains on all
    # images in fp32 and keeps every epoch without choosing one: here the last.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = RELEASED
    beta: float = option(2.0, "how strongly the difficulty of a class counts; 0 weighs all alike", at_most=STEEPEST)
    weight_lower: float = option(5 / 6, "the least weight of a class", at_most=1000)
    weight_upper: float = option(5 / 2, "the largest weight of a class", positive=True, at_most=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_order(self, "weight_lower", "weight_upper")

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return super().class_state(num_classes, recipe) | {"class_weight": torch.ones(num_classes)}

    def watcher(self, clean_BCHW: Tensor, targets: Targets) -> Kappa:
        return Kappa(targets.label_B)

    def measured(self, logits: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        return super().measured(logits, targets) | {"kappa": targets.watched.count_B}

    def kappa(self, stats: EpochStats) -> Tensor:
        """Return kappa, (K,), as `class_weight` takes it."""
        kappa = stats.measured["kappa"]
        return kappa.total_KD.squeeze(1) / kappa.count_K.mean() if self.variant == "released" else kappa.mean_K

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        met_K = stats.measured["kappa"].count_K > 0
        weight_K = class_weight(self.kappa(stats), self.beta, self.weight_lower, self.weight_upper, met_K)
        return super().next_class_state(state, stats, epoch, recipe) | {"class_weight": weight_K}
