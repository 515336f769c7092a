"""The Jensen-Shannon divergence and its two gradients: against the formula, and where its limits are."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import class_temperature_js, class_temperature_js_reference, class_temperature_kl

# whole tiles, ragged ones, and rows in several passes (1501), where a program has one row and the interpreter is slow
SHAPES = [(0, 10), (1, 1), (7, 2), (129, 10), (33, 100), (1, 1501)]
# Loss, absolute: every logarithm to 2**-22 of 1, weighted by probabilities; of the gradients, in each class.
LOSS_TOLERANCE = {torch.float32: 2**-20, torch.float64: 1e-12}
GRAD_TOLERANCE = {torch.float32: 2**-21, torch.float64: 1e-12}
# and of its own value, one ulp of the logits' dtype: the interpreter truncates to bfloat16 where a GPU rounds.
ULP = {torch.float32: 2**-21, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-12}

each_path = pytest.mark.parametrize("path", ["triton", "reference"])


class Batch(NamedTuple):
    student: Tensor
    teacher: Tensor
    label: Tensor
    temperature: Tensor

    def double(self) -> "Batch":
        return Batch(self.student.double(), self.teacher.double(), self.label, self.temperature.double())


def batch(
    shape: tuple[int, int],
    device: torch.device,
    student: torch.dtype = torch.float32,
    teacher: torch.dtype = torch.float32,
    scale: float = 3.0,
) -> Batch:
    gen = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(2, *shape, generator=gen)
    label = torch.randint(shape[1], shape[:1], generator=gen)
    temperature = 0.1 * 100 ** torch.rand(shape[1], generator=gen)  # 0.1 ... 10
    return Batch(logits[0].to(device, student), logits[1].to(device, teacher), label.to(device), temperature.to(device))


def weights(length: int, device: torch.device) -> Tensor:
    return torch.linspace(0, 2, length, device=device)


def by_hand(
    student: Tensor, teacher: Tensor, temperature: Any = 1.0, own: float = 1.0, beta: float = 0.5, weight: Any = 1.0
) -> Tensor:
    """The formula, row by row, in float64: autograd gives its gradients."""
    log_p, log_q = (teacher.double() / temperature).log_softmax(1), (student.double() / own).log_softmax(1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    rows = beta * F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(1)
    return weight * (rows + (1 - beta) * F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(1))


def take(path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "reference" and device.type == "cpu":
        monkeypatch.setattr("retemper.kernels.runtime.TRITON_ON_CPU", False)


def assert_agrees(args: Batch, loss: Any, expected: Any, compute: torch.dtype = torch.float32) -> None:
    """Compare two functions of student and teacher, both giving a number a row: their values and both gradients."""
    leaves, wide = ([t.clone().requires_grad_() for t in logits] for logits in (args[:2], args.double()[:2]))
    rows, truth = loss(*leaves), expected(*wide)
    assert rows.dtype == compute
    torch.testing.assert_close(rows.double(), truth, rtol=LOSS_TOLERANCE[compute], atol=LOSS_TOLERANCE[compute])
    row_grad = torch.linspace(-1, 2, 2 * len(truth), device=truth.device)[::2].to(compute)  # the stride counts
    grads = torch.autograd.grad(rows, leaves, row_grad.reshape(rows.shape))
    for grad, logits, own in zip(grads, args[:2], torch.autograd.grad(truth, wide, row_grad.double()), strict=True):
        assert grad.dtype == logits.dtype and grad.is_contiguous()
        limits = torch.finfo(grad.dtype)
        atol = 20 * GRAD_TOLERANCE[compute] + limits.tiny * limits.eps  # 20: temperatures from 0.1, weights up to 2
        torch.testing.assert_close(grad.double(), own, rtol=ULP[grad.dtype], atol=atol)


@each_path
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_formula(
    shape: tuple[int, int], beta: float, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(path, device, monkeypatch)
    args = batch(shape, device)
    own = args.temperature.double()[args.label, None]
    options: dict[str, Any] = {"student_temperature": 2.5, "beta": beta, "reduction": "none"}
    weight, row_weight = weights(shape[1], device), weights(shape[0], device)
    assert_agrees(
        args,
        lambda s, t: class_temperature_js(s, t, *args[2:], **options),
        lambda s, t: by_hand(s, t, own, 2.5, beta),
    )
    assert_agrees(
        args,
        lambda s, t: class_temperature_js(
            s, t, *args[2:], class_weight=weight, row_weight=row_weight, ignore_index=None, **options
        ),
        lambda s, t: by_hand(s, t, own, 2.5, beta, weight.double()[args.label] * row_weight.double()),
    )


@pytest.mark.parametrize("teacher", ULP, ids=str)
@pytest.mark.parametrize("student", ULP, ids=str)
def test_takes_any_two_dtypes(student: torch.dtype, teacher: torch.dtype, device: torch.device) -> None:
    args = batch((7, 30), device, student, teacher)
    compute = torch.float64 if torch.float64 in (student, teacher) else torch.float32
    assert_agrees(args, lambda s, t: class_temperature_js(s, t, reduction="none"), by_hand, compute)
    gaps = args._replace(student=args.student[:, 5:15], teacher=args.teacher[:, 10:20])  # rows with gaps
    assert_agrees(gaps, lambda s, t: class_temperature_js(s, t, reduction="none"), by_hand, compute)


@each_path
@pytest.mark.parametrize("classes", [10, 200])
def test_is_bounded_whatever_training_does_to_logits(
    classes: int, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(path, device, monkeypatch)
    args = batch((7, classes), device)
    args.teacher[0, 1:] = args.student[0, :1] = -math.inf  # nothing in common
    args.teacher[1, :5] = args.student[1, :5] = -math.inf
    args.student[2, 0] = -math.inf  # denies what the teacher holds possible
    args.student[3] *= 1e4
    args.student[4] = args.teacher[4] = -math.inf
    args.student[5, 0] = math.nan
    args.teacher[6, 0] = math.inf
    student, teacher = args.student.requires_grad_(), args.teacher.requires_grad_()
    loss = class_temperature_js(student, teacher, reduction="none")
    grads = torch.autograd.grad(loss.sum(), (student, teacher))
    torch.testing.assert_close(loss[0].item(), math.log(2))
    assert loss[:4].isfinite().all() and (loss[:4] <= math.log(2) + 1e-6).all() and loss[4:].isnan().all()
    for grad in grads:
        assert grad[:4].isfinite().all() and (grad[1, :5] == 0).all() and grad[4:].isnan().all()
        assert grad[:4].sum(1).abs().max() < 1e-5
    with torch.no_grad():
        finite = slice(3, 4)
        torch.testing.assert_close(loss[finite].double(), by_hand(student[finite], teacher[finite]))


@each_path
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), beta=st.floats(0.01, 0.99), scale=st.floats(0, 1e3))
def test_is_a_divergence(path: str, seed: int, beta: float, scale: float, device: torch.device) -> None:
    gen = torch.Generator().manual_seed(seed)
    one, other = (scale * torch.randn(2, 5, 12, generator=gen)).to(device)
    with pytest.MonkeyPatch.context() as patch:
        take(path, device, patch)
        there = class_temperature_js(one, other, beta=beta, reduction="none")
        back = class_temperature_js(other, one, beta=1 - beta, reduction="none")
        itself = class_temperature_js(one, one.clone(), beta=beta, reduction="none")
    torch.testing.assert_close(there, back, rtol=1e-4, atol=1e-6)
    assert (there >= 0).all() and (there <= math.log(2) + 1e-6).all()
    assert (itself == 0).all() if path == "triton" else (itself <= 1e-6).all()


@each_path
def test_what_a_row_may_have_of_its_own(path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, device, monkeypatch)
    args, own = batch((10, 10), device), torch.linspace(0.5, 3, 10, device=device)
    options: dict[str, Any] = {"reduction": "none", "beta": 0.3}

    def assert_rows(temperature: Any, expected: Any, label: Tensor | None = None, **others: Any) -> None:
        assert_agrees(
            args,
            lambda s, t: class_temperature_js(s, t, label, temperature, **options, **others),
            lambda s, t: by_hand(s, t, expected, beta=0.3),
        )

    assert_rows(0.7, 0.7)
    assert_rows(own[2], own[2].double())  # of no dimensions
    assert_rows(own, own.double()[:, None])  # without labels, by row
    assert_rows(own[:, None], own.double()[:, None], args.label)
    assert_rows(own, own.double()[args.label, None], args.label)  # with labels, by class
    for dtype in (torch.int32, torch.uint8):
        assert_rows(own, own.double()[args.label, None], args.label.to(dtype))


@each_path
def test_rows_left_out_and_rows_without_a_class(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(path, device, monkeypatch)
    student, teacher, label, temperature = batch((6, 10), device)
    label[:3] = torch.tensor([-100, -1, 10], device=device)
    student[0, 0] = math.nan  # what is left out may be anything
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    loss = class_temperature_js(student, teacher, label, temperature, reduction="none")
    grads = torch.autograd.grad(loss.sum(), (student, teacher))
    assert loss[0] == 0 and loss[1:3].isnan().all() and loss[3:].isfinite().all()
    for grad in grads:
        assert (grad[0] == 0).all() and grad[1:3].isnan().all() and grad[3:].isfinite().all()
    kept = [0, 3, 4, 5]
    few = student[kept], teacher[kept], label[kept], temperature
    for reduction, divisor in (("sum", 1), ("batchmean", 3), ("mean", 30)):
        torch.testing.assert_close(class_temperature_js(*few, reduction=reduction), loss[3:].sum() / divisor)
    assert class_temperature_js(student[:1], teacher[:1], label[:1]) == 0
    assert class_temperature_js(*few, ignore_index=None).isnan()


def test_leading_dimensions_are_rows(device: torch.device) -> None:
    args = batch((12, 5), device)
    rows = class_temperature_js(*args, reduction="none")
    student, teacher = (t.view(2, 6, 5) for t in args[:2])
    loss = class_temperature_js(student, teacher, args.label.view(2, 6), args.temperature, reduction="none")
    assert torch.equal(loss, rows.view(2, 6))
    student, teacher = (t.view(2, 3, 2, 5).permute(0, 3, 1, 2).contiguous().requires_grad_() for t in args[:2])
    label = args.label.view(2, 3, 2)
    loss = class_temperature_js(student, teacher, label, args.temperature, class_dim=1, reduction="none")
    assert torch.equal(loss, rows.view(2, 3, 2))
    loss.sum().backward()
    leaf = args.student.clone().requires_grad_()
    class_temperature_js(leaf, *args[1:], reduction="sum").backward()
    assert student.grad is not None and leaf.grad is not None
    assert torch.equal(student.grad.permute(0, 2, 3, 1).reshape(12, 5), leaf.grad)


@each_path
def test_at_its_ends_it_is_a_kl_divergence(path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, device, monkeypatch)
    args = batch((12, 10), device, scale=1.0)._replace(temperature=torch.linspace(1, 2, 10, device=device))
    weight: dict[str, Any] = {"class_weight": weights(10, device), "student_temperature": 1.5}
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in weight.items()}
    for end, near, reverse in ((0.0, 1e-7, False), (1.0, 1 - 1e-7, True)):
        loss = class_temperature_js(*args, beta=end, **weight)
        assert torch.equal(loss, class_temperature_kl(*args, reverse=reverse, **weight))
        limit = class_temperature_js(*args.double(), beta=near, **wide) / 1e-7
        torch.testing.assert_close(loss.double(), limit, rtol=1e-4, atol=0)


# What Liger-Kernel's test_jsd.py asks for: random logits, beta from 0 to 1, rows left out, and a loss that is the last
# layer or not. Its tolerances, but for an absolute one of 1e-8, which float32 cannot hold for losses of 0.1 and more.
LIGER_TOLERANCE: dict[torch.dtype, Any] = {
    torch.float32: {"rtol": 1e-6, "atol": 2**-21},
    torch.bfloat16: {"rtol": 5e-2, "atol": 1e-8},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
}


def as_liger_tests(student: Tensor, teacher: Tensor, beta: float, counts: Tensor) -> Tensor:
    """The divergence out of PyTorch's KL: of log-probabilities, the mean over the rows that count."""
    log_q, log_p = student.log_softmax(-1)[counts], teacher.log_softmax(-1)[counts]
    kl = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    if beta == 0:
        return kl(log_q, log_p)
    if beta == 1:
        return kl(log_p, log_q)
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    return beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)


@pytest.mark.parametrize("is_last_layer", [True, False])
@pytest.mark.parametrize("dtype", LIGER_TOLERANCE, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_has_the_values_and_gradients_that_ligers_tests_expect(
    beta: float, dtype: torch.dtype, is_last_layer: bool, device: torch.device
) -> None:
    gen = torch.Generator().manual_seed(42)
    logits = [torch.randn(2, 7, 213, generator=gen).to(device, dtype).requires_grad_() for _ in range(2)]
    label = torch.randint(213, (2, 7), generator=gen).to(device)
    label[0, :3] = -100
    factor = 1 if is_last_layer else 2
    loss = class_temperature_js(*logits, label, beta=beta) * factor
    wide = [x.detach().double().requires_grad_() for x in logits]
    expected = as_liger_tests(*wide, beta, label != -100) * factor
    torch.testing.assert_close(loss.double(), expected, **LIGER_TOLERANCE[dtype])
    grads, truth = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, wide)
    for grad, own in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad.double(), own, **LIGER_TOLERANCE[dtype])


@pytest.mark.parametrize("function", [class_temperature_js, class_temperature_js_reference], ids=lambda f: f.__name__)
def test_gradients_are_the_derivatives(function: Any, device: torch.device) -> None:
    student, teacher, label, temperature = batch((5, 4), device).double()
    leaves = student.requires_grad_(), teacher.requires_grad_()
    options: dict[str, Any] = {"student_temperature": 2.5, "class_weight": weights(4, device).double(), "beta": 0.3}
    options["row_weight"] = weights(5, device).double() + 1
    for form in ({"reduction": "none"}, {"reduction": "batchmean"}) if function is class_temperature_js else ({},):
        assert torch.autograd.gradcheck(
            lambda s, t, form=form: function(s, t, label, temperature, **options, **form), leaves
        )
    assert torch.autograd.gradcheck(lambda s: function(s, teacher.detach(), beta=0.3), leaves[:1])
    assert torch.autograd.gradcheck(lambda t: function(student.detach(), t, beta=0.3), leaves[1:])


def test_a_gradient_has_no_gradient(device: torch.device) -> None:
    student, teacher, *_ = batch((5, 4), device)
    loss = class_temperature_js(student.requires_grad_(), teacher)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        grad.sum().backward()


def test_what_has_no_gradient_says_so(device: torch.device) -> None:
    student, teacher, label, _ = batch((5, 4), device)
    for name in ("temperature", "class_weight", "row_weight"):
        tensor = torch.ones(5 if name == "row_weight" else 4, device=device, requires_grad=True)
        with pytest.raises(ValueError, match=rf"{name}: requires grad, .* pass {name}.detach\(\)"):
            class_temperature_js(student, teacher, label, **{name: tensor})
        with torch.no_grad():
            class_temperature_js(student, teacher, label, **{name: tensor})


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    student, teacher, label, temperature = args = batch((7, 10), device)
    for message, inputs, options in [
        *((f"^beta: {beta}; needs a number from 0 to 1", args, {"beta": beta}) for beta in (-0.1, 1.5, math.nan)),
        ("^beta: 0.5; needs a number", args, {"beta": torch.tensor(0.5)}),
        (r"teacher: shape \(7, 9\), but student", (student, teacher[:, :9], label, temperature), {}),
        (r"teacher: torch.int32; needs", (student, teacher.int(), label, temperature), {}),
        (r"label: shape \(6,\); needs \(7,\)", (student, teacher, label[:6], temperature), {}),
        (r"temperature: shape \(9,\); needs", (student, teacher, label, temperature[:9]), {}),
        (r"label: None; needs the class", (student, teacher), {"class_weight": temperature}),
        (r"student_temperature: 0", args, {"student_temperature": 0.0}),
        (r"reduction: 'avg'; needs one of batchmean, mean, sum, none", args, {"reduction": "avg"}),
    ]:
        with pytest.raises(ValueError, match=message):
            class_temperature_js(*inputs, **options)


@pytest.mark.parametrize(
    ("dtype", "one_number"), [(torch.float32, False), (torch.bfloat16, True), (torch.float64, False)], ids=str
)
def test_are_well_formed_ops(dtype: torch.dtype, one_number: bool, device: torch.device) -> None:
    student, teacher, label, temperature = batch((7, 10), device, dtype, dtype)
    of_class = (None, None, None, None) if one_number else (label, temperature, weights(10, device), weights(7, device))
    rest: tuple[Any, ...] = (*of_class, 0.7, 2.0, 0.3, False, None if one_number else -100)
    ops, leaves = torch.ops.retemper, (student.clone().requires_grad_(), teacher.clone().requires_grad_())
    torch.library.opcheck(ops.class_temperature_js_rows.default, (*leaves, *rest))
    torch.library.opcheck(ops.class_temperature_js.default, (*leaves, *rest))
    row_grad = torch.ones(7, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for wanted in ((True, True), (False, True)):
        torch.library.opcheck(ops.class_temperature_js_backward.default, (row_grad, student, teacher, *rest, *wanted))


def test_compiles_into_one_graph(device: torch.device) -> None:
    student, teacher, label, by_class = batch((7, 10), device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(student: Tensor, teacher: Tensor, temperature: Any) -> Tensor:
        return class_temperature_js(student * 1, teacher, label, temperature, class_weight=by_class, beta=0.3)

    with torch._dynamo.config.patch(recompile_limit=3):  # a tensor, a constant, a variable; one more would be an error
        for temperature in (by_class, 0.05, 7.0, 0.3, 30.0):
            mine, theirs = ([t.clone().requires_grad_() for t in (student, teacher)] for _ in range(2))
            loss = compiled(*mine, temperature)
            expected = class_temperature_js(*theirs, label, temperature, class_weight=by_class, beta=0.3)
            torch.testing.assert_close(loss, expected)
            for ours, own in zip(torch.autograd.grad(loss, mine), torch.autograd.grad(expected, theirs), strict=True):
                torch.testing.assert_close(ours, own)
