"""DAFA: similar classes trade robustness, the harder of two gets what the easier gives (Lee et al., ICLR 2024).

min  W[y] CE(S(x), y) + beta KL(S(x) || S(x'))   where   x' = argmax KL(S(x) || S(x')) in the ball of radius W[y] eps

TRADES, W = 1, until the end of the warm-up; then once, with p_k the mean prediction of attacked images of class k,

W[i] = 1 + scale sum over j != i of   p_i[j] p_j[j]  if p_i[i] < p_j[j],   -p_j[i] p_i[i]  otherwise
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retemper.engine import (
    MOST_EPOCHS,
    EpochStats,
    OwnPredictionAttack,
    Recipe,
    Targets,
    TrainingAttack,
    at_least_float32,
    kl_rows,
    option,
    run_recipe,
)
from retemper.recipes.settings import ON_BOTH, adversarial_training


def traded_weight(mean_probability_KK: Tensor, scale: float = 1.0) -> Tensor:
    """Return the weight of each class, (K,); the weights sum to K.

    Args:
        mean_probability_KK: (K, K); row k is the mean prediction of attacked images of class k.
        scale: how much is traded; lambda in the paper.
    """
    own_K = mean_probability_KK.diagonal()
    given_KK = mean_probability_KK * own_K  # [i, j]: what i gets from j, when j is the easier
    harder_KK = own_K[:, None] < own_K
    gained_KK = torch.where(harder_KK, given_KK, -given_KK.T)
    return 1 + scale * (gained_KK.sum(1) - gained_KK.diagonal())


@dataclass(frozen=True, kw_only=True)
class Dafa(OwnPredictionAttack):
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    # released: the script inverts its flag, so that its SGD is Nesterov's; all images are trained on, and the last
    # epoch is kept. A weight below 0, which a network that gives one answer to all leads to, is 0 here and not there.
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(nesterov=True, holdout_per_class=0, precision="fp32")
    }
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("adv", "clean")  # the authors' order
    beta: float = option(6.0, "weight of the robust term", at_most=1000)
    scale: float = option(1.0, "how much similar classes trade (lambda)", at_most=100)
    warm_up: int = option(70, "the epoch after which the weights are computed, once", at_most=MOST_EPOCHS)

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return {"class_weight": torch.ones(num_classes)}

    def margins(self, targets: Targets, attack: TrainingAttack) -> tuple[Tensor, Tensor]:
        weight_B = targets.state["class_weight"][targets.label_B]
        return attack.eps * weight_B, attack.step * weight_B

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        weight_B = targets.state["class_weight"][targets.label_B]
        clean_B = weight_B * targets.cross_entropy_rows(logits["clean"])
        return (clean_B + self.beta * kl_rows(logits["clean"], logits["adv"])).mean()

    def measured(self, logits: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        return {"probability": at_least_float32(logits["adv"]).softmax(1)}

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        if epoch != self.warm_up:
            return dict(state)
        weight_K = traded_weight(stats.measured["probability"].mean_KD, self.scale)
        return {"class_weight": weight_K.clamp(min=0)}


AUTHORS: dict[str, Any] = dict(
    eps=0.031, attack_step=0.007, epochs=110, lr_drops=(99, 104), weight_decay=5e-4, select_always_from=99
)
# the share of the authors' 110 epochs that comes before the weights
SETTINGS = adversarial_training(
    Dafa,
    AUTHORS,
    ON_BOTH,
    digits=dict(warm_up=12),
    small=dict(warm_up=6),
    fashion_mnist_resnet18=dict(warm_up=38),
    cifar100_resnet18=dict(scale=1.5),
    tiny_imagenet_preact_resnet18=dict(scale=1.5, warm_up=64),
    imagenet100_resnet18=dict(scale=1.5, warm_up=57),
)

if __name__ == "__main__":
    run_recipe(__file__)
