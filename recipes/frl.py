"""FRL: classes whose error exceeds the mean by a bound get more weight, and a larger eps (Xu et al., ICML 2021).

min  sum w_clean[y] CE(S(x), y) / sum w_clean[y]  +  beta sum w_bndy[y] KL(S(x) || S(x')) / sum w_bndy[y]

where x' = argmax KL(S(x) || S(x')) in the ball of radius eps clip(exp(2 m[y]), 0.98, 3). Before each epoch, on held-out
images, with e the clean error of each class and b its boundary error (correct, but not under PGD):

l_clean <- simplex(l_clean + r (e - mean e - delta)),  l_bndy <- simplex(l_bndy + 2 r (b - mean b - delta)),
m <- m + r_margin (b - mean b - delta),                w[k] = 1/K + l[k] - mean l
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retemper.engine import (
    MOST_EPOCHS,
    EpochStats,
    Forwards,
    OwnPredictionAttack,
    Part,
    Recipe,
    Targets,
    TrainingAttack,
    kl_rows,
    option,
    require_order,
    run_recipe,
)
from retemper.recipes.settings import ON_DIGITS, adversarial_training


def simplex(multiplier_K: Tensor, limit: float) -> Tensor:
    """Return the multipliers, (K,), made non-negative and scaled to sum to no more than `limit`."""
    multiplier_K = multiplier_K.clamp(min=0)
    return multiplier_K * (limit / multiplier_K.sum().clamp(min=limit))


def loss_weight(multiplier_K: Tensor) -> Tensor:
    """Return the weights of the classes in the loss, (K,), which sum to 1."""
    return 1 / multiplier_K.numel() + multiplier_K - multiplier_K.mean()


def weighted_mean(loss_B: Tensor, weight_B: Tensor, part: Part) -> Tensor:
    """Return the weighted mean of (B,) losses, the weights divided by their mean over the whole batch."""
    return (weight_B * loss_B).mean() / part.mean(weight_B.mean())


REWEIGHT: dict[str, Any] = dict(delta=0.1, margin_rate=0.0)
SCRIPT: dict[str, Any] = dict(holdout_from="end", select_from=MOST_EPOCHS, precision="fp32")


@dataclass(frozen=True, kw_only=True)
class Frl(OwnPredictionAttack):
    # remargin: weights and margins. reweight: weights alone, for which the authors take another bound. released and
    # released-reweight: their scripts, which look at the clean images twice, hold the last images of each class out and
    # keep the last epoch. Their network has no last batch norm: --student preact_resnet18_frl.
    variants: ClassVar[tuple[str, ...]] = ("remargin", "reweight", "released", "released-reweight")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reweight": REWEIGHT,
        "released": SCRIPT,
        "released-reweight": SCRIPT | REWEIGHT,
    }
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("clean", "adv")
    validates_by: ClassVar = "pgd"
    variant: str = option("remargin", "weights and margins, or weights alone", choices="variants")
    beta: float = option(1.5, "weight of the robust term", at_most=1000)
    delta: float = option(0.07, "excess of error over the mean that is tolerated", at_most=1)
    weight_rate: float = option(0.05, "rate of the clean weights (r); the robust ones move twice as fast", at_most=100)
    margin_rate: float = option(0.2, "rate of the margins (r_margin)", at_most=100)
    rate_halves_every: int = option(
        40, "epochs after which the weights' rate is halved", positive=True, at_most=MOST_EPOCHS
    )
    limit: float = option(0.5, "what the multipliers may sum to", at_most=1000)
    margin_lower: float = option(0.98, "the least factor on a class's radius", at_most=100)
    margin_upper: float = option(3.0, "the largest factor on a class's radius", at_most=100)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_order(self, "margin_lower", "margin_upper")

    def forwards_in(self, epoch: int, recipe: Recipe) -> Forwards:
        return Forwards(("clean", "adv", "clean") if self.variant.startswith("released") else self.forwards)

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return {f"multiplier_{name}": torch.zeros(num_classes) for name in ("clean", "boundary", "margin")}

    def margins(self, targets: Targets, attack: TrainingAttack) -> tuple[Tensor, Tensor]:
        factor_K = (2 * targets.state["multiplier_margin"]).exp().clamp(self.margin_lower, self.margin_upper)
        eps_B = attack.eps * factor_K[targets.label_B]
        largest = targets.part.largest(eps_B.amax())
        return eps_B, torch.ones_like(eps_B) * largest / 4  # the authors' step is the batch's largest eps / 4

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        clean_B, boundary_B = (
            loss_weight(targets.state[f"multiplier_{name}"])[targets.label_B] for name in ("clean", "boundary")
        )
        clean = weighted_mean(targets.cross_entropy_rows(logits["clean"]), clean_B, targets.part)
        boundary = weighted_mean(kl_rows(logits["clean"], logits["adv"]), boundary_B, targets.part)
        return clean + self.beta * boundary

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        assert stats.held is not None
        clean_K, robust_K = stats.held.clean_accuracy_K, stats.held.robust_accuracy_K
        excess_clean_K = clean_K.mean() - clean_K - self.delta  # of errors: 1 - accuracy
        boundary_K = clean_K - robust_K
        excess_boundary_K = boundary_K - boundary_K.mean() - self.delta
        rate = self.weight_rate / 2 ** ((epoch + 1) // self.rate_halves_every)  # that of the epoch to come
        return {
            "multiplier_clean": simplex(state["multiplier_clean"] + rate * excess_clean_K, self.limit),
            "multiplier_boundary": simplex(state["multiplier_boundary"] + 2 * rate * excess_boundary_K, self.limit),
            "multiplier_margin": state["multiplier_margin"] + self.margin_rate * excess_boundary_K,
        }


AUTHORS: dict[str, Any] = dict(
    epochs=40,
    lr=0.001,
    lr_drops=(40, 80),
    weight_decay=5e-4,
    holdout_per_class=300,
    select_every=5,
    select_always_from=30,
)
# 20 and 10 epochs in place of 40, and far fewer steps: larger rates; but margins that are large already grow less
DIGITS_SHORT = dict(lr=0.01, lr_drops=(20,), weight_rate=0.1, margin_rate=0.05, rate_halves_every=20)
FASHION_SHORT = dict(lr=0.01, lr_drops=(10,), weight_rate=0.2, margin_rate=0.1, rate_halves_every=10)
FINE_TUNE = dict(epochs=40, lr_drops=(40, 80), select_always_from=30)
SETTINGS = adversarial_training(
    Frl,
    AUTHORS,
    ON_DIGITS,
    from_robust="sat",
    digits=DIGITS_SHORT,
    small=FASHION_SHORT,
    fashion_mnist_resnet18=FINE_TUNE,
    svhn_resnet18=dict(lr=0.001),  # the authors', to fine-tune
    cifar100_resnet18=dict(holdout_per_class=30),  # the authors' share, of classes of 500
    tiny_imagenet_preact_resnet18=FINE_TUNE | dict(holdout_per_class=30),
    imagenet100_resnet18=FINE_TUNE | dict(holdout_per_class=30),
)

if __name__ == "__main__":
    run_recipe(__file__)
