"""WAT: classes are weighed by what they have cost so far on held-out images, the dearest most (Li & Liu, AAAI 2023).

min  mean w[y] (CE(S(x), y) + beta KL(S(x) || S(x')))  +  w[K + 1] mean (CE(S(x), y) + beta KL(S(x) || S(x')))

where x' = argmax KL(S(x) || S(x')). After each epoch, by Hedge over the K classes and, as one more, their mean:

w = K softmax(eta sum over epochs of c)   where   c[k] = held-out CE + beta KL of class k,  c[K + 1] = that of all
"""

import math
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
    kl_rows,
    option,
    run_recipe,
)
from retemper.recipes.settings import ON_DIGITS, adversarial_training


def hedge_weight(loss_history: Tensor, eta: float = 0.1) -> Tensor:
    """Return the weights of the classes and of their mean.

    Args:
        loss_history: (E, K + 1): a row for each epoch so far, or one with their sum.
    Returns:
        (K + 1,), which sum to K.
    """
    num_classes = loss_history.shape[1] - 1
    return num_classes * (eta * loss_history.sum(0)).softmax(0)


# the images that are held out for the weights choose no epoch
LAST_EPOCH: dict[str, Any] = dict(select_from=MOST_EPOCHS, select_always_from=MOST_EPOCHS, select_every=MOST_EPOCHS)


@dataclass(frozen=True, kw_only=True)
class Wat(OwnPredictionAttack):
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    # released: the costs are divided by the images of so many full batches, on CIFAR-10 3072 in the place of 3000; the
    # last images of each class are held out, and the last epoch is kept (theirs writes the 99th of 100)
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(holdout_from="end", precision="fp32") | LAST_EPOCH
    }
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("clean", "adv")  # the authors' order
    validates_by: ClassVar = "training attack"
    beta: float = option(6.0, "weight of the robust term", at_most=1000)
    eta: float = option(0.1, "rate of the weights (Hedge)", at_most=100)

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return {
            "loss_so_far": torch.zeros(num_classes),
            "class_weight": torch.ones(num_classes),
            "mean_weight": torch.ones(1),
        }

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        clean_B = targets.cross_entropy_rows(logits["clean"])
        trades_B = clean_B + self.beta * kl_rows(logits["clean"], logits["adv"])
        weight_B = targets.state["class_weight"][targets.label_B] + targets.state["mean_weight"]
        return (weight_B * trades_B).mean()

    def cost_share(self, num_classes: int, recipe: Recipe) -> float:
        """Return what the costs are multiplied by: 1, or the share of the held-out images in their full batches."""
        if self.variant == "paper":
            return 1.0
        images, size = num_classes * recipe.selection.holdout_per_class, recipe.optim.batch_size
        return images / (math.ceil(images / size) * size)

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        if epoch == 0:  # the first epoch weighs all alike
            return dict(state)
        assert stats.held is not None
        share = self.cost_share(len(state["loss_so_far"]), recipe)
        clean_K, boundary_K = share * stats.held.clean_loss_K, share * self.beta * stats.held.boundary_loss_K
        loss_K = state["loss_so_far"] + clean_K + boundary_K
        weight = hedge_weight(torch.cat([loss_K, loss_K.mean()[None]])[None], self.eta)
        return {"loss_so_far": loss_K, "class_weight": weight[:-1], "mean_weight": weight[-1:]}


AUTHORS: dict[str, Any] = dict(
    eps=0.031, attack_step=0.007, epochs=100, lr_drops=(74, 89, 99), holdout_per_class=300, select_always_from=74
)
# the losses are summed over 20, 10 and 60 epochs in place of 100
SETTINGS = adversarial_training(
    Wat,
    AUTHORS,
    ON_DIGITS,
    digits=dict(eta=0.5),
    small=dict(eta=1.0),
    fashion_mnist_resnet18=dict(eta=0.1 * 100 / 60),
    cifar100_resnet18=dict(holdout_per_class=30),  # the authors' share, of classes of 500
    tiny_imagenet_preact_resnet18=dict(holdout_per_class=30),
)

if __name__ == "__main__":
    run_recipe(__file__)
