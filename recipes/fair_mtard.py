"""Fair-MTARD: MTARD with each class weighed by how soon it falls to the attack (Yue et al., NeurIPS 2023).

min  (1 - v) L_adv + v L_clean   where   L_adv = w[y] KL(T(x') || S(x')),  L_clean = w[y] KL(C(x) || S(x))

w is the rule of fair.py; v, the weight of the clean task, follows from the weighed losses as in MTARD.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import Targets, run_recipe
from retemper.recipes.fair import RELEASED, Fair
from retemper.recipes.mtard import SHORT, Mtard
from retemper.recipes.settings import ON_DIGITS, distillation


@dataclass(frozen=True, kw_only=True)
class FairMtard(Mtard, Fair):
    # released: the clean task too is held against T(x'), the robust teacher on the attack: the authors' code asks the
    # clean teacher and forgets its answer; MTARD's FLOOR; the rest as in Fair
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = RELEASED

    def teacher_of(self, task: str, targets: Targets) -> Tensor:
        return super().teacher_of("adv" if self.variant == "released" else task, targets)

    def by_class(self, task: str, targets: Targets) -> dict[str, Any]:
        return {"class_weight": targets.state["class_weight"]}


SETTINGS = distillation(FairMtard, status=ON_DIGITS, digits=SHORT, small=SHORT)

if __name__ == "__main__":
    run_recipe(__file__)
