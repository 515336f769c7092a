"""Label trust: where the teacher fails a class, the student heeds its labels instead, and heeds them more (ours, 2026).

min  w[y] (a KL(p(x) || S(x')) + (1 - a) KL(p(x) || S(x)))   where   x' = argmax KL(p(x) || S(x')) in the eps ball

p(x) = (1 - l[y]) softmax(T(x) / t[y]) + l[y] onehot(y). With l = 0 and w = t = 1 this is RSLAD's loss. After each epoch
the classes that cost the student more than the mean are trusted more, and those that fall most often weigh more:

l <- clip(l + trust_rate g, 0, 4/5)    where   g = (L - mean L) / max|L - mean L|
w <- clip(w + weight_rate h, 1/2, 4)   where   h = (K softmax(e / 0.1) - 1) / (K - 1)

L[k] is the class's mean adversarial cross-entropy and e[k] the share of its attacked images that fell, as the student
sees them in training. h is a subgradient step on the worst class's error, shared among those almost as bad, lest they
overtake one another by turns.

Both forwards are one batch to batch norm (`joint`): apart, each is trained under its own statistics, and attacked and
evaluated under a mean of the two. The moving w pull the student about: an average of its weights is kept (`average`).

A rate of 0 switches its part off. Two more are off: t, moved as ABSLD's, and a radius of (1 + margin_rate g[y]) eps.
Rule "mean_gap" takes g for h.

Over 80 lines: it holds what was tried beside the rule, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retemper.engine import EpochStats, KlObjective, Recipe, Targets, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.absld import next_temperature
from retemper.recipes.settings import ON_BOTH, distillation


def class_gap(loss_K: Tensor) -> Tensor:
    """(K,) g above, in [-1, 1]: 0 where all losses are equal."""
    gap_K = loss_K - loss_K.mean()
    largest = gap_K.abs().max()
    return torch.where(largest > 0, gap_K / largest, torch.zeros_like(gap_K))


def next_trust(trust_K: Tensor, loss_K: Tensor, rate: float, upper: float = 0.8) -> Tensor:
    """(K,) l after an epoch with the mean losses `loss_K`."""
    return (trust_K + rate * class_gap(loss_K)).clamp(0, upper)


def mean_gap_weight(weight_K: Tensor, loss_K: Tensor, rate: float, lower: float = 0.5, upper: float = 4.0) -> Tensor:
    """(K,) w of rule "mean_gap" after an epoch with the mean losses `loss_K`."""
    return (weight_K + rate * class_gap(loss_K)).clamp(lower, upper)


def near_worst_weight(
    weight_K: Tensor, error_K: Tensor, rate: float, lower: float = 0.5, upper: float = 4.0, softness: float = 0.1
) -> Tensor:
    """(K,) w after an epoch with the errors `error_K`, in [0, 1]."""
    classes = len(error_K)
    share_K = (error_K / softness).softmax(0)
    return (weight_K + rate * (classes * share_K - 1) / (classes - 1)).clamp(lower, upper)


WEIGHT_RULES = {"near_worst": near_worst_weight, "mean_gap": mean_gap_weight}


@dataclass(frozen=True, kw_only=True)
class LabelTrust(Recipe):
    adv_weight: float = 5 / 6  # a above
    kl_scale: float = 0.1  # as RSLAD's
    joint: bool = True
    average: Literal["none", "ema", "swa"] = "ema"
    rule: Literal["near_worst", "mean_gap"] = "near_worst"  # of the class weights
    trust_rate: float = 0.1
    trust_start: float = 0.0  # with a rate of 0 it is every class's trust, for good
    trust_upper: float = 0.8
    weight_rate: float = 0.4
    weight_lower: float = 0.5
    weight_upper: float = 4.0
    temperature_rate: float = 0.0  # falls with the learning rate, as ABSLD's
    margin_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in WEIGHT_RULES:
            raise ValueError(f"rule = {self.rule!r}: it must be one of {', '.join(WEIGHT_RULES)}")
        if not self.trust_start <= self.trust_upper <= 1:
            raise ValueError(f"trust_upper = {self.trust_upper}: it must lie between trust_start and 1")
        if not self.weight_lower <= 1 <= self.weight_upper:
            raise ValueError(f"weight_lower = {self.weight_lower}, weight_upper = {self.weight_upper}: 1 lies outside")
        if self.margin_rate > 1:
            raise ValueError(f"margin_rate = {self.margin_rate}: above 1 a class's eps could be negative")

    def class_state(self, num_classes: int) -> dict[str, Tensor]:
        """Only of the parts that are on, so that RSLAD's step is left where none is."""
        parts = {
            "label_trust": (self.trust_start, self.trust_rate or self.trust_start),
            "class_weight": (1.0, self.weight_rate),
            "temperature": (1.0, self.temperature_rate),
            "margin": (self.eps, self.margin_rate),
        }
        return {name: torch.full((num_classes,), start) for name, (start, on) in parts.items() if on}

    def margins(self, targets: Targets) -> tuple[float | Tensor, float]:
        margin_K = targets.state.get("margin")
        return self.eps if margin_K is None else margin_K[targets.label_B], self.attack_step

    def objective(self, targets: Targets) -> KlObjective:
        temperature_K = targets.state.get("temperature", targets.ones_K)
        return KlObjective(targets.teacher, targets.label_B, temperature_K, targets.state.get("label_trust"))

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        state, teacher_BK, label_B = targets.state, targets.teacher, targets.label_B
        temperature_K = state.get("temperature", targets.ones_K)
        weight_K, trust_K = state.get("class_weight"), state.get("label_trust")
        adv, clean = (
            class_temperature_kl(
                logits[name], teacher_BK, label_B, temperature_K, class_weight=weight_K, label_trust=trust_K
            )
            for name in ("adv", "clean")
        )
        return self.kl_scale * (self.adv_weight * adv + (1 - self.adv_weight) * clean)

    def next_class_state(self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int) -> dict[str, Tensor]:
        adv = stats.forwards["adv"]
        met_K = adv.count_K > 0  # what was not met costs as much as the mean, and has not fallen
        loss_K = torch.where(met_K, adv.mean_loss_K, adv.mean_loss_K[met_K].mean())
        error_K = torch.where(met_K, 1 - adv.accuracy_K, 0.0)
        new_weight, by_K = WEIGHT_RULES[self.rule], loss_K if self.rule == "mean_gap" else error_K
        rules = {
            "label_trust": lambda l_K: next_trust(l_K, loss_K, self.trust_rate, self.trust_upper),
            "class_weight": lambda w_K: new_weight(w_K, by_K, self.weight_rate, self.weight_lower, self.weight_upper),
            "temperature": lambda t_K: next_temperature(t_K, loss_K, self.temperature_rate * self.decay(epoch)),
            "margin": lambda _: self.eps * (1 + self.margin_rate * class_gap(loss_K)),
        }
        return {name: rules[name](now_K) for name, now_K in state.items()}


SHORT = dict(kl_scale=1.0, ema_decay=0.99)  # a thousand steps are too few for a tenth of the loss, a long average
# chosen on held-out training images; benchmarks/label_trust_study.py shows what the parts do
SETTINGS = distillation(LabelTrust, ON_BOTH, digits=SHORT, fashion_mnist_small=SHORT)

if __name__ == "__main__":
    run_recipe(__file__)
