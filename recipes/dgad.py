"""DGAD: where the teacher is wrong its answer is corrected, and clean images are learned (Park and Min, ECCV 2024).

min  KL(T^(z) || S(z)) + b mean_k (S(x')[k] - S(x)[k])^2   where   z = x where T is wrong at x, else x'

x' = argmax KL(T(x') || S(x')) in the eps ball, as in AdaAD. T^ is T with the logit of the label and the largest one
exchanged: where T is right, T itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retemper.engine import Targets, at_least_float32, given, kl_rows, option, run_recipe
from retemper.recipes.adaad import AUTHORS, OWN_TEACHERS, AdaAttack
from retemper.recipes.settings import ON_DIGITS, distillation


def corrected(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return (B, K) logits with that of the label, (B,) int64, and the largest of each row exchanged."""
    own_B1, largest_B1 = label_B[:, None], logits_BK.argmax(1, keepdim=True)
    own, largest = logits_BK.gather(1, own_B1), logits_BK.gather(1, largest_B1)
    return logits_BK.scatter(1, largest_B1, own).scatter_(1, own_B1, largest)


@dataclass(frozen=True, kw_only=True)
class Dgad(AdaAttack):
    # released: as AdaAD's. Left out: the authors' code divides the two sums of a last, smaller batch by the size of a
    # full one; and with MobileNetV2 a parenthesis in the wrong place halves the attacked term and multiplies it by the
    # clean one. Their CIFAR-10 teachers are TRADES' and LTD's, as AdaAD's.
    consistency_weight: float = option(1.0, "weight of the pull between clean and attacked answers (b)", at_most=1000)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        clean_BK, adv_BK, label_B = logits["clean"], logits["adv"], targets.label_B
        wrong_B = targets.teacher.argmax(1) != label_B
        on_clean_B = kl_rows(corrected(targets.teacher, label_B), clean_BK)
        on_adv_B = kl_rows(corrected(given(targets.teacher_adv_BK), label_B), adv_BK)
        apart_BK = at_least_float32(adv_BK).softmax(1) - at_least_float32(clean_BK).softmax(1)
        guided = torch.where(wrong_B, on_clean_B, on_adv_B).mean()
        return guided + self.consistency_weight * apart_BK.square().mean()


SETTINGS = distillation(Dgad, AUTHORS, ON_DIGITS, own_teachers=OWN_TEACHERS)

if __name__ == "__main__":
    run_recipe(__file__)
