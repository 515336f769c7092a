"""What several methods' losses are made of: one number for each image, to be weighed by class and then averaged.

Dimension key: B batch, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
