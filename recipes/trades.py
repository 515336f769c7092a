"""TRADES: cross-entropy on clean images plus a pull towards the same answer nearby (Zhang et al., ICML 2019).

min  CE(S(x), y) + beta KL(S(x) || S(x'))   where   x' = argmax KL(S(x) || S(x')) in the eps ball
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import (
    Forwards,
    OwnPredictionAttack,
    Recipe,
    Setting,
    Targets,
    option,
    run_recipe,
)
from retemper.kernels import class_temperature_kl
from retemper.recipes.data_sets import DIGITS, SVHN
from retemper.recipes.settings import ON_BOTH, adversarial_training, as_student


@dataclass(frozen=True, kw_only=True)
class Trades(OwnPredictionAttack):
    # released: the authors' script, or with awp_gamma that of AWP's authors. Both look at the clean images twice, train
    # on all images and choose no epoch; with AWP the optimizer's step begins at the perturbed weights.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(holdout_per_class=0, awp_decay="perturbed", precision="fp32")
    }
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("clean", "adv")  # the authors' order
    beta: float = option(6.0, "weight of the robust term", at_most=1000)

    def forwards_in(self, epoch: int, recipe: Recipe) -> Forwards:
        if self.variant != "released":
            return Forwards(self.forwards)
        return Forwards(("adv", "clean", "clean") if recipe.optim.awp_gamma else ("clean", "adv", "clean"))

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        clean = targets.cross_entropy(logits["clean"])
        # the clean prediction is not detached: both networks' outputs move towards each other
        return clean + self.beta * class_temperature_kl(logits["adv"], logits["clean"])


AUTHORS: dict[str, Any] = dict(eps=0.031, attack_step=0.007)  # not 8/255 and 2/255
WRN34_10: dict[str, Any] = dict(student="wrn34_10", epochs=76, lr_drops=(74,), select_always_from=70)

SETTINGS = {
    "digits": Setting(
        note="8x8 digits, for a CPU", recipe=Recipe.of(Trades, **AUTHORS | DIGITS, student="tiny_resnet_wide")
    ),
    "cifar10_wrn34_10": Setting(
        note="CIFAR-10, WRN-34-10, as the authors trained it: the teacher of the distillation papers",
        recipe=Recipe.of(Trades, **AUTHORS, dataset="cifar10", **WRN34_10),
    ),
    "cifar10_wrn34_10_awp": Setting(
        note="CIFAR-10, WRN-34-10, with adversarial weight perturbation, as AWP's authors trained it",
        recipe=Recipe.of(
            Trades,
            dataset="cifar10",
            student="wrn34_10",
            epochs=200,
            lr_drops=(99, 149),
            weight_decay=5e-4,
            awp_gamma=5e-3,
            awp_from=10,
            select_always_from=149,
        ),
    ),
    "cifar100_wrn34_10": Setting(
        note="CIFAR-100, WRN-34-10: a teacher of which no checkpoint is public",
        recipe=Recipe.of(Trades, **AUTHORS, dataset="cifar100", holdout_per_class=10, **WRN34_10),
    ),
    "svhn_wrn34_10": Setting(
        note="SVHN, WRN-34-10: a teacher of which no checkpoint is public",
        recipe=Recipe.of(Trades, **AUTHORS | SVHN, **WRN34_10),
    ),
    "tiny_imagenet_preact_resnet34": Setting(
        note="Tiny-ImageNet, PreActResNet-34: a teacher of which no checkpoint is public",
        recipe=Recipe.of(
            Trades,
            **AUTHORS,
            dataset="tiny-imagenet",
            student="preact_resnet34",
            holdout_per_class=10,
            epochs=76,
            lr_drops=(74,),
        ),
    ),
}

# the students alone, to compare other methods with at equal size
RESNET18: dict[str, Any] = dict(epochs=100, lr_drops=(74, 89, 99), select_always_from=74)
STUDENTS = adversarial_training(
    Trades,
    AUTHORS,
    ON_BOTH,
    cifar10_resnet18=RESNET18,
    cifar10_preact_resnet18=RESNET18,
    cifar100_resnet18=RESNET18,
    svhn_resnet18=RESNET18,
)
SETTINGS = {as_student(name): setting for name, setting in STUDENTS.items()} | SETTINGS

if __name__ == "__main__":
    run_recipe(__file__)
