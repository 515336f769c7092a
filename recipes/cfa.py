"""CFA: a margin and a weight of robustness for each class, by how robust it is already (Wei et al., CVPR 2023).

min  a[y] CE(S(x), y) + b[y] KL(S(x) || S(x'))   where   x' = argmax KL(S(x) || S(x')) in the ball of radius eps[y]

TRADES until `calibrate_from`. After each epoch then, with t[k] the share of class k's training images that withstood,

eps[k] = (lambda1 + t[k]) eps,   beta[k] = (lambda2 + t[k]) beta,   a[k] = 1 / (1 + beta[k]),   b[k] = beta[k] a[k]

AT + CFA has the radii alone:   min CE(S(x'), y)   where   x' = argmax CE(S(x'), y) in the ball of radius eps[y].
What is kept is an average of the epochs' weights that skips those whose worst class is too weak on held-out images.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from retemper.engine import (
    MOST_EPOCHS,
    EpochStats,
    Forwards,
    LabelAttack,
    Method,
    OwnPredictionAttack,
    Recipe,
    Targets,
    TrainingAttack,
    kl_rows,
    option,
    run_recipe,
)
from retemper.recipes.settings import ON_BOTH, adversarial_training


def class_radius(robust_accuracy_K: Tensor, eps: float, margin_offset: float) -> Tensor:
    """Return the radius of each class, (K,), in units of `eps`: a class that withstands attacks gets stronger ones."""
    return (margin_offset + robust_accuracy_K) * eps


def loss_weights(robust_accuracy_K: Tensor, beta: float, beta_offset: float) -> tuple[Tensor, Tensor]:
    """Return the weights of the cross-entropy and of the KL, each (K,); the two sum to 1."""
    beta_K = (beta_offset + robust_accuracy_K) * beta
    return 1 / (1 + beta_K), beta_K / (1 + beta_K)


def full(num_classes: int, value: float) -> Tensor:
    """Return one value for all classes, (K,) float64: what it is made of rounds it once, to the dtype of the run."""
    return torch.full((num_classes,), value, dtype=torch.float64)


# released, of both: the code's constants; an average that begins with the first epoch that is good enough on the first
# images of each class; the best epoch on test images; a forward of clean images after each step. While no epoch was
# good enough, theirs keeps a network that was never trained, and ours the student.
RELEASED: dict[str, Any] = dict(
    margin_offset=0.5,
    ema_decay=0.88,
    average_from=1,
    select_on="test",
    holdout_from="start",
    normalise=True,
    padding_mode="reflect",
    precision="fp32",
)


@dataclass(frozen=True, kw_only=True)
class ClassRadius(Method):
    """The radius of each class, which AT + CFA and TRADES + CFA have in common."""

    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    margin_offset: float = option(0.3, "added to a class's robust accuracy in its radius (lambda1)", at_most=100)
    calibrate_from: int = option(10, "the epoch after which radii and weights are of each class", at_most=MOST_EPOCHS)

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return {"margin": full(num_classes, recipe.attack.eps)}

    def margins(self, targets: Targets, attack: TrainingAttack) -> tuple[Tensor, float]:
        return targets.state["margin"][targets.label_B], attack.step

    def calibrated(self, robust_accuracy_K: Tensor, recipe: Recipe) -> dict[str, Tensor]:
        """Return the class state for classes that withstood so well."""
        return {"margin": class_radius(robust_accuracy_K, recipe.attack.eps, self.margin_offset)}

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        if epoch < self.calibrate_from:
            return dict(state)
        return self.calibrated(stats.forwards["adv"].accuracy_K, recipe)


@dataclass(frozen=True, kw_only=True)
class Cfa(ClassRadius, OwnPredictionAttack):
    # released: the TRADES of the first epochs is divided by 1 + beta, like the loss after them; a third forward
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": RELEASED | dict(average_above=0.24)}
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("clean", "adv")
    released_forwards: ClassVar[Forwards] = Forwards(("clean", "adv", "clean"), after=("clean",))
    beta: float = option(6.0, "weight of the robust term", at_most=1000)
    beta_offset: float = option(0.5, "added to a class's robust accuracy in its beta (lambda2)", at_most=100)

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        scale = 1 + self.beta if self.variant == "released" else 1.0
        weights = {"ce_weight": full(num_classes, 1 / scale), "kl_weight": full(num_classes, self.beta / scale)}
        return super().class_state(num_classes, recipe) | weights

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        ce_B, kl_B = (targets.state[name][targets.label_B] for name in ("ce_weight", "kl_weight"))
        clean_B = targets.cross_entropy_rows(logits["clean"])
        return (ce_B * clean_B + kl_B * kl_rows(logits["clean"], logits["adv"])).mean()

    def calibrated(self, robust_accuracy_K: Tensor, recipe: Recipe) -> dict[str, Tensor]:
        ce_K, kl_K = loss_weights(robust_accuracy_K, self.beta, self.beta_offset)
        return super().calibrated(robust_accuracy_K, recipe) | {"ce_weight": ce_K, "kl_weight": kl_K}


@dataclass(frozen=True, kw_only=True)
class CfaAt(ClassRadius, LabelAttack):
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": RELEASED}
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("adv",)
    released_forwards: ClassVar[Forwards] = Forwards(("adv",), after=("clean",))
    margin_offset: float = option(0.5, "added to a class's robust accuracy in its radius (lambda1)", at_most=100)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return targets.cross_entropy_rows(logits["adv"]).mean()


AUTHORS: dict[str, Any] = dict(
    average="ema",
    average_every="epoch",
    average_from=50,
    average_above=0.2,
    ema_decay=0.85,
    epochs=200,
    lr_drops=(100, 150),
    weight_decay=5e-4,
    select_steps=10,
    select_from=101,
    select_always_from=101,
)
AUTHORS_AT: dict[str, Any] = AUTHORS | dict(attack_start="uniform", clip_start=True, attack_bn="train")
# a twentieth and a quarter of the epochs, as of the authors' 200; the second half may be kept
CHANGES: dict[str, Any] = dict(
    digits=dict(calibrate_from=1, average_from=5),
    small=dict(calibrate_from=1, average_from=3, select_from=6),
    fashion_mnist_resnet18=dict(calibrate_from=3, average_from=15, select_from=31),
    cifar100_resnet18=dict(average_above=0.0),  # the worst of 100 classes never gets there
    tiny_imagenet_preact_resnet18=dict(calibrate_from=5, average_from=25, average_above=0.0, select_from=51),
    imagenet100_resnet18=dict(calibrate_from=5, average_from=23, average_above=0.0, select_from=46),
)
SETTINGS = adversarial_training(Cfa, AUTHORS, ON_BOTH, **CHANGES) | {
    f"{name}_at": replace(setting, note=f"AT + CFA: {setting.note}")
    for name, setting in adversarial_training(CfaAt, AUTHORS_AT, **CHANGES).items()
}

if __name__ == "__main__":
    run_recipe(__file__)
