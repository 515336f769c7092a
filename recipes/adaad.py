"""AdaAD: the attack looks for where student and teacher differ most, through both (Huang et al., CVPR 2023).

min  a KL(T(x') || S(x')) + (1 - a) KL(T(x) || S(x))   where   x' = argmax KL(T(x') || S(x')) in the eps ball

The gradient of the attack flows through the teacher as well: it answers to every iterate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import Objective, Targets, given, kl_rows, option, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.igdm import Igdm
from retemper.recipes.settings import BY_PGD_10, ON_DIGITS, distillation


def disagreement(both_B2K: Tensor) -> Tensor:
    """Return KL(T(x') || S(x')), summed over the batch, of (B, 2 K) logits: the student's, then the teacher's."""
    student_BK, teacher_BK = both_B2K.chunk(2, 1)
    return kl_rows(teacher_BK, student_BK).sum()


@dataclass(frozen=True, kw_only=True)
class AdaAttack(Igdm):
    """AdaAD's attack and the forwards behind it, for methods that build on it."""

    # 8/255 by steps of 2/255, as the authors' commands have it; their defaults are twice that.
    # released: the epoch is chosen on test images, by PGD-10, and training is in fp32. The authors' teachers, of LTD,
    # are those of the settings `.._authors_teacher`.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": BY_PGD_10}
    forwards: ClassVar[tuple[str, ...]] = ("clean", "adv")  # the authors' order
    teacher_sees: ClassVar[tuple[str, ...]] = ("clean", "adv")
    attacks_teacher: ClassVar[bool] = True

    def objective(self, targets: Targets) -> Objective:
        return disagreement


@dataclass(frozen=True, kw_only=True)
class AdaAd(AdaAttack):
    adv_weight: float = option(1.0, "weight of the attacked term (a)", at_most=1)
    kl_scale: float = option(
        0.1, "factor on the loss; the authors average over CIFAR-10's classes, sum CIFAR-100's", at_most=1000
    )

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        adv = class_temperature_kl(logits["adv"], given(targets.teacher_adv_BK))
        clean = class_temperature_kl(logits["clean"], targets.teacher)
        return self.kl_scale * (self.adv_weight * adv + (1 - self.adv_weight) * clean)


AUTHORS: dict[str, Any] = dict(epochs=200, lr_drops=(100, 150), select_always_from=100, weight_decay=5e-4)
SUMMED = dict(kl_scale=1.0)  # CIFAR-100: the authors' sum. The short ones: too few steps for a tenth of the loss
OWN_TEACHERS = {
    "cifar10_resnet18": ("wrn34_20", "robustbench:Chen2021LTD_WRN34_20@cifar10/Linf"),
    "cifar100_resnet18": ("wrn34_10", "robustbench:Chen2021LTD_WRN34_10@cifar100/Linf"),
}
SETTINGS = distillation(
    AdaAd,
    AUTHORS,
    ON_DIGITS,
    own_teachers=OWN_TEACHERS,
    digits=SUMMED,
    small=SUMMED,
    cifar100_resnet18=SUMMED,
    cifar100_resnet18_authors_teacher=SUMMED,
)

if __name__ == "__main__":
    run_recipe(__file__)
