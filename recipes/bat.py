"""BAT: learn from both sides of the boundary that an attack crosses, and be unsure there (Sun et al., AAAI 2023).

min  CE(S(x_c), y) + beta KL(S(x) || S(x_a)) + KL(S(x_c) || U) + KL(S(x_a) || U)

Along one attack, which raises KL(S(x) || S(x')): x_c is the last iterate before the first that is classified wrongly,
x_a the iterate that is wrong after `tau` wrong ones before it. Where there is none, each is the last iterate; an image
that is wrong at the start has x_c there. U is uniform: KL(p || U) = log K - entropy of p.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retemper.engine import (
    OwnPredictionAttack,
    Targets,
    Watcher,
    at_least_float32,
    kl_rows,
    option,
    run_recipe,
)
from retemper.recipes.settings import ON_DIGITS, adversarial_training


class Boundary(Watcher):
    """Watches an attack and keeps the iterates on either side of the boundary.

    Args:
        sides: those that are asked for, of "last_clean" and "adv".
    """

    def __init__(
        self, clean_BCHW: Tensor, label_B: Tensor, tau: int, sides: tuple[str, ...] = ("last_clean", "adv")
    ) -> None:
        self.label_B, self.tau, self.sides = label_B, tau, sides
        self.before_BCHW: Tensor | None = None  # the iterate before this one
        self.last_clean_BCHW = self.first_adv_BCHW = clean_BCHW
        self.errors_B = torch.zeros_like(label_B)

    def __call__(self, adv_BCHW: Tensor, logits_BK: Tensor) -> None:
        wrong_B = logits_BK.argmax(1) != self.label_B
        before_BCHW = adv_BCHW if self.before_BCHW is None else self.before_BCHW
        first_B, crossed_B = wrong_B & (self.errors_B == 0), wrong_B & (self.errors_B == self.tau)
        self.last_clean_BCHW = torch.where(first_B[:, None, None, None], before_BCHW, self.last_clean_BCHW)
        self.first_adv_BCHW = torch.where(crossed_B[:, None, None, None], adv_BCHW, self.first_adv_BCHW)
        self.errors_B = self.errors_B + wrong_B
        self.before_BCHW = adv_BCHW.clone()  # the attack writes over its iterate

    def images(self, adv_BCHW: Tensor) -> dict[str, Tensor]:
        """Return x_c as "last_clean" and x_a as "adv", where the attack has ended in `adv_BCHW`."""
        errors_B111 = self.errors_B[:, None, None, None]
        last_clean_BCHW = torch.where(errors_B111 > 0, self.last_clean_BCHW, adv_BCHW)
        first_adv_BCHW = torch.where(errors_B111 > self.tau, self.first_adv_BCHW, adv_BCHW)
        found = {"last_clean": last_clean_BCHW, "adv": first_adv_BCHW}
        return {side: found[side] for side in self.sides}


def certainty(logits_BK: Tensor) -> Tensor:
    """Return KL(softmax(logits) || U) of each image, (B,)."""
    log_p_BK = at_least_float32(logits_BK).log_softmax(1)
    return math.log(logits_BK.shape[1]) + (log_p_BK.exp() * log_p_BK).sum(1)


@dataclass(frozen=True, kw_only=True)
class Bat(OwnPredictionAttack):
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    # released: each side comes from an attack of its own, from another start; all images are trained on, and the last
    # epoch is kept
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(holdout_per_class=0, precision="fp32")
    }
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("last_clean", "adv", "clean")  # x_c, x_a, x in the authors' order
    follows_iterates: ClassVar[bool] = True
    beta: float = option(6.0, "weight of the robust term", at_most=1000)
    tau: int = option(1, "wrong iterates before the one that is learned from", at_most=1000)
    uniform_weight: float = option(1.0, "weight of the pull towards the uniform distribution", at_most=1000)

    def attacks(self) -> int:
        return 2 if self.variant == "released" else 1

    def watcher(self, clean_BCHW: Tensor, targets: Targets) -> Boundary:
        sides = ("last_clean", "adv")
        if self.attacks() == 2:
            sides = sides[targets.attack : targets.attack + 1]
        return Boundary(clean_BCHW, targets.label_B, self.tau, sides)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        clean_B = targets.cross_entropy_rows(logits["last_clean"])
        robust_B = kl_rows(logits["clean"], logits["adv"])
        uniform_B = certainty(logits["last_clean"]) + certainty(logits["adv"])
        return (clean_B + self.beta * robust_B + self.uniform_weight * uniform_B).mean()


AUTHORS: dict[str, Any] = dict(
    eps=0.031, attack_step=0.007, clip_start=True, epochs=200, lr_drops=(74, 89, 99), select_always_from=74
)
SETTINGS = adversarial_training(Bat, AUTHORS, ON_DIGITS)

if __name__ == "__main__":
    run_recipe(__file__)
