"""SAT: standard adversarial training on the hard labels (Madry et al., ICLR 2018; protocol of Rice et al., ICML 2020).

min  CE(S(x'), y)   where   x' = argmax CE(S(x'), y) in the eps ball, from a uniform start
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from retemper.engine import (
    DIGITS,
    FASHION,
    FASHION_SMALL,
    Objective,
    Recipe,
    Setting,
    Targets,
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
}

if __name__ == "__main__":
    run_recipe(__file__)
