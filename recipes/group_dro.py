"""Group DRO of the classes: what costs most weighs most, by exponentiated gradients (Sagawa et al., ICLR 2020).

min  sum over k of q[k] L[k]   where   x' = argmax CE(S(x'), y) in the eps ball,   q = q' exp(eta L) / sum q' exp(eta L)

L[k] is the mean of CE(S(x'), y) over the batch's images of class k, and q' what q was in the step before, at the start
1/K each. A class without images in the batch has L[k] = 0, as in the authors' code: it adds nothing to the loss, and
its q falls a little where the others' rise. The groups are the classes and the images are attacked: this is SAT under
another weighting, a baseline for the methods that even out classes. The authors' groups are of another kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retemper.engine import LabelAttack, Recipe, Targets, is_label, option, run_recipe
from retemper.recipes.sat import ATTACK, RICE
from retemper.recipes.settings import ON_DIGITS, adversarial_training


def next_weight(weight_K: Tensor, loss_K: Tensor, eta: float) -> Tensor:
    """Return q, (K,), which sums to 1, after a step with the mean losses `loss_K`, (K,)."""
    return (weight_K.log() + eta * loss_K).softmax(0)


@dataclass(frozen=True, kw_only=True)
class GroupDro(LabelAttack):
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("adv",)
    eta: float = option(0.01, "rate of the class weights", at_most=100)

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return {"class_weight": torch.full((num_classes,), 1 / num_classes)}

    def weighed(self, adv_BK: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of the images, (B,), q, and the share of each class's images in the whole batch, (K,).

        The share of a class without images is given as 1.
        """
        loss_B = targets.cross_entropy_rows(adv_BK)
        own_BK = is_label(adv_BK, targets.label_B).to(loss_B.dtype)
        own_loss_BK = own_BK * loss_B.detach()[:, None]
        share_K, total_K = targets.part.mean(torch.stack([own_BK.mean(0), own_loss_BK.mean(0)]))
        share_K = torch.where(share_K > 0, share_K, 1.0)
        return loss_B, next_weight(targets.state["class_weight"], total_K / share_K, self.eta), share_K

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        loss_B, weight_K, share_K = self.weighed(logits["adv"], targets)
        return ((weight_K / share_K)[targets.label_B] * loss_B).mean()

    def after_step(self, state: Mapping[str, Tensor], logits: Mapping[str, Tensor], targets: Targets) -> None:
        state["class_weight"].copy_(self.weighed(logits["adv"], targets)[1])


SETTINGS = adversarial_training(GroupDro, ATTACK | RICE, ON_DIGITS)

if __name__ == "__main__":
    run_recipe(__file__)
