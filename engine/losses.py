"""Objectives, which an attack raises, and the pieces of losses, which training lowers.

An objective is a function from (B, K) logits to a scalar, summed over the batch. It may have a method `rows`, from
logits to the values that it is the sum of, (B,), and a method `gradient`, from logits to their gradient. A piece of a
loss is one number for each image, (B,), so that a method can weigh classes before it averages. Shapes, dtypes and
devices are checked at every call; values only by `claims`, since reading them makes the host wait. Dimension key: B
batch, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import class_temperature_kl
from retemper.kernels.class_temperature_kl import gradient
from retemper.kernels.runtime import runs_triton

Objective = Callable[[Tensor], Tensor]
Claim = tuple[Tensor, str]  # a 0-dim bool on the device, and what is wrong where it is false
WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NO_LABEL = torch.iinfo(torch.int64).min  # in place of -100, which PyTorch leaves out without a word


@dataclass(frozen=True, eq=False)
class KlObjective:
    """The sum over the batch of KL(target_i || softmax(logits_i)).

        target_i = (1 - label_trust[y_i]) softmax(teacher_i / temperature[y_i]) + label_trust[y_i] onehot(y_i)

    y_i is the label of row i; row_trust[i] may take the place of label_trust[y_i]. An attack needs the gradient alone;
    `gradient` computes it in one launch, without the value and without autograd.

    Attributes:
        teacher: (B, K) logits; a constant to the attack.
        label: (B,) whole numbers; they are kept as int64.
        temperature: a number above 0, also as a tensor of no dimensions, or (K,) of them, one for each class.
        label_trust: (K,) in [0, 1]; None trusts the teacher alone.
        row_trust: (B,) in [0, 1], in place of label_trust.
    Raises:
        TypeError: teacher or label is no tensor.
        ValueError: a label is not (B,), or not of whole numbers; a shape, dtype or device does not fit the logits.
    """

    teacher: Tensor
    label: Tensor
    temperature: float | Tensor = 1.0
    label_trust: Tensor | None = None
    row_trust: Tensor | None = None

    def __post_init__(self) -> None:
        _require_tensor("teacher", self.teacher)
        object.__setattr__(self, "teacher", self.teacher.detach())  # the way of a frozen dataclass
        object.__setattr__(self, "label", as_label(self.label))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the objective of (B, K) logits, a scalar."""
        return class_temperature_kl(logits, **self._target, reduction="sum")

    def rows(self, logits: Tensor) -> Tensor:
        """Return the divergence of each row of (B, K) logits, (B,)."""
        return class_temperature_kl(logits, **self._target, reduction="none")

    def gradient(self, logits: Tensor) -> Tensor:
        """Return the derivative of the objective at (B, K) logits, of their shape and dtype."""
        _require_tensor("logits", logits)
        return gradient(logits.contiguous(), **self._target)

    @property
    def _target(self) -> dict[str, Any]:
        target = dict(teacher=self.teacher, label=self.label, temperature=self.temperature)
        return target | dict(label_trust=self.label_trust, row_trust=self.row_trust, ignore_index=None)

    def claims(self, logits: Tensor) -> list[Claim]:
        """Return what must hold of the values beside these logits. Raises as a call does."""
        require_labelled(logits, self.label)
        found = [_labels_are_classes(self.label, logits), (self.teacher.isfinite().all(), "teacher: not finite")]
        if isinstance(self.temperature, Tensor):
            positive = (self.temperature > 0) & self.temperature.isfinite()
            found.append((positive.all(), "temperature: it must be finite and above 0 for every class"))
        for name, each in (("label_trust", "class"), ("row_trust", "row")):
            trust = getattr(self, name)
            if trust is not None:
                fraction = (trust >= 0) & (trust <= 1)
                found.append((fraction.all(), f"{name}: it must lie in [0, 1] for every {each}"))
        return found


@dataclass(frozen=True, eq=False)
class LabelObjective:
    """An objective of the logits and the labels alone.

    Attributes:
        label: (B,) whole numbers; they are kept as int64.
        loss: takes (B, K) logits in float32 or wider, (B,) labels and, as PyTorch's losses, a `reduction`, "sum" or
            "none"; returns a scalar or (B,).
    """

    label: Tensor
    loss: Callable[..., Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", as_label(self.label))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the objective of (B, K) logits, a scalar. Raises TypeError or ValueError where they do not fit."""
        return self._reduced(logits, "sum")

    def rows(self, logits: Tensor) -> Tensor:
        """Return the value of each row of (B, K) logits, (B,). Raises as a call does."""
        return self._reduced(logits, "none")

    def _reduced(self, logits: Tensor, reduction: str) -> Tensor:
        require_labelled(logits, self.label)
        label = self.label.clone() if self.label.is_inference() else self.label  # autograd keeps no inference tensor
        return self.loss(at_least_float32(logits), label, reduction=reduction)

    def claims(self, logits: Tensor) -> list[Claim]:
        """Return what must hold of the values beside these logits. Raises as a call does."""
        require_labelled(logits, self.label)
        return [_labels_are_classes(self.label, logits)]


@dataclass(frozen=True, eq=False)
class CrossEntropy(LabelObjective):
    """The sum over the batch of the cross-entropy of each row's label, which is the divergence from the label alone.

    On a GPU its `gradient` is that of `KlObjective`, in one launch where autograd takes eight. On a CPU there is none,
    and an attack differentiates the value.
    """

    trust: dict[int, Tensor] = field(default_factory=dict)  # by the number of classes

    @property
    def gradient(self) -> Callable[[Tensor], Tensor] | None:
        """Return what maps (B, K) logits to the derivative at them, of their shape and dtype; None on a CPU."""
        return self._gradient if runs_triton(self.label) else None

    def _gradient(self, logits: Tensor) -> Tensor:
        require_labelled(logits, self.label)
        classes = logits.shape[1]
        if classes not in self.trust:
            self.trust[classes] = torch.ones(classes, device=logits.device)
        return KlObjective(logits, self.label, label_trust=self.trust[classes]).gradient(logits)


@dataclass(frozen=True, eq=False)
class RowsObjective:
    """The sum over the batch of what a function returns for each image.

    An attack that chooses among the iterates of each image (`pgd` with `restarts`, or keep = "best") needs `rows`.

    Attributes:
        rows: what the model returns, (B, K) logits, to one value for each image, (B,).
    """

    rows: Callable[[Any], Tensor]

    def __call__(self, logits: Any) -> Tensor:
        """Return the objective of what the model returns, a scalar."""
        return self.rows(logits).sum()


def cross_entropy_objective(label_B: Tensor) -> Objective:
    """Return the objective of PGD and FGSM: the sum of the cross-entropies against the labels.

    Args:
        label_B: (B,) whole numbers of any integer dtype.
    Raises:
        TypeError: they are no tensor.
        ValueError: their dtype or shape does not fit; when it is called, the logits do not fit them.
    """
    return CrossEntropy(label_B, partial(F.cross_entropy, ignore_index=NO_LABEL))


def cw_objective(label_B: Tensor, confidence: float = 50.0) -> Objective:
    """Return the margin of Carlini & Wagner (S&P 2017): the sum of -max(z_y - max_{j != y} z_j + confidence, 0).

    Args:
        label_B: (B,) whole numbers of any integer dtype.
        confidence: in units of the logits.
    Raises:
        TypeError, ValueError: as `cross_entropy_objective`.
    """

    def margin(logits_BK: Tensor, label_B: Tensor, reduction: str) -> Tensor:
        own_B = logits_BK.gather(1, label_B[:, None]).squeeze(1)
        other_B = logits_BK.masked_fill(is_label(logits_BK, label_B), -torch.inf).amax(1)
        margin_B = -(own_B - other_B + confidence).clamp(min=0)
        return margin_B.sum() if reduction == "sum" else margin_B

    return LabelObjective(label_B, margin)


def cross_entropy_rows(logits_BK: Tensor, label_B: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each row, (B,), in float32 or wider. Labels are whole numbers.

    Args:
        smoothing: the share of a label's weight that is spread evenly over all classes (Szegedy et al., CVPR 2016).
    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    require_labelled(logits_BK, label_B)
    options: dict[str, Any] = dict(reduction="none", ignore_index=NO_LABEL, label_smoothing=smoothing)
    return F.cross_entropy(at_least_float32(logits_BK), as_label(label_B), **options)


def kl_rows(clean_BK: Tensor, adv_BK: Tensor) -> Tensor:
    """Return KL(softmax(clean) || softmax(adv)) of each row, (B,), in float32 or wider; differentiable in both.

    Raises:
        TypeError, ValueError: shapes or devices differ: nothing is broadcast.
    """
    _require_logits("clean", clean_BK)
    _require_logits("adv", adv_BK)
    if clean_BK.shape != adv_BK.shape or clean_BK.device != adv_BK.device:
        places = (f"{tuple(one.shape)} on {one.device}" for one in (clean_BK, adv_BK))
        raise ValueError("clean has shape {}, adv {}: they must agree".format(*places))
    return class_temperature_kl(adv_BK, clean_BK, reduction="none")


def is_label(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return (B, K) bool, true at each row's label, without a read on the host (torch's one_hot reads, on a CPU).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    require_labelled(logits_BK, label_B)
    return torch.arange(logits_BK.shape[1], device=label_B.device) == label_B[:, None]


def as_label(label_B: Tensor) -> Tensor:
    """Return labels of any integer dtype as int64.

    Raises:
        TypeError: they are no tensor.
        ValueError: they are not (B,), or not whole numbers.
    """
    _require_tensor("label", label_B)
    if label_B.dtype not in WHOLE_NUMBERS or label_B.dim() != 1:
        raise ValueError(f"label: {label_B.dtype} of shape {tuple(label_B.shape)}; needs whole numbers, (B,) int64")
    return label_B.long()


def require_labelled(logits_BK: Tensor, label_B: Tensor) -> None:
    """Raise TypeError or ValueError unless there is one label for each row of logits, on their device."""
    _require_logits("logits", logits_BK)
    as_label(label_B)
    if len(label_B) != len(logits_BK):
        raise ValueError(f"label: shape {tuple(label_B.shape)}, but logits has {tuple(logits_BK.shape)}: one a row")
    if label_B.device != logits_BK.device:
        raise ValueError(f"label: on {label_B.device}, but logits is on {logits_BK.device}; move it with .to()")


def require_claims(claims: Sequence[Claim]) -> None:
    """Raise ValueError at the first claim that does not hold; the host waits once."""
    holds = [one.to(claims[0][0].device) for one, _ in claims]
    known = torch.stack(holds).tolist() if holds else []
    if not all(known):
        raise ValueError(claims[known.index(False)][1])


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: it is a {type(value).__name__}, and must be a tensor")


def _require_logits(name: str, logits_BK: Tensor) -> None:
    _require_tensor(name, logits_BK)
    if logits_BK.dim() != 2 or not logits_BK.is_floating_point():
        raise ValueError(f"{name}: {logits_BK.dtype} of shape {tuple(logits_BK.shape)}; needs (B, K) floats")


def _labels_are_classes(label_B: Tensor, logits_BK: Tensor) -> Claim:
    classes = logits_BK.shape[1]
    return (
        (label_B >= 0) & (label_B < classes)
    ).all(), f"label: it must lie in 0 .. {classes - 1} for {classes} logits"


def at_least_float32(logits_BK: Tensor) -> Tensor:
    """Return logits of half precision as float32, and wider ones as they are.

    A sum over a batch has no digits left in half precision.
    """
    return logits_BK.float() if logits_BK.element_size() < 4 else logits_BK
