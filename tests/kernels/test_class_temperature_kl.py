"""The class-wise distillation loss against its reference, forward and backward, and where its limits are."""

import math
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import (
    class_temperature_kl,
    class_temperature_kl_grad_,
    class_temperature_kl_grad_reference,
    class_temperature_kl_reference,
)
from retemper.kernels.class_temperature_kl import gradient
from retemper.kernels.kl_arguments import arguments

# whole tiles, ragged ones, and rows in several passes (1501), where a program has one row and the interpreter is slow
SHAPES = [(b, k) for b in (0, 1, 7, 128) for k in (1, 2, 3, 10, 100, 1000) if b * k < 12_000]
SHAPES += [(64, 100), (1, 1501), (2, 1501)]  # 64 rows of 100 are two whole programs
# Loss, of the row's own value or of 1: each log is a quotient and a difference, good to 2**-22 of itself.
LOSS_TOLERANCE = {torch.float32: 2**-20, torch.float64: 1e-12}
# Gradient at temperature 1, absolute: p = exp(-x) to x exp(-x) 2**-22, so p and q to 2**-23 each, weights up to 2.
GRAD_TOLERANCE = {torch.float32: 2**-21, torch.float64: 1e-12}
# and of its own value, one ulp of the student's dtype: the interpreter truncates to bfloat16 where a GPU rounds.
ULP = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-12}
BITS: dict[str, Any] = {"rtol": 0, "atol": 0, "equal_nan": True}


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
    temperature = 0.05 * 1000 ** torch.rand(shape[1], generator=gen)  # 0.05 ... 50
    return Batch(logits[0].to(device, student), logits[1].to(device, teacher), label.to(device), temperature.to(device))


def weights(classes: int, device: torch.device) -> Tensor:
    return torch.linspace(0, 2, classes, device=device)


def trusts(classes: int, device: torch.device) -> Tensor:
    return torch.linspace(0, 1, classes, device=device)


def assert_loss(loss: Tensor, expected: Tensor) -> None:
    tolerance = LOSS_TOLERANCE[loss.dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)


def assert_grad(
    grad: Tensor, expected: Tensor, compute: torch.dtype, student_temperature: float = 1.0, plain: bool = False
) -> None:
    limits = torch.finfo(grad.dtype)
    atol = GRAD_TOLERANCE[compute] / student_temperature * (2 if plain else 1)  # plain PyTorch's sums are in float32
    atol += limits.tiny * limits.eps  # the steps of the smallest floats
    torch.testing.assert_close(grad.double(), expected.double(), rtol=ULP[grad.dtype], atol=atol)


def grad_of_sum(args: Batch, **options: Any) -> Tensor:
    student = args.student.clone().requires_grad_()
    loss = class_temperature_kl(student, *args[1:], reduction="sum", **options)
    return torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("student_temperature", [1.0, 0.05, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_reference(shape: tuple[int, int], student_temperature: float, device: torch.device) -> None:
    args = batch(shape, device)
    for weight in (None, weights(shape[1], device)):
        options: dict[str, Any] = {"student_temperature": student_temperature, "class_weight": weight}
        wide: dict[str, Any] = options | {"class_weight": None if weight is None else weight.double()}
        loss = class_temperature_kl(*args, **options, reduction="none")
        assert loss.dtype == torch.float32
        assert_loss(loss, class_temperature_kl_reference(*args.double(), **wide))
        grad = grad_of_sum(args, **options)
        expected = class_temperature_kl_grad_reference(*args.double(), **wide)
        assert_grad(grad, expected, torch.float32, student_temperature)
        student = args.student.clone()
        assert class_temperature_kl_grad_(student, *args[1:], **options) is student
        assert torch.equal(student, grad)


@pytest.mark.parametrize("shape", [(7, 1), (128, 10), (7, 100), (7, 200), (2, 1501)], ids=str)
def test_agrees_with_reference_where_labels_are_trusted(shape: tuple[int, int], device: torch.device) -> None:
    args, trust = batch(shape, device), trusts(shape[1], device)
    weight = weights(shape[1], device)
    options: dict[str, Any] = {"student_temperature": 2.0, "class_weight": weight, "label_trust": trust}
    wide: dict[str, Any] = options | {"class_weight": weight.double(), "label_trust": trust.double()}
    loss = class_temperature_kl(*args, **options, reduction="none")
    assert_loss(loss, class_temperature_kl_reference(*args.double(), **wide))
    grad = grad_of_sum(args, **options)
    assert_grad(grad, class_temperature_kl_grad_reference(*args.double(), **wide), torch.float32, 2.0)
    assert torch.equal(class_temperature_kl_grad_(args.student, *args[1:], **options), grad)


@pytest.mark.usefixtures("path")
def test_trust_leads_from_the_teacher_to_the_label(device: torch.device) -> None:
    args = batch((97, 10), device)
    for each in (args, args.double(), batch((1000, 2), device)):  # so many rows that any rounding would show
        none = torch.zeros_like(each.temperature)
        loss = class_temperature_kl(*each, label_trust=none, reduction="none")
        assert torch.equal(loss, class_temperature_kl(*each, reduction="none"))
        assert torch.equal(grad_of_sum(each, label_trust=none), grad_of_sum(each))

    half, whole = (torch.full((10,), share, device=device) for share in (0.5, 1.0))
    log_q, label = args.student.double().log_softmax(1), F.one_hot(args.label, 10)
    soft = (args.teacher.double() / args.temperature.double()[args.label, None]).softmax(1)
    for trust, target in ((half, (soft + label) / 2), (whole, label.double())):
        expected = F.kl_div(log_q, target, reduction="none").sum(1)
        assert_loss(class_temperature_kl(*args, label_trust=trust, reduction="none"), expected)
        assert_grad(grad_of_sum(args, label_trust=trust), log_q.exp() - target, torch.float32)
    torch.testing.assert_close(
        class_temperature_kl(*args, label_trust=whole), F.cross_entropy(args.student, args.label)
    )


@pytest.mark.parametrize("classes", [10, 100])
def test_a_trusted_label_survives_infinite_logits(classes: int, path: str, device: torch.device) -> None:
    args, half = batch((6, classes), device), torch.full((classes,), 0.5, device=device)
    args.label.fill_(1)
    args.temperature.fill_(1)
    args.teacher[0, 1:] = -math.inf  # certain of class 0, which the label is not
    args.teacher[1, 1] = args.student[2, 0] = args.student[3, 1] = -math.inf
    args.student[4] = args.teacher[4] = torch.where(torch.arange(classes, device=device) == 1, 0, -12)  # both are sure
    args.student[4] *= 0.9
    args.student[5, 1] = args.teacher[5, 1] = -1000  # both deny the label: the target there is its trust alone
    for trust in (half, half + 0.5, half * 2.7e-6):
        loss = class_temperature_kl(*args, label_trust=trust, reduction="none")
        wide: dict[str, Any] = {"label_trust": trust.double()}
        expected = class_temperature_kl_reference(*args.double(), **wide)
        assert (loss[2] == math.inf) == (trust[0] < 1) and loss[3] == math.inf  # impossible, and yet in the target
        assert_loss(loss, expected)
        if path == "triton":  # small, to its own digits; plain PyTorch has the digits of 1
            torch.testing.assert_close(loss[4].double(), expected[4], rtol=1e-5, atol=0)
        grad = grad_of_sum(args, label_trust=trust)
        expected = class_temperature_kl_grad_reference(*args.double(), **wide)
        assert_grad(grad, expected, torch.float32, plain=path == "reference")
    log_q = args.student[0].log_softmax(0)
    torch.testing.assert_close(
        class_temperature_kl(*args, label_trust=half, reduction="none")[0], math.log(0.5) - (log_q[0] + log_q[1]) / 2
    )


@pytest.mark.parametrize("teacher", ULP, ids=str)
@pytest.mark.parametrize("student", ULP, ids=str)
@pytest.mark.parametrize("shape", [(7, 10), (1, 1501)], ids=str)
def test_takes_any_two_dtypes(
    shape: tuple[int, int], student: torch.dtype, teacher: torch.dtype, device: torch.device
) -> None:
    args = batch(shape, device, student, teacher)
    loss, grad = class_temperature_kl(*args, reduction="none"), grad_of_sum(args)
    compute = torch.float64 if torch.float64 in (student, teacher) else torch.float32
    assert loss.dtype == compute and grad.dtype == student
    assert_loss(loss, class_temperature_kl_reference(*args.double()))
    assert_grad(grad, class_temperature_kl_grad_reference(*args.double()), compute)


@pytest.mark.parametrize("path", ["triton", "reference"])
@pytest.mark.parametrize("classes", [10, 1501])
def test_survives_what_training_may_do_to_logits(
    classes: int, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "reference" and device.type == "cpu":
        monkeypatch.setattr("retemper.kernels.runtime.TRITON_ON_CPU", False)
    args = batch((2, classes), device, scale=1e4)
    assert_loss(class_temperature_kl(*args, reduction="none"), class_temperature_kl_reference(*args.double()))
    assert_grad(grad_of_sum(args), class_temperature_kl_grad_reference(*args.double()), torch.float32)

    hole = batch((7, classes), device)
    hole.teacher[0, 1:] = -math.inf  # certain of class 0: no term but its own
    hole.teacher[1, :5] = hole.student[1, :5] = -math.inf
    hole.teacher[2, : classes - 1] = hole.student[2, : classes - 1] = -math.inf  # whole blocks of nothing
    hole.student[3, 0] = -math.inf  # denies what the teacher holds possible
    hole.student[4] = hole.teacher[4] = -math.inf
    hole.student[5, 0] = math.nan
    hole.teacher[6, 0] = math.inf
    hole.temperature.fill_(1)
    loss, grad = class_temperature_kl(*hole, reduction="none"), grad_of_sum(hole)
    torch.testing.assert_close(loss[0], -hole.student[0].log_softmax(0)[0])
    assert loss[1].isfinite() and loss[2] == 0 and loss[3] == math.inf
    assert loss[4:].isnan().all() and grad[4:].isnan().all()
    assert grad[:4].isfinite().all() and (grad[1, :5] == 0).all()
    assert_grad(grad[:4], class_temperature_kl_grad_reference(*hole.double())[:4], torch.float32)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(10, torch.float32), (10, torch.float64), (1501, torch.float32)], ids=str
)
def test_a_label_that_is_no_class_makes_its_row_nan(classes: int, dtype: torch.dtype, device: torch.device) -> None:
    args = batch((5, classes), device, dtype)
    args.label[:4] = torch.tensor([-1, classes, 2**40, -(2**63)], device=device)
    by_class: dict[str, Any] = {"class_weight": weights(classes, device), "label_trust": trusts(classes, device)}
    for options in ({}, by_class):
        loss = class_temperature_kl(*args, **options, reduction="none")
        grad = grad_of_sum(args, **options)
        bad = args.label.ge(classes) | args.label.lt(0)
        assert torch.equal(loss.isnan(), bad) and torch.equal(grad.isnan(), bad[:, None].expand_as(grad))


@pytest.mark.parametrize("path", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1, 0.3, 30.0])
def test_a_number_is_the_temperature_of_every_class(
    temperature: float, dtype: torch.dtype, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "reference" and device.type == "cpu":
        monkeypatch.setattr("retemper.kernels.runtime.TRITON_ON_CPU", False)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    args = batch((17, 10), device, dtype)._replace(temperature=torch.full((10,), temperature, dtype=compute).to(device))
    args.label[:2] = torch.tensor([-1, 10], device=device)
    by_class: dict[str, Any] = {"class_weight": weights(10, device), "label_trust": trusts(10, device)}
    for options in ({}, by_class):
        number: dict[str, Any] = {"temperature": temperature, **options}
        loss = class_temperature_kl(*args[:3], **number, reduction="none")
        grad = grad_of_sum(Batch(*args[:3], temperature), **options)  # type: ignore[arg-type]
        assert loss[:2].isnan().all() and grad[:2].isnan().all()  # no class, so no temperature
        torch.testing.assert_close(loss, class_temperature_kl(*args, **options, reduction="none"), **BITS)
        torch.testing.assert_close(grad, grad_of_sum(args, **options), **BITS)
        student = args.student.clone()
        assert class_temperature_kl_grad_(student, *args[1:3], **number) is student
        torch.testing.assert_close(student, grad, **BITS)

        wide: dict[str, Any] = {"temperature": args.temperature[0].item()} | {
            name: v.double() for name, v in options.items()
        }
        known = args.double()
        assert_loss(loss[2:], class_temperature_kl_reference(*known[:3], **wide)[2:])
        assert_grad(grad[2:], class_temperature_kl_grad_reference(*known[:3], **wide)[2:], compute)


def test_without_a_temperature_it_is_one(device: torch.device) -> None:
    args = batch((7, 10), device)
    assert torch.equal(class_temperature_kl(*args[:3]), class_temperature_kl(*args[:3], 1.0))
    expected = class_temperature_kl_grad_(args.student.clone(), *args[1:3], 1.0)
    assert torch.equal(class_temperature_kl_grad_(args.student.clone(), *args[1:3]), expected)
    assert torch.equal(class_temperature_kl_reference(*args[:3]), class_temperature_kl_reference(*args[:3], 1.0))
    assert torch.equal(
        class_temperature_kl_grad_reference(*args[:3]), class_temperature_kl_grad_reference(*args[:3], 1.0)
    )


@pytest.mark.triton
def test_a_number_takes_no_launch_but_ours(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, label, _ = batch((7, 10), device)
    kernel = MagicMock()
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", False)  # the NaN of conftest.py
    monkeypatch.setattr("retemper.kernels.kl_kernel._kl_kernel", kernel)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        class_temperature_kl(student, teacher, label, 0.3, ignore_index=None, reduction="none")
        class_temperature_kl_grad_(student, teacher, label, 0.3)
    names = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    assert kernel.__getitem__.return_value.call_count == 2
    assert names <= {"aten::new_empty", "aten::empty", "aten::detach"}  # of which none computes


def test_reductions(device: torch.device) -> None:
    args = batch((7, 10), device)
    rows = class_temperature_kl(*args, reduction="none")
    assert rows.shape == (7,)
    for reduction, divisor in (("sum", 1), ("batchmean", 7), ("mean", 70)):
        loss = class_temperature_kl(*args, reduction=reduction)
        torch.testing.assert_close(loss, rows.sum() / divisor)
        student = args.student.clone().requires_grad_()
        class_temperature_kl(student, *args[1:], reduction=reduction).backward()
        torch.testing.assert_close(student.grad, grad_of_sum(args) / divisor)


def test_is_pytorchs_loss_at_temperature_one(device: torch.device) -> None:
    args = batch((33, 10), device)._replace(temperature=torch.ones(10, device=device))
    expected = F.kl_div(args.student.log_softmax(1), args.teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(class_temperature_kl(*args), expected)
    expected = F.kl_div(args.student.log_softmax(1), args.teacher.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(class_temperature_kl(*args, reduction="none"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
def test_an_empty_batch_costs_nothing(reduction: str, device: torch.device) -> None:
    args = batch((0, 10), device)
    student = args.student.requires_grad_()
    loss = class_temperature_kl(student, *args[1:], reduction=reduction)
    assert loss.numel() == 0 if reduction == "none" else loss == 0
    loss.sum().backward()
    assert student.grad is not None and student.grad.shape == (0, 10)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    scale=st.floats(0, 1e4),
    temperature=st.floats(0.05, 50),
)
def test_is_a_divergence(
    seed: int, shape: tuple[int, int], scale: float, temperature: float, device: torch.device
) -> None:
    gen = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, *shape, generator=gen)).to(device)
    label = torch.randint(shape[1], shape[:1], generator=gen).to(device)
    by_class = torch.full(shape[1:], temperature, device=device)
    options: dict[str, Any] = {"student_temperature": temperature}
    both, twice = torch.cat([student, teacher]), torch.cat([teacher, teacher])
    loss = class_temperature_kl(both, twice, label.repeat(2), by_class, **options, reduction="none")
    assert (loss >= 0).all() and loss.isfinite().all()
    assert (loss[len(teacher) :] == 0).all()  # of the teacher to itself
    grad = class_temperature_kl_grad_(student, teacher, label, by_class, **options) * temperature
    assert grad.abs().max() <= 1
    assert grad.sum(1).abs().max() <= 1e-5


def test_gradient_is_the_derivative(device: torch.device) -> None:
    args = batch((5, 4), device).double()
    by_class = {"class_weight": weights(4, device).double(), "label_trust": trusts(4, device).double()}

    for reduction in ("none", "sum", "batchmean", "mean"):
        options: dict[str, Any] = {"student_temperature": 2.5, "reduction": reduction, **by_class}
        loss = partial(class_temperature_kl, **options)
        assert torch.autograd.gradcheck(
            lambda student, loss=loss: loss(student, *args[1:]), args.student.requires_grad_()
        )


def test_gradient_of_rows_need_not_be_one(device: torch.device) -> None:
    args = batch((7, 10), device)
    row_grad = torch.arange(14.0, device=device)[::2]  # every second value: the stride counts
    student = args.student.clone().requires_grad_()
    class_temperature_kl(student, *args[1:], reduction="none").backward(row_grad)
    torch.testing.assert_close(student.grad, grad_of_sum(args) * row_grad[:, None])


def test_rows_may_have_gaps(device: torch.device) -> None:
    args = batch((7, 30), device)
    gaps = Batch(args.student[:, 5:15], args.teacher[:, 10:20], args.label % 10, args.temperature[:10])
    dense = Batch(*(t.contiguous() for t in gaps))
    assert torch.equal(class_temperature_kl(*gaps), class_temperature_kl(*dense))
    assert torch.equal(grad_of_sum(gaps), grad_of_sum(dense))
    around = args.student.clone()
    class_temperature_kl_grad_(*gaps)
    assert torch.equal(args.student[:, 5:15], grad_of_sum(dense))
    assert torch.equal(args.student[:, :5], around[:, :5]) and torch.equal(args.student[:, 15:], around[:, 15:])


@pytest.mark.parametrize(("trust", "rows"), [("label_trust", 10), ("row_trust", 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_in_memory_of_its_own_is_the_same(
    dtype: torch.dtype, trust: str, rows: int, device: torch.device
) -> None:
    args = batch((7, 10), device, dtype, dtype)
    options: dict[str, Any] = {trust: trusts(rows, device), "ignore_index": None}
    before = args.student.clone()
    found = gradient(args.student.requires_grad_(), *args[1:], **options)
    assert torch.equal(args.student, before) and found.dtype == dtype and not found.requires_grad
    assert torch.equal(found, class_temperature_kl_grad_(before, *args[1:], **options))
    with pytest.raises(ValueError, match="teacher: requires grad"):
        gradient(args.student, args.teacher.requires_grad_())


def operands(inputs: dict[str, Any]) -> tuple[Any, ...]:
    return arguments(**inputs).of_operator()


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("by class", torch.bfloat16),
        ("by class", torch.float64),
        ("number", torch.float32),
        ("by row", torch.float32),
        ("trust by row", torch.float32),
        ("probabilities", torch.float32),
    ],
    ids=str,
)
def test_are_well_formed_ops(form: str, dtype: torch.dtype, device: torch.device) -> None:
    student, teacher, label, temperature = batch((7, 10), device, dtype, dtype)
    options: dict[str, Any] = {
        "by class": {
            "label": label,
            "temperature": temperature,
            "class_weight": weights(10, device),
            "label_trust": trusts(10, device),
        },
        "number": {"label": label, "temperature": 0.3, "ignore_index": None},
        "by row": {"temperature": temperature[:7], "row_weight": weights(7, device), "reverse": True},
        "trust by row": {"label": label, "temperature": temperature[0], "row_trust": trusts(7, device)},
        "probabilities": {"teacher_is": "probabilities"},
    }[form]
    given = operands({"student": student, "teacher": teacher.softmax(1), "student_temperature": 2.0, **options})
    tracked = (given[0].clone().requires_grad_(), given[1].clone().requires_grad_(), *given[2:])
    ops = torch.ops.retemper
    for op in (ops.class_temperature_kl_rows, ops.class_temperature_kl):
        torch.library.opcheck(op.default, tracked)
    for op in (ops.class_temperature_kl_overwrite_, ops.class_temperature_kl_grad_):
        torch.library.opcheck(op.default, given)
    row_grad = torch.ones(7, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(ops.class_temperature_kl_backward.default, (row_grad, *given, True, False))
    torch.library.opcheck(ops.class_temperature_kl_backward.default, (row_grad, *given, True, True))
    torch.library.opcheck(ops.class_temperature_kl_backward.default, (None, *given, True, False))


@pytest.mark.parametrize(("trust", "rows"), [("label_trust", 10), ("row_trust", 7)])
def test_compiles_into_one_graph(trust: str, rows: int, device: torch.device) -> None:
    args = batch((7, 10), device)
    by_class: dict[str, Any] = {"class_weight": weights(10, device), trust: trusts(rows, device)}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(student: Tensor) -> Tensor:
        return class_temperature_kl(2 * student, *args[1:], **by_class)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def direction(student: Tensor) -> Tensor:
        return class_temperature_kl_grad_(2 * student, *args[1:], **by_class)

    student = args.student.clone().requires_grad_()
    loss(student).backward()
    twice = args._replace(student=2 * args.student)
    expected = grad_of_sum(twice, **by_class)
    torch.testing.assert_close(student.grad, 2 * expected / 7)
    torch.testing.assert_close(direction(args.student), expected)


def test_a_number_that_varies_is_compiled_twice_at_most(device: torch.device) -> None:
    """Once as a constant, once as a variable: PyTorch gives up on a function that it compiles anew for every number."""
    student, teacher, label, _ = batch((7, 10), device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(student: Tensor, changed: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        class_temperature_kl_grad_(changed, teacher, label, temperature)
        loss = class_temperature_kl(student, teacher, label, temperature)
        return loss, class_temperature_kl_grad_(2 * student.detach(), teacher, label, temperature)

    with torch._dynamo.config.patch(recompile_limit=2):  # one more would raise an error
        for temperature in (0.05, 7.0, 0.3, 30.0):
            own, changed = student.clone().requires_grad_(), student.clone()
            loss, direction = compiled(own, changed, temperature)
            loss.backward()
            args = Batch(student, teacher, label, torch.full((10,), temperature, device=device))
            torch.testing.assert_close(loss, class_temperature_kl(*args))
            torch.testing.assert_close(own.grad, grad_of_sum(args) / 7)
            torch.testing.assert_close(direction, grad_of_sum(args._replace(student=2 * student)))
            torch.testing.assert_close(changed, grad_of_sum(args))
