"""Objectives, which an attack raises, and the pieces of losses, which training lowers.

An objective is a function from (B, K) logits to a scalar, summed over the batch. A piece of a loss is one number for
each image, (B,), so that a method can weigh classes before it averages. Dimension key: B batch, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import class_temperature_kl, class_temperature_kl_grad_

Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class KlObjective:
    """The sum over the batch of KL(target_i || softmax(logits_i)).

        target_i = (1 - label_trust[y_i]) softmax(teacher_i / temperature[y_i]) + label_trust[y_i] onehot(y_i)

    y_i is the label of row i. An attack needs the gradient alone; `gradient` computes it in one launch, without the
    value and without autograd.

    Attributes:
        teacher: (B, K) logits.
        label: (B,) int64.
        temperature: a number, or (K,) for a temperature of each class.
        label_trust: (K,) in [0, 1]; None trusts the teacher alone.
    """

    teacher: Tensor
    label: Tensor
    temperature: float | Tensor = 1.0
    label_trust: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the objective of (B, K) logits, a scalar."""
        return class_temperature_kl(
            logits, self.teacher, self.label, self.temperature, label_trust=self.label_trust, reduction="sum"
        )

    def gradient(self, logits: Tensor) -> Tensor:
        """Return the derivative of the objective at (B, K) logits, of their shape and dtype."""
        logits = logits.detach().clone()  # the network may need its output again for its own gradient
        return class_temperature_kl_grad_(
            logits, self.teacher, self.label, self.temperature, label_trust=self.label_trust
        )


def cross_entropy_objective(label_B: Tensor) -> Objective:
    """Return the objective of PGD and FGSM: the sum of the cross-entropies against `label_B`, (B,) int64."""
    return lambda logits_BK: F.cross_entropy(_at_least_float32(logits_BK), label_B, reduction="sum")


def cw_objective(label_B: Tensor, confidence: float = 50.0) -> Objective:
    """Return the margin of Carlini & Wagner (S&P 2017): the sum of -max(z_y - max_{j != y} z_j + confidence, 0).

    Args:
        label_B: (B,) int64.
        confidence: in units of the logits.
    """

    def objective(logits_BK: Tensor) -> Tensor:
        own_BK = F.one_hot(label_B, logits_BK.shape[1]).bool()
        own_B = logits_BK.gather(1, label_B[:, None]).squeeze(1)
        other_B = logits_BK.masked_fill(own_BK, -torch.inf).amax(1)
        return -(own_B - other_B + confidence).clamp(min=0).sum()

    return objective


def cross_entropy_rows(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return the cross-entropy of each row, (B,), in float32 or wider."""
    return F.cross_entropy(_at_least_float32(logits_BK), label_B, reduction="none")


def kl_rows(clean_BK: Tensor, adv_BK: Tensor) -> Tensor:
    """Return KL(softmax(clean) || softmax(adv)) of each row, (B,), in float32 or wider; differentiable in both."""
    clean, adv = _at_least_float32(clean_BK).log_softmax(1), _at_least_float32(adv_BK).log_softmax(1)
    return (clean.exp() * (clean - adv)).sum(1)


def is_label(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return (B, K) bool, true at each row's label, without a read on the host (torch's one_hot reads, on a CPU)."""
    return torch.arange(logits_BK.shape[1], device=label_B.device) == label_B[:, None]


def _at_least_float32(logits_BK: Tensor) -> Tensor:
    """Return half precision as float32: a sum over a batch has no digits left in half precision."""
    return logits_BK.float() if logits_BK.element_size() < 4 else logits_BK
