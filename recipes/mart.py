"""MART: images that the student gets wrong without an attack count more against it (Wang et al., ICLR 2020).

min  BCE(p', y) + beta (1 - p[y]) KL(p || p')   where   p, p' = softmax S(x), S(x'),   x' = argmax CE(S(x'), y)

BCE(p', y) = -log p'[y] - log(1 - max_{k != y} p'[k]): to be right is not enough, the runner-up is to be unlikely too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import (
    LabelAttack,
    Recipe,
    Setting,
    Targets,
    at_least_float32,
    cross_entropy_rows,
    is_label,
    kl_rows,
    option,
    run_recipe,
)
from retemper.recipes.settings import ON_DIGITS, adversarial_training

FLOOR = 1e-4  # the authors' code adds it to 1 - p' under the logarithm: a runner-up that is certain costs 9.2, not inf


def boosted_cross_entropy(logits_BK: Tensor, label_B: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return BCE of softmax(logits) for each image, (B,)."""
    runner_up_B = logits_BK.softmax(1).masked_fill(is_label(logits_BK, label_B), 0).amax(1)
    return cross_entropy_rows(logits_BK, label_B, smoothing) - torch.log(1 + FLOOR - runner_up_B)


@dataclass(frozen=True, kw_only=True)
class Mart(LabelAttack):
    # released: the authors' script, with its guards in the robust term. It trains on all images and chooses no epoch.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(holdout_per_class=0, precision="fp32")
    }
    hard_labels: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("clean", "adv")  # the authors' order
    beta: float = option(
        5.0, "weight of the robust term (lambda); the authors take 5 for ResNet-18, 6 for WRN-34-10", at_most=1000
    )

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        clean_BK, adv_BK = (at_least_float32(logits[name]) for name in self.forwards)
        right_B = clean_BK.softmax(1).gather(1, targets.label_B[:, None]).squeeze(1)
        if self.variant == "released":
            kl_BK = F.kl_div((adv_BK.softmax(1) + 1e-12).log(), clean_BK.softmax(1), reduction="none")
            robust_B = (1.0000001 - right_B) * kl_BK.sum(1)
        else:
            robust_B = (1 - right_B) * kl_rows(clean_BK, adv_BK)
        boosted_B = boosted_cross_entropy(adv_BK, targets.label_B, targets.label_smoothing)
        return (boosted_B + self.beta * robust_B).mean()


AUTHORS: dict[str, Any] = dict(
    eps=0.031,
    attack_step=0.007,
    epochs=120,
    lr=0.01,
    lr_drops=(74, 89, 99),
    weight_decay=3.5e-3,
    select_always_from=74,
)
WRN34_10 = dict(student="wrn34_10", epochs=90, lr=0.1, lr_drops=(74, 89), weight_decay=7e-4, beta=6.0)
# the authors' small rate and large decay need their many steps
SHORT = dict(lr=0.1, weight_decay=5e-4)
SETTINGS = adversarial_training(
    Mart,
    AUTHORS,
    ON_DIGITS,
    digits=SHORT,
    small=SHORT,
    fashion_mnist_resnet18=SHORT,
    tiny_imagenet_preact_resnet18=SHORT,
    imagenet100_resnet18=SHORT,
)
SETTINGS["cifar10_wrn34_10"] = Setting(
    note="CIFAR-10, WRN-34-10, as the authors train it",
    recipe=Recipe.of(Mart, **AUTHORS | WRN34_10, dataset="cifar10"),
)

if __name__ == "__main__":
    run_recipe(__file__)
