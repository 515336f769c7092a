"""Label trust: where the teacher fails a class, the student heeds its labels instead, and heeds them more (ours, 2026).

min  w[y] (a KL(p(x) || S(x')) + (1 - a) KL(p(x) || S(x)))   where   x' = argmax KL(p(x) || S(x')) in the eps ball

p(x) = (1 - l[y]) softmax(T(x)) + l[y] onehot(y). With l = 0 and w = 1 this is RSLAD's loss. After each epoch
the classes that cost the student more than the mean are trusted more, and those that fall most often weigh more:

l <- clip(l + trust_rate g, 0, 4/5)    where   g = (L - mean L) / max|L - mean L|
w <- clip(w + weight_rate h, 1/2, 4)   where   h = (K softmax(e / 0.1) - 1) / (K - 1)

L[k] is the class's mean adversarial cross-entropy and e[k] the share of its attacked images that fell, as the student
sees them in training. h is a subgradient step on the worst class's error, shared among those almost as bad, lest they
overtake one another by turns.

Both forwards are one batch to batch norm (`joint`): apart, each is trained under its own statistics, and attacked and
evaluated under a mean of the two. The moving w pull the student about: an average of its weights is kept (`average`).

A rate of 0 switches its part off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retemper.engine import EpochStats, KlObjective, Recipe, Targets, option, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.absld import class_gap
from retemper.recipes.igdm import Igdm
from retemper.recipes.settings import ON_BOTH, distillation


def next_trust(trust_K: Tensor, loss_K: Tensor, rate: float, upper: float = 0.8) -> Tensor:
    """Return l, (K,), after an epoch with the mean losses `loss_K`, (K,)."""
    return (trust_K + rate * class_gap(loss_K)).clamp(0, upper)


def next_weight(
    weight_K: Tensor, error_K: Tensor, rate: float, lower: float = 0.5, upper: float = 4.0, softness: float = 0.1
) -> Tensor:
    """Return w, (K,), after an epoch with the errors `error_K`, (K,) in [0, 1]."""
    classes = len(error_K)
    share_K = (error_K / softness).softmax(0)
    return (weight_K + rate * (classes * share_K - 1) / (classes - 1)).clamp(lower, upper)


@dataclass(frozen=True, kw_only=True)
class LabelTrust(Igdm):
    adv_weight: float = option(5 / 6, "weight of the attacked term (a)", at_most=1)
    kl_scale: float = option(0.1, "factor on the loss", at_most=1000)
    trust_rate: float = option(0.1, "the most that the trust in labels moves in an epoch; 0 leaves it", at_most=1)
    trust_start: float = option(0.0, "trust in the labels at the start", at_most=1)
    trust_upper: float = option(0.8, "the largest trust in the labels", at_most=1)
    weight_rate: float = option(0.4, "the most that a class weight moves in an epoch; 0 leaves it", at_most=100)
    weight_lower: float = option(0.5, "the least weight of a class", at_most=1000)
    weight_upper: float = option(4.0, "the largest weight of a class", positive=True, at_most=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trust_start <= self.trust_upper <= 1:
            raise ValueError(f"trust_upper = {self.trust_upper}: it must lie between trust_start and 1")
        if not self.weight_lower <= 1 <= self.weight_upper:
            raise ValueError(f"weight_lower = {self.weight_lower}, weight_upper = {self.weight_upper}: 1 lies outside")

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        """Return the state of the parts that are on, so that RSLAD's step is left where none is."""
        parts = {
            "label_trust": (self.trust_start, self.trust_rate or self.trust_start),
            "class_weight": (1.0, self.weight_rate),
        }
        own = {name: torch.full((num_classes,), start) for name, (start, on) in parts.items() if on}
        return super().class_state(num_classes, recipe) | own

    def objective(self, targets: Targets) -> KlObjective:
        return KlObjective(targets.teacher, targets.label_B, label_trust=targets.state.get("label_trust"))

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        weight_K, trust_K = targets.state.get("class_weight"), targets.state.get("label_trust")
        adv, clean = (
            class_temperature_kl(
                logits[name],
                targets.teacher,
                targets.label_B,
                class_weight=weight_K,
                label_trust=trust_K,
                ignore_index=None,
            )
            for name in ("adv", "clean")
        )
        return self.kl_scale * (self.adv_weight * adv + (1 - self.adv_weight) * clean)

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        adv = stats.forwards["adv"]
        met_K = adv.count_K > 0  # a class without images costs as much as the mean, and has not fallen
        loss_K = torch.where(met_K, adv.mean_loss_K, adv.mean_loss_K[met_K].mean())
        error_K = torch.where(met_K, 1 - adv.accuracy_K, 0.0)
        rules = {
            "label_trust": lambda l_K: next_trust(l_K, loss_K, self.trust_rate, self.trust_upper),
            "class_weight": lambda w_K: next_weight(
                w_K, error_K, self.weight_rate, self.weight_lower, self.weight_upper
            ),
        }
        moved = {name: rule(state[name]) for name, rule in rules.items() if name in state}
        return super().next_class_state(state, stats, epoch, recipe) | moved


# both forwards are one batch to batch norm, and an average of the weights is kept
OURS: dict[str, Any] = dict(joint=True, average="ema")
SHORT = dict(kl_scale=1.0, ema_decay=0.99)  # a thousand steps are too few for a tenth of the loss, a long average
# chosen on held-out training images; benchmarks/label_trust_study.py shows what the parts do
SETTINGS = distillation(LabelTrust, OURS, ON_BOTH, digits=SHORT, small=SHORT)

if __name__ == "__main__":
    run_recipe(__file__)
