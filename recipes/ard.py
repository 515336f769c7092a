"""ARD: the teacher's soft answer to the clean image, asked of the attacked one (Goldblum et al., AAAI 2020).

min  a t^2 KL(T(x; t) || S(x'; t)) + (1 - a) CE(S(x), y)   where   x' = argmax CE(S(x'), y) in the eps ball

T(x; t) = softmax(teacher(x) / t), S likewise. The attack starts uniformly and runs in train mode, so that its forwards
move the batch-norm statistics too; so does the clean one, even where a = 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from retemper.engine import Objective, Recipe, Targets, cross_entropy_objective, cross_entropy_rows, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.settings import ON_DIGITS, distillation


@dataclass(frozen=True, kw_only=True)
class Ard(Recipe):
    # released: the authors' code multiplies the first learning rate at every drop, so that the second changes nothing
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    attack_start: str = "uniform"
    attack_bn: str = "train"
    epochs: int = 200
    lr_drops: tuple[int, ...] = (100, 150)
    select_always_from: int = 100
    temperature: float = 30.0
    soft_weight: float = 1.0  # a above
    kl_scale: float = 0.1  # the authors average over the 10 classes too: sum / 10, for any number of classes

    def decay(self, epoch: int) -> float:
        drops = sum(drop <= epoch for drop in self.lr_drops)
        return self.lr_factor ** (min(drops, 1) if self.variant == "released" else drops)

    def objective(self, targets: Targets) -> Objective:
        return cross_entropy_objective(targets.label_B)

    def soft_loss(self, logits_BK: Tensor, teacher_BK: Tensor, targets: Targets) -> Tensor:
        """(B,) the tempered KL, t^2 and the scale included."""
        t = self.temperature
        kl_B = class_temperature_kl(
            logits_BK, teacher_BK, targets.label_B, t * targets.ones_K, student_temperature=t, reduction="none"
        )
        return self.kl_scale * t * t * kl_B

    def image_loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """(B,) what each image adds to the loss."""
        loss_B = self.soft_weight * self.soft_loss(logits["adv"], targets.teacher, targets)
        if self.soft_weight < 1:
            loss_B = loss_B + (1 - self.soft_weight) * cross_entropy_rows(logits["clean"], targets.label_B)
        return loss_B

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return self.image_loss(logits, targets).mean()


SHORT = dict(kl_scale=1.0)  # one or two thousand steps are too few for a tenth of the loss
SETTINGS = distillation(
    Ard,
    ON_DIGITS,
    digits=SHORT,
    fashion_mnist_small=SHORT,
    cifar100_resnet18=dict(batch_size=256),
)

if __name__ == "__main__":
    run_recipe(__file__)
