"""What an epoch has shown of each class: the sums that the steps add to, and what a method moves its class state by.

Dimension key: B batch, K classes, D values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retemper.kernels.class_sums import add_class_sums_


@dataclass(frozen=True, kw_only=True)
class ClassSums:
    """The sums of an epoch so far for one of the forwards ("adv" or "clean"): each (K,), added to in place."""

    loss_K: Tensor  # cross-entropy against the label, before the step
    correct_K: Tensor
    count_K: Tensor

    @classmethod
    def zeros(cls, num_classes: int, device: torch.device, dtype: torch.dtype = torch.float32) -> "ClassSums":
        """Return sums of no image; those of losses are of `dtype`."""
        loss, correct, count = torch.zeros(3, num_classes, device=device, dtype=dtype)
        return cls(loss_K=loss, correct_K=correct.long(), count_K=count.long())

    def add(self, logits_BK: Tensor, label_B: Tensor) -> None:
        """Count one more batch: logits without gradient, and the label of each row, any whole numbers."""
        add_class_sums_(logits_BK, label_B, self.loss_K, self.correct_K, self.count_K)

    @property
    def mean_loss_K(self) -> Tensor:
        """The mean loss of each class's images, (K,); 0 where there were none."""
        return self.loss_K / self.count_K.clamp(min=1)

    @property
    def known_loss_K(self) -> Tensor:
        """The mean loss of each class's images, (K,); a class without images is given the mean of the others."""
        met_K = self.count_K > 0
        return torch.where(met_K, self.mean_loss_K, self.mean_loss_K[met_K].mean())

    @property
    def accuracy_K(self) -> Tensor:
        """The share of each class's images classified correctly, (K,); 0 where there were none."""
        return self.correct_K.to(self.loss_K.dtype) / self.count_K.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class ClassMeans:
    """The sums of an epoch so far of something that a method measures for each image."""

    total_KD: Tensor
    count_K: Tensor

    @classmethod
    def zeros(
        cls, num_classes: int, values: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> "ClassMeans":
        """Return sums of no image, of `dtype`."""
        total = torch.zeros(num_classes, values, device=device, dtype=dtype)
        return cls(total_KD=total, count_K=torch.zeros(num_classes, device=device, dtype=dtype))

    def add(self, value_BD: Tensor, label_B: Tensor) -> None:
        """Count one more batch of (B, D) values, or (B,) where D = 1, with (B,) int64 labels."""
        value_BD = value_BD.detach().to(self.total_KD.dtype).view(len(label_B), -1)
        own_KB = (torch.arange(len(self.count_K), device=label_B.device)[:, None] == label_B).to(value_BD.dtype)
        self.total_KD.add_(own_KB @ value_BD)  # not index_add_: on a GPU that adds in no fixed order
        self.count_K.add_(own_KB.sum(1))

    @property
    def mean_KD(self) -> Tensor:
        """The mean of each class, (K, D); 0 for a class without images."""
        return self.total_KD / self.count_K.clamp(min=1)[:, None]

    @property
    def mean_K(self) -> Tensor:
        """The mean of each class, (K,), where D = 1."""
        return self.mean_KD.squeeze(1)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The student's results on the held-out training images after an epoch, by class: each (K,)."""

    clean_accuracy_K: Tensor
    robust_accuracy_K: Tensor
    clean_loss_K: Tensor  # mean cross-entropy of the clean images
    boundary_loss_K: Tensor  # mean KL(clean prediction || attacked prediction)


@dataclass(frozen=True, kw_only=True)
class EpochStats:
    """The sums of an epoch, which the class state moves by.

    Attributes:
        forwards: the sums of each training forward, by name.
        measured: the sums of what `Method.measured` returned, by name.
        held: the held-out images; None unless the method has `validates_by`.
        surveyed: the sums of what `Method.surveyed` returned; None unless the next epoch has `surveys_by`.
    """

    forwards: Mapping[str, ClassSums] = field(default_factory=dict)
    measured: Mapping[str, ClassMeans] = field(default_factory=dict)
    held: HeldOut | None = None
    surveyed: ClassMeans | None = None
