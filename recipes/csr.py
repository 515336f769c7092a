"""CSR: two epochs on a robust network against its largest confusions under attack (Jin et al., ICLR 2025).

min  0.7 CE(S(x), y) + 6 KL(S(x) || S(x')) + 0.3 mean G[argmax S(x'), y] CE(S(x'), y)

where x' = argmax KL(S(x) || S(x')). Before each epoch the training images are attacked, and of the shares C of those
of class j that are taken for class i, the diagonal 0, the spectral norm has the gradient u v':

G = 2 (u v' - min) / (max - min) + 0.01   where   C = sum_r s_r u_r v_r',  u, v those of the largest s

An image counts as taken for another class, too, where its own class's logit, lowered by gamma, is not the largest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from retemper.engine import (
    EpochStats,
    Forwards,
    OwnPredictionAttack,
    Recipe,
    Targets,
    TrainingAttack,
    option,
    run_recipe,
)
from retemper.kernels import class_temperature_kl
from retemper.recipes.settings import ON_DIGITS, TWO_EPOCHS, adversarial_training


def pair_weight(confusion_KK: Tensor) -> Tensor:
    """Return G, (K, K) float64, by the class that is given and the true one: each in [0.01, 2.01].

    The sign of u and v is not told by the decomposition, but is the same for both: their product has none.

    Args:
        confusion_KK: (K, K) shares or counts, of any float dtype; a row is a class that is given, the diagonal is 0.
            Where all are 0, there is nothing to lower, and G is 0.01.
    """
    u_KK, _, v_KK = torch.linalg.svd(confusion_KK.double())
    pull_KK = torch.outer(u_KK[:, 0], v_KK[0]) * (confusion_KK.sum() > 0)
    above_KK = pull_KK - pull_KK.min()
    return 2 * above_KK / above_KK.max().clamp(min=torch.finfo(torch.float64).tiny) + 0.01


@dataclass(frozen=True, kw_only=True)
class Csr(OwnPredictionAttack):
    # released: the authors' script looks at both images twice, which moves the statistics of batch norm twice, trains
    # on all images and chooses no epoch. It counts images, so that the larger of two classes weighs more. The same
    # gamma is taken of the logit, so that a negative one is raised.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(holdout_per_class=0, precision="fp32")
    }
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("clean", "adv")
    released_forwards: ClassVar[Forwards | None] = Forwards(("clean", "adv", "clean", "adv"))
    beta: float = option(6.0, "weight of the robust term", at_most=1000)
    share: float = option(0.3, "weight of the term on confusions; the clean one has what is left to 1", at_most=1)
    gamma: float = option(0.1, "the share of a true class's logit by which it is lowered in the counts", at_most=1)
    confusion_of: Literal["survey", "training"] = option(
        "survey",
        "the counts: of all training images, attacked before each epoch; or, another algorithm that costs nothing, of "
        "the training attack of the epoch before (the first epoch has a survey either way)",
    )

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return {"pair_weight": torch.ones(num_classes, num_classes)}

    def surveys_by(self, epoch: int, recipe: Recipe) -> TrainingAttack | None:
        if epoch > 1 and self.confusion_of == "training":
            return None
        return replace(recipe.attack, start="uniform", clip_start=False)

    def surveyed(self, logits_BK: Tensor, label_B: Tensor) -> Tensor:
        class_K = torch.arange(logits_BK.shape[1], device=logits_BK.device)
        lowered_BK = torch.where(label_B[:, None] == class_K, (1 - self.gamma) * logits_BK, logits_BK)
        return (lowered_BK.argmax(1)[:, None] == class_K).to(logits_BK.dtype)

    def measured(self, logits: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        found = super().measured(logits, targets)
        if self.confusion_of == "training":
            found["given"] = self.surveyed(logits["adv"], targets.label_B)
        return found

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        weight_B = targets.state["pair_weight"][logits["adv"].argmax(1), targets.label_B]
        confusion = (weight_B * targets.cross_entropy_rows(logits["adv"])).mean()
        clean = targets.cross_entropy_rows(logits["clean"]).mean()
        robust = class_temperature_kl(logits["adv"], logits["clean"])  # as in TRADES, neither side is detached
        return (1 - self.share) * clean + self.beta * robust + self.share * confusion

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        found = super().next_class_state(state, stats, epoch, recipe)
        seen = stats.surveyed or stats.measured.get("given")
        if seen is None:  # after the last epoch
            return found
        seen_KK = seen.total_KD if self.variant == "released" else seen.mean_KD
        confusion_KK = seen_KK.T.clone().fill_diagonal_(0)
        return found | {"pair_weight": pair_weight(confusion_KK).to(state["pair_weight"])}


SETTINGS = adversarial_training(Csr, status=ON_DIGITS, from_robust="trades", **TWO_EPOCHS)

if __name__ == "__main__":
    run_recipe(__file__)
