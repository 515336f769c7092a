"""AdaIAD: AdaAD's attack through both networks, with a teacher trusted as in IAD (Huang et al., CVPR 2023).

min  a (t^2 KL(T(x'; t) || S(x'; t)) + (1 - A) KL(S(x) || S(x'))) + (1 - a) CE(S(x), y)
where   x' = argmax KL(T(x') || S(x')) in the eps ball

T(x; t) = softmax(teacher(x) / t), S likewise. A = T(x')[y] ** trust_power, and 1 in the first part of training,
`begin`. KL(S(x) || S(x')) is differentiated in both; all KLs are sums over the classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from retemper.engine import Forwards, Targets, given, kl_rows, option, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.adaad import AUTHORS, OWN_TEACHERS, AdaAd
from retemper.recipes.iad import Trust
from retemper.recipes.settings import ON_DIGITS, distillation


@dataclass(frozen=True, kw_only=True)
class AdaIad(AdaAd, Trust):
    # released: as AdaAD's, and a second forward of the clean images, with a third once the student's own answer counts
    released_forwards: ClassVar[Forwards | None] = Forwards(("clean", "adv", "clean", "clean"))
    released_at_first: ClassVar[Forwards | None] = Forwards(("clean", "adv", "clean"))
    teacher_sees: ClassVar[tuple[str, ...]] = ("adv",)
    temperature: float = option(30.0, "temperature of both networks (t)", positive=True, at_most=1000)
    kl_scale: float = option(1.0, "factor on the soft terms", at_most=1000)

    def smooths_labels(self) -> bool:
        return self.adv_weight < 1

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        t, teacher_BK = self.temperature, given(targets.teacher_adv_BK)
        soft = class_temperature_kl(logits["adv"], teacher_BK, temperature=t, student_temperature=t)
        own = (self.distrust(targets) * kl_rows(logits["clean"], logits["adv"])).mean()
        loss = self.adv_weight * self.kl_scale * (t * t * soft + own)
        if self.adv_weight < 1:
            loss = loss + (1 - self.adv_weight) * targets.cross_entropy_rows(logits["clean"]).mean()
        return loss


SETTINGS = distillation(AdaIad, AUTHORS, ON_DIGITS, own_teachers=OWN_TEACHERS)

if __name__ == "__main__":
    run_recipe(__file__)
