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
from retemper.recipes.fair import RELEASED, Fair
from retemper.recipes.settings import ON_DIGITS, distillation


@dataclass(frozen=True, kw_only=True)
class FairArd(Ard, Fair):
    # released: the second drop of the learning rate changes nothing (Ard), and Nesterov's momentum (Fair)
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = RELEASED

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        weight_B = targets.state["class_weight"][targets.label_B]
        return (weight_B * self.image_loss(logits, targets)).mean()


SETTINGS = distillation(FairArd, AUTHORS, ON_DIGITS, digits=SHORT, fashion_mnist_small=SHORT)

if __name__ == "__main__":
    run_recipe(__file__)
