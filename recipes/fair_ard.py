"""Fair-ARD: ARD with each class weighed by how soon it falls to the attack (Yue et al., NeurIPS 2023).

min  w[y] (a t^2 KL(T(x; t) || S(x'; t)) + (1 - a) CE(S(x), y))   where   x' = argmax CE(S(x'), y) in the eps ball

w is the rule of fair.py; the rest is ARD's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import Targets, run_recipe
from retemper.recipes.ard import AUTHORS, SHORT, Ard
from retemper.recipes.fair import RELEASED_BY_ARD, Fair
from retemper.recipes.settings import ON_DIGITS, distillation


@dataclass(frozen=True, kw_only=True)
class FairArd(Ard, Fair):
    # released: as ARD's and Fair's
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = RELEASED_BY_ARD

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        weight_B = targets.state["class_weight"][targets.label_B]
        return (weight_B * self.image_loss(logits, targets)).mean()


SETTINGS = distillation(
    FairArd,
    AUTHORS,
    ON_DIGITS,
    digits=SHORT,
    small=SHORT,
    cifar100_resnet18=dict(kl_scale=0.01),  # the authors' script is CIFAR-10's; it averages over the classes, as ARD's
    tiny_imagenet_preact_resnet18=dict(kl_scale=0.005),
)

if __name__ == "__main__":
    run_recipe(__file__)
