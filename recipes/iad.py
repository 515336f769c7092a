"""IAD: the student trusts its teacher as far as that is right on the attack, and itself beyond (Zhu et al., ICLR 2022).

IAD-I    min  KL(T(x) || S(x')) + (1 - A) KL(S(x) || S(x'))
IAD-II   min  (1 - a - b) CE(S(x'), y) + a (A KL(T(x') || S(x')) + (1 - A) KL(S(x) || S(x'))) + b KL(C(x') || S(x'))

x' = argmax CE(S(x'), y) in the eps ball, as in ARD. A = T(x')[y] ** trust_power, and 1 in the first part of training,
`begin`. C is a clean teacher. KL(S(x) || S(x')) is differentiated in both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from retemper.engine import (
    EpochStats,
    Forwards,
    Method,
    Recipe,
    Targets,
    cross_entropy_rows,
    given,
    kl_rows,
    option,
    run_recipe,
)
from retemper.recipes.ard import AUTHORS, Ard
from retemper.recipes.settings import BY_PGD_10, ON_DIGITS, distillation


@dataclass(frozen=True, kw_only=True)
class Trust(Method):
    """The trust in the teacher, for methods that build on IAD.

    Attributes:
        released_at_first: the forwards of the variant `released` in the epochs that trust the teacher in full.
    """

    released_at_first: ClassVar[Forwards | None] = None
    trust_power: float = option(
        0.1, "power of the teacher's probability of the label that it is trusted by", at_most=100
    )
    begin: float = option(0.3, "share of the epochs that trust the teacher in full", at_most=1)

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return super().class_state(num_classes, recipe) | {"begun": torch.tensor([self.begun_after(0, recipe)])}

    def begun_after(self, epoch: int, recipe: Recipe) -> float:
        """Return 1 where the epoch after `epoch` trusts the teacher in part, 0 where it does so in full."""
        return float(epoch >= round(self.begin * recipe.optim.epochs))

    def forwards_in(self, epoch: int, recipe: Recipe) -> Forwards:
        if self.variant == "released" and self.released_at_first and not self.begun_after(epoch - 1, recipe):
            return self.released_at_first
        return super().forwards_in(epoch, recipe)

    def distrust(self, targets: Targets) -> Tensor:
        """Return 1 - A of each image, (B,)."""
        wrong_B = cross_entropy_rows(given(targets.teacher_adv_BK), targets.label_B)  # -log T(x')[y]
        return targets.state["begun"] * (1 - (-self.trust_power * wrong_B).exp())

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        begun = torch.full_like(state["begun"], self.begun_after(epoch, recipe))
        return super().next_class_state(state, stats, epoch, recipe) | {"begun": begun}


@dataclass(frozen=True, kw_only=True)
class Iad(Ard, Trust):
    # released: as in ARD, the second drop of the learning rate changes nothing. The attacked images have a second
    # forward, and the clean ones too once IAD has begun. The epoch is chosen on test images, by PGD-10. The authors'
    # teacher, an adversarially trained ResNet-18, is that of the settings `.._authors_teacher`. Left out: the start of
    # their PGD-10 may leave [0, 1], which turned 2 of 599 digits. Another of their versions takes no second forward of
    # the attacked images, which moves the running statistics alone, by up to 0.04 in 60 steps on digits.
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": dict(lr_drop_of="first", **BY_PGD_10)}
    released_forwards: ClassVar[Forwards | None] = Forwards(("adv", "adv", "clean", "clean"))
    released_at_first: ClassVar[Forwards | None] = Forwards(("adv", "adv", "clean"))
    teacher_sees: ClassVar[tuple[str, ...]] = ("clean", "adv")
    temperature: float = option(1.0, "temperature of both networks", positive=True, at_most=1000)
    kl_scale: float = option(1.0, "factor on the soft terms", at_most=1000)

    def image_loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        own_B = self.distrust(targets) * kl_rows(logits["clean"], logits["adv"])
        return super().image_loss(logits, targets) + self.soft_weight * own_B


@dataclass(frozen=True, kw_only=True)
class Iad2(Iad):
    # released: as IAD-I's, but one forward of the attacked images, and none of the clean ones until IAD begins: after
    # 40 of 200 epochs in one of the authors' versions, at once in another. Their clean teacher too is a ResNet-18.
    released_forwards: ClassVar[Forwards | None] = Forwards(("adv", "clean"))
    released_at_first: ClassVar[Forwards | None] = Forwards(("adv",))
    teacher_sees: ClassVar[tuple[str, ...]] = ("adv",)
    clean_teacher_sees: ClassVar[tuple[str, ...]] = ("adv",)
    soft_weight: float = option(0.5, "weight of the soft terms (a)", at_most=1)
    clean_teacher_weight: float = option(0.25, "weight of the clean teacher (b)", at_most=1)
    begin: float = option(0.2, "share of the epochs that trust the teacher in full", at_most=1)

    def smooths_labels(self) -> bool:
        return self.soft_weight + self.clean_teacher_weight < 1

    def image_loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        adv_BK, distrust_B = logits["adv"], self.distrust(targets)
        hard_B = targets.cross_entropy_rows(adv_BK)
        robust_B = (1 - distrust_B) * self.soft_loss(adv_BK, given(targets.teacher_adv_BK))
        if "clean" in logits:
            robust_B = robust_B + self.temperature**2 * distrust_B * kl_rows(logits["clean"], adv_BK)
        clean_B = self.soft_loss(adv_BK, given(targets.clean_teacher_adv_BK))
        hard_weight = 1 - self.soft_weight - self.clean_teacher_weight
        return hard_weight * hard_B + self.soft_weight * robust_B + self.clean_teacher_weight * clean_B


OWN_TEACHERS = {name: ("resnet18", f"sat:{name}") for name in ("cifar10_resnet18", "cifar100_resnet18")}
SETTINGS = distillation(Iad, AUTHORS, ON_DIGITS, own_teachers=OWN_TEACHERS) | {
    f"{name}_ii": replace(setting, note=f"IAD-II: {setting.note}")
    for name, setting in distillation(Iad2, AUTHORS, ON_DIGITS, own_teachers=OWN_TEACHERS).items()
}

if __name__ == "__main__":
    run_recipe(__file__)
