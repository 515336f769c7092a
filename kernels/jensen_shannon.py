"""The generalised Jensen-Shannon divergence of a student and a teacher whose temperature depends on the class.

    loss_i = w_i (beta sum_k p_ik u_ik + (1 - beta) sum_k q_ik v_ik)
    p_i    = softmax(teacher_i / T_i),   q_i = softmax(student_i / Ts),   m_i = beta p_i + (1 - beta) q_i
    u_ik   = log p_ik - log m_ik,        v_ik = log q_ik - log m_ik
    d loss_i / d teacher_ik = w_i beta p_ik (u_ik - sum_j p_ij u_ij) / T_i
    d loss_i / d student_ik = w_i (1 - beta) q_ik (v_ik - sum_j q_ij v_ij) / Ts

T_i and w_i are those of class_temperature_kl.py. A term with p = 0 or q = 0 counts 0. Whatever the logits, the loss is
at most ln 2 w_i, and it is symmetrical for beta = 1/2 (Lin, IEEE Transactions on Information Theory 1991).

At beta = 0 and 1 the formula is 0. Divided by beta it tends to KL(teacher || student) where beta tends to 0, and divided
by 1 - beta to KL(student || teacher) where beta tends to 1. As in Liger-Kernel and in generalised knowledge distillation
(Agarwal et al., ICLR 2024), these two are what the function returns there.

Bound by memory. One launch reads two (B, K) tensors, and another one reads them again and writes the gradients.
"""

# pyright: reportGeneralTypeIssues=false
# (Triton declares that static_range never returns, so pyright lets no loop go over it.)

from typing import Any

import torch
from torch import Tensor

from retemper.kernels.class_temperature_kl import REDUCTIONS, _check, _constant, _reduced, class_temperature_kl
from retemper.kernels.kl_divergence import Inputs, _rows, _softmax, arguments
from retemper.kernels.kl_kernel import _each_stride, _row_stride
from retemper.kernels.language import cdiv, tl, triton
from retemper.kernels.logit_rows import row_log2_total, row_logits, row_peak, row_tiles
from retemper.kernels.numerics import LN2, LOG2E
from retemper.kernels.operators import differentiable, operator, rewritten
from retemper.kernels.runtime import EXACT, access_width, compute_dtype, launching, require_no_grad, runs_triton


def class_temperature_js_reference(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    beta: float = 0.5,
    **options: Any,
) -> Tensor:
    """Compute the loss of each row in plain PyTorch, differentiable in every tensor. `beta` lies between 0 and 1.

    Args:
        student, teacher, ...: as for `class_temperature_js` without `reduction`, but shapes and dtypes not checked.

    Returns:
        (B,) in nats, leading dimensions flattened; float32, or float64 when student or teacher is.
    """
    return _compute(arguments(student, teacher, label, temperature, **options), beta)[0]


def _compute(
    inputs: Inputs, beta: float, of_student: bool = False, of_teacher: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses of the rows, (B,), and the gradients that are wanted, (B, K), all in the dtype of the sums."""
    dtype = compute_dtype(inputs.student, inputs.teacher)
    rows = _rows(inputs, dtype)
    p, log_p = _distribution(inputs.teacher.to(dtype), rows.temperature)
    q, log_q = _distribution(inputs.student.to(dtype), inputs.student_temperature)
    log_m = torch.lerp(q, p, beta).log()
    p_terms, q_terms = _terms(p, log_p - log_m), _terms(q, log_q - log_m)
    p_mean, q_mean = p_terms.sum(1, keepdim=True), q_terms.sum(1, keepdim=True)
    scale = torch.ones_like(p_mean) if rows.scale is None else rows.scale
    if rows.unknown is not None:
        scale = scale.masked_fill(rows.unknown, torch.nan)

    def finished(value: Tensor) -> Tensor:
        return value if rows.ignored is None else value.masked_fill(rows.ignored, 0)

    loss = finished((beta * p_mean + (1 - beta) * q_mean).clamp(min=0) * scale)  # only rounding makes it negative
    student_grad = teacher_grad = None
    if of_student:
        student_grad = finished((q_terms - q * q_mean) * (scale * ((1 - beta) / inputs.student_temperature)))
    if of_teacher:
        teacher_grad = finished((p_terms - p * p_mean) * (scale * beta / rows.temperature))
    return loss.squeeze(1), student_grad, teacher_grad


def _distribution(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(logits / temperature) and its logarithm, (B, K) each."""
    shifted, exps, total = _softmax(logits, temperature)
    return exps / total, shifted - total.log()


def _terms(weight: Tensor, apart: Tensor) -> Tensor:
    """Return weight * apart: 0 where the weight is 0, and NaN where it is NaN."""
    return torch.where(weight > 0, weight * apart, weight)


@triton.jit
def _weighted(log_p, log_q, beta):
    """Return p, q, p log2(p / m) and q log2(q / m), where m = beta p + (1 - beta) q, from log2 p and log2 q.

    All are told by the larger of p and q, so that equal ones give 0: with r = smaller / larger and s the share of the
    smaller in m, m / larger = 1 - s (1 - r).
    """
    ratio = log_q - log_p
    p_is_larger = ratio <= 0
    apart = -tl.abs(ratio)
    r = tl.exp2(apart)
    log_m = tl.log2(1 - tl.where(p_is_larger, 1 - beta, beta) * (1 - r))
    larger = tl.exp2(tl.maximum(log_p, log_q, propagate_nan=tl.PropagateNan.ALL))
    smaller = tl.where(larger == 0, 0.0, larger * r)  # where both are 0, r is NaN
    of_larger = tl.where(larger == 0, 0.0, -larger * log_m)
    of_smaller = tl.where(smaller == 0, 0.0, smaller * (apart - log_m))
    p, q = tl.where(p_is_larger, larger, smaller), tl.where(p_is_larger, smaller, larger)
    return p, q, tl.where(p_is_larger, of_larger, of_smaller), tl.where(p_is_larger, of_smaller, of_larger)


@triton.jit
def _row_numbers(
    label_ptr,
    temperature_ptr,
    weight_ptr,
    row_weight_ptr,
    real,
    temperature_stride,
    row_weight_stride,
    temperature,
    BY_ROW: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return the label, the teacher's temperature and the weight of each row: (ROWS,) each, NaN where it has no class."""
    label = tl.zeros((ROWS,), tl.int64)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if label_ptr is not None:
        label = tl.load(label_ptr + real).to(tl.int64)
    known = (label >= 0) & (label < K)
    if temperature_ptr is None:
        own = tl.full((ROWS,), 1.0, tl.float32) * temperature
    elif BY_ROW:
        own = tl.load(temperature_ptr + real * temperature_stride).to(tl.float32)
    else:
        own = tl.load(temperature_ptr + label, mask=known, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + label, mask=known, other=0.0).to(tl.float32)
    if row_weight_ptr is not None:
        scale *= tl.load(row_weight_ptr + real * row_weight_stride).to(tl.float32)
    return label, tl.where(known & (own > 0), own, float("nan")), scale


@triton.jit
def _row_log2_softmax(logits, peak, rate, log_total):
    """Return log2 of the softmax of a block (ROWS, LANES) of logits."""
    return (logits - peak[:, None]) * rate[:, None] - log_total[:, None]


@triton.jit
def _js_kernel(
    student_ptr,
    teacher_ptr,
    label_ptr,
    temperature_ptr,
    weight_ptr,
    row_weight_ptr,
    row_grad_ptr,
    loss_ptr,
    student_grad_ptr,
    teacher_grad_ptr,
    temperature_stride,
    row_weight_stride,
    row_grad_stride,
    ignore_index,
    temperature,
    student_temperature,
    beta,
    B,
    STUDENT_STRIDE: tl.constexpr,  # constant as K is: what divides it decides how wide an access may be
    TEACHER_STRIDE: tl.constexpr,
    BY_ROW: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the weighted loss of each row to loss (B,), or its gradients to (B, K), dense, or one of them.

    Without temperature_ptr, `temperature` is that of every row. All logarithms are to the base 2.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, B - 1)  # rows past the end repeat the last one, and are not stored
    student_row, teacher_row = student_ptr + real * STUDENT_STRIDE, teacher_ptr + real * TEACHER_STRIDE
    label, own_temperature, scale = _row_numbers(
        label_ptr, temperature_ptr, weight_ptr, row_weight_ptr, real,
        temperature_stride, row_weight_stride, temperature, BY_ROW, K, ROWS,
    )  # fmt: skip
    if row_grad_ptr is not None:
        scale *= tl.load(row_grad_ptr + real * row_grad_stride)
    rate_p = LOG2E / own_temperature
    rate_q = tl.full((ROWS,), 1.0, tl.float32) * (LOG2E / student_temperature)
    peak_p = row_peak(teacher_row, K, ROWS, LANES, STEPS)
    peak_q = row_peak(student_row, K, ROWS, LANES, STEPS)
    total_p = row_log2_total(teacher_row, peak_p, rate_p, K, ROWS, LANES, STEPS)
    total_q = row_log2_total(student_row, peak_q, rate_q, K, ROWS, LANES, STEPS)

    sum_p = tl.zeros((ROWS, LANES), tl.float32)
    sum_q = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        teacher = row_logits(teacher_row, start, K, LANES, STEPS)
        student = row_logits(student_row, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            log_p = _row_log2_softmax(teacher[step], peak_p, rate_p, total_p)
            log_q = _row_log2_softmax(student[step], peak_q, rate_q, total_q)
            _, _, of_p, of_q = _weighted(log_p, log_q, beta)
            sum_p += of_p
            sum_q += of_q
    mean_p, mean_q = tl.sum(sum_p, 1), tl.sum(sum_q, 1)

    if loss_ptr is not None:
        loss = LN2 * (beta * mean_p + (1 - beta) * mean_q)
        loss = scale * tl.maximum(loss, 0.0, propagate_nan=tl.PropagateNan.ALL)  # only rounding makes it negative
        if ignore_index is not None:
            loss = tl.where(label == ignore_index, 0.0, loss)
        tl.store(loss_ptr + row, loss, mask=row < B)
    else:
        scale_p = LN2 * beta * scale / own_temperature
        scale_q = LN2 * (1 - beta) * scale / student_temperature
        for start in range(0, K, STEPS * LANES):
            teacher = row_logits(teacher_row, start, K, LANES, STEPS)
            student = row_logits(student_row, start, K, LANES, STEPS)
            for step in tl.static_range(STEPS):
                log_p = _row_log2_softmax(teacher[step], peak_p, rate_p, total_p)
                log_q = _row_log2_softmax(student[step], peak_q, rate_q, total_q)
                p, q, of_p, of_q = _weighted(log_p, log_q, beta)
                cls = start + step * LANES + tl.arange(0, LANES)
                inside = (row < B)[:, None] & (cls < K)
                if teacher_grad_ptr is not None:
                    grad = scale_p[:, None] * (of_p - p * mean_p[:, None])
                    if ignore_index is not None:
                        grad = tl.where(label[:, None] == ignore_index, 0.0, grad)
                    tl.store(teacher_grad_ptr + (row * K)[:, None] + cls, grad.to(teacher_grad_ptr.dtype.element_ty), mask=inside)
                if student_grad_ptr is not None:
                    grad = scale_q[:, None] * (of_q - q * mean_q[:, None])
                    if ignore_index is not None:
                        grad = tl.where(label[:, None] == ignore_index, 0.0, grad)
                    tl.store(student_grad_ptr + (row * K)[:, None] + cls, grad.to(student_grad_ptr.dtype.element_ty), mask=inside)


def _launch(
    inputs: Inputs,
    beta: float,
    row_grad: Tensor | None = None,
    *,
    loss: Tensor | None = None,
    student_grad: Tensor | None = None,
    teacher_grad: Tensor | None = None,
) -> None:
    """Fill `loss`, (B,), with the loss of each row; or gradients, (B, K), with those of the losses times `row_grad`."""
    student, teacher = inputs.student, inputs.teacher
    batch, classes = student.shape
    if batch == 0:
        return
    tiles = row_tiles(classes, access_width(classes, student, teacher))
    by_row = inputs.by_row and inputs.temperatures is not None
    given: Any = (
        *(student, teacher, inputs.label, inputs.temperatures, inputs.class_weight, inputs.row_weight, row_grad),
        *(loss, student_grad, teacher_grad),
        *(_each_stride(inputs.temperatures) if by_row else 0, _each_stride(inputs.row_weight), _each_stride(row_grad)),
        *(inputs.ignore_index, inputs.temperature, inputs.student_temperature, beta, batch),
    )
    with launching(student):
        _js_kernel[(cdiv(batch, tiles["ROWS"]),)](
            *given, _row_stride(student), _row_stride(teacher), by_row, **tiles, **EXACT
        )


_INPUTS = (
    "Tensor student, Tensor teacher, Tensor? label, Tensor? temperatures, Tensor? class_weight, Tensor? row_weight,"
    " {number} temperature, {number} student_temperature, float beta, bool by_row, int? ignore_index"
)
_REAL, _ANY = _INPUTS.format(number="float"), _INPUTS.format(number="Scalar")


def _split(arguments: tuple[Any, ...]) -> tuple[Inputs, float]:
    """Return the inputs and beta out of the arguments of an operator."""
    student, teacher, label, temperatures, class_weight, row_weight, *numbers, beta, by_row, ignore_index = arguments
    by_class = (temperatures, class_weight, None, row_weight)
    return Inputs(student, teacher, label, *by_class, *numbers, by_row, ignore_index, reverse=False, given=False), beta


def _joined(inputs: Inputs, beta: float) -> tuple[Any, ...]:
    """Return the arguments of an operator: the reverse of `_split`."""
    i = inputs
    tensors = (i.student, i.teacher, i.label, i.temperatures, i.class_weight, i.row_weight)
    return *tensors, i.temperature, i.student_temperature, beta, i.by_row, i.ignore_index


def _fake_forward(student: Tensor, teacher: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape[0], dtype=compute_dtype(student, teacher))


def _fake_backward(row_grad: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    student_grad, teacher_grad = (
        torch.empty(logits.shape if wanted else (0,), dtype=logits.dtype, device=logits.device)
        for logits, wanted in zip((student, teacher), rest[-2:], strict=True)
    )
    return student_grad, teacher_grad


@operator(f"class_temperature_js_forward({_REAL}) -> Tensor", fake=_fake_forward)
def _forward_op(*arguments: Any) -> Tensor:
    """Return the losses of the rows."""
    inputs, beta = _split(arguments)
    _check(inputs)
    if not runs_triton(inputs.student, inputs.teacher):
        return _compute(inputs, beta)[0]
    loss = _fake_forward(*arguments)
    _launch(inputs, beta, loss=loss)
    return loss


@operator(
    f"class_temperature_js_backward(Tensor row_grad, {_REAL}, bool of_student, bool of_teacher) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward_op(row_grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients that are wanted, of the losses times `row_grad`; empty tensors for others."""
    *given, of_student, of_teacher = arguments
    inputs, beta = _split(tuple(given))
    grads = _fake_backward(row_grad, *arguments)
    if runs_triton(inputs.student, inputs.teacher):
        wanted = (grad if want else None for grad, want in zip(grads, (of_student, of_teacher), strict=True))
        _launch(inputs, beta, row_grad, **dict(zip(("student_grad", "teacher_grad"), wanted, strict=True)))
    else:
        for grad, found in zip(grads, _compute(inputs, beta, of_student, of_teacher)[1:], strict=True):
            if found is not None:
                torch.mul(found, row_grad[:, None], out=grad)
    return grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.temperature, ctx.student_temperature, ctx.beta, ctx.by_row, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of student and teacher."""
    wanted = ctx.needs_input_grad[:2]
    numbers = (ctx.temperature, ctx.student_temperature, ctx.beta, ctx.by_row, ctx.ignore_index)
    grads = _backward_op(row_grad, *ctx.saved_tensors, *numbers, *wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 9


differentiable(_forward_op, _backward, _setup)


@rewritten(f"class_temperature_js({_ANY}) -> Tensor")
def _loss_op(*arguments: Any) -> Tensor:
    """Return the losses of the rows, whatever the temperatures are."""
    inputs, beta = _split(arguments)
    return _forward_op(*_joined(_constant(inputs), beta))


def class_temperature_js(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    beta: float = 0.5,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    class_dim: int = -1,
    reduction: str = "batchmean",
) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence of each row. Differentiable, once, in student and teacher.

    The formula and its sources are in the module docstring. Between student and teacher it is bounded, also where one of
    them holds impossible what the other predicts. Rows that are ignored or have no class are as in
    `class_temperature_kl`.

    Args:
        student, teacher, label, temperature, student_temperature, class_weight, row_weight, ignore_index, class_dim,
            reduction: as for `class_temperature_kl`.
        beta: the teacher's share in the mixture, from 0 to 1. 0 gives KL(teacher || student) and 1 gives
            KL(student || teacher).

    Returns:
        A scalar, or for "none" one number a row, in nats; float32, or float64 when student or teacher is. Without a row
        that counts it is 0.

    Raises:
        TypeError, ValueError: as `class_temperature_kl`; `beta` is no number from 0 to 1.
        RuntimeError: a gradient is differentiated again.
    """
    options: dict[str, Any] = {
        "student_temperature": student_temperature,
        "class_weight": class_weight,
        "row_weight": row_weight,
        "ignore_index": ignore_index,
        "class_dim": class_dim,
    }
    if isinstance(beta, Tensor) or not 0 <= beta <= 1:
        raise ValueError(f"beta: {beta}; needs a number from 0 to 1")
    if beta in (0, 1):
        return class_temperature_kl(
            student, teacher, label, temperature, reverse=beta == 1, reduction=reduction, **options
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}; needs one of {', '.join(REDUCTIONS)}")
    require_no_grad(temperature=temperature, class_weight=class_weight, row_weight=row_weight)
    inputs = arguments(student, teacher, label, temperature, **options)
    given = _joined(inputs, beta)
    loss = _loss_op(*given) if torch.compiler.is_compiling() else _forward_op(*given)
    if reduction == "none":
        return loss if student.dim() == 2 else loss.view(student.movedim(class_dim, -1).shape[:-1])
    return _reduced(loss, inputs, reduction)
