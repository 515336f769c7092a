"""Fair-IAD: IAD-I with each class weighed by how soon it falls to the attack (Yue et al., NeurIPS 2023).

min  w[y] (KL(T(x) || S(x')) + (1 - A) KL(S(x) || S(x')))   where   x' = argmax CE(S(x'), y) in the eps ball

w is the rule of fair.py; A, the share that the teacher is trusted, and the rest are IAD's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import Forwards, Targets, run_recipe
from retemper.recipes.ard import AUTHORS
from retemper.recipes.fair import RELEASED_BY_ARD, Fair
from retemper.recipes.iad import Iad
from retemper.recipes.settings import ON_DIGITS, distillation


@dataclass(frozen=True, kw_only=True)
class FairIad(Iad, Fair):
    # released: as ARD's and Fair's, and a second forward of the attacked images, in every epoch. With soft_weight
    # below 1, the authors' cross-entropy is that of the attacked images; here, as in IAD, of the clean ones.
    released_forwards: ClassVar[Forwards | None] = Forwards(("adv", "clean", "adv"))
    released_at_first: ClassVar[Forwards | None] = released_forwards
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = RELEASED_BY_ARD

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        weight_B = targets.state["class_weight"][targets.label_B]
        return (weight_B * self.image_loss(logits, targets)).mean()


SETTINGS = distillation(FairIad, AUTHORS, ON_DIGITS)

if __name__ == "__main__":
    run_recipe(__file__)
