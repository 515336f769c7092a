"""FAIR-TAT: attacks lead to the classes that errors lead to; a radius for each class (Medi et al., WACV 2025).

min  CE(S(x'), y)   where   x' = argmin CE(S(x'), t) in the ball of radius eps[y]

The target t of an image is drawn in every step: class k with a chance that grows as exp(2 f[k]), and never y. f[k] is
the share of the last epoch's wrong answers, to attacked training images, that were k, each true class counted alike
whatever its size. The radius is CFA's:
eps[k] = (1/2 + t[k]) eps, with t[k] the share of class k's images that withstood; and so is the average that is kept.
In the first epoch all targets are alike, and all radii eps.
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
    Objective,
    Recipe,
    Targets,
    TrainingAttack,
    cross_entropy_objective,
    is_label,
    option,
    run_recipe,
)
from retemper.recipes.cfa import AUTHORS_AT, RELEASED, ClassRadius, full
from retemper.recipes.settings import ON_DIGITS, adversarial_training


def drawn_target(score_K: Tensor, label_B: Tensor, uniform_BK: Tensor) -> Tensor:
    """Return a class of each image, (B,), drawn from softmax(score) without the image's own: in one draw.

    Args:
        score_K: (K,), as logits.
        uniform_BK: (B, K) random numbers in [0, 1]. The largest score + Gumbel noise has the chances of the softmax.
    """
    gumbel_BK = -(-uniform_BK.clamp(min=torch.finfo(uniform_BK.dtype).tiny).log()).log()
    score_BK = score_K + gumbel_BK
    return score_BK.masked_fill(is_label(score_BK, label_B), -torch.inf).argmax(1)


@dataclass(frozen=True, kw_only=True)
class FairTat(ClassRadius):
    # released: as AT + CFA's, of whose code theirs is a fork: the first images of each class are held out, the test
    # images choose, mirrored borders, normalised images, and forwards of clean images before and after each step. Wrong
    # answers count one by one, so that those of a larger class weigh more.
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {name: value for name, value in RELEASED.items() if name not in ("margin_offset", "ema_decay")}
    }
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("adv",)
    released_forwards: ClassVar[Forwards] = Forwards(("adv", "clean"), after=("clean",))
    attack_asks_teacher: ClassVar[bool] = False
    draws: ClassVar[bool] = True
    margin_offset: float = option(0.5, "added to a class's robust accuracy in its radius (lambda)", at_most=100)
    calibrate_from: int = option(1, "the epoch after which radii are of each class", at_most=MOST_EPOCHS)
    sharpness: float = option(2.0, "how strongly the errors of the last epoch count in the draw", at_most=1000)

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return super().class_state(num_classes, recipe) | {"error_share": full(num_classes, 1 / num_classes)}

    def objective(self, targets: Targets) -> Objective:
        score_K = self.sharpness * targets.state["error_share"]
        return cross_entropy_objective(drawn_target(score_K, targets.label_B, targets.uniform))

    def margins(self, targets: Targets, attack: TrainingAttack) -> tuple[Tensor, float]:
        eps_B, step = super().margins(targets, attack)
        return eps_B, -step  # down the cross-entropy of the target

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return targets.cross_entropy_rows(logits["adv"]).mean()

    def measured(self, logits: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        answer_BK = is_label(logits["adv"], logits["adv"].argmax(1))
        return {"error": answer_BK & ~is_label(logits["adv"], targets.label_B)}

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        seen = stats.measured["error"]
        errors_K = (seen.total_KD if self.variant == "released" else seen.mean_KD).sum(0)
        share = {"error_share": errors_K / errors_K.sum().clamp(min=torch.finfo(errors_K.dtype).tiny)}
        return super().next_class_state(state, stats, epoch, recipe) | share


AUTHORS: dict[str, Any] = AUTHORS_AT | dict(average_from=1)
SETTINGS = adversarial_training(
    FairTat,
    AUTHORS,
    ON_DIGITS,
    # the second half of the epochs may be kept, as of the authors' 200
    small=dict(select_from=6),
    fashion_mnist_resnet18=dict(select_from=31),
    cifar100_resnet18=dict(average_above=0.0),  # the worst of 100 classes never gets there
    tiny_imagenet_preact_resnet18=dict(average_above=0.0, select_from=51),
    imagenet100_resnet18=dict(average_above=0.0, select_from=46),
)

if __name__ == "__main__":
    run_recipe(__file__)
