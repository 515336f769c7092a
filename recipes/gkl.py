"""GKL: TRADES' KL divergence taken apart, with weights of classes in place of images' (Cui et al., TPAMI 2026).

min  CE(S(x), y) + alpha KL(p || S(x')) + beta/4 sum_jk w_j w_k (d_j - d_k)^2,   p = S(x), a constant

where x' = argmax KL(S(x) || S(x')), and d are the logits of x less those of x'. Both sides of the square learn, which
is what the KL divergence lacks. w is the row of the class y in a table: row k is the mean of softmax(logits / T) over
class k's images in the last epoch, to the power gamma; uniform at first. The square's mean is over the w_j w_k.

The radius grows with the epochs, from 0 to eps, and the attack's steps with the quarters: 2, 3, 4, 5. IKL (Cui et al.,
NeurIPS 2024) is `--variant ikl`: gamma = 1, at T = 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retemper.engine import (
    EpochStats,
    KlObjective,
    Method,
    Objective,
    Recipe,
    Setting,
    Targets,
    TrainingAttack,
    at_least_float32,
    option,
    run_recipe,
)
from retemper.kernels import class_pair, class_temperature_kl
from retemper.recipes.settings import ON_DIGITS, adversarial_training

LONGER = (2.0, 4 / 3, 1.0, 1.0)  # how much longer a step is in each quarter than in the last


def quarter_of(epoch: int, epochs: int) -> int:
    """Return in which quarter of the run an epoch is: 1 to 4."""
    return sum(epoch > int(quarter * epochs / 4) for quarter in range(4))


@dataclass(frozen=True, kw_only=True)
class Gkl(Method):
    # released: the quarters' conditions do not exclude one another, so that all epochs have the last one's steps, 5 of
    # eps / 2; what is kept is an average of the epochs, .9 from the first on, as the average of .9996 is computed and
    # not saved; decay pulls at the perturbed weights, and all images are trained on. Their script for CIFAR-10 loses
    # the line with T = 1 and runs at 4: add --temperature 4.
    variants: ClassVar[tuple[str, ...]] = ("paper", "ikl", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ikl": dict(temperature=4.0, power=1.0),
        "released": dict(
            average_every="epoch",
            average_from=1,
            ema_decay=0.9,
            awp_decay="perturbed",
            holdout_per_class=0,
            precision="fp32",
        ),
    }
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("adv", "clean")  # the authors' order
    needs_own_prediction: ClassVar[bool] = True
    attack_asks_teacher: ClassVar[bool] = False
    alpha: float = option(4.0, "weight of the KL divergence (alpha)", at_most=1000)
    beta: float = option(20.0, "weight of the square over pairs of classes (beta)", at_most=1000)
    temperature: float = option(1.0, "temperature of the predictions in the table (T)", positive=True, at_most=1000)
    power: float = option(0.2, "power of the means in the table (gamma); 0 weighs all pairs alike", at_most=100)
    attack_beta: float = option(0.0, "weight of the square over pairs in what the attack raises", at_most=1000)

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        table_KK = torch.full((num_classes, num_classes), 1 / num_classes, dtype=torch.float64)
        return {"pair_weight": table_KK**self.power, "radius_share": torch.tensor(self.radius_share(1, recipe))}

    def radius_share(self, epoch: int, recipe: Recipe) -> float:
        """Return the radius of an epoch, from 1, as a share of eps."""
        return min(1.0, epoch / recipe.optim.epochs)

    def attack_in(self, epoch: int, recipe: Recipe) -> Mapping[str, Any]:
        quarter = quarter_of(epoch, recipe.optim.epochs)
        if self.variant == "released" or quarter == 4:
            return {}
        attack = recipe.attack
        return dict(steps=max(1, attack.steps - 4 + quarter), step=min(1.0, attack.step * LONGER[quarter - 1]))

    def margins(self, targets: Targets, attack: TrainingAttack) -> tuple[Tensor, Tensor]:
        share_B = targets.state["radius_share"].expand(len(targets.label_B))
        return attack.eps * share_B, attack.step * share_B

    def objective(self, targets: Targets) -> Objective:
        kl = KlObjective(targets.own, targets.label_B)
        if not self.attack_beta:
            return kl
        return lambda adv_BK: kl(adv_BK) + self.attack_beta / 4 * len(adv_BK) * self.pairs(targets.own, adv_BK, targets)

    def pairs(self, clean_BK: Tensor, adv_BK: Tensor, targets: Targets) -> Tensor:
        """Return the mean square over pairs of classes, weighed by the rows of the images' classes: a scalar."""
        table_KK, label_B = targets.state["pair_weight"], targets.label_B
        mass = targets.part.mean(table_KK.sum(1).square()[label_B].mean())
        return class_pair(clean_BK, adv_BK, table_KK, label_B, ignore_index=None) / mass

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        clean_BK, adv_BK = logits["clean"], logits["adv"]
        hard = targets.cross_entropy_rows(clean_BK).mean()
        # the authors write a cross-entropy, with the same gradient: it lacks the entropy of a constant
        soft = class_temperature_kl(adv_BK, clean_BK.detach())
        return hard + self.alpha * soft + self.beta / 4 * self.pairs(clean_BK, adv_BK, targets)

    def measured(self, logits: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        return {"prediction": (at_least_float32(logits["clean"]) / self.temperature).softmax(1)}

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        means = stats.measured["prediction"]
        table_KK = torch.where(means.count_K[:, None] > 0, means.mean_KD**self.power, state["pair_weight"])
        share = torch.full_like(state["radius_share"], self.radius_share(epoch + 1, recipe))
        return {"pair_weight": table_KK, "radius_share": share}


AUTHORS: dict[str, Any] = dict(
    attack_steps=5,  # of the last quarter, and its step
    attack_step=4 / 255,
    epochs=200,
    lr=0.2,
    lr_schedule="cosine",  # by the step; theirs by the epoch, of one more: lr / 2 (1 + cos(pi epoch / (epochs + 1)))
    weight_decay=5e-4,
    awp_gamma=5e-3,
    awp_from=10,
    average="ema",
    average_from=151,
    ema_decay=0.9996,
    select_always_from=150,
)
CIFAR100: dict[str, Any] = dict(power=0.4, attack_beta=1.0)  # the attack of their scripts for it, and of no other
# the last quarter of the epochs is averaged, over as large a part of it as of the authors' 50 epochs
CHANGES: dict[str, Any] = dict(
    digits=dict(attack_step=0.15 / 2, awp_from=2, average_from=16, ema_decay=0.95),
    small=dict(awp_from=2, average_from=8, ema_decay=0.98),
    fashion_mnist_small=dict(attack_step=0.1 / 2),
    fashion_mnist_resnet18=dict(attack_step=0.1 / 2, awp_from=4, average_from=46, ema_decay=0.999),
    svhn_resnet18=dict(attack_step=4 / 255),
    cifar100_resnet18=CIFAR100,
    tiny_imagenet_preact_resnet18=dict(awp_from=6, average_from=76),
    imagenet100_resnet18=dict(awp_from=5, average_from=68),
)
SETTINGS = adversarial_training(Gkl, AUTHORS, ON_DIGITS, **CHANGES) | {
    "cifar10_wrn34_10": Setting(
        note="CIFAR-10, WRN-34-10, the authors' setting",
        recipe=Recipe.of(Gkl, **AUTHORS, dataset="cifar10", student="wrn34_10"),
    ),
    "cifar100_wrn34_10": Setting(
        note="CIFAR-100, WRN-34-10, the authors' setting",
        recipe=Recipe.of(Gkl, **AUTHORS | CIFAR100, dataset="cifar100", student="wrn34_10", holdout_per_class=10),
    ),
}

if __name__ == "__main__":
    run_recipe(__file__)
