"""The Triton kernel of class_pair, which must agree with the reference in class_pair.py.

Bound by memory and, at the sizes of a training step, by the launch. One launch reads the logits and the weights, where
eager PyTorch takes nine launches for the loss and as many for the gradients, which are one launch here too. A row is
read twice, the second time from the cache: its mean must be known before what lies apart from it.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton declares that static_range never returns, so pyright lets no loop go over it. And constants need
# not be declared where one function calls another.)

from typing import Any

from torch import Tensor

from retemper.kernels.language import cdiv, tl, triton
from retemper.kernels.launch import Launch, launch_prepared
from retemper.kernels.logit_rows import each_stride, row_numbers, row_stride, row_tiles, store_block
from retemper.kernels.rows import LABELS, require_dense, require_each, require_logits
from retemper.kernels.runtime import FLOATS, access_width

LEAST = tl.constexpr(1e-37)  # divides the mean of a row without any weight, which is 0


def require_fitting(clean: Tensor, adv: Tensor, weight: Tensor, label: Tensor | None) -> None:
    """Raise ValueError where a shape, dtype, device or stride does not fit."""
    require_logits(clean=clean, adv=adv)
    batch, classes = clean.shape
    if weight.shape != (wanted := (batch if label is None else classes, classes)):
        form = "a row for each row of logits" if label is None else "a row for each class, as label is given"
        raise ValueError(f"weight: shape {tuple(weight.shape)}; needs {wanted}, {form}")
    if weight.dtype not in FLOATS or weight.device != clean.device:
        raise ValueError(f"weight: {weight.dtype} on {weight.device}; needs floats on {clean.device}")
    if weight.stride(1) != 1 and classes > 1:
        raise ValueError(f"weight: strides {weight.stride()}; rows must be contiguous, call .contiguous() on it")
    if label is not None:
        require_each("label", label, batch, LABELS, clean.device)
        require_dense("label", label)


@triton.jit
def _block(clean_row, adv_row, weight_row, first, cls, K: tl.constexpr):
    """Return the difference of the logits less that of the `first`, and the weight, of a block (ROWS, LANES).

    Beyond the last class the weight is 0.
    """
    inside = cls < K
    clean = tl.load(clean_row[:, None] + cls, mask=inside, other=0.0).to(tl.float32)
    adv = tl.load(adv_row[:, None] + cls, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_row[:, None] + cls, mask=inside, other=0.0).to(tl.float32)
    return clean - adv - first[:, None], weight


@triton.jit
def _total_and_mean(
    clean_row,
    adv_row,
    weight_row,
    first,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Return each row's sum of weights, (ROWS,), and the mean under them of the differences that `_block` returns."""
    weights = tl.zeros((ROWS, LANES), tl.float32)
    moments = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        for step in tl.static_range(STEPS):
            cls = start + step * LANES + tl.arange(0, LANES)
            apart, weight = _block(clean_row, adv_row, weight_row, first, cls, K)
            weights += weight
            moments += weight * apart
    total = tl.sum(weights, 1)
    return total, tl.sum(moments, 1) / tl.maximum(total, LEAST)


@triton.jit
def _pair_kernel(
    clean_ptr,
    adv_ptr,
    weight_ptr,
    label_ptr,
    row_grad_ptr,
    loss_ptr,
    clean_grad_ptr,
    adv_grad_ptr,
    ignore_index,
    row_grad_stride,
    B,
    CLEAN_STRIDE: tl.constexpr,  # constant as K is: what divides it decides how wide an access may be
    ADV_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the loss of each row to loss (B,), or its gradients to (B, K), dense, or one of them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, B - 1)  # rows past the end repeat the last one, and are not stored
    label, known, scale, ignored = row_numbers(
        label_ptr, None, None, None, row_grad_ptr, 0, 0, row_grad_stride, ignore_index, 1.0, real, False, K, ROWS
    )
    clean_row, adv_row = clean_ptr + real * CLEAN_STRIDE, adv_ptr + real * ADV_STRIDE
    weight_row = weight_ptr + real * WEIGHT_STRIDE
    if label_ptr is not None:
        weight_row = weight_ptr + label.to(tl.int64) * WEIGHT_STRIDE
        scale *= known  # NaN where the label is no class
    # where all are nearly equal, their mean is rounded as what lies between them
    first = tl.load(clean_row).to(tl.float32) - tl.load(adv_row).to(tl.float32)

    total, mean = _total_and_mean(clean_row, adv_row, weight_row, first, K, ROWS, LANES, STEPS)
    spread = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        for step in tl.static_range(STEPS):
            cls = start + step * LANES + tl.arange(0, LANES)
            apart, weight = _block(clean_row, adv_row, weight_row, first, cls, K)
            apart -= tl.expand_dims(mean, 1)
            pull = weight * apart
            if loss_ptr is not None:
                spread += pull * apart
            else:
                grad = (4 * scale * total)[:, None] * pull
                if clean_grad_ptr is not None:
                    store_block(clean_grad_ptr, grad, row, cls, ignored, B, K, K)
                if adv_grad_ptr is not None:
                    store_block(adv_grad_ptr, -grad, row, cls, ignored, B, K, K)
    if loss_ptr is not None:
        loss = 2 * scale * (total * tl.sum(spread, 1))
        tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss), mask=row < B)


def launch(
    clean: Tensor,
    adv: Tensor,
    weight: Tensor,
    label: Tensor | None,
    ignore_index: int | None,
    row_grad: Tensor | None = None,
    *,
    loss: Tensor | None = None,
    clean_grad: Tensor | None = None,
    adv_grad: Tensor | None = None,
) -> None:
    """Fill `loss`, (B,), with the loss of each row; or gradients, (B, K), with those of the losses times `row_grad`."""
    launch_prepared(
        _prepared,
        clean,
        adv,
        weight,
        label,
        row_grad,
        loss,
        clean_grad,
        adv_grad,
        None if label is None else ignore_index,
    )


def _prepared(
    clean: Tensor,
    adv: Tensor,
    weight: Tensor,
    label: Tensor | None,
    row_grad: Tensor | None,
    loss: Tensor | None,
    clean_grad: Tensor | None,
    adv_grad: Tensor | None,
    ignore_index: int | None,
) -> Launch | None:
    """Check the arguments, and return the launch."""
    require_fitting(clean, adv, weight, label)
    batch, classes = clean.shape
    if batch == 0:
        return None
    named: dict[str, Any] = row_tiles(classes, access_width(classes, clean, adv))
    grid = (cdiv(batch, named["ROWS"]),)
    named |= {"CLEAN_STRIDE": row_stride(clean), "ADV_STRIDE": row_stride(adv), "WEIGHT_STRIDE": row_stride(weight)}
    return Launch(_pair_kernel, grid, named | {"row_grad_stride": each_stride(row_grad), "B": batch})
