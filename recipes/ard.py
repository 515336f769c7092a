"""ARD: the teacher's soft answer to the clean image, asked of the attacked one (Goldblum et al., AAAI 2020).

min  a t^2 KL(T(x; t) || S(x'; t)) + (1 - a) CE(S(x), y)   where   x' = argmax CE(S(x'), y) in the eps ball

T(x; t) = softmax(teacher(x) / t), S likewise. The attack starts uniformly and runs in train mode, so that its forwards
move the batch-norm statistics too; so does the clean one, even where a = 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import LabelAttack, Targets, option, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.igdm import Igdm
from retemper.recipes.settings import ON_DIGITS, distillation


@dataclass(frozen=True, kw_only=True)
class Ard(LabelAttack, Igdm):
    # released: the authors' code multiplies the first learning rate at every drop, so that the second changes nothing.
    # It trains on all images in fp32 and keeps every epoch without choosing one: here the last.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(lr_drop_of="first", holdout_per_class=0, precision="fp32")
    }
    temperature: float = option(30.0, "temperature of both networks (t)", positive=True, at_most=1000)
    soft_weight: float = option(
        1.0, "weight of the soft term (a); the rest is the cross-entropy of clean images", at_most=1
    )
    kl_scale: float = option(
        0.1, "factor on the soft term; the authors average over the classes: a tenth for 10", at_most=1000
    )

    def smooths_labels(self) -> bool:
        return self.soft_weight < 1

    def soft_loss(self, logits_BK: Tensor, teacher_BK: Tensor) -> Tensor:
        """Return the tempered KL of each image, (B,), with t^2 and the scale."""
        t = self.temperature
        kl_B = class_temperature_kl(logits_BK, teacher_BK, temperature=t, student_temperature=t, reduction="none")
        return self.kl_scale * t * t * kl_B

    def image_loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """Return what each image adds to the loss, (B,)."""
        loss_B = self.soft_weight * self.soft_loss(logits["adv"], targets.teacher)
        if self.soft_weight < 1:
            loss_B = loss_B + (1 - self.soft_weight) * targets.cross_entropy_rows(logits["clean"])
        return loss_B

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return self.image_loss(logits, targets).mean()


AUTHORS: dict[str, Any] = dict(
    attack_start="uniform", attack_bn="train", epochs=200, lr_drops=(100, 150), select_always_from=100
)
SHORT = dict(kl_scale=1.0)  # one or two thousand steps are too few for a tenth of the loss
SETTINGS = distillation(
    Ard,
    AUTHORS,
    ON_DIGITS,
    digits=SHORT,
    small=SHORT,
    cifar100_resnet18=dict(batch_size=256, kl_scale=0.01),
    tiny_imagenet_preact_resnet18=dict(kl_scale=0.005),
)

if __name__ == "__main__":
    run_recipe(__file__)
