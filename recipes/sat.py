"""SAT: standard adversarial training on the hard labels (Madry et al., ICLR 2018; protocol of Rice et al., ICML 2020).

min  CE(S(x'), y)   where   x' = argmax CE(S(x'), y) in the eps ball, from a uniform start

With no attack steps, x' = x: plain training, for the clean teacher of the methods that have one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import Forwards, LabelAttack, Targets, run_recipe
from retemper.recipes.settings import BY_PGD_10, ON_BOTH, adversarial_training, as_student, teachers


@dataclass(frozen=True, kw_only=True)
class Sat(LabelAttack):
    # released: the script of Rice et al. It looks at the attacked images once more where the attack ends, and at the
    # clean ones after the step, for its log. It crops from mirrored borders, normalises the images, lets the rate drop
    # in an epoch's last step, and keeps the epoch that is best on the test images under PGD-10.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(attack_bn="train", padding_mode="reflect", normalise=True, lr_drop_early=True, **BY_PGD_10)
    }
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("adv",)
    released_forwards: ClassVar = Forwards(("adv", "adv"), after=("clean",))

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return targets.cross_entropy(logits["adv"])


@dataclass(frozen=True, kw_only=True)
class Clean(Sat):
    variants: ClassVar[tuple[str, ...]] = ("paper",)  # the script attacks, and clean teachers are ours
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}


AUTHORS: dict[str, Any] = dict(attack_start="uniform", clip_start=True)
# the students alone: where FRL and FAAL begin, and what other methods are compared with at equal size
ATTACK = AUTHORS | dict(attack_bn="train")  # as Rice et al. do
RICE: dict[str, Any] = dict(epochs=200, lr_drops=(100, 150), weight_decay=5e-4, select_always_from=100)
OURS: dict[str, Any] = dict(weight_decay=5e-4)
STUDENTS = adversarial_training(
    Sat,
    ATTACK,
    ON_BOTH,
    digits=OURS,
    small=OURS,
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
CLEAN = {name: one for name, one in teachers(Clean, {}, AUTHORS, **OURS).items() if name.endswith("_clean")}
TEACHERS = teachers(Sat, STATUS, AUTHORS, **OURS) | CLEAN
SETTINGS = {as_student(name): setting for name, setting in STUDENTS.items()} | TEACHERS

if __name__ == "__main__":
    run_recipe(__file__)
