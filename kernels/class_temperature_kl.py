"""KL divergence to a teacher whose temperature depends on the class (ABSLD, Zhao et al., 2023), forward and backward.

    loss_i  = w[y_i] sum_k p_ik (log p_ik - log q_ik)
    p_i     = (1 - l[y_i]) softmax(teacher_i / T[y_i]) + l[y_i] onehot(y_i),   q_i = softmax(student_i / Ts)
    d loss_i / d student_ik = w[y_i] (q_ik - p_ik) / Ts

l is how far a class's label is trusted over the teacher; without it the target is the teacher alone. A term with p = 0
is 0, as in torch.xlogy. The peak of a row is taken off before the division by the temperature: logits of 1e4 at
temperature 0.05 would otherwise lose their differences to rounding. Bound by memory and, at the sizes of a training
step, by the launch: one launch reads 2 (B, K) tensors, where eager takes ten to write and re-read seven.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (Triton declares that static_range never returns, so that no loop may go over it; and an `if` on what is known when
# compiled may bind names for another.)

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retemper.kernels.runtime import (
    EXACT,
    access_width,
    compute_dtype,
    launching,
    require_one_device,
    require_rows,
    require_vector,
    require_writable,
    runs_triton,
)

REDUCTIONS = ("batchmean", "mean", "sum", "none")

# How many logits of each tensor a thread holds, in how many steps, and the warps of a program; from the code for sm_90,
# not yet measured on a GPU. A row lies in the registers of one thread, or of neighbours in one warp: nothing is read
# twice, hardly a warp waits for another. At 1,000 classes in fp32 the loss takes 35 instructions a logit and the
# gradient 53, where 8 logits a thread and reductions by 4 warps took 107 and 154, and the memory leaves time for 55 and
# 83. 32 logits take 96 registers, more would leave too few warps; and 26 steps take 17 seconds to compile.
PER_THREAD = 32
MOST_STEPS = 8
WARPS = 4

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))  # the kernel computes in powers of 2: one instruction each, where e takes five


def row_tiles(classes: int, width: int) -> dict[str, int]:
    """A kernel's constants: a row goes in steps of LANES logits, `width` of them for each thread that shares it."""
    steps = min(MOST_STEPS, PER_THREAD // width)
    threads = min(32 * WARPS, triton.next_power_of_2(triton.cdiv(classes, steps * width)))
    lanes = threads * width
    steps = min(steps, triton.cdiv(classes, lanes))
    return {"K": classes, "ROWS": 32 * WARPS // threads, "LANES": lanes, "STEPS": steps, "num_warps": WARPS}


def class_temperature_kl_reference(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
) -> Tensor:
    """The loss of each row in plain PyTorch, in float64: the truth for the tests, and the path on a CPU."""
    temperature = _filled(temperature, student, teacher)
    label, temperature, class_weight, label_trust = _of_class(label, temperature, class_weight, label_trust)
    log_p = _log_softmax(teacher.double(), temperature)
    log_q = _log_softmax(student.double(), student_temperature)
    p = log_p.exp()
    if label_trust is not None:
        p = _mixed(p, label, label_trust)
        log_p = torch.where(label_trust == 0, log_p, p.log())
    kl = torch.where(p == 0, 0, p * (log_p - log_q)).sum(1)
    kl = torch.where(kl < 0, 0, kl)  # rounding only; NaN stays
    kl = kl if class_weight is None else kl * class_weight[:, 0]
    return kl.to(compute_dtype(student, teacher))


def class_temperature_kl_grad_reference(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
    row_grad: Tensor | None = None,
) -> Tensor:
    """d(sum of row_grad * loss)/d(student), likewise, into a new tensor of the student's dtype."""
    temperature = _filled(temperature, student, teacher)
    label, temperature, class_weight, label_trust = _of_class(label, temperature, class_weight, label_trust)
    p = _log_softmax(teacher.double(), temperature).exp_()
    if label_trust is not None:
        p = _mixed(p, label, label_trust)
    grad = _log_softmax(student.double(), student_temperature).exp_().sub_(p).div_(student_temperature)
    if class_weight is not None:
        grad *= class_weight
    if row_grad is not None:
        grad *= row_grad[:, None]
    return grad.to(student.dtype)


def _filled(temperature: float | Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """The (K,) temperatures; a number is written K times, rounded to the dtype in which the loss is given."""
    if isinstance(temperature, Tensor):
        return temperature
    return student.new_full(student.shape[1:], temperature, dtype=compute_dtype(student, teacher))


def _of_class(label: Tensor, *by_class: Tensor | None) -> list[Any]:
    """The labels, each made a class, and the values of each row's class as (B, 1) columns: NaN where it was none.

    All at once, since on a CPU an operation more in each attack step is seen in the time of training.
    """
    given = torch.stack([value for value in by_class if value is not None]).double()
    known, label = (label >= 0) & (label < given.shape[1]), label.clamp(0, given.shape[1] - 1)
    columns = iter(torch.where(known, given.index_select(1, label), float("nan"))[:, :, None])
    return [label, *(None if value is None else next(columns) for value in by_class)]


def _mixed(p: Tensor, label: Tensor, trust: Tensor) -> Tensor:
    """The target: the teacher's probabilities, moved towards the label by its share."""
    one_hot = torch.eye(p.shape[1], dtype=p.dtype, device=p.device).index_select(0, label)
    return p.lerp_(one_hot, trust)


def _log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    return ((logits - logits.amax(1, keepdim=True)) / temperature).log_softmax(1)


@triton.jit
def _logits(row_ptr, start, K: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr) -> Any:
    """STEPS times LANES logits of each row as float32; -inf beyond the last class."""
    logits = ()
    for step in tl.static_range(STEPS):
        cls = start + step * LANES + tl.arange(0, LANES)
        logit = tl.load(row_ptr[:, None] + cls, mask=cls < K, other=float("-inf"))
        logits = logits + (logit.to(tl.float32),)  # noqa: RUF005 (Triton has no starred expressions)
    return logits


@triton.jit
def _log2_total(rest, peaks):
    """log2 of (rest + peaks), for peaks >= 1: log2(1 + x), and where x is small, 1 + x would have rounded it away."""
    x = rest + (peaks - 1)
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x / 5))))
    return tl.where(x < 0.03, series * LOG2E, tl.log2(1 + x))


@triton.jit
def _exp2_m1(x):
    """2**x - 1 for x <= 0, where a small x is lost likewise: the series of the exponential, to 2**-24 of itself."""
    series = tl.fma(x, LN2 / 6, 1.0)
    series = tl.fma(x * (LN2 / 5), series, 1.0)
    series = tl.fma(x * (LN2 / 4), series, 1.0)
    series = tl.fma(x * (LN2 / 3), series, 1.0)
    series = tl.fma(x * (LN2 / 2), series, 1.0)
    return tl.where(x > -0.144, x * LN2 * series, tl.exp2(x) - 1)


@triton.jit
def _log2_1m(x):
    """log2(1 - x) for x in [0, 1], likewise."""
    return tl.where(x > 0.03, tl.log2(1 - x), _log2_total(-x, 1.0))


@triton.jit
def _mixed_own(log_p, trust):
    """log2 of the target at the label, ((1 - trust) p + trust), from the teacher's log2 p there."""
    short = -(1 - trust) * _exp2_m1(log_p)  # of 1: a sure target's logarithm is as exact as its distance from 1
    mixed = tl.where(short > 0.5, tl.log2((1 - trust) * tl.exp2(log_p) + trust), _log2_1m(short))
    return tl.where(trust == 0, log_p, mixed)


@triton.jit
def _peak(row_ptr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr) -> Any:
    """The highest logit of each row."""
    highest = tl.full((ROWS, LANES), float("-inf"), tl.float32)
    for start in range(0, K, STEPS * LANES):
        logits = _logits(row_ptr, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            highest = tl.maximum(highest, logits[step])
    return tl.max(highest, 1)


@triton.jit
def _log_total(row_ptr, peak, rate, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr):
    """log2 sum exp((logit - peak) / temperature) of each row; NaN where a logit is, or is +inf, or all are -inf.

    The peak's own term, 1, is kept apart: a sure row's rest is lost to rounding beside it.
    """
    rest = tl.zeros((ROWS, LANES), tl.float32)
    peaks = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        logits = _logits(row_ptr, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            tempered = (logits[step] - peak[:, None]) * rate[:, None]
            top = tempered == 0
            rest += tl.where(top, 0.0, tl.exp2(tempered))
            peaks += tl.where(top, 1.0, 0.0)
    return _log2_total(tl.sum(rest, 1), tl.sum(peaks, 1))


@triton.jit
def _kl_kernel(
    student_ptr,
    teacher_ptr,
    label_ptr,
    temperature_ptr,
    weight_ptr,
    trust_ptr,
    row_grad_ptr,
    out_ptr,
    row_grad_stride,
    temperature,
    student_temperature,
    B,
    STUDENT_STRIDE: tl.constexpr,  # known when compiled, as K is: what divides it decides how wide an access may be
    TEACHER_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    K: tl.constexpr,
    GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The weighted loss of each row into out (B,), or its gradient into out (B, K), which may be the student itself.

    Without temperature_ptr every class has the one `temperature`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, B - 1)  # rows past the end repeat the last one, and are not stored
    student_row, teacher_row = student_ptr + real * STUDENT_STRIDE, teacher_ptr + real * TEACHER_STRIDE
    label = tl.load(label_ptr + real)
    known = (label >= 0) & (label < K)
    own_temperature = tl.where(known, temperature, float("nan"))
    if temperature_ptr is not None:
        own_temperature = tl.load(temperature_ptr + label, mask=known, other=float("nan"))
    rate_p = LOG2E / own_temperature
    rate_q = tl.full((ROWS,), LOG2E, tl.float32) / student_temperature
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + label, mask=known, other=float("nan"))
    if row_grad_ptr is not None:
        scale *= tl.load(row_grad_ptr + real * row_grad_stride)

    peak_p = _peak(teacher_row, K, ROWS, LANES, STEPS)
    peak_q = _peak(student_row, K, ROWS, LANES, STEPS)
    log_total_p = _log_total(teacher_row, peak_p, rate_p, K, ROWS, LANES, STEPS)
    log_total_q = _log_total(student_row, peak_q, rate_q, K, ROWS, LANES, STEPS)
    if trust_ptr is not None:
        trust = tl.load(trust_ptr + label, mask=known, other=float("nan"))
        own = tl.load(teacher_row + label, mask=known, other=float("nan")).to(tl.float32)
        log_own = _mixed_own((own - peak_p) * rate_p - log_total_p, trust)
        log_kept = _log2_1m(trust)
    if GRAD:
        scale = scale / student_temperature
    kl = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, STEPS * LANES):
        teacher = _logits(teacher_row, start, K, LANES, STEPS)
        student = _logits(student_row, start, K, LANES, STEPS)
        for step in tl.static_range(STEPS):
            log_p = (teacher[step] - peak_p[:, None]) * rate_p[:, None] - log_total_p[:, None]
            log_q = (student[step] - peak_q[:, None]) * rate_q[:, None] - log_total_q[:, None]
            cls = start + step * LANES + tl.arange(0, LANES)
            if trust_ptr is not None:
                log_p = tl.where(cls == label[:, None], log_own[:, None], log_p + log_kept[:, None])
            if GRAD:
                # q - p, from whichever is larger: as a difference of two it would keep no digit where they are close
                larger = tl.exp2(tl.maximum(log_p, log_q, propagate_nan=tl.PropagateNan.ALL))
                ratio = log_q - log_p
                apart = larger * _exp2_m1(-tl.abs(ratio))
                apart = tl.where(larger == 0, 0.0, tl.where(ratio <= 0, apart, -apart))
                grad = (scale[:, None] * apart).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + (row * OUT_STRIDE)[:, None] + cls, grad, mask=(row < B)[:, None] & (cls < K))
            else:
                p = tl.exp2(log_p)
                kl += tl.where(p == 0, 0.0, p * (log_p - log_q))
    if not GRAD:
        # below 0 by rounding only; NaN stays
        loss = tl.maximum(LN2 * tl.sum(kl, 1), 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + row, scale * loss, mask=row < B)


def _check(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: Tensor | None,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
) -> None:
    by_class = {"temperature": temperature, "class_weight": class_weight, "label_trust": label_trust}
    require_rows(student=student, teacher=teacher)
    require_one_device(student=student, teacher=teacher, label=label, **by_class)
    batch, classes = student.shape
    require_vector("label", label, batch, torch.int64)
    for name, value in by_class.items():
        require_vector(name, value, classes, torch.float32, torch.float64)


def _row_stride(rows: Tensor) -> int:
    """From row to row; of a single row it means nothing, and is not worth a kernel of its own."""
    return rows.stride(0) if rows.shape[0] > 1 else rows[0].numel()


def _options(
    temperature_by_class: Tensor | None,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    temperature: float,
    student_temperature: float,
) -> dict[str, Any]:
    """The arguments of an op as the references take them."""
    return {
        "temperature": temperature if temperature_by_class is None else temperature_by_class,
        "student_temperature": student_temperature,
        "class_weight": class_weight,
        "label_trust": label_trust,
    }


def _launch(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    by_class: tuple[Tensor | None, ...],
    numbers: tuple[float, float],
    row_grad: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out`: (B,) with the loss of each row, or (B, K) with its gradient.

    by_class holds temperature, weight and trust; numbers, the temperature without classes and the student's.
    """
    batch, classes = student.shape
    if batch == 0:
        return
    tiles = row_tiles(classes, access_width(classes, student, teacher))
    strides = {f"{name}_STRIDE": _row_stride(rows) for name, rows in (("STUDENT", student), ("TEACHER", teacher))}
    options: dict[str, Any] = {**strides, "OUT_STRIDE": _row_stride(out), "GRAD": out.dim() == 2, **tiles, **EXACT}
    vectors = (None if value is None else value.float() for value in by_class)
    row_grad_stride = 0 if row_grad is None else row_grad.stride(0)
    arguments: Any = (student, teacher, label, *vectors, row_grad, out, row_grad_stride, *numbers, batch)
    with launching(student):
        _kl_kernel[(triton.cdiv(batch, tiles["ROWS"]),)](*arguments, **options)


@torch.library.custom_op("retemper::class_temperature_kl", mutates_args=())
def _class_temperature_kl_op(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature_by_class: Tensor | None,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    temperature: float,
    student_temperature: float,
) -> Tensor:
    _check(student, teacher, label, temperature_by_class, class_weight, label_trust)
    by_class, numbers = (temperature_by_class, class_weight, label_trust), (temperature, student_temperature)
    if not runs_triton(student, teacher):
        return class_temperature_kl_reference(student, teacher, label, **_options(*by_class, *numbers))
    loss = student.new_empty(student.shape[0], dtype=torch.float32)
    _launch(student, teacher, label, by_class, numbers, None, loss)
    return loss


@torch.library.custom_op("retemper::class_temperature_kl_backward", mutates_args=())
def _backward_op(
    row_grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature_by_class: Tensor | None,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    temperature: float,
    student_temperature: float,
) -> Tensor:
    by_class, numbers = (temperature_by_class, class_weight, label_trust), (temperature, student_temperature)
    if not runs_triton(student, teacher):
        options = _options(*by_class, *numbers)
        return class_temperature_kl_grad_reference(student, teacher, label, **options, row_grad=row_grad)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(student, teacher, label, by_class, numbers, row_grad, grad)
    return grad


@torch.library.custom_op("retemper::class_temperature_kl_grad_", mutates_args=("student",))
def _grad_op(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature_by_class: Tensor | None,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    temperature: float,
    student_temperature: float,
) -> None:
    _check(student, teacher, label, temperature_by_class, class_weight, label_trust)
    if student.shape[0] > 1 and student.stride(0) < student.shape[1]:
        raise ValueError(f"student: strides {student.stride()} overlap and cannot be overwritten; call .contiguous()")
    by_class, numbers = (temperature_by_class, class_weight, label_trust), (temperature, student_temperature)
    if runs_triton(student, teacher):
        _launch(student, teacher, label, by_class, numbers, None, student)
    else:
        options = _options(*by_class, *numbers)
        student.copy_(class_temperature_kl_grad_reference(student, teacher, label, **options))


@_class_temperature_kl_op.register_fake
def _(student: Tensor, teacher: Tensor, *args: object) -> Tensor:
    return student.new_empty(student.shape[0], dtype=compute_dtype(student, teacher))


@_backward_op.register_fake
def _(row_grad: Tensor, student: Tensor, *args: object) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


@_grad_op.register_fake
def _(*args: object) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.temperature, ctx.student_temperature = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the student; the teacher is a constant, as in every method that uses this loss."""
    grad = None
    if ctx.needs_input_grad[0]:
        grad = _backward_op(row_grad, *ctx.saved_tensors, ctx.temperature, ctx.student_temperature)
    return grad, *[None] * 7


_class_temperature_kl_op.register_autograd(_backward, setup_context=_setup)


@torch.compiler.allow_in_graph
def _call_loss(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float | Tensor,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    student_temperature: float,
) -> Tensor:
    by_class, number = _split(temperature, student, teacher)
    return _class_temperature_kl_op(
        student, teacher, label, by_class, class_weight, label_trust, number, student_temperature
    )


@torch.compiler.allow_in_graph
def _call_grad(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float | Tensor,
    class_weight: Tensor | None,
    label_trust: Tensor | None,
    student_temperature: float,
) -> Tensor:
    by_class, number = _split(temperature, student, teacher)
    _grad_op(student, teacher, label, by_class, class_weight, label_trust, number, student_temperature)
    return student


def _split(temperature: float | Tensor, student: Tensor, teacher: Tensor) -> tuple[Tensor | None, float]:
    """Split the temperature into what the schema of an op can carry: (K,) temperatures or None, and one number.

    torch.compile makes a number a constant of its graph, and a symbol once it has seen a second value. An op cannot
    take a symbol: PyTorch would compile the graph anew for each value, and give up after a few. So a symbol becomes a
    tensor. Only functions marked with allow_in_graph get to see one.
    """
    if isinstance(temperature, torch.SymFloat):
        temperature = student.new_ones(student.shape[1:], dtype=compute_dtype(student, teacher)) * temperature
    return (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)


def class_temperature_kl(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """KL of the student to the teacher at the temperature of each row's class. Differentiable, once, in `student`.

    With `label_trust` the target is (1 - trust) times the teacher's prediction plus trust times the label's one-hot. A
    row whose label is no class is NaN, and so is its gradient.

    Args:
        student, teacher: (B, K) logits, the K of a row side by side; any two float dtypes.
        label: (B,) int64.
        temperature: of the teacher, above 0: one number for all classes, or (K,) float32 or float64.
        class_weight, label_trust: (K,) float32 or float64; trust in [0, 1].
        student_temperature: one number above 0 for all classes.
        reduction: "batchmean" divides the sum by B, "mean" by B * K; "sum"; "none" gives the rows.

    Returns:
        A scalar, or (B,), in nats; float32, or float64 when student or teacher is. An empty batch gives 0.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; a number that is a temperature is not finite and
            above 0; unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}; needs one of {', '.join(REDUCTIONS)}")
    temperature = temperature if isinstance(temperature, Tensor) else _positive("temperature", temperature)
    _positive("student_temperature", student_temperature)
    loss = _call_loss(student, teacher, label, temperature, class_weight, label_trust, student_temperature)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / max(1, student.shape[0] if reduction == "batchmean" else student.numel())


def class_temperature_kl_grad_(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_trust: Tensor | None = None,
) -> Tensor:
    """Overwrite the logits `student` with d(sum of class_temperature_kl)/d(student): what an attack needs of the loss.

    Args as for `class_temperature_kl`; rows of `student` must not overlap.

    Returns:
        `student` itself.

    Raises:
        ValueError: as `class_temperature_kl`; or `student` is tracked by autograd.
    """
    require_writable("student", student)
    temperature = temperature if isinstance(temperature, Tensor) else _positive("temperature", temperature)
    _positive("student_temperature", student_temperature)
    return _call_grad(student, teacher, label, temperature, class_weight, label_trust, student_temperature)


def _positive(name: str, number: float) -> float:
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: {number}; needs a finite number above 0")
    return float(number)
