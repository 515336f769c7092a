"""The class-pair term of IKL and GKL: how far apart two networks' logits hold each pair of classes, and its gradients.

    loss_i = sum_jk w_ij w_ik (d_ij - d_ik)^2 = 2 W_i sum_k w_ik (d_ik - m_i)^2,   d = clean - adv
    W_i    = sum_k w_ik,   m_i = sum_k w_ik d_ik / W_i
    d loss_i / d clean_ik = 4 W_i w_ik (d_ik - m_i) = - d loss_i / d adv_ik

w_i is the row of sample i's class in a table (K, K), or its own. The sum over K^2 pairs takes O(K) so, and K numbers in
place of K^2. The mean is subtracted before the square: W sum w d^2 - (sum w d)^2 is the same, and loses all digits
where the d are nearly equal.

The term is that of the improved and the generalised KL divergence (Cui et al., NeurIPS 2024, and TPAMI 2026); with
w_i = softmax(clean_i), its second order is that of KL(clean || adv).

The Triton kernel is in class_pair_kernels.py. Here are the reference, the operators and what users call.
"""

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.class_pair_kernels import LEAST, launch, require_fitting
from retemper.kernels.operators import differentiable, differentiated_once, keep, operator
from retemper.kernels.rows import as_rows, by_row, require_class_dim, row_shapes
from retemper.kernels.runtime import compute_dtype, require_no_grad, runs_triton

REDUCTIONS = ("batchmean", "sum", "none")
PART = 2**18  # logits that a CPU works on at a time: what it computes of them stays in its cache
FEW = 16  # classes; a CPU adds up rows that fill no vector faster as a product with ones
Rows = tuple[Tensor, Tensor, Tensor, Tensor | None, int | None]  # clean, adv, weight, label, ignore_index


def class_pair_reference(
    clean: Tensor, adv: Tensor, weight: Tensor, label: Tensor | None = None, **options: Any
) -> Tensor:
    """Compute the loss of each row in plain PyTorch, differentiable in every tensor.

    Args:
        clean, adv, ...: as for `class_pair` without `reduction`, but dtypes and devices not checked.

    Returns:
        (B,), leading dimensions flattened; float32, or float64 when clean or adv is.
    """
    pull, apart, total, ones = _centred(*_arguments(clean, adv, weight, label, **options))
    return _losses(pull * apart, total, ones).view(-1)


def _losses(squares: Tensor, total: Tensor, ones: Tensor | None) -> Tensor:
    return _row_sums(squares, ones) * total * 2


def _centred(
    clean: Tensor, adv: Tensor, weight: Tensor, label: Tensor | None, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return w (d - m) and d - m, (B, K), and W, (B, 1): 0 in rows left out, NaN where the label is no class.

    And what `_row_sums` takes beside the rows.
    """
    dtype = compute_dtype(clean, adv)
    weight, ignored = (weight, None) if label is None else _looked_up(weight, label, ignore_index)
    weight = weight if weight.dtype is dtype else weight.to(dtype)
    apart = (clean if clean.dtype is dtype else clean.to(dtype)) - adv
    if ignored is not None:
        weight, apart = weight.masked_fill(ignored, 0), apart.masked_fill(ignored, 0)
    classes = weight.shape[1]
    ones = weight.new_ones(classes) if classes < FEW else None
    apart = apart - apart[:, :1]  # where all are nearly equal, their mean is rounded as what lies between them
    total = _row_sums(weight, ones)
    apart = apart - _row_sums(weight * apart, ones) / total.clamp(min=LEAST.value)
    return weight * apart, apart, total, ones


def _row_sums(values: Tensor, ones: Tensor | None) -> Tensor:
    """Return the sum of each row, (B, 1)."""
    return values.sum(1, keepdim=True) if ones is None else values.mv(ones)[:, None]  # autocast leaves mv alone


def _looked_up(table: Tensor, label: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    """Return each row's weights, NaN where its label is no class, and which rows are left out, (B, 1), or None.

    A look-up on a CPU refuses a label that is no class, which costs less than to compare labels.
    """
    label, classes = label.long(), table.shape[0]
    if label.is_cpu and not (ignore_index is not None and 0 <= ignore_index < classes):
        try:
            return table.index_select(0, label), None
        except IndexError:
            pass
    known = label.clamp(0, classes - 1)
    weight = table.index_select(0, known).masked_fill((known != label)[:, None], torch.nan)
    return weight, None if ignore_index is None else (label == ignore_index)[:, None]


def _evaluate(rows: Rows, differentiated: bool = False) -> tuple[Tensor, Any]:
    """Return the losses of the rows, (B, 1), and where they are `differentiated` a quarter of the gradient at `clean`.

    A CPU takes a few rows of many at a time.
    """
    clean, adv, weight, label, ignore_index = rows
    size = PART * torch.get_num_threads() // clean.shape[1] or 1
    if clean.is_cuda or clean.shape[0] <= size:
        pull, apart, total, ones = _centred(*rows)
        slope = pull * total if differentiated else None
        return _losses(pull.mul_(apart), total, ones), slope
    dtype = compute_dtype(clean, adv)
    losses = clean.new_empty(clean.shape[0], 1, dtype=dtype)
    slopes = clean.new_empty(clean.shape, dtype=dtype) if differentiated else None
    for start in range(0, clean.shape[0], size):
        part = slice(start, start + size)
        own = (weight[part], None) if label is None else (weight, label[part])
        pull, apart, total, ones = _centred(clean[part], adv[part], *own, ignore_index)
        if slopes is not None:
            torch.mul(pull, total, out=slopes[part])
        losses[part] = _losses(pull.mul_(apart), total, ones)
    return losses, slopes


class _AtOnce(torch.autograd.Function):
    """The loss in plain PyTorch, with the gradient computed beside it: most of the work is one and the same."""

    @staticmethod
    def forward(ctx: Any, clean: Tensor, adv: Tensor, rows: Rows, reduction: str) -> Tensor:
        loss, slope = _evaluate(rows, differentiated=True)
        ctx.save_for_backward(slope)
        ctx.dtypes, ctx.divisor = (clean.dtype, adv.dtype), None
        if reduction == "none":
            return loss.view(-1)
        ctx.divisor = _divisor(rows, reduction)
        return loss.sum() / ctx.divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *differentiated_once(_scaled, ctx, grad), None, None


def _scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    (slope,) = ctx.saved_tensors
    clean_grad = slope * (4 * grad[:, None] if ctx.divisor is None else 4 * grad / ctx.divisor)
    of_clean, of_adv = ctx.dtypes
    return clean_grad.to(of_clean), -clean_grad.to(of_adv) if ctx.needs_input_grad[1] else None


def _divisor(rows: Rows, reduction: str) -> int | Tensor:
    """Return by what the sum of the losses is divided: no less than 1."""
    clean, _, _, label, ignore_index = rows
    if reduction == "sum":
        return 1
    if label is None or ignore_index is None:
        return max(1, clean.shape[0])
    return (label != ignore_index).sum().clamp_(min=1)


_INPUTS = "Tensor clean, Tensor adv, Tensor weight, Tensor? label, int? ignore_index"


def _fake_rows(clean: Tensor, adv: Tensor, *_: Any) -> Tensor:
    return clean.new_empty(clean.shape[:1], dtype=compute_dtype(clean, adv))


def _fake_backward(row_grad: Tensor, clean: Tensor, adv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return gradients to be filled, and an empty tensor for one that is not wanted."""
    clean_grad, adv_grad = (
        torch.empty(logits.shape if wanted else (0,), dtype=logits.dtype, device=logits.device)
        for logits, wanted in zip((clean, adv), rest[-2:], strict=True)
    )
    return clean_grad, adv_grad


@operator(f"class_pair_rows({_INPUTS}) -> Tensor", fake=_fake_rows)
def _rows_op(clean: Tensor, adv: Tensor, weight: Tensor, label: Tensor | None, ignore_index: int | None) -> Tensor:
    """Return the losses of the rows."""
    if not runs_triton(clean, adv):
        require_fitting(clean, adv, weight, label)
        return _evaluate((clean, adv, weight, label, ignore_index))[0].view(-1)
    loss = _fake_rows(clean, adv)
    launch(clean, adv, weight, label, ignore_index, loss=loss)
    return loss


@operator(
    f"class_pair_backward(Tensor row_grad, {_INPUTS}, bool of_clean, bool of_adv) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward_op(row_grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients that are wanted, of the losses times `row_grad`; empty tensors for others."""
    *rows, of_clean, of_adv = arguments
    clean, adv, *_ = rows
    clean_grad, adv_grad = grads = _fake_backward(row_grad, *arguments)
    if runs_triton(clean, adv):
        given: Any = (*rows, row_grad)
        launch(*given, clean_grad=clean_grad if of_clean else None, adv_grad=adv_grad if of_adv else None)
    else:
        slope = _evaluate((*rows,), differentiated=True)[1]
        slope = slope * (4 * row_grad[:, None])
        if of_clean:
            clean_grad.copy_(slope)
        if of_adv:
            torch.neg(slope, out=adv_grad) if adv_grad.dtype == slope.dtype else adv_grad.copy_(-slope)
    return grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index = inputs
    if any(ctx.needs_input_grad[2:]):
        raise ValueError("only clean and adv have gradients; detach the weight")
    keep(ctx, *tensors)


def _backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of clean and adv."""
    wanted = ctx.needs_input_grad[:2]
    grads = _backward_op(row_grad, *ctx.saved_tensors, ctx.ignore_index, *wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None


differentiable(_rows_op, _backward, _setup)


def class_pair(
    clean: Tensor,
    adv: Tensor,
    weight: Tensor,
    label: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    class_dim: int = -1,
    reduction: str = "batchmean",
) -> Tensor:
    """Compute the class-pair term of each row. Differentiable, once, in clean and adv: both get a gradient.

    The formula and its source are in the module docstring. B is the number of rows: leading dimensions are flattened.
    A row with the label `ignore_index` counts nothing: its loss and gradients are 0, and "batchmean" does not divide by
    it. A row with another label that is no class is NaN, and so are its gradients.

    Args:
        clean, adv: (B, K) logits, (B, T, K), or with `class_dim=1` (B, K, H, W); any two float dtypes.
        weight: floats of 0 or more: a table (K, K) with a row for each class where labels are given; otherwise of the
            shape of the logits. They need not add up to 1.
        label: the class of each row, of any integer dtype: (B,), (B, T) or (B, H, W).
        ignore_index: the label of rows that count nothing. None where there are none: no row is looked for, and the
            mean takes no launch to count.
        class_dim: the dimension of the classes.
        reduction: "batchmean" divides the sum by the rows that count; "sum"; "none" returns the rows.

    Returns:
        A scalar, or for "none" one number a row, (B,), (B, T) or (B, H, W); float32, or float64 when clean or adv is.
        Without a row that counts it is 0.

    Raises:
        TypeError: what must be a tensor is none.
        ValueError: a shape, dtype, device or stride does not fit; `weight` requires grad.
        RuntimeError: a gradient is differentiated again.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}; needs one of {', '.join(REDUCTIONS)}")
    require_no_grad(weight=weight)
    rows = _arguments(clean, adv, weight, label, ignore_index=ignore_index, class_dim=class_dim)
    loss = _reduced(rows, reduction)
    if reduction == "none" and clean.dim() > 2:
        return loss.view(clean.movedim(class_dim, -1).shape[:-1])
    return loss


def _reduced(rows: Rows, reduction: str) -> Tensor:
    """Return the losses of the rows, their sum, or the mean of those that count."""
    clean, adv, weight, label, ignore_index = rows
    if _in_plain_pytorch(clean, adv):
        require_fitting(clean, adv, weight, label)
        if label is not None:
            own, ignored = _looked_up(weight, label, ignore_index)
            rows = rows if ignored is not None else (clean, adv, own, None, None)
        if (clean.requires_grad or adv.requires_grad) and torch.is_grad_enabled():
            return _AtOnce.apply(clean, adv, rows, reduction)  # pyright: ignore[reportReturnType]
        loss = _evaluate(rows)[0].view(-1)
    else:
        loss = _rows_op(*rows)
    if reduction in ("none", "sum"):
        return loss if reduction == "none" else loss.sum()
    by = _divisor(rows, reduction)
    return loss.sum() / by if isinstance(by, Tensor) or not len(loss) else loss.mean()


def _in_plain_pytorch(clean: Tensor, adv: Tensor) -> bool:
    """Say whether the reference is called as it is: an operator around it would take longer than many a batch."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not (traced or runs_triton(clean, adv))


def _arguments(
    clean: Tensor,
    adv: Tensor,
    weight: Tensor,
    label: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    class_dim: int = -1,
) -> Rows:
    """Return what users call with as the operators take it."""
    for name, value in (("clean", clean), ("adv", adv), ("weight", weight)):
        require_class_dim(name, value, class_dim)
    shapes = row_shapes(clean, class_dim)
    if adv.shape != clean.shape:
        raise ValueError(f"adv: shape {tuple(adv.shape)}, but clean has {tuple(clean.shape)}")
    logits = as_rows(clean, class_dim), as_rows(adv, class_dim)
    if label is None:
        if weight.shape != clean.shape:
            raise ValueError(f"weight: shape {tuple(weight.shape)}; needs {tuple(clean.shape)} without label")
        return *logits, as_rows(weight, class_dim), None, None
    return *logits, weight, by_row("label", label, shapes[:1]), ignore_index
