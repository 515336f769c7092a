"""What several methods' losses are made of: one number for each image, to be weighed by class and then averaged.

Dimension key: B batch, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import class_temperature_kl, class_temperature_kl_grad_


def cross_entropy_rows(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """(B,) the cross-entropy of each row, at least in float32."""
    return F.cross_entropy(_wide(logits_BK), label_B, reduction="none")


def kl_rows(clean_BK: Tensor, adv_BK: Tensor) -> Tensor:
    """(B,) KL(softmax(clean) || softmax(adv)) of each row, at least in float32; differentiable in both."""
    clean, adv = _wide(clean_BK).log_softmax(1), _wide(adv_BK).log_softmax(1)
    return (clean.exp() * (clean - adv)).sum(1)


def is_label(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """(B, K) bool: true at each row's label. torch's one_hot looks at the labels on the host, on a CPU."""
    return torch.arange(logits_BK.shape[1], device=label_B.device) == label_B[:, None]


def _wide(logits_BK: Tensor) -> Tensor:
    return logits_BK.float() if logits_BK.element_size() < 4 else logits_BK


Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class KlObjective:
    """The sum over the batch of KL(target_i || softmax(logits_i)).

    target_i = (1 - label_trust[y_i]) softmax(teacher_i / temperature[y_i]) + label_trust[y_i] onehot(y_i), y the label.

    An attack needs its gradient alone, which `gradient` gives without the value: one launch and no autograd.

    Attributes:
        teacher: (B, K) logits.
        label: (B,) int64.
        temperature: (K,).
        label_trust: (K,) in [0, 1]; None trusts the teacher alone.
    """

    teacher: Tensor
    label: Tensor
    temperature: Tensor
    label_trust: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, K) logits to a scalar."""
        return class_temperature_kl(
            logits, self.teacher, self.label, self.temperature, label_trust=self.label_trust, reduction="sum"
        )

    def gradient(self, logits: Tensor) -> Tensor:
        """(B, K): its derivative at the logits."""
        logits = logits.detach().clone()  # the network may need its output again for its own gradient
        return class_temperature_kl_grad_(
            logits, self.teacher, self.label, self.temperature, label_trust=self.label_trust
        )


def cross_entropy_objective(label_B: Tensor) -> Objective:
    """The sum of the cross-entropies against `label_B`: what PGD and FGSM raise."""
    return lambda logits_BK: F.cross_entropy(_wide(logits_BK), label_B, reduction="sum")


def cw_objective(label_B: Tensor, confidence: float = 50.0) -> Objective:
    """The margin of Carlini & Wagner (S&P 2017) on logits: sum of -max(z_y - max_{j != y} z_j + confidence, 0)."""

    def objective(logits_BK: Tensor) -> Tensor:
        own_BK = F.one_hot(label_B, logits_BK.shape[1]).bool()
        own_B = logits_BK.gather(1, label_B[:, None]).squeeze(1)
        other_B = logits_BK.masked_fill(own_BK, -torch.inf).amax(1)
        return -(own_B - other_B + confidence).clamp(min=0).sum()

    return objective
