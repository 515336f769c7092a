"""Fair-MTARD: MTARD with each class weighed by how soon it falls to the attack (Yue et al., NeurIPS 2023).

min  (1 - v) L_adv + v L_clean   where   L_adv = w[y] KL(T(x') || S(x')),  L_clean = w[y] KL(C(x) || S(x))

w is the rule of fair.py; v, the weight of the clean task, follows from the weighed losses as in MTARD.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from retemper.engine import Targets, given, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.fair import Fair
from retemper.recipes.mtard import SHORT, Mtard
from retemper.recipes.settings import ON_DIGITS, distillation


@dataclass(frozen=True, kw_only=True)
class FairMtard(Mtard, Fair):
    # released: the clean task too is held against T(x'), the robust teacher on the attack: the authors' code asks the
    # clean teacher and forgets its answer; and Nesterov's momentum (Fair)
    def task_losses(self, logits: Mapping[str, Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        label_B, weight_K = targets.label_B, targets.state["class_weight"]
        robust_BK = given(targets.teacher_adv_BK)
        clean_BK = robust_BK if self.variant == "released" else given(targets.clean_teacher_BK)
        adv = class_temperature_kl(logits["adv"], robust_BK, label_B, class_weight=weight_K)
        clean = class_temperature_kl(logits["clean"], clean_BK, label_B, class_weight=weight_K)
        return self.kl_scale * adv, self.kl_scale * clean


SETTINGS = distillation(FairMtard, status=ON_DIGITS, digits=SHORT, fashion_mnist_small=SHORT)

if __name__ == "__main__":
    run_recipe(__file__)
