"""Fair-RSLAD: RSLAD with each class weighed by how soon it falls to the attack (Yue et al., NeurIPS 2023).

min  w[y] (a KL(T(x) || S(x')) + (1 - a) KL(T(x) || S(x)))   where   x' = argmax KL(T(x) || S(x')) in the eps ball

w is the rule of fair.py and leaves the attack alone; the rest is RSLAD's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import EpochStats, Targets, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.fair import FLOOR, RELEASED, Fair
from retemper.recipes.rslad import SHORT, Rslad
from retemper.recipes.settings import ON_BOTH, distillation


@dataclass(frozen=True, kw_only=True)
class FairRslad(Rslad, Fair):
    # released: as Fair, but that this one of the authors' four scripts adds no 1e-5 to kappa. It divides by zero where
    # a class is never classified correctly, and its losses are NaN from then on: such a class has kappa = 1e-5 here.
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = RELEASED

    def kappa(self, stats: EpochStats) -> Tensor:
        kappa_K = super().kappa(stats)
        return kappa_K.clamp(min=FLOOR) - FLOOR if self.variant == "released" else kappa_K

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        label_B, weight_K = targets.label_B, targets.state["class_weight"]
        adv = class_temperature_kl(logits["adv"], targets.teacher, label_B, class_weight=weight_K, ignore_index=None)
        clean = class_temperature_kl(
            logits["clean"], targets.teacher, label_B, class_weight=weight_K, ignore_index=None
        )
        return self.kl_scale * (self.adv_weight * adv + (1 - self.adv_weight) * clean)


SETTINGS = distillation(FairRslad, status=ON_BOTH, digits=SHORT, small=SHORT)

if __name__ == "__main__":
    run_recipe(__file__)
