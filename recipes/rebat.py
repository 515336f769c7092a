"""ReBAT: smaller drops of the rate, and a pull towards an average of the weights (Wang et al., NeurIPS 2023).

min  CE(S(x'), y) + pull KL(S(x') || A(x'))   where   x' = argmax CE(S(x'), y) in the eps ball

A is the average of the student's weights (EMA). It begins soon after the first drop of the rate, and the pull with it;
before, A is the student. A is what is evaluated and kept. A drop divides the rate by 1.5 in place of 10.

ReBAT++ divides it by 1.7, and after the first drop takes x' from a ball that is a quarter larger, with 2 steps more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import Forwards, LabelAttack, Recipe, Targets, option, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.sat import ATTACK, RICE
from retemper.recipes.settings import BY_PGD_10, ON_DIGITS, adversarial_training

RELEASED: dict[str, Any] = dict(select_on="holdout", padding_mode="reflect", normalise=True, lr_drop_early=True)


@dataclass(frozen=True, kw_only=True)
class Rebat(LabelAttack):
    # released: the script pulls the other way round, by KL(A(x') || S(x')). The rest of it is that of Rice et al.
    # (sat.py), but held-out training images choose the epoch. Left out: its A answers in training mode in the pull's
    # first epoch, and its images and perturbations are in half precision.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": dict(BY_PGD_10) | RELEASED}
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("adv",)
    released_forwards: ClassVar = Forwards(("adv", "adv"), after=("clean",))
    average_sees: ClassVar[tuple[str, ...]] = ("adv",)
    pull: float = option(1.0, "weight of the pull towards the average", at_most=1000)
    strong_eps: float = option(
        1.0, "factor on the attack's radius after the first drop of the rate", positive=True, at_most=100
    )
    strong_steps: int = option(0, "steps that the attack takes more after the first drop of the rate", at_most=1000)

    def attack_in(self, epoch: int, recipe: Recipe) -> Mapping[str, Any]:
        attack = recipe.attack
        if epoch <= min(recipe.optim.lr_drops, default=epoch) or (self.strong_eps == 1 and not self.strong_steps):
            return {}
        return dict(eps=min(1.0, self.strong_eps * attack.eps), steps=attack.steps + self.strong_steps)

    def shown_to_average(self, epoch: int, recipe: Recipe) -> tuple[str, ...]:
        return self.average_sees if epoch >= recipe.optim.average_from else ()

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        hard = targets.cross_entropy_rows(logits["adv"]).mean()
        if targets.average_adv_BK is None:
            return hard
        pull = class_temperature_kl(logits["adv"], targets.average_adv_BK, reverse=self.variant == "paper")
        return hard + self.pull * pull


AUTHORS: dict[str, Any] = ATTACK | RICE | dict(lr_factor=1 / 1.5, average="ema", average_from=106)
# the average begins as soon after the first drop; a thousand steps are too few for a long one
CHANGES: dict[str, Any] = dict(
    digits=dict(average_from=15, ema_decay=0.99),
    small=dict(average_from=8, ema_decay=0.99),
    fashion_mnist_resnet18=dict(average_from=45),
    tiny_imagenet_preact_resnet18=dict(average_from=78),
    imagenet100_resnet18=dict(average_from=34),
)
PLUS_PLUS: dict[str, Any] = dict(lr_factor=1 / 1.7, strong_eps=1.25, strong_steps=2)
SETTINGS = adversarial_training(Rebat, AUTHORS, ON_DIGITS, **CHANGES) | {
    f"{name}_plus_plus": replace(setting, note=f"ReBAT++: {setting.note}")
    for name, setting in adversarial_training(Rebat, AUTHORS | PLUS_PLUS, **CHANGES).items()
}

if __name__ == "__main__":
    run_recipe(__file__)
