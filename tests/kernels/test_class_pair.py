"""The class-pair term and its two gradients: against the sum over pairs, and where its limits are."""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from retemper import kernels

# whole tiles, ragged ones, and rows in several passes (1501), where a program has one row and the interpreter is slow
SHAPES = [(0, 10), (1, 1), (7, 2), (129, 10), (33, 100), (1, 1501)]
# of the largest value: sums of as many roundings as there are classes, added in some order
TOLERANCE = {torch.float32: 2**-20, torch.float64: 1e-12}
# and of a gradient's own, one ulp of the logits' dtype: the interpreter truncates to bfloat16 where a GPU rounds
ULP = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-12}

module = import_module("retemper.kernels.class_pair")
class_pair: Any = kernels.class_pair  # Any: pyright would match options given by name in a dict with every parameter
class_pair_reference: Any = kernels.class_pair_reference

each_path = pytest.mark.parametrize("path", ["triton", "reference"], indirect=True)


class Batch(NamedTuple):
    clean: Tensor
    adv: Tensor
    table: Tensor
    label: Tensor


def batch(
    shape: tuple[int, int],
    device: torch.device,
    clean: torch.dtype = torch.float32,
    adv: torch.dtype = torch.float32,
    table: torch.dtype = torch.float32,
) -> Batch:
    gen = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, *shape, generator=gen)
    weights = torch.randn(shape[1], shape[1], generator=gen).softmax(1)
    label = torch.randint(shape[1], shape[:1], generator=gen)
    return Batch(logits[0].to(device, clean), logits[1].to(device, adv), weights.to(device, table), label.to(device))


def by_pairs(clean: Tensor, adv: Tensor, weight: Tensor) -> Tensor:
    """The sum over all pairs of classes, row by row, in float64 as the authors write it; weights of each row."""
    d, w = clean.double() - adv.double(), weight.double()
    return (w[:, :, None] * w[:, None] * (d[:, :, None] - d[:, None]) ** 2).sum((1, 2))


def losses(*given: Tensor, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what gives the loss of each row of clean and adv, with such weights and labels."""
    return lambda clean, adv: class_pair(clean, adv, *given, **options, reduction="none")


def assert_agrees(args: Batch, loss: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> None:
    """Compare a function of clean and adv that gives a number a row with the sum over pairs: values and gradients."""
    leaves = [t.clone().requires_grad_() for t in args[:2]]
    wide = [t.double().requires_grad_() for t in args[:2]]
    rows, truth = loss(leaves[0], leaves[1]), by_pairs(wide[0], wide[1], weight)
    compute = torch.float64 if torch.float64 in (args.clean.dtype, args.adv.dtype) else torch.float32
    assert rows.dtype == compute and rows.shape == truth.shape
    atol = TOLERANCE[compute] * truth.detach().max().item() if len(truth) else 0
    torch.testing.assert_close(rows.double(), truth, rtol=TOLERANCE[compute], atol=atol)
    row_grad = torch.linspace(-1, 2, 2 * len(truth), device=truth.device)[::2].to(compute)  # the stride counts
    grads, truths = torch.autograd.grad(rows, leaves, row_grad), torch.autograd.grad(truth, wide, row_grad.double())
    for grad, logits, own in zip(grads, args[:2], truths, strict=True):
        assert grad.dtype == logits.dtype and grad.is_contiguous()
        atol = TOLERANCE[compute] * own.abs().max().item() if own.numel() else 0
        torch.testing.assert_close(grad.double(), own, rtol=ULP[grad.dtype], atol=atol)


@each_path
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_sum_over_pairs(shape: tuple[int, int], path: str, device: torch.device) -> None:
    args = batch(shape, device)
    own = args.table[args.label]
    assert_agrees(args, losses(*args[2:]), own)
    assert_agrees(args, losses(*args[2:], ignore_index=None), own)
    assert_agrees(args, losses(own), own)  # weights of each row


@pytest.mark.parametrize("adv", ULP, ids=str)
@pytest.mark.parametrize("clean", ULP, ids=str)
def test_takes_any_dtypes(clean: torch.dtype, adv: torch.dtype, device: torch.device) -> None:
    for table in ULP:
        args = batch((7, 30), device, clean, adv, table)
        assert_agrees(args, losses(*args[2:]), args.table[args.label])
    args = batch((7, 30), device, clean, adv)
    gaps = Batch(args.clean[:, 5:15], args.adv[:, 10:20], args.table[:10, 2:12], args.label % 10)  # rows with gaps
    for dtype in (torch.int32, torch.uint8):
        assert_agrees(gaps, losses(gaps.table, gaps.label.to(dtype)), gaps.table[gaps.label])


@each_path
def test_keeps_its_digits_where_the_logits_nearly_agree(path: str, device: torch.device) -> None:
    """Differences near 1000 that differ by 1e-3: the difference of the two sums has no digit of those."""
    args = batch((33, 100), device)
    args = args._replace(clean=torch.zeros_like(args.adv), adv=1000 + 1e-3 * args.adv)
    own = args.table[args.label]
    apart = args.clean - args.adv
    formula = 2 * (own.sum(1) * (own * apart**2).sum(1) - (own * apart).sum(1) ** 2)
    assert ((formula / by_pairs(*args[:2], own)) - 1).abs().max() > 1
    assert_agrees(args, losses(*args[2:]), own)


@each_path
def test_has_the_limits_of_a_variance(path: str, device: torch.device) -> None:
    clean, adv, table, label = batch((12, 10), device)
    rows = class_pair(clean, adv, table, label, reduction="none")
    assert (rows > 0).all()
    assert (class_pair(clean, clean + 4, table, label, reduction="none") < 1e-9).all()  # a shift of all classes
    torch.testing.assert_close(class_pair(adv, clean, table, label, reduction="none"), rows)
    torch.testing.assert_close(class_pair(clean, adv, 3 * table, label, reduction="none"), 9 * rows)
    none = class_pair(clean.requires_grad_(), adv, torch.zeros_like(table), label, reduction="none")
    assert (none == 0).all() and (torch.autograd.grad(none.sum(), clean)[0] == 0).all()  # a class without images
    one = torch.eye(10, device=device)
    assert (class_pair(clean, adv, one, label, reduction="none") < 1e-9).all()  # a single class makes no pair


@each_path
def test_rows_left_out_and_rows_without_a_class(path: str, device: torch.device) -> None:
    clean, adv, table, label = batch((6, 10), device)
    label[:3] = torch.tensor([-100, -1, 10], device=device)
    clean[0, 0] = math.nan  # what is left out may be anything
    clean, adv = clean.requires_grad_(), adv.requires_grad_()
    loss = class_pair(clean, adv, table, label, reduction="none")
    grads = torch.autograd.grad(loss.sum(), (clean, adv))
    assert loss[0] == 0 and loss[1:3].isnan().all() and loss[3:].isfinite().all()
    for grad in grads:
        assert (grad[0] == 0).all() and grad[1:3].isnan().all() and grad[3:].isfinite().all()
    kept = [0, 3, 4, 5]
    few = clean[kept], adv[kept], table, label[kept]
    for reduction, divisor in (("sum", 1), ("batchmean", 3)):
        torch.testing.assert_close(class_pair(*few, reduction=reduction), loss[3:].sum() / divisor)
    assert class_pair(clean[:1], adv[:1], table, label[:1]) == 0
    unlike = class_pair(clean, adv, table, label, ignore_index=None, reduction="none")
    assert unlike[:3].isnan().all() and torch.equal(unlike[3:], loss[3:])
    chosen = int(label[3])  # a class that counts nothing
    of_class = class_pair(*few, ignore_index=chosen, reduction="none")
    assert of_class[0].isnan() and of_class[1] == 0 and (of_class[2:][label[4:] != chosen] > 0).all()


@pytest.mark.parametrize("classes", [10, 30])
def test_half_precision_around_it_changes_nothing(classes: int, reference_path: None) -> None:
    """A CPU's sums of few classes are products, which autocast would round to 8 bits."""
    args = batch((12, classes), torch.device("cpu"))
    leaf = args.clean.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = class_pair(leaf, *args[1:])
    expected = class_pair(args.clean, *args[1:])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_leading_dimensions_are_rows(device: torch.device) -> None:
    args = batch((12, 5), device)
    rows, own = class_pair(*args, reduction="none"), args.table[args.label]
    views = [t.view(2, 6, 5) for t in args[:2]]
    assert torch.equal(class_pair(*views, args.table, args.label.view(2, 6), reduction="none"), rows.view(2, 6))
    clean, adv, weight = (t.view(2, 3, 2, 5).permute(0, 3, 1, 2).contiguous() for t in (*args[:2], own))
    clean.requires_grad_()
    for given in ((args.table, args.label.view(2, 3, 2)), (weight,)):
        loss = class_pair(clean, adv, *given, class_dim=1, reduction="none")
        torch.testing.assert_close(loss, rows.view(2, 3, 2))
        (grad,) = torch.autograd.grad(loss.sum(), clean)
        leaf = args.clean.clone().requires_grad_()
        (expected,) = torch.autograd.grad(class_pair(leaf, *args[1:], reduction="sum"), leaf)
        torch.testing.assert_close(grad.permute(0, 2, 3, 1).reshape(12, 5), expected)


@pytest.mark.usefixtures("reference_path")
def test_a_cpu_takes_many_rows_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, adv, table, label = args = batch((50, 20), torch.device("cpu"))
    monkeypatch.setattr(module, "PART", 160)
    assert_agrees(args, losses(table, label), table[label])
    assert_agrees(args, losses(table[label]), table[label])
    clean[label == 3] = math.nan
    kept = label != 3
    found = class_pair(clean, adv, table, label, ignore_index=3, reduction="none")
    assert (found[~kept] == 0).all()
    torch.testing.assert_close(found[kept], class_pair(clean[kept], adv[kept], table, label[kept], reduction="none"))


@pytest.mark.parametrize("function", [class_pair, class_pair_reference], ids=lambda f: f.__name__)
def test_gradients_are_the_derivatives(function: Any, device: torch.device) -> None:
    clean, adv, table, label = batch((5, 4), device, *[torch.float64] * 3)
    leaves = clean.requires_grad_(), adv.requires_grad_()
    for form in ({"reduction": "none"}, {"reduction": "batchmean"}) if function is class_pair else ({},):
        assert torch.autograd.gradcheck(lambda c, a, form=form: function(c, a, table, label, **form), leaves)
    assert torch.autograd.gradcheck(lambda c: function(c, adv.detach(), table, label), leaves[:1])
    assert torch.autograd.gradcheck(lambda a: function(clean.detach(), a, table, label), leaves[1:])


@each_path
def test_a_gradient_has_no_gradient(path: str, device: torch.device) -> None:
    clean, adv, table, label = batch((5, 4), device)
    loss = class_pair(clean.requires_grad_(), adv, table, label)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(loss, clean, create_graph=True)
        grad.sum().backward()


@each_path
def test_what_has_no_gradient_says_so(path: str, device: torch.device) -> None:
    clean, adv, table, label = batch((5, 4), device)
    table.requires_grad_()
    with pytest.raises(ValueError, match=r"weight: requires grad, .* pass weight.detach\(\)"):
        class_pair(clean, adv, table, label)
    with torch.no_grad():
        class_pair(clean, adv, table, label)


@each_path
def test_refuses_what_it_cannot_do(path: str, device: torch.device) -> None:
    clean, adv, table, label = args = batch((7, 10), device)
    for message, inputs, options in [
        (r"adv: shape \(7, 9\), but clean has \(7, 10\)", (clean, adv[:, :9], table, label), {}),
        (r"adv: torch.int32; needs", (clean, adv.int(), table, label), {}),
        (r"label: shape \(6,\); needs \(7,\)", (clean, adv, table, label[:6]), {}),
        (r"label: torch.float32; needs", (clean, adv, table, label.float()), {}),
        (r"weight: shape \(7, 10\); needs \(10, 10\), a row for each class", (clean, adv, table[:7], label), {}),
        (r"weight: shape \(10, 10\); needs \(7, 10\) without label", (clean, adv, table), {}),
        (r"weight: torch.int64 on .*; needs floats", (clean, adv, table.long(), label), {}),
        (r"weight: strides .*; rows must be contiguous", (clean, adv, table.t(), label), {}),
        (r"clean: strides .*; rows must be contiguous", (clean.t().contiguous().t(), adv, table, label), {}),
        (r"clean: shape \(10,\); needs", (clean[0], adv[0], table, label), {}),
        (r"reduction: 'mean'; needs one of batchmean, sum, none", args, {"reduction": "mean"}),
    ]:
        with pytest.raises(ValueError, match=message):
            class_pair(*inputs, **options)
    with pytest.raises(TypeError, match="weight: a float; needs a tensor"):
        class_pair(clean, adv, 0.5, label)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_are_well_formed_ops(dtype: torch.dtype, labelled: bool, device: torch.device) -> None:
    clean, adv, table, label = batch((7, 10), device, dtype, dtype)
    rest: tuple[Any, ...] = (table, label, -100) if labelled else (table[label], None, None)
    ops, leaves = torch.ops.retemper, (clean.clone().requires_grad_(), adv.clone().requires_grad_())
    torch.library.opcheck(ops.class_pair_rows.default, (*leaves, *rest))
    row_grad = torch.ones(7, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(ops.class_pair_backward.default, (row_grad, clean, adv, *rest, *wanted))


@each_path
def test_compiles_into_one_graph(path: str, device: torch.device) -> None:
    clean, adv, table, label = batch((7, 10), device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(clean: Tensor, adv: Tensor) -> Tensor:
        return class_pair(clean * 1, adv, table, label)

    mine, theirs = ([t.clone().requires_grad_() for t in (clean, adv)] for _ in range(2))
    loss, expected = compiled(*mine), class_pair(*theirs, table, label)
    torch.testing.assert_close(loss, expected)
    for ours, own in zip(torch.autograd.grad(loss, mine), torch.autograd.grad(expected, theirs), strict=True):
        torch.testing.assert_close(ours, own)
