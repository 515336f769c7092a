"""Fair-IAD: IAD-I with each class weighed by how soon it falls to the attack (Yue et al., NeurIPS 2023).

min  w[y] (KL(T(x) || S(x')) + (1 - A) KL(S(x) || S(x')))   where   x' = argmax CE(S(x'), y) in the eps ball

w is the rule of fair.py; A, the share that the teacher is trusted, and the rest are IAD's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import Targets, run_recipe
from retemper.recipes.ard import AUTHORS
from retemper.recipes.fair import RELEASED, Fair
from retemper.recipes.iad import Iad
from retemper.recipes.settings import ON_DIGITS, distillation


@dataclass(frozen=True, kw_only=True)
class FairIad(Iad, Fair):
    # released: the second drop of the learning rate changes nothing (Ard), and Nesterov's momentum (Fair). The authors'
    # code also takes one more forward of the attacked images, whose answer it throws away: its trace in the batch-norm
    # statistics is left out in both.
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = RELEASED

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        weight_B = targets.state["class_weight"][targets.label_B]
        return (weight_B * self.image_loss(logits, targets)).mean()


SETTINGS = distillation(FairIad, AUTHORS, ON_DIGITS)

if __name__ == "__main__":
    run_recipe(__file__)
