"""SAAD: images count as far as the attack leaves the teacher in doubt, where it transfers (Lee and Chung, TMLR 2026).

min  w (KL(T(x') || S(x')) + IGDM's term) + b (1 - w / max w) KL(T(x) || S(x))   where   w = c (H - min H)

H is the entropy of T(x'); minimum and maximum are those of the batch. x' = argmax KL(T'(x') || S(x')) in the eps ball,
where T' is the teacher to first order around x, in the logit of the label alone: one backward pass of T for each image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import Forwards, Objective, Recipe, Targets, at_least_float32, given, option, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.adaad import disagreement
from retemper.recipes.igdm import Igdm
from retemper.recipes.settings import ON_DIGITS, distillation


def entropy(logits_BK: Tensor, order: float = 1.0) -> Tensor:
    """Return Renyi's entropy of the softmax of each row, (B,) in nats; of order 1, Shannon's."""
    log_p_BK = at_least_float32(logits_BK).log_softmax(1)
    if order == 1:
        return -(log_p_BK.exp() * log_p_BK).sum(1)
    return (order * log_p_BK).logsumexp(1) / (1 - order)


@dataclass(frozen=True, kw_only=True)
class Saad(Igdm):
    # released: trains on all images in fp32 and keeps the last epoch. In both: the authors' b is 0. They measure the
    # statistics of the averaged network anew, on clean images; here they are averaged, as the weights are.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(holdout_per_class=0, precision="fp32")
    }
    teacher_sees: ClassVar[tuple[str, ...]] = ("adv",)  # its answers to clean images come with the slope
    igdm: float = option(
        1.0, "weight of IGDM's term (alpha); the authors': 10 on CIFAR-100 and Tiny-ImageNet", at_most=1000
    )
    doubt_scale: float = option(5.0, "factor on the weight of an image (c)", positive=True, at_most=1000)
    doubt_order: float = option(1.0, "order of Renyi's entropy (H); 1: Shannon's", positive=True, at_most=100)
    clean_weight: float = option(0.0, "weight of the clean term (b)", at_most=1000)
    slope_weight: float = option(
        1.0, "how much of the teacher's change the attack foresees, to first order", positive=True, at_most=100
    )

    def attacks_slope(self) -> float:
        return self.slope_weight

    def objective(self, targets: Targets) -> Objective:
        return disagreement

    def forwards_in(self, epoch: int, recipe: Recipe) -> Forwards:
        names = super().forwards_in(epoch, recipe).before
        return Forwards((*(name for name in names if name != "clean"), "clean"))  # the authors' order

    def doubt(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """Return w and w / max w of each image, (B,)."""
        entropy_B = entropy(given(targets.teacher_adv_BK), self.doubt_order)
        weight_B = self.doubt_scale * (entropy_B + targets.part.largest(-entropy_B.min()))
        return weight_B, weight_B / (targets.part.largest(weight_B.max()) + 1e-8)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        weight_B, share_B = self.doubt(targets)
        loss = class_temperature_kl(logits["adv"], given(targets.teacher_adv_BK), row_weight=weight_B)
        if self.igdm:
            loss = loss + self.igdm_term(logits, targets, weight_B)
        if self.clean_weight:
            clean = class_temperature_kl(logits["clean"], targets.teacher, row_weight=1 - share_B)
            loss = loss + self.clean_weight * clean
        return loss

    def training_loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return self.loss(logits, targets)  # IGDM's term is in it, weighed by image


def averaged_from(epoch: int) -> dict[str, Any]:
    """Return the options of the average, which begins five epochs before the learning rate first falls."""
    return dict(average="swa", average_every="epoch", average_from=epoch)


# a teacher that is sure of a whole class leaves it without weight: on digits, with b = 0, one is never learned
SHORT = dict(clean_weight=1.0)
AUTHORS: dict[str, Any] = dict(epochs=200, lr_drops=(100, 150), select_always_from=100) | averaged_from(95)
SETTINGS = distillation(
    Saad,
    AUTHORS,
    ON_DIGITS,
    digits=SHORT | averaged_from(13),
    small=SHORT | averaged_from(7),
    fashion_mnist_resnet18=averaged_from(41),
    cifar100_resnet18=dict(igdm=10.0),
    tiny_imagenet_preact_resnet18=dict(igdm=10.0) | averaged_from(70),
    imagenet100_resnet18=dict(igdm=10.0) | averaged_from(25),
)

if __name__ == "__main__":
    run_recipe(__file__)
