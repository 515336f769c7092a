"""ADR: an average of the student's weights labels its images, more and more as training goes on (Wu et al., ICLR 2024).

PGD-AT + ADR   min  CE(r(x), S(x'))                            where   x' = argmax CE(r(x), S(x')) in the eps ball
TRADES + ADR   min  CE(r(x), S(x)) + beta KL(S(x) || S(x'))    where   x' = argmax KL(S(x) || S(x')) in the eps ball

r(x) = l p + (1 - l) onehot(y),   p = softmax(E(x) / tau),   l = clip(lambda - (max p - p[y]), 0, 1)

E is the average (EMA), in eval mode. From the first step to the last, tau falls and lambda rises along half a cosine. A
cross-entropy of r is computed as the divergence from r, which is less by r's entropy and has the same gradient. E is
what is evaluated and kept: the rows "ADR + WA" of the paper.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import (
    KlObjective,
    Method,
    OwnPredictionAttack,
    Targets,
    at_least_float32,
    given,
    option,
    run_recipe,
)
from retemper.kernels import class_temperature_kl
from retemper.recipes.sat import ATTACK, RICE
from retemper.recipes.settings import BY_PGD_10, ON_DIGITS, adversarial_training


def annealed(start: float, end: float, progress: Tensor) -> Tensor:
    """Return a number, 0-dim, that goes from `start` to `end` along half a cosine, at a `progress` in [0, 1]."""
    return end + (start - end) / 2 * (1 + (math.pi * progress).cos())


def trust_in_label(average_BK: Tensor, label_B: Tensor, temperature: Tensor, mixing: Tensor) -> Tensor:
    """Return 1 - l of each image, (B,): how far its label is trusted over the average's prediction.

    Args:
        average_BK: the average's logits.
        temperature, mixing: tau and lambda, 0-dim.
    """
    p_BK = (at_least_float32(average_BK) / temperature).softmax(1)
    short_B = p_BK.amax(1) - p_BK.gather(1, label_B[:, None])[:, 0]
    return (1 - mixing + short_B).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Rectified(Method):
    """The labels that the average corrects, which PGD-AT + ADR and TRADES + ADR have in common."""

    # released, of both: images normalised, the best epoch on the test images under PGD-10. Left out: their loader drops
    # the last, smaller batch of an epoch, on CIFAR-10 80 of 50,000 images, and their average begins before the first
    # step, ours after it: of that start a thousandth is left after 1,400 steps.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": dict(normalise=True, **BY_PGD_10)}
    average_sees: ClassVar[tuple[str, ...]] = ("clean",)
    watches_progress: ClassVar[bool] = True
    temperature_start: float = option(2.5, "temperature of the average at the start (tau)", positive=True, at_most=1000)
    temperature_end: float = option(2.0, "temperature of the average at the end", positive=True, at_most=1000)
    mixing_start: float = option(0.7, "share of the average in a label at the start (lambda)", at_most=1)
    mixing_end: float = option(0.95, "share of the average in a label at the end", at_most=1)

    def rectified(self, targets: Targets) -> dict[str, Any]:
        """Return r as KlObjective takes it, and class_temperature_kl beside the student's logits."""
        average_BK, label_B, progress = given(targets.average_BK), targets.label_B, given(targets.progress)
        tau = annealed(self.temperature_start, self.temperature_end, progress)
        trust_B = trust_in_label(average_BK, label_B, tau, annealed(self.mixing_start, self.mixing_end, progress))
        return dict(teacher=average_BK, label=label_B, temperature=tau, row_trust=trust_B)


@dataclass(frozen=True, kw_only=True)
class Adr(Rectified):
    # released, with awp_gamma: theirs perturbs every weight, biases and batch norm's too, and moves the running
    # statistics at the weights of before
    forwards: ClassVar[tuple[str, ...]] = ("adv",)

    def objective(self, targets: Targets) -> KlObjective:
        return KlObjective(**self.rectified(targets))

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return class_temperature_kl(logits["adv"], **self.rectified(targets), ignore_index=None)


@dataclass(frozen=True, kw_only=True)
class AdrTrades(Rectified, OwnPredictionAttack):
    # released: both forwards are one batch, and the attack has batch norm in training mode. Theirs starts from noise
    # that is uniform in [0, 0.001].
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(Rectified.variant_options["released"], joint=True, attack_bn="train")
    }
    forwards: ClassVar[tuple[str, ...]] = ("clean", "adv")
    beta: float = option(6.0, "weight of the robust term", at_most=1000)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        clean = class_temperature_kl(logits["clean"], **self.rectified(targets), ignore_index=None)
        return clean + self.beta * class_temperature_kl(logits["adv"], logits["clean"])


AUTHORS: dict[str, Any] = RICE | dict(nesterov=True, average="ema", ema_decay=0.995)
SHORT: dict[str, Any] = dict(ema_decay=0.99)  # a thousand steps are too few for a long average
CHANGES: dict[str, Any] = dict(
    digits=SHORT,
    small=SHORT,
    cifar100_resnet18=dict(temperature_start=1.5, temperature_end=1.0),
    tiny_imagenet_preact_resnet18=dict(
        epochs=80,
        lr_drops=(40, 60),
        select_always_from=40,
        temperature_start=2.0,
        temperature_end=1.5,  # of their files for SGD, a misspelt line sets none; those for AWP set this
        mixing_start=0.5,
        mixing_end=0.9,
    ),
)
# with adversarial weight perturbation, the authors' constants
AWP: dict[str, Any] = dict(awp_gamma=0.005, nesterov=False, mixing_end=0.85)
CHANGES_AWP: dict[str, Any] = dict(
    cifar10_resnet18=dict(temperature_end=1.5),
    cifar100_resnet18=dict(temperature_start=2.0, temperature_end=1.0),
)
WITH_AWP = adversarial_training(Adr, ATTACK | AUTHORS | AWP, **CHANGES_AWP)
WITH_TRADES = adversarial_training(AdrTrades, AUTHORS, **CHANGES)
SETTINGS = adversarial_training(Adr, ATTACK | AUTHORS, ON_DIGITS, **CHANGES)
SETTINGS |= {f"{name}_awp": replace(WITH_AWP[name], note=f"ADR + AWP: {WITH_AWP[name].note}") for name in CHANGES_AWP}
SETTINGS |= {f"{name}_trades": replace(one, note=f"TRADES + ADR: {one.note}") for name, one in WITH_TRADES.items()}

if __name__ == "__main__":
    run_recipe(__file__)
