"""Batch norm by group against PyTorch's own on each group alone: values, gradients, and the running statistics."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import batch_norm, batch_norm_reference, batch_norm_twice

CHANNELS_LAST = torch.channels_last
SHAPES = [  # images and groups: a channel; odd; words and programs of them; pixels of 1 x 1; several slices
    ((2, 1, 5, 7), 1),
    ((4, 5, 3, 3), 2),
    ((6, 40, 2, 2), 3),
    ((8, 16, 1, 1), 2),
    ((4, 24, 20, 17), 2),
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest value
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_shape = pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
NAMES = ("x", "weight", "bias", "residual")


def inputs(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32, mean: float = 0.5
) -> dict[str, Any]:
    """Return x, weight, bias and residual. No sum before a ReLU is near zero, so that rounding moves none across it."""
    gen = torch.Generator().manual_seed(0)
    x, sign = torch.randn(shape, generator=gen), torch.randn(shape, generator=gen).sign()
    weight, bias = torch.rand(2, shape[1], generator=gen) + 0.5
    found = {"x": (x + mean).to(dtype), "weight": weight, "bias": bias, "residual": (20 * sign).to(dtype)}
    images = {name: found[name].contiguous(memory_format=CHANNELS_LAST) for name in ("x", "residual")}
    return {name: value.to(device).requires_grad_() for name, value in (found | images).items()}


def statistics(channels: int, device: torch.device) -> list[Tensor]:
    gen = torch.Generator().manual_seed(1)
    mean, var = torch.rand(2, channels, generator=gen)
    return [mean.to(device), var.to(device), torch.tensor(7, device=device)]


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double() if t.is_floating_point() else t.clone() for t in tensors]


def apart(given: dict[str, Any], running: list[Tensor], groups: int, relu: bool) -> Tensor:
    """Return what PyTorch's own batch norm makes of each group, which moves `running`."""
    how: dict[str, Any] = {"weight": given["weight"], "bias": given["bias"], "training": True, "eps": 1e-3}
    mean, var, batches = running
    y = torch.cat([F.batch_norm(part, mean, var, **how, momentum=0.3) for part in given["x"].chunk(groups)])
    batches += groups
    y = y + given["residual"] if "residual" in given else y
    return y.relu() if relu else y


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    off = (ours.double() - theirs).abs().max()
    assert off <= tolerance * theirs.abs().max().clamp(min=1e-3), float(off)


@pytest.mark.parametrize(("shortcut", "relu"), [(True, True), (True, False), (False, False)])
@each_dtype
@each_shape
def test_is_pytorchs_batch_norm_of_each_group(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, shortcut: bool, relu: bool, device: torch.device
) -> None:
    given = inputs(shape, device, dtype)
    given = given if shortcut else {name: given[name] for name in NAMES[:3]}
    wide = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    ours, theirs = statistics(shape[1], device), double(statistics(shape[1], device))
    y = batch_norm(**given, statistics=ours, groups=groups, momentum=0.3, eps=1e-3, relu=relu)
    expected = apart(wide, theirs, groups, relu)
    assert y.dtype == dtype and y.stride() == given["x"].stride()
    close(y, expected, TOLERANCE[dtype])
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=1e-5, atol=1e-6)
    grad = torch.randn(shape[::-1], device=device).to(dtype).permute(3, 2, 1, 0)  # in a layout of its own
    grads = torch.autograd.grad(y, [*given.values()], grad)
    for own, true, of in zip(
        grads, torch.autograd.grad(expected, [*wide.values()], grad.double()), given.values(), strict=True
    ):
        assert own.dtype == of.dtype and (own.stride() == of.stride() or not relu)
        close(own, true, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize("path", ["triton", "reference"], indirect=True)
@pytest.mark.parametrize("momentum", [0.3, 1.0])
@pytest.mark.parametrize("moves", [(), (1,), (0, 1), (0, 1, 0, 0), (1, 0)], ids=str)
def test_running_statistics_move_in_the_order_asked_for(
    moves: tuple[int, ...], momentum: float, path: str, device: torch.device
) -> None:
    given = inputs((4, 5, 6, 6), device)
    ours, theirs = statistics(5, device), double(statistics(5, device))
    first = batch_norm(**given, statistics=ours, groups=2, moves=moves, momentum=momentum)
    for group in moves:
        part = given["x"].detach().double().chunk(2)[group]
        F.batch_norm(part, theirs[0], theirs[1], training=True, momentum=momentum)
        theirs[2] += 1
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(first, batch_norm(**given, groups=2)), "the result depends on the statistics that it moves"


def test_two_readers_get_one_result_and_their_gradients_are_added_up(device: torch.device) -> None:
    for relu, shortcut in ((True, True), (True, False), (False, True), (False, False)):
        given = inputs((4, 8, 6, 6), device)
        given = given if shortcut else {name: given[name] for name in NAMES[:3]}
        one, two = torch.randn(2, *given["x"].shape, device=device)
        expected = torch.autograd.grad(batch_norm(**given, groups=2, relu=relu), [*given.values()], one + two)
        y, again = batch_norm_twice(**given, groups=2, relu=relu)
        assert y.data_ptr() == again.data_ptr()
        grads = torch.autograd.grad([y, again], [*given.values()], [one, two], retain_graph=True)
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        alone = torch.autograd.grad(again, [*given.values()], one + two)  # one reader may be without a gradient
        for ours, theirs in zip(alone, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_not_a_number_stays(device: torch.device) -> None:
    given = inputs((4, 5, 3, 3), device)
    with torch.no_grad():
        given["x"][0, 2, 1, 1] = torch.nan
        y = batch_norm(**given, groups=2, relu=True)
    assert y[:2, 2].isnan().all() and not y[2:].isnan().any() and not y[:, [0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_float64_and_other_layouts_have_every_gradient(layout: torch.memory_format, device: torch.device) -> None:
    given = [v.detach().double() for v in inputs((4, 3, 2, 2), device).values()]
    given = [v.contiguous(memory_format=layout) if v.dim() == 4 else v for v in given]

    def doubled(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return batch_norm(x, weight, bias, groups=2, residual=residual / 40, relu=True)

    def reference(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return batch_norm_reference(x, weight, bias, groups=2, residual=residual / 40, relu=True)[0]

    given = [v.requires_grad_() for v in given]
    assert torch.autograd.gradcheck(doubled, given)
    assert torch.autograd.gradcheck(reference, given) and torch.autograd.gradgradcheck(reference, given)
    plain = [v.detach().float().requires_grad_() for v in given]
    y = batch_norm(*plain[:3], groups=2, residual=plain[3])
    assert y.stride() == plain[0].stride()
    close(y, batch_norm(*given[:3], groups=2, residual=given[3]), 2e-6)


def test_the_gradient_has_none(device: torch.device) -> None:
    given = inputs((4, 3, 2, 2), device)
    for results in ([batch_norm(**given)], batch_norm_twice(**given)):
        (grad,) = torch.autograd.grad([y.square().sum() for y in results], given["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated again"):
            grad.square().sum().backward()


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    given = {name: value.detach() for name, value in inputs((4, 3, 2, 2), device).items()}
    x, residual, running = given["x"], given["residual"], statistics(3, device)
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"x: shape \(4, 3, 2\); needs \(B, C, H, W\)", {"x": x[..., 0]}),
        (r"x: torch.int64; needs one of", {"x": x.long(), "residual": None}),
        (r"x: strides .* needs contiguous or channels-last", {"x": x.transpose(1, 2), "residual": None}),
        (r"groups: 3; needs a number that divides the 4 images", {"groups": 3}),
        (
            r"x: shape \(4, 3, 1, 1\) in 4 groups; needs 2 values",
            {"x": x.mean((2, 3), True), "residual": None, "groups": 4},
        ),
        (r"moves: \[2\]; needs numbers of groups, 0 to 1", {"groups": 2, "moves": [2]}),
        (r"weight: shape \(2,\); needs \(3,\)", {"weight": given["weight"][:2]}),
        (r"bias: torch.float16; needs torch.float32", {"bias": given["bias"].half()}),
        (r"running_mean: shape \(2,\)", {"statistics": [running[0][:2], *running[1:]]}),
        (r"running_var: torch.float64", {"statistics": [running[0], running[1].double(), running[2]]}),
        (r"running_mean: requires grad", {"statistics": [running[0].clone().requires_grad_(), *running[1:]]}),
        (r"num_batches_tracked: torch.float32", {"statistics": [*running[:2], running[2].float()]}),
        (r"residual: shape", {"residual": residual[:1]}),
        (r"residual: strides .* one dense layout", {"residual": residual.contiguous()}),
    ]
    for message, changed in cases:
        with pytest.raises(ValueError, match=message):
            batch_norm(**{**given, **changed})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_are_well_formed_ops(dtype: torch.dtype, full: bool, device: torch.device) -> None:
    given = inputs((4, 3, 2, 2), device, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x, residual = given["x"], given["residual"] if full else None
    weight, bias = (given[name].detach().to(wide).requires_grad_() for name in NAMES[1:3])
    running = [t.to(wide) if t.is_floating_point() else t for t in statistics(3, device)] if full else [None] * 3
    arguments = (x, weight, bias, *running, residual, 2, [0, 1, 0] if full else [], 0.1, 1e-5, full)
    torch.library.opcheck(torch.ops.retemper.batch_norm_.default, arguments)
    y, mean, rstd = (t.detach() for t in torch.ops.retemper.batch_norm_.default(*arguments))
    saved = (x.detach(), weight.detach(), mean, rstd)
    for grad in (torch.randn_like(y), torch.randn_like(y).contiguous()):
        other = torch.randn_like(y) if full else None
        backward = (grad, other, y if full else None, *saved, full)
        torch.library.opcheck(torch.ops.retemper.batch_norm_backward.default, backward)


def test_compiles_into_one_graph(device: torch.device) -> None:
    given = inputs((4, 3, 2, 2), device)
    ours, theirs = statistics(3, device), statistics(3, device)

    def block(x: Tensor, running: list[Tensor]) -> Tensor:
        y = batch_norm(2 * x, given["weight"], given["bias"], running, groups=2, relu=True)
        return batch_norm(y * 3, given["weight"], given["bias"], groups=2, residual=x)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    pairs = []
    for call, running in ((compiled, ours), (block, theirs)):
        y = call(given["x"], running)
        pairs.append([y, *torch.autograd.grad(y.square().sum(), given["x"]), *running])
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
