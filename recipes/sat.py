"""SAT: standard adversarial training on the hard labels (Madry et al., ICLR 2018; protocol of Rice et al., ICML 2020).

min  CE(S(x'), y)   where   x' = argmax CE(S(x'), y) in the eps ball, from a uniform start

With no attack steps, x' = x: plain training, for the clean teacher of the methods that have one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from retemper.engine import LabelAttack, Targets, run_recipe
from retemper.recipes.settings import ON_BOTH, adversarial_training, as_student, teachers


@dataclass(frozen=True, kw_only=True)
class Sat(LabelAttack):
    forwards: ClassVar[tuple[str, ...]] = ("adv",)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return F.cross_entropy(logits["adv"].float(), targets.label_B)


AUTHORS: dict[str, Any] = dict(attack_start="uniform", clip_start=True)
# the students alone: where FRL and FAAL begin, and what other methods are compared with at equal size
RICE: dict[str, Any] = dict(epochs=200, lr_drops=(100, 150), weight_decay=5e-4, select_always_from=100)
OURS: dict[str, Any] = dict(weight_decay=5e-4)
STUDENTS = adversarial_training(
    Sat,
    AUTHORS,
    ON_BOTH,
    digits=OURS,
    fashion_mnist_small=OURS,
    fashion_mnist_resnet18=OURS,
    cifar10_resnet18=RICE,
    cifar10_preact_resnet18=RICE,
    cifar100_resnet18=RICE,
    svhn_resnet18=RICE,
    tiny_imagenet_preact_resnet18=OURS,
)
STATUS = dict(
    digits="3 seeds on a 2-core CPU: docs/fairness.md", fashion_mnist_small="1 seed on a 2-core CPU: docs/fairness.md"
)
SETTINGS = {as_student(name): setting for name, setting in STUDENTS.items()} | teachers(Sat, STATUS, AUTHORS, **OURS)

if __name__ == "__main__":
    run_recipe(__file__)
