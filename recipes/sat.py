"""SAT: standard adversarial training on the hard labels (Madry et al., ICLR 2018; protocol of Rice et al., ICML 2020).

min  CE(S(x'), y)   where   x' = argmax CE(S(x'), y) in the eps ball, from a uniform start

With no attack steps, x' = x: plain training, for the clean teacher of the methods that have one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from retemper.engine import (
    DIGITS,
    FASHION,
    FASHION_SMALL,
    ON_DIGITS,
    Objective,
    Recipe,
    Setting,
    Targets,
    adversarial_training,
    as_student,
    cross_entropy_objective,
    run_recipe,
)


@dataclass(frozen=True, kw_only=True)
class Sat(Recipe):
    forwards: ClassVar[tuple[str, ...]] = ("adv",)
    attack_start: str = "uniform"
    clip_start: bool = True

    def objective(self, targets: Targets) -> Objective:
        return cross_entropy_objective(targets.label_B)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return F.cross_entropy(logits["adv"].float(), targets.label_B)


# no attack, in training or in choosing the best epoch; eps is what an evaluation attacks with
CLEAN: dict[str, Any] = dict(attack_steps=0, attack_start="none", select_steps=0, weight_decay=5e-4)
CLEAN_200: dict[str, Any] = CLEAN | dict(epochs=200, lr_drops=(100, 150), select_always_from=150)

SETTINGS = {
    "digits": Setting(
        note="8x8 digits: the robust teacher of the digits settings, under a minute on one core",
        status="3 seeds on a 2-core CPU: README",
        recipe=Sat(
            **DIGITS,
            student="tiny_resnet_wide",
            weight_decay=5e-4,
        ),
    ),
    "fashion_mnist_small": Setting(
        note="Fashion-MNIST: the robust teacher of fashion_mnist_small",
        status="1 seed on a 2-core CPU: README",
        recipe=Sat(
            **FASHION_SMALL,
            student="tiny_resnet_wide",
            weight_decay=5e-4,
        ),
    ),
    "fashion_mnist_preact_resnet18": Setting(
        note="Fashion-MNIST: the robust teacher of fashion_mnist_resnet18, for a GPU",
        recipe=Sat(
            **FASHION,
            student="preact_resnet18",
            epochs=30,
            lr_drops=(20, 27),
            weight_decay=5e-4,
            select_every=5,
            select_always_from=20,
        ),
    ),
    "cifar10_preact_resnet18": Setting(
        note="CIFAR-10, PreActResNet-18, the protocol of Rice et al.",
        recipe=Sat(
            dataset="cifar10",
            student="preact_resnet18",
            epochs=200,
            lr_drops=(100, 150),
            weight_decay=5e-4,
            select_always_from=100,
        ),
    ),
    "digits_clean": Setting(
        note="8x8 digits, no attack: the clean teacher of the digits settings, seconds on one core",
        recipe=Sat(**DIGITS, **CLEAN, student="tiny_resnet_wide"),
    ),
    "fashion_mnist_small_clean": Setting(
        note="Fashion-MNIST, no attack: the clean teacher of fashion_mnist_small",
        recipe=Sat(**FASHION_SMALL, **CLEAN, student="tiny_resnet_wide"),
    ),
    "fashion_mnist_preact_resnet18_clean": Setting(
        note="Fashion-MNIST, no attack: the clean teacher of fashion_mnist_resnet18, for a GPU",
        recipe=Sat(
            **FASHION,
            **CLEAN,
            student="preact_resnet18",
            epochs=30,
            lr_drops=(20, 27),
            select_every=5,
            select_always_from=27,
        ),
    ),
    "cifar10_resnet56_clean": Setting(
        note="CIFAR-10, ResNet-56, no attack: the clean teacher of MTARD's kind, for a GPU",
        recipe=Sat(dataset="cifar10", student="resnet56", **CLEAN_200),
    ),
    "cifar100_resnet18_clean": Setting(
        note="CIFAR-100, ResNet-18, no attack: a clean teacher, for a GPU",
        recipe=Sat(dataset="cifar100", student="resnet18", holdout_per_class=10, **CLEAN_200),
    ),
    "tiny_imagenet_preact_resnet34_clean": Setting(
        note="Tiny-ImageNet, PreActResNet-34, no attack: a clean teacher, for a GPU",
        recipe=Sat(
            dataset="tiny-imagenet",
            student="preact_resnet34",
            holdout_per_class=10,
            epochs=100,
            lr_drops=(75, 90),
            select_always_from=75,
            **CLEAN,
        ),
    ),
}

# the students alone: where FRL and FAAL begin, and what other methods are compared with at equal size
RICE: dict[str, Any] = dict(epochs=200, lr_drops=(100, 150), weight_decay=5e-4, select_always_from=100)
STUDENTS = adversarial_training(
    Sat,
    ON_DIGITS,
    digits=dict(weight_decay=5e-4),
    fashion_mnist_small=dict(weight_decay=5e-4),
    fashion_mnist_resnet18=dict(weight_decay=5e-4),
    cifar10_resnet18=RICE,
    cifar100_resnet18=RICE,
    tiny_imagenet_preact_resnet18=dict(weight_decay=5e-4),
)
SETTINGS = {as_student(name): setting for name, setting in STUDENTS.items()} | SETTINGS

if __name__ == "__main__":
    run_recipe(__file__)
