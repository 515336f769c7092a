"""CFA: a margin and a weight of robustness for each class, by how robust it is already (Wei et al., CVPR 2023).

min  a[y] CE(S(x), y) + b[y] KL(S(x) || S(x'))   where   x' = argmax KL(S(x) || S(x')) in the ball of radius eps[y]

TRADES until `calibrate_from`. After each epoch then, with t[k] the share of class k's training images that withstood,

eps[k] = (lambda1 + t[k]) eps,   beta[k] = (lambda2 + t[k]) beta,   a[k] = 1 / (1 + beta[k]),   b[k] = beta[k] a[k]

What is kept is an average of the epochs' weights that skips those whose worst class is too weak on held-out images.

Over 80 lines: margins, loss weights and the weights' average each have a rule and a schedule.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from retemper.engine import EpochStats, KlObjective, Recipe, Targets, cross_entropy_rows, kl_rows, run_recipe
from retemper.recipes.settings import ON_BOTH, adversarial_training


def class_margin(robust_accuracy_K: Tensor, eps: float, margin_offset: float) -> Tensor:
    """(K,) the radius of each class: a class that withstands attacks gets stronger ones."""
    return (margin_offset + robust_accuracy_K) * eps


def loss_weights(robust_accuracy_K: Tensor, beta: float, beta_offset: float) -> tuple[Tensor, Tensor]:
    """(K,) of the cross-entropy and (K,) of the KL; the two sum to 1."""
    beta_K = (beta_offset + robust_accuracy_K) * beta
    return 1 / (1 + beta_K), beta_K / (1 + beta_K)


@dataclass(frozen=True, kw_only=True)
class Cfa(Recipe):
    # paper: the constants that it names for TRADES. released: the code's defaults, and an average that begins with the
    # first epoch that is good enough; the TRADES of the first epochs is divided by 1 + beta, like the loss after them.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_fields: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(margin_offset=0.5, ema_decay=0.88, average_above=0.24, average_from=1),
    }
    forwards: ClassVar[tuple[str, ...]] = ("clean", "adv")
    needs_own_prediction: ClassVar[bool] = True
    beta: float = 6.0
    margin_offset: float = 0.3  # lambda1
    beta_offset: float = 0.5  # lambda2
    calibrate_from: int = 10  # after this epoch
    average: Literal["none", "ema", "swa"] = "ema"
    average_every: Literal["step", "epoch"] = "epoch"
    average_from: int = 50
    average_above: float = 0.2
    ema_decay: float = 0.85
    epochs: int = 200
    lr_drops: tuple[int, ...] = (100, 150)
    weight_decay: float = 5e-4
    select_from: int = 100
    select_always_from: int = 100

    def class_state(self, num_classes: int) -> dict[str, Tensor]:
        scale = 1 + self.beta if self.variant == "released" else 1.0
        return {
            "margin": torch.full((num_classes,), self.eps),
            "ce_weight": torch.full((num_classes,), 1 / scale),
            "kl_weight": torch.full((num_classes,), self.beta / scale),
        }

    def objective(self, targets: Targets) -> KlObjective:
        return KlObjective(targets.own, targets.label_B, targets.ones_K)

    def margins(self, targets: Targets) -> tuple[Tensor, float]:
        return targets.state["margin"][targets.label_B], self.attack_step

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        ce_B, kl_B = (targets.state[name][targets.label_B] for name in ("ce_weight", "kl_weight"))
        clean_B = cross_entropy_rows(logits["clean"], targets.label_B)
        return (ce_B * clean_B + kl_B * kl_rows(logits["clean"], logits["adv"])).mean()

    def next_class_state(self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int) -> dict[str, Tensor]:
        if epoch < self.calibrate_from:
            return dict(state)
        robust_K = stats.forwards["adv"].accuracy_K
        ce_K, kl_K = loss_weights(robust_K, self.beta, self.beta_offset)
        return {
            "margin": class_margin(robust_K, self.eps, self.margin_offset),
            "ce_weight": ce_K,
            "kl_weight": kl_K,
        }


# a twentieth and a quarter of the epochs, as of the authors' 200
SETTINGS = adversarial_training(
    Cfa,
    ON_BOTH,
    digits=dict(calibrate_from=1, average_from=5),
    fashion_mnist_small=dict(calibrate_from=1, average_from=3, select_from=5),
    fashion_mnist_resnet18=dict(calibrate_from=3, average_from=15, select_from=30),
    cifar100_resnet18=dict(average_above=0.0),  # the worst of 100 classes never gets there
    tiny_imagenet_preact_resnet18=dict(calibrate_from=5, average_from=25, average_above=0.0, select_from=50),
)

if __name__ == "__main__":
    run_recipe(__file__)
