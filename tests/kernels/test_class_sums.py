"""The sums by class against a loop over the rows, and whom a bad row may touch."""

import math
from importlib import import_module
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import class_sums, class_sums_reference
from retemper.kernels.class_sums import add_class_sums_

# whole tiles, ragged ones, rows in passes; few rows of many classes, since the interpreter is slow
SHAPES = [(b, k) for b in (0, 1, 7, 128) for k in (1, 2, 3, 10, 16, 100, 1000, 1500) if b * k < 20_000]
SEVERAL = [
    (300, 10),
    (1100, 20),
    (2, 20_000),
]  # programs for the rows of few classes; slices of rows; blocks of classes
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# sums of up to 128 losses of about 10, so below 2**11, in float32: half an ulp (2**-13) a few times over
TOLERANCE = {torch.float32: 2**-10, torch.float64: 1e-9}


def batch(shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(shape, generator=gen)).round(decimals=1)  # round: some ties
    return logits.to(device, dtype), torch.randint(shape[1], shape[:1], generator=gen).to(device)


sums_module: Any = import_module("retemper.kernels.class_sums_kernels")
each_path = pytest.mark.parametrize("path", ["triton", "reference"])


def take(path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "reference" and device.type == "cpu":
        monkeypatch.setattr("retemper.kernels.runtime.TRITON_ON_CPU", False)


def by_row(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, row after row."""
    classes = logits.shape[1]
    loss = torch.zeros(classes, dtype=torch.float64)
    correct, count = (torch.zeros(classes, dtype=torch.int64) for _ in range(2))
    for row, own in zip(logits.double().cpu(), label.tolist(), strict=True):
        if 0 <= own < classes:
            cross_entropy = F.cross_entropy(row, torch.tensor(own))
            loss[own] += cross_entropy
            correct[own] += int(row.argmax() == own and not cross_entropy.isnan())
            count[own] += 1
    return loss, correct, count


def assert_sums(logits: Tensor, label: Tensor, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    out = class_sums(logits, label, logits.shape[1])
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert [t.dtype for t in out] == [kind, torch.int64, torch.int64]
    torch.testing.assert_close(out[0].double().cpu(), expected[0], rtol=0, atol=TOLERANCE[kind], equal_nan=True)
    assert torch.equal(out[1].cpu(), expected[1]) and torch.equal(out[2].cpu(), expected[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    logits, label = batch(shape, device, dtype)
    expected = by_row(logits, label)
    assert_sums(logits, label, expected)
    assert_sums(torch.stack([logits, logits], 1)[:, 1], label, expected)  # rows with gaps
    for ours, theirs in zip(class_sums_reference(logits.double(), label), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize("shape", SEVERAL, ids=str)
def test_programs_that_share_the_work_agree(shape: tuple[int, int], device: torch.device) -> None:
    logits, label = batch(shape, device)
    assert_sums(logits, label, by_row(logits, label))
    assert all(map(torch.equal, class_sums(logits, label, shape[1]), class_sums(logits, label, shape[1])))


@each_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 10), (7, 10), (300, 10), (7, 100), (1100, 20)], ids=str)
def test_added_to_totals_they_are_what_adding_gives(
    shape: tuple[int, int], dtype: torch.dtype, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(path, device, monkeypatch)
    logits, label = batch(shape, device, dtype)
    sums = class_sums(logits, label, shape[1])
    totals = [torch.arange(shape[1], device=device).to(one.dtype) for one in sums]
    expected = [total + one + one for total, one in zip(totals, sums, strict=True)]
    add_class_sums_(logits, label, *totals)
    add_class_sums_(logits, label, *totals)
    assert all(map(torch.equal, totals, expected))


def test_totals_of_other_classes_are_refused(device: torch.device) -> None:
    logits, label = batch((7, 10), device)
    loss, count = torch.zeros(10, device=device), torch.zeros(10, device=device, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits: shape \(7, 10\); needs \(B, 9\)"):
        add_class_sums_(logits, label, loss[:9], count, count.clone())
    with pytest.raises(ValueError, match="correct: torch"):
        add_class_sums_(logits, label, loss, loss.clone(), count)


@each_path
def test_takes_100_000_classes(path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, device, monkeypatch)
    monkeypatch.setattr(sums_module, "BLOCK", 4096)  # the interpreter takes 10 ms a program
    monkeypatch.setattr(sums_module, "TILE", 2**15)
    logits, label = batch((2, 100_000), device)
    assert_sums(logits, label, by_row(logits, label))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [10, 300])
def test_of_equal_logits_the_first_is_the_prediction(classes: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.zeros(6, classes, device=device, dtype=dtype)
    logits[3:, 2] = logits[3:, classes - 1] = 1
    label = torch.tensor([0, 1, classes - 1, 0, 2, classes - 1], device=device)
    _, correct, count = class_sums(logits, label, classes)
    assert correct.nonzero().flatten().tolist() == [0, 2]
    assert correct.sum() == 2 and count.sum() == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [10, 300])
def test_a_bad_row_spoils_its_own_class_alone(classes: int, dtype: torch.dtype, device: torch.device) -> None:
    logits, label = batch((40, classes), device, dtype)
    label %= 8
    label[:4] = torch.tensor([8, 9, 8, 8], device=device)
    logits[0, 3] = logits[0, 8] = math.nan
    logits[1] = -math.inf
    logits[2, 8] = math.inf
    logits[3, 5] = math.inf
    loss, correct, count = class_sums(logits, label, classes)
    assert loss.isnan().nonzero().flatten().tolist() == [8, 9]
    assert correct[8:10].sum() == 0 and count[8:10].tolist() == [3, 1]
    assert_sums(logits, label, by_row(logits, label))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_class_held_impossible_costs_infinity(dtype: torch.dtype, device: torch.device) -> None:
    logits, label = batch((5, 300), device, dtype)
    logits[:, :150] = -math.inf  # a whole block of nothing
    label[:] = torch.tensor([0, 200, 200, 201, 202], device=device)
    loss, correct, _ = class_sums(logits, label, 300)
    assert loss[0] == math.inf and loss[200:].isfinite().all() and correct[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_label_that_is_no_class_adds_nothing(dtype: torch.dtype, device: torch.device) -> None:
    logits, label = batch((7, 10), device, dtype)
    label[:5] = torch.tensor([-1, 10, 12, 2**40, -(2**63)], device=device)
    logits[0] = math.nan
    assert_sums(logits, label, by_row(logits[5:], label[5:]))


@each_path
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_may_be_of_any_integer_dtype(
    dtype: torch.dtype, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(path, device, monkeypatch)
    for classes in (10, 40):
        logits, label = batch((60, classes), device)
        label[:2] = torch.tensor([classes, 127], device=device)
        assert_sums(logits, label.to(dtype), by_row(logits, label))


@pytest.mark.triton
def test_one_or_two_launches_do_and_their_memory_does_not_grow_with_both_sizes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {name: MagicMock() for name in ("class_sums", "row_losses", "slice_sums", "total")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(sums_module, f"_{name}_kernel", kernel)
    most = 0

    def new_empty(self: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
        nonlocal most
        most = max(most, math.prod([shape] if isinstance(shape, int) else shape))
        return torch.empty(shape, dtype=dtype, device=self.device)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    for rows, classes, launches in ((128, 10, 1), (1024, 10, 2), (200_000, 10, 2), (1024, 1000, 2), (64, 100_000, 2)):
        logits = torch.zeros(1, classes, device=device).expand(rows, classes)
        class_sums(logits, torch.zeros(rows, dtype=torch.int64, device=device), classes)
        assert sum(kernel.__getitem__.return_value.call_count for kernel in kernels.values()) == launches
        assert most <= max(1024 * 16, rows, classes)
        for kernel in kernels.values():
            kernel.reset_mock()


def test_logits_that_require_a_gradient_are_refused(device: torch.device) -> None:
    logits, label = batch((7, 10), device)
    expected = class_sums(logits, label, 10)
    logits.requires_grad_()
    with pytest.raises(
        ValueError, match=r"logits: requires grad, and its gradient is not computed; pass logits.detach"
    ):
        class_sums(logits, label, 10)
    for own in (logits.detach(), logits):
        with torch.no_grad():
            assert all(map(torch.equal, class_sums(own, label, 10), expected))


def test_the_reference_is_differentiable(device: torch.device) -> None:
    logits, label = batch((7, 3), device, torch.float64)
    label[0] = -1
    weight = torch.linspace(1, 2, 3, device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: (class_sums_reference(x, label)[0] * weight).sum(), logits.requires_grad_()
    )


@each_path
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32), rows=st.integers(0, 200), classes=st.integers(1, 40), scale=st.sampled_from([1.0, 1e4])
)
def test_the_classes_add_up_to_the_batch(
    path: str, seed: int, rows: int, classes: int, scale: float, device: torch.device
) -> None:
    gen = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, classes, generator=gen)).to(device)
    label = torch.randint(classes, (rows,), generator=gen).to(device)
    with pytest.MonkeyPatch.context() as patch:
        take(path, device, patch)
        loss, correct, count = class_sums(logits, label, classes)
    torch.testing.assert_close(loss.sum(), F.cross_entropy(logits, label, reduction="sum"), rtol=1e-5, atol=1e-5)
    assert correct.sum() == (logits.argmax(1) == label).sum()
    assert torch.equal(count, label.bincount(minlength=classes))
    assert (correct <= count).all()


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    logits, label = batch((7, 10), device)
    for message, args in [
        (r"logits: shape \(7, 10\); needs \(B, 9\), as num_classes says", (logits, label, 9)),
        (r"logits: shape \(70,\); needs \(B, 10\)", (logits.flatten(), label, 10)),
        (r"logits: shape \(7, 0\); needs \(B, K\) with K at least 1", (logits[:, :0], label, 0)),
        (r"logits: torch.int64; needs one of", (logits.long(), label, 10)),
        (r"logits: strides \(1, 7\); rows", (logits.t().contiguous().t(), label, 10)),
        (r"label: shape \(6,\); needs \(7,\)", (logits, label[:6], 10)),
        (r"label: torch.float32; needs torch.int64 or torch.int32 or", (logits, label.float(), 10)),
        (r"label: torch.bool; needs torch.int64 or", (logits, label > 3, 10)),
    ]:
        with pytest.raises(ValueError, match=message):
            class_sums(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_a_well_formed_op(dtype: torch.dtype, device: torch.device) -> None:
    given = batch((7, 10), device, dtype)
    torch.library.opcheck(torch.ops.retemper.class_sums.default, given)
    torch.library.opcheck(torch.ops.retemper.add_class_sums_.default, (*given, *class_sums(*given, 10)))


def test_compiles_into_one_graph(device: torch.device) -> None:
    logits, label = batch((7, 10), device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return class_sums((logits * 1).detach(), label, 10)

    for ours, theirs in zip(step(logits.requires_grad_()), class_sums(logits.detach(), label, 10), strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad
