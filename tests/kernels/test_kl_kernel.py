"""What the KL may be asked for, of kernel and reference alike: both gradients, and every form of the arguments."""

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import class_temperature_kl, class_temperature_kl_grad_, class_temperature_kl_reference

BATCH, CLASSES = 7, 10
# p log p is good to 2**-22; divided by temperatures of 0.3, times weights up to 4
TIGHT: dict[str, Any] = {"rtol": 2**-19, "atol": 2**-18}
# of each value one rounding to the logits' dtype; a GPU rounds to bfloat16 where the interpreter truncates
ULP = {torch.float32: 2**-19, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-11}


def logits(shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    drawn = 3 * torch.randn(2, *shape, generator=gen)
    dtypes = dtypes or (torch.float32, torch.float32)
    return [one.to(device, dtype).requires_grad_() for one, dtype in zip(drawn, dtypes, strict=True)]


def by_class(device: torch.device, classes: int = CLASSES) -> dict[str, Any]:
    numbers = {"temperature": (0.4, 6), "class_weight": (0, 2), "label_trust": (0, 0.9)}
    return {name: torch.linspace(ends[0], ends[1], classes, device=device) for name, ends in numbers.items()}


def labels(batch: int, device: torch.device, classes: int = CLASSES) -> Tensor:
    return torch.arange(batch, device=device) % classes


def forms(device: torch.device, batch: int = BATCH, classes: int = CLASSES) -> dict[str, dict[str, Any]]:
    """The ways to ask for the loss, without student and teacher."""
    own = torch.linspace(0.3, 4, batch, device=device)
    labelled = {"label": labels(batch, device, classes)}
    classed = by_class(device, classes)
    temperature = {"temperature": classed["temperature"]}
    return {
        "plain": {},
        "by class": labelled | classed,
        "class temperature": labelled | temperature | {"ignore_index": None},
        "by row": labelled | {"temperature": own[:, None], "row_weight": own[:, None] - 1},
        "one tensor": {"temperature": own[batch // 2], "student_temperature": 2.5},
        "reverse": labelled | temperature | {"reverse": True, "student_temperature": 1.5},
        "reverse by row": {"temperature": own, "reverse": True, "row_weight": own},
        "left out": {"label": labelled["label"].where(own > 1, -100)} | classed,
        "trust by row": labelled | temperature | {"row_trust": ((own - 0.3) / 4)[:, None], "row_weight": own},
    }


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def gradients(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    rows = loss(student, teacher)
    return rows.detach(), *torch.autograd.grad(rows, (student, teacher), weight.to(rows.dtype))


def truth(student: Tensor, teacher: Tensor, weight: Tensor, form: dict[str, Any]) -> tuple[Tensor, ...]:
    """The loss and both gradients by autograd, through the reference in float64."""
    wide = {name: double(value) for name, value in form.items()}
    leaves = [one.detach().double().requires_grad_() for one in (student, teacher)]
    return gradients(lambda s, t: class_temperature_kl_reference(s, t, **wide), leaves[0], leaves[1], weight)


SHAPES = [(form, (BATCH, CLASSES)) for form in forms(torch.device("cpu"))]
SHAPES += [
    (form, shape)
    for form in ("by class", "reverse by row", "trust by row")
    for shape in ((1, 1), (3, 100), (1, 1501), (130, 3))
]


@pytest.mark.parametrize(("form", "shape"), SHAPES, ids=str)
def test_both_gradients_are_those_of_autograd(
    form: str, shape: tuple[int, int], path: str, device: torch.device
) -> None:
    student, teacher = logits(shape, device)
    options, weight = forms(device, *shape)[form], torch.linspace(-1, 2, shape[0], device=device)
    found = gradients(lambda s, t: class_temperature_kl(s, t, **options, reduction="none"), student, teacher, weight)
    for ours, expected in zip(found, truth(student, teacher, weight, options), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, **TIGHT)
    changed = student.detach().clone()
    class_temperature_kl_grad_(changed, teacher.detach(), **options)
    (alone,) = torch.autograd.grad(class_temperature_kl(student, teacher, **options, reduction="sum"), student)
    torch.testing.assert_close(changed, alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float64, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["by class", "reverse"])
def test_both_gradients_in_any_two_dtypes(
    form: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype, path: str, device: torch.device
) -> None:
    student, teacher = logits((BATCH, CLASSES), device, student_dtype, teacher_dtype)
    options, weight = forms(device)[form], torch.ones(BATCH, device=device)
    found = gradients(lambda s, t: class_temperature_kl(s, t, **options, reduction="none"), student, teacher, weight)
    for ours, expected in zip(found[1:], truth(student, teacher, weight, options)[1:], strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=ULP[ours.dtype], atol=2**-19)
    assert (found[1].dtype, found[2].dtype) == (student_dtype, teacher_dtype)


@pytest.mark.parametrize("form", forms(torch.device("cpu")))
def test_gradients_are_the_derivatives(form: str, device: torch.device) -> None:
    student, teacher = logits((5, 4), device, torch.float64, torch.float64)
    options = {name: double(value) for name, value in forms(device, 5, 4)[form].items()}
    for reduction in ("none", "batchmean"):
        assert torch.autograd.gradcheck(
            lambda s, t, reduction=reduction: class_temperature_kl(s, t, **options, reduction=reduction),
            (student, teacher),
        )
    assert torch.autograd.gradcheck(lambda s, t: class_temperature_kl_reference(s, t, **options), (student, teacher))


def test_the_reference_is_differentiable_in_everything(device: torch.device) -> None:
    student, teacher = logits((5, 4), device, torch.float64, torch.float64)
    values = [value.double().add(0.05).requires_grad_() for value in by_class(device, 4).values()]

    def loss(*given: Tensor) -> Tensor:
        student, teacher, *rest = given
        options: dict[str, Any] = dict(zip(("temperature", "class_weight", "label_trust"), rest, strict=True))
        return class_temperature_kl_reference(student, teacher, labels(5, device, 4), **options)

    assert torch.autograd.gradcheck(loss, (student, teacher, *values))


def test_trades_has_the_gradient_of_plain_pytorch(path: str, device: torch.device) -> None:
    """Its outer loss sends a gradient through the clean prediction too."""
    weight = torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    clean, adv = (one.detach() for one in logits((33, 20), device))
    ours = class_temperature_kl(adv @ weight.t(), clean @ weight.t())
    plain = F.kl_div((adv @ weight.t()).log_softmax(1), (clean @ weight.t()).softmax(1), reduction="batchmean")
    expected, found = (torch.autograd.grad(loss, weight)[0] for loss in (plain, ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.triton
def test_both_gradients_are_one_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = logits((BATCH, CLASSES), device)
    loss = class_temperature_kl(student, teacher, reduction="none")
    kernel = MagicMock()
    monkeypatch.setattr("retemper.kernels.kl_kernel._kl_kernel", kernel)
    torch.autograd.grad(loss.sum(), (student, teacher))
    assert kernel.__getitem__.return_value.call_count == 1


def test_only_what_is_asked_for_has_a_gradient(path: str, device: torch.device) -> None:
    student, teacher = logits((BATCH, CLASSES), device)
    both = torch.autograd.grad(class_temperature_kl(student, teacher), (student, teacher))
    alone = class_temperature_kl(student, teacher.detach()), class_temperature_kl(student.detach(), teacher)
    for loss, leaf, expected in zip(alone, (student, teacher), both, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected, rtol=0, atol=0)
    with torch.no_grad():
        assert not class_temperature_kl(student, teacher).requires_grad


def test_what_has_no_gradient_is_refused(path: str, device: torch.device) -> None:
    student, teacher = (one.detach() for one in logits((BATCH, CLASSES), device))
    label = labels(BATCH, device)
    named = by_class(device) | dict.fromkeys(("row_weight", "row_trust"), torch.ones(BATCH, device=device))
    for name, value in named.items():
        options: dict[str, Any] = {name: value.clone().requires_grad_()}
        with pytest.raises(ValueError, match=rf"{name}: requires grad, .* {name}.detach\(\)"):
            class_temperature_kl(student, teacher, label, **options)
        with pytest.raises(ValueError, match=rf"{name}: requires grad"):
            class_temperature_kl_grad_(student.clone(), teacher, label, **options)
        with torch.no_grad():
            class_temperature_kl(student, teacher, label, **options)
    with pytest.raises(ValueError, match="teacher: requires grad"):
        class_temperature_kl_grad_(student, teacher.requires_grad_(), label)


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_a_gradient_cannot_be_differentiated_again(reduction: str, path: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64):
        student, teacher = logits((BATCH, CLASSES), device, dtype, dtype)
        loss = class_temperature_kl(student, teacher, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated again"):
            grad.square().sum().backward()


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # PyTorch's own, at the first use of the forward mode
def test_the_forward_mode_is_refused_by_the_kernel(device: torch.device) -> None:
    student, teacher = (one.detach() for one in logits((BATCH, CLASSES), device))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"jvp|forward mode"):
        class_temperature_kl(torch.autograd.forward_ad.make_dual(student, teacher), teacher)


def test_without_labels_rows_are_those_of_any_label(path: str, device: torch.device) -> None:
    student, teacher = logits((BATCH, CLASSES), device)
    label = labels(BATCH, device)
    for temperature in (1.0, 4, torch.tensor(0.3, device=device), torch.linspace(1, 3, BATCH, device=device)):
        for reduction in ("none", "sum", "batchmean", "mean"):
            options: dict[str, Any] = {"temperature": temperature, "reduction": reduction}
            found = class_temperature_kl(student, teacher, **options)
            torch.testing.assert_close(found, class_temperature_kl(student, teacher, label, **options))


def test_temperatures_of_as_many_rows_as_classes_are_by_class_where_there_are_labels(
    path: str, device: torch.device
) -> None:
    student, teacher = (one.detach() for one in logits((CLASSES, CLASSES), device))
    label, value = labels(CLASSES, device).flip(0), torch.linspace(0.5, 4, CLASSES, device=device)
    rows = [class_temperature_kl(student[i : i + 1], teacher[i : i + 1], None, t.item()) for i, t in enumerate(value)]
    by_row = torch.stack(rows)
    torch.testing.assert_close(class_temperature_kl(student, teacher, None, value, reduction="none"), by_row)
    torch.testing.assert_close(class_temperature_kl(student, teacher, label, value[:, None], reduction="none"), by_row)
    found = class_temperature_kl(student, teacher, label, value, reduction="none")
    expected = class_temperature_kl(student, teacher, None, value.flip(0), reduction="none")
    torch.testing.assert_close(found, expected)


def test_a_trust_of_as_many_rows_as_classes_is_by_the_name_of_its_argument(path: str, device: torch.device) -> None:
    student, teacher = logits((CLASSES, CLASSES), device)
    label, trust = labels(CLASSES, device).flip(0), torch.linspace(0, 1, CLASSES, device=device)
    forms: list[dict[str, Any]] = [{"row_trust": trust}, {"label_trust": trust.flip(0)}]  # row i is of class K - 1 - i
    by_row, of_class = (class_temperature_kl(student, teacher, label, **form, reduction="none") for form in forms)
    assert torch.equal(by_row, of_class)
    grads = [torch.autograd.grad(loss.sum(), (student, teacher)) for loss in (by_row, of_class)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert grads[0][1][:-1].all() and (grads[0][1][-1] == 0).all()  # where the label is all, the teacher is nothing
    spread = torch.stack([trust, trust], 1)[:, 0]  # every second number: the stride counts
    assert torch.equal(class_temperature_kl(student, teacher, label, row_trust=spread, reduction="none"), by_row)


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan])
def test_a_temperature_that_is_none_makes_its_rows_nan(bad: float, path: str, device: torch.device) -> None:
    student, teacher = logits((BATCH, CLASSES), device)
    label, temperature = labels(BATCH, device), torch.ones(CLASSES, device=device)
    temperature[2] = bad
    for reverse in (False, True):
        loss = class_temperature_kl(student, teacher, label, temperature, reduction="none", reverse=reverse)
        assert torch.equal(loss.isnan(), label == 2)
        for grad in torch.autograd.grad(loss.nansum(), (student, teacher)):
            assert torch.equal(grad.isnan().any(1), label == 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_takes_labels_of_any_integers(dtype: torch.dtype, path: str, device: torch.device) -> None:
    student, teacher = (one.detach() for one in logits((BATCH, 200), device))
    label = torch.tensor([0, 1, 2, 100, 120, 3, 127], device=device)
    classed = by_class(device, 200)
    expected = class_temperature_kl(student, teacher, label, **classed)
    assert torch.equal(class_temperature_kl(student, teacher, label.to(dtype), **classed), expected)
    if dtype == torch.uint8:
        assert class_temperature_kl(student, teacher, label.to(dtype) + 128, reduction="none")[-1].isnan()


@pytest.mark.parametrize("ignored", [-100, 3])
@pytest.mark.parametrize("form", ["plain", "by class", "by row", "reverse", "probabilities"])
def test_rows_that_are_left_out_count_nothing(form: str, ignored: int, path: str, device: torch.device) -> None:
    student, teacher = logits((BATCH, CLASSES), device)
    options: dict[str, Any] = forms(device).get(form, {"teacher_is": "probabilities"})
    if form == "probabilities":
        teacher = teacher.detach().softmax(1).requires_grad_()
    label = labels(BATCH, device)
    label[[1, 4]] = ignored
    kept = label != ignored
    with torch.no_grad():
        student[1], teacher[4] = torch.nan, torch.inf
    options = {name: value for name, value in options.items() if name != "label"} | {"ignore_index": ignored}
    part: dict[str, Any] = {
        name: value[kept] if isinstance(value, Tensor) and len(value) == BATCH else value
        for name, value in options.items()
    }
    for reduction in ("none", "sum", "batchmean", "mean"):
        loss = class_temperature_kl(student, teacher, label, **options, reduction=reduction)
        expected = class_temperature_kl(student[kept], teacher[kept], label[kept], **part, reduction=reduction)
        torch.testing.assert_close(loss[kept] if reduction == "none" else loss, expected)
        assert reduction != "none" or (loss[~kept] == 0).all()
        wanted = torch.autograd.grad(expected.sum(), (student, teacher))
        for grad, other in zip(torch.autograd.grad(loss.sum(), (student, teacher)), wanted, strict=True):
            torch.testing.assert_close(grad, other, rtol=2**-20, atol=2**-22)
            assert (grad[~kept] == 0).all()
    changed = student.detach().clone()
    class_temperature_kl_grad_(changed, teacher.detach(), label, **options)
    assert (changed[~kept] == 0).all() and changed[kept].isfinite().all()
    label[:] = ignored
    assert class_temperature_kl(student, teacher, label, **options) == 0


@pytest.mark.parametrize("classes", [CLASSES, 100])
def test_probabilities_are_taken_as_they_are(classes: int, path: str, device: torch.device) -> None:
    student, teacher = (one.detach() for one in logits((BATCH, classes), device))
    p = (teacher.softmax(1) * torch.linspace(0.5, 2, BATCH, device=device)[:, None]).requires_grad_()
    leaves, weight = (student.requires_grad_(), p), torch.linspace(1, 2, BATCH, device=device)
    ours = class_temperature_kl(
        student, p, teacher_is="probabilities", student_temperature=2.0, row_weight=weight, reduction="none"
    )
    plain = F.kl_div((student / 2).log_softmax(1), p, reduction="none").sum(1) * weight
    torch.testing.assert_close(ours, plain, **TIGHT)
    expected = torch.autograd.grad(plain.sum(), leaves)
    for found, other in zip(torch.autograd.grad(ours.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(found, other, **TIGHT)
    with torch.no_grad():
        p[:, 0] = 0
        p[0, 1] = -0.1
        student[1, 0] = -torch.inf  # impossible to both
    loss = class_temperature_kl(student, p, teacher_is="probabilities", reduction="none")
    assert loss[0].isnan() and loss[1:].isfinite().all()
    (grad,) = torch.autograd.grad(loss[1:].sum(), student)
    torch.testing.assert_close(grad[1:], (student.softmax(1) * p.sum(1, keepdim=True) - p).detach()[1:], **TIGHT)


def test_reversed_is_pytorchs_loss_of_the_student_s_prediction(path: str, device: torch.device) -> None:
    student, teacher = logits((BATCH, CLASSES), device)
    plain = F.kl_div((teacher / 3).log_softmax(1), student.log_softmax(1), log_target=True, reduction="batchmean")
    ours = class_temperature_kl(student, teacher, None, 3.0, reverse=True)
    torch.testing.assert_close(ours, plain)
    leaves = (student, teacher)
    for found, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize(
    ("shape", "class_dim"),
    [((2, 3, CLASSES), -1), ((2, CLASSES, 3, 4), 1), ((CLASSES, 6), 0), ((CLASSES, 1), 0), ((1, CLASSES, 6), 1)],
)
@pytest.mark.parametrize("form", ["by class", "by row", "left out"])
def test_leading_dimensions_are_rows(
    form: str, shape: tuple[int, ...], class_dim: int, path: str, device: torch.device
) -> None:
    student, teacher = logits(shape, device)
    lead = student.movedim(class_dim, -1).shape[:-1]
    rows = [one.movedim(class_dim, -1).reshape(-1, CLASSES).contiguous() for one in (student, teacher)]
    flat = forms(device, len(rows[0]))[form]
    shaped: dict[str, Any] = {
        name: value.view(lead) if isinstance(value, Tensor) and value.numel() == len(rows[0]) else value
        for name, value in flat.items()
    }
    for reduction in ("none", "batchmean", "mean"):
        loss = class_temperature_kl(student, teacher, **shaped, class_dim=class_dim, reduction=reduction)
        expected = class_temperature_kl(rows[0], rows[1], **flat, reduction=reduction)
        assert loss.shape == (lead if reduction == "none" else ())
        torch.testing.assert_close(loss.flatten(), expected.flatten(), rtol=0, atol=0)
        leaves, wanted = (student, teacher), torch.autograd.grad(expected.sum(), (student, teacher))
        for grad, other in zip(torch.autograd.grad(loss.sum(), leaves), wanted, strict=True):
            torch.testing.assert_close(grad, other, rtol=0, atol=0)
    changed = student.detach().clone()
    assert class_temperature_kl_grad_(changed, teacher.detach(), **shaped, class_dim=class_dim) is changed
    expected = class_temperature_kl_grad_(rows[0].detach().clone(), rows[1].detach(), **flat)
    torch.testing.assert_close(changed.movedim(class_dim, -1).reshape(-1, CLASSES), expected, rtol=0, atol=0)


def test_a_row_of_100_000_classes(device: torch.device, path: str) -> None:
    student, teacher = logits((1, 100_000), device)
    label, options = torch.tensor([99_999], device=device), by_class(device, 100_000)
    weight = torch.ones(1, device=device)
    found = gradients(
        lambda s, t: class_temperature_kl(s, t, label, **options, reduction="none"), student, teacher, weight
    )
    expected = truth(student, teacher, weight, {"label": label, **options})
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 30, 64])
def test_a_cpu_takes_large_batches_part_by_part(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retemper.kernels.runtime.TRITON_ON_CPU", False)
    for form in forms(torch.device("cpu"), 13):
        options = forms(torch.device("cpu"), 13)[form]
        student, teacher = logits((13, CLASSES), torch.device("cpu"))
        rows = class_temperature_kl(student, teacher, **options, reduction="none")
        grads = torch.autograd.grad(rows.sum(), (student, teacher))
        with monkeypatch.context() as patch:
            patch.setattr("retemper.kernels.kl_divergence.PART", size)
            parts = class_temperature_kl(student, teacher, **options, reduction="none")
            for grad, other in zip(torch.autograd.grad(parts.sum(), (student, teacher)), grads, strict=True):
                torch.testing.assert_close(grad, other)
            changed = student.detach().clone()
            class_temperature_kl_grad_(changed, teacher.detach(), **options)
        torch.testing.assert_close(parts, rows)
        torch.testing.assert_close(changed, grads[0])


def test_infinite_logits_leave_the_other_gradients_finite(path: str, device: torch.device) -> None:
    student, teacher = logits((3, CLASSES), device)
    with torch.no_grad():
        teacher[0, 1:] = -torch.inf  # certain
        teacher[1, :5] = student[1, :5] = -torch.inf
    loss = class_temperature_kl(student, teacher, reduction="none")
    of_student, of_teacher = torch.autograd.grad(loss.sum(), (student, teacher))
    assert loss.isfinite().all() and of_student.isfinite().all() and of_teacher.isfinite().all()
    assert (of_teacher[0] == 0).all() and (of_teacher[1, :5] == 0).all()


def test_any_number_of_temperatures_is_compiled_twice_at_most(device: torch.device) -> None:
    student, teacher = logits((BATCH, CLASSES), device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(changed: Tensor, temperature: float, own: float) -> tuple[Tensor, Tensor]:
        loss = class_temperature_kl(student, teacher, temperature=temperature, student_temperature=own)
        options: dict[str, Any] = {"temperature": temperature, "student_temperature": own}
        return loss, class_temperature_kl_grad_(changed, teacher.detach(), **options)

    with torch._dynamo.config.patch(recompile_limit=3):  # one more would raise an error
        for temperature, own in ((0.05, 1.0), (7.0, 2.0), (0.3, 3.0), (30.0, 0.4), (2.0, 2.5)):
            loss, changed = compiled(student.detach().clone(), temperature, own)
            expected = class_temperature_kl(student, teacher, None, temperature, student_temperature=own)
            torch.testing.assert_close(loss, expected)
            wanted = torch.autograd.grad(expected, (student, teacher))
            for grad, other in zip(torch.autograd.grad(loss, (student, teacher)), wanted, strict=True):
                torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(changed, BATCH * wanted[0], rtol=1e-4, atol=1e-6)


def test_can_be_exported(device: torch.device) -> None:
    class Loss(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
            return class_temperature_kl(student, teacher, label, 4.0, student_temperature=2.0)

    student, teacher = (one.detach() for one in logits((BATCH, CLASSES), device))
    label = labels(BATCH, device)
    program = torch.export.export(Loss(), (student, teacher, label))
    assert "retemper.class_temperature_kl" in program.graph_module.code
    torch.testing.assert_close(program.module()(student, teacher, label), Loss()(student, teacher, label))
