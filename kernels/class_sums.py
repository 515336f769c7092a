"""The sums, by class, of cross-entropy, correct predictions and samples, from which class-wise methods adapt.

    loss_sum[k] = sum over y_i = k of log sum_j exp(logit_ij) - logit_ik
    correct[k]  = number of i with y_i = k whose first largest logit is at k
    count[k]    = number of i with y_i = k

The temperatures of ABSLD (Zhao et al., 2023) and the class weights of other methods follow from them.
Bound by memory: one pass over the logits, where eager PyTorch takes a log-softmax, an argmax, two gathers and three
scatters. Deterministic, without atomics: whatever is added is added in a fixed order.

The kernels are in class_sums_kernels.py. Here are the operator and what users call.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels.class_sums_kernels import launch, require_fitting, room
from retemper.kernels.operators import operator
from retemper.kernels.runtime import compute_dtype, require_no_grad, require_vector, runs_triton

FEW = 16  # classes; rows shorter than PyTorch's vectors are slow on a CPU, so that it gets them as columns


def class_sums_reference(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sums in plain PyTorch: the truth for the tests, and the path on a CPU.

    Args and Returns: as for `class_sums`. Nothing is checked. Differentiable in `logits`.
    """
    wide, label = logits.to(compute_dtype(logits)), label.long()
    classes, known = wide.shape[1], None
    if not _all_known(label, classes):
        given, label = label, label.clamp(0, classes - 1)
        known = label == given
    log_softmax = wide.log_softmax(1) if classes >= FEW else wide.t().log_softmax(0).t()
    cross_entropy = F.nll_loss(log_softmax, label, reduction="none")
    hit = (wide.max(1)[1] == label).logical_and_(cross_entropy == cross_entropy)  # a row with NaN predicts nothing
    if known is not None:
        cross_entropy, hit = cross_entropy.masked_fill(~known, 0), hit & known
    loss, none = wide.new_zeros(classes), label.new_zeros(classes)
    counted = torch.ones_like(label) if known is None else known.long()
    return (
        loss.index_add_(0, label, cross_entropy),
        none.index_add(0, label, hit.long()),
        none.index_add_(0, label, counted),
    )


def _all_known(label: Tensor, classes: int) -> bool:
    """Say whether each label is a class, as far as it is told: on a CPU a look costs less than care for all rows."""
    if not label.is_cpu or label.numel() == 0 or type(label) is not Tensor or torch.compiler.is_compiling():
        return False
    lowest, highest = label.aminmax()
    return lowest.item() >= 0 and highest.item() < classes


def _fake(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return room(logits, logits.shape[1:])


@operator("class_sums(Tensor logits, Tensor label) -> (Tensor, Tensor, Tensor)", fake=_fake)
def _class_sums_op(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_triton(logits) or logits.dim() != 2:
        require_fitting(logits, label)
        return class_sums_reference(logits, label)
    sums = _fake(logits, label)
    launch(logits, label, sums)
    return sums


@operator(
    "add_class_sums_(Tensor logits, Tensor label, Tensor(a!) loss, Tensor(b!) correct, Tensor(c!) count) -> ()",
    fake=lambda *_: None,
)
def _add_class_sums_op(logits: Tensor, label: Tensor, loss: Tensor, correct: Tensor, count: Tensor) -> None:
    if runs_triton(logits, loss):
        launch(logits, label, (loss, correct, count), add=True)
        return
    require_fitting(logits, label)
    for total, more in zip((loss, correct, count), class_sums_reference(logits, label), strict=True):
        total += more


def add_class_sums_(logits: Tensor, label: Tensor, loss: Tensor, correct: Tensor, count: Tensor) -> None:
    """Add what `class_sums` returns to totals, in its launches: to the bit what adding afterwards gives.

    Args:
        logits, label: as for `class_sums`; K is the length of the totals.
        loss: (K,) float32, or float64, contiguous; overwritten.
        correct, count: (K,) int64, contiguous; overwritten.

    Raises:
        ValueError: as `class_sums`.
    """
    _require_classes(logits, loss.numel())
    require_vector("loss", loss, logits.shape[1], torch.float32, torch.float64)
    for name, total in (("correct", correct), ("count", count)):
        require_vector(name, total, logits.shape[1], torch.int64)
    require_no_grad(logits=logits)
    _add_class_sums_op(logits, label, loss, correct, count)


def class_sums(logits: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the cross-entropy, the correct predictions and the samples of each class. Not differentiable.

    A row with NaN makes the loss of its own class NaN, no other, and is not correct. A row whose label is no class
    adds nothing. Of equal logits the first is the prediction. The formula is in the module docstring.

    Args:
        logits: (B, K), any float dtype, the K of a row side by side in memory; detached, where autograd is on.
        label: (B,), any integer dtype.
        num_classes: K; a model with more outputs than the data has classes is refused.

    Returns:
        loss_sum: (K,) in nats, float32, or float64 for float64 logits.
        correct, count: (K,) int64.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; K is not `num_classes`; `logits` requires a gradient
            while autograd is on.
    """
    _require_classes(logits, num_classes)
    require_no_grad(logits=logits)
    if _in_plain_pytorch(logits):
        require_fitting(logits, label)
        return class_sums_reference(logits, label)
    return _class_sums_op(logits, label)


def _require_classes(logits: Tensor, num_classes: int) -> None:
    if logits.dim() != 2 or logits.shape[1] != num_classes:
        raise ValueError(f"logits: shape {tuple(logits.shape)}; needs (B, {num_classes}), as num_classes says")


def _in_plain_pytorch(logits: Tensor) -> bool:
    """Say whether the reference is called as it is: an operator around it would take longer than many a batch."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return type(logits) is Tensor and not (traced or runs_triton(logits))
