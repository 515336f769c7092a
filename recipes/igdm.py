"""IGDM: along the attack the student's answer turns as its teacher's does, with any host (Lee et al., ICLR 2025).

min  host + alpha (e / E) KL(T(x + b d) - T(x - g d) || S(x + b d) - S(x - g d))   where   d = x' - x

KL is that of the softmaxes of these differences of logits, with a gradient in S alone. e is the epoch, from 1, of E.
The views are not clipped to [0, 1]. With b = 1 the first is x' itself; with g = 0 the second is x.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retemper.engine import EpochStats, Forwards, Method, Recipe, Targets, given, option
from retemper.kernels import class_temperature_kl


@dataclass(frozen=True, kw_only=True)
class Igdm(Method):
    """The term, for a method whose teacher answers to clean or attacked images and whose student sees both."""

    igdm: float = option(
        0.0, "weight of IGDM's term (alpha), 0 is off; the authors' is 1, 20 on CIFAR-100, 10 on Tiny-ImageNet",
        at_most=1000,
    )  # fmt: skip
    igdm_beta: float = option(
        1.0, "how far along the attack IGDM looks (b); 1: at the attacked image", positive=True, at_most=100
    )
    igdm_gamma: float = option(1.0, "how far against the attack IGDM looks (g); 0: at the clean image", at_most=100)

    @property
    def igdm_views(self) -> tuple[str, ...]:
        """The names of the images that the term compares, along the attack and against it; none where it is off."""
        names = "adv" if self.igdm_beta == 1 else "plus", "minus" if self.igdm_gamma else "clean"
        return names if self.igdm else ()

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return super().class_state(num_classes, recipe) | self._weight_in(1, recipe)

    def _weight_in(self, epoch: int, recipe: Recipe) -> dict[str, Tensor]:
        """Return alpha e / E, where the term is on."""
        share = min(epoch / recipe.optim.epochs, 1)
        return {"igdm_weight": torch.tensor(self.igdm * share)} if self.igdm else {}

    def views(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        at = {"plus": self.igdm_beta, "minus": -self.igdm_gamma}
        clean, adv = images["clean"], images["adv"]
        own = {name: torch.lerp(clean, adv, at[name]) for name in self.igdm_views if name in at}
        return super().views(images) | own

    def shown_to_teacher(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().shown_to_teacher(), *self.igdm_views)))

    def forwards_in(self, epoch: int, recipe: Recipe) -> Forwards:
        forwards = super().forwards_in(epoch, recipe)
        own = (name for name in self.igdm_views if name not in forwards.before)
        return Forwards((*forwards.before, *own), forwards.after)

    def igdm_term(self, logits: Mapping[str, Tensor], targets: Targets, row_weight_B: Tensor | None = None) -> Tensor:
        """Return the weighted term, a scalar; of each image `row_weight_B` is a further weight, (B,)."""
        plus, minus = self.igdm_views
        answers = {"clean": targets.teacher_BK, "adv": targets.teacher_adv_BK, **targets.teacher_views}
        turn_BK = given(answers[plus]) - given(answers[minus])
        kl = class_temperature_kl(logits[plus] - logits[minus], turn_BK, row_weight=row_weight_B)
        return targets.state["igdm_weight"] * kl

    def training_loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        host = super().training_loss(logits, targets)
        return host + self.igdm_term(logits, targets) if self.igdm else host

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        return super().next_class_state(state, stats, epoch, recipe) | self._weight_in(epoch + 1, recipe)
