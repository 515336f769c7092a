"""What follows a convolution, against its reference, forward and backward, and what a folded network relies on."""

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.kernels import epilogue, epilogue_reference

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [  # one value; one channel; whole words, half ones, odd ones; a row of pixels; a vector; two programs
    (1, 1, 1, 1),
    (3, 1, 5, 7),
    (2, 16, 8, 8),
    (3, 12, 4, 3),
    (2, 7, 3, 5),
    (2, 3, 1, 9),
    (3, 10, 1, 1),
    (2, 24, 7, 7),
]
# values up to 8: three roundings of half an ulp in float32; one ulp in the others, since the interpreter truncates
TOLERANCE = {torch.float32: 2**-20, torch.float16: 2**-7, torch.bfloat16: 2**-4}

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def batch(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = LAYOUTS[0],
) -> tuple[Tensor, Tensor]:
    """Return x and a residual whose values are halves, so that some sums are zero to the bit."""
    gen = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=gen).mul(2).round().div(2) for _ in range(2))
    x, residual = (t.to(device, dtype).contiguous(memory_format=layout) for t in (x, residual))
    return x, residual


def of_channels(channels: int, device: torch.device, step: float) -> tuple[Tensor, Tensor]:
    """A shift and a scale of both signs: multiples of `step`."""
    ramps = (torch.linspace(*ends, channels, device=device) for ends in ((-1, 1.5), (-2, 1)))
    shift, scale = (ramp.div(step).round().mul(step) for ramp in ramps)
    return shift, scale


def options(scale: Tensor, residual: Tensor) -> Iterator[dict[str, Any]]:
    for of in (None, scale):
        for add in (None, residual):
            for relu in (True, False):
                yield {"scale": of, "residual": add, "relu": relu}


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}


@each_layout
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_reference(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> None:
    x, residual = batch(shape, device, dtype, layout)
    for of_dtype in {torch.float32, dtype}:
        shift, scale = (t.to(of_dtype) for t in of_channels(shape[1], device, 0.01))
        for given in options(scale, residual):
            y = epilogue(x, shift, **given)
            assert y.dtype == dtype and y.stride() == x.stride()
            expected = epilogue_reference(x.double(), shift.double(), **double(given))
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@each_layout
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_autograds_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> None:
    x, residual = (t.requires_grad_() for t in batch(shape, device, dtype, layout))
    shift, scale = of_channels(shape[1], device, 0.25)  # every sum and product is exact: zero is zero in each dtype
    backwards, _ = batch(shape[::-1], device, dtype)
    weight = backwards.permute(3, 2, 1, 0)  # a gradient in a layout of its own
    for given in options(scale, residual):
        wide = epilogue_reference(x.double(), shift.double(), **double(given))
        for of in ([x],) if given["residual"] is None else ([x], [residual], [x, residual]):
            ours = torch.autograd.grad(epilogue(x, shift, **given), of, weight)
            theirs = torch.autograd.grad(wide, of, weight.double(), retain_graph=True)
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("path", ["triton", "reference"])
@each_layout
def test_is_what_eager_does_to_the_bit(
    layout: torch.memory_format, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "reference" and device.type == "cpu":
        monkeypatch.setattr("retemper.kernels.runtime.TRITON_ON_CPU", False)
    gen = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, 12, 4, 3, generator=gen).to(device).to(memory_format=layout) for _ in range(2))
    shift, scale = (t[:, None, None] for t in of_channels(12, device, 0.01))
    x[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    x.requires_grad_()
    for add in (None, residual.requires_grad_()):
        of = [x] if add is None else [x, add]
        eager = F.relu(x * scale + shift + (0 if add is None else add))
        y = epilogue(x, shift.flatten(), scale=scale.flatten(), residual=add)
        torch.testing.assert_close(y, eager, rtol=0, atol=0, equal_nan=True)
        assert y.isnan().sum() == 1
        for ours, theirs in zip(torch.autograd.grad(y.sum(), of), torch.autograd.grad(eager.sum(), of), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@each_layout
def test_a_gradient_that_is_not_a_number_stays_where_it_passes(
    layout: torch.memory_format, device: torch.device
) -> None:
    x, _ = batch((2, 3, 2, 2), device, layout=layout)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(epilogue(x, torch.zeros(3, device=device)), x, torch.full_like(x, math.nan))
    assert torch.equal(grad.isnan(), x > 0) and (grad[x <= 0] == 0).all()


@each_layout
def test_without_relu_and_scale_the_gradient_is_passed_on(layout: torch.memory_format, device: torch.device) -> None:
    x, residual = (t.requires_grad_() for t in batch((2, 3, 4, 4), device, layout=layout))
    weight = torch.rand(2, 3, 4, 4, device=device)
    y = epilogue(x, torch.zeros(3, device=device), residual=residual, relu=False)
    grads = torch.autograd.grad(y, [x, residual], weight)
    assert all(grad.data_ptr() == weight.data_ptr() for grad in grads)


def test_x_and_residual_share_one_gradient_but_not_their_sums(device: torch.device) -> None:
    x, residual = (t.requires_grad_() for t in batch((2, 3, 4, 4), device))
    y = epilogue(x, torch.ones(3, device=device), residual=residual)
    grads = torch.autograd.grad(y.sum(), [x, residual], retain_graph=True)
    assert grads[0].data_ptr() == grads[1].data_ptr()
    y.sum().backward()
    y = epilogue(x, torch.ones(3, device=device))
    y.sum().backward()  # into x.grad, in place: the residual's must not move
    assert x.grad is not None and residual.grad is not None
    assert torch.equal(residual.grad, grads[1]) and torch.equal(x.grad, grads[0] + (y > 0))


def test_rows_that_start_anywhere(device: torch.device) -> None:
    big, other = batch((3, 8, 3, 3), device)
    shift, _ = of_channels(8, device, 0.25)
    for part in (slice(1, None), slice(1, 2)):
        expected = F.relu(big[part] + shift[:, None, None] + other[part])
        assert torch.equal(epilogue(big[part], shift, residual=other[part]), expected)
        offset = torch.cat([shift[:1], shift])[1:]
        assert torch.equal(epilogue(big[part], offset, residual=other[part]), expected)


@each_layout
def test_follows_a_convolution_whose_norm_was_folded(layout: torch.memory_format, device: torch.device) -> None:
    torch.manual_seed(0)
    image, kernel = torch.rand(2, 3, 6, 6, device=device), torch.randn(8, 3, 3, 3, device=device)
    image, kernel = (t.contiguous(memory_format=layout) for t in (image, kernel))
    mean, variance, weight, bias = torch.randn(4, 8, device=device)
    variance = variance.square() + 0.5
    image.requires_grad_()
    out = F.conv2d(image, kernel, padding=1)
    expected = F.relu(F.batch_norm(out, mean, variance, weight, bias, eps=1e-5))
    scale = weight * (variance + 1e-5).rsqrt()
    y = epilogue(out, bias - mean * scale, scale=scale)
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(t.square().sum(), image, retain_graph=True)[0] for t in (y, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_layout
def test_half_precision_on_a_cpu_is_computed_in_float32_part_by_part(
    dtype: torch.dtype, layout: torch.memory_format, reference_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    x, residual = batch((5, 7, 3, 4), cpu, dtype, layout)
    x[0, 0, 0, 0] = math.nan
    monkeypatch.setattr(
        sys.modules["retemper.kernels.epilogue"], "PART", 2 * x[0].numel()
    )  # parts of 2, 2 and 1 samples
    shift, scale = of_channels(7, cpu, 1 / 1024)  # which half precision does not hold
    for given in options(scale, residual):
        y = epilogue(x, shift, **given)
        torch.testing.assert_close(y, epilogue_reference(x.double(), shift, **double(given)).to(dtype), equal_nan=True)
        assert y.stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)], ids=str)
def test_takes_nothing(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    epilogue(x, torch.zeros(shape[1], device=device)).sum().backward()
    assert x.grad is not None and x.grad.shape == shape


def test_float64_is_computed_in_float64(device: torch.device) -> None:
    gen = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 3, 2, 2, generator=gen, dtype=torch.float64).to(device) for _ in range(2))
    shift, scale = (torch.randn(3, generator=gen, dtype=torch.float64).to(device) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x, residual: epilogue(x, shift, scale=scale, residual=residual),
        (x.requires_grad_(), residual.requires_grad_()),
    )


def test_a_shift_or_scale_that_requires_a_gradient_is_refused(device: torch.device) -> None:
    x, _ = batch((2, 3, 4, 4), device)
    shift, scale = of_channels(3, device, 0.25)
    expected = epilogue(x, shift, scale=scale)
    with pytest.raises(ValueError, match=r"shift: requires grad, .* pass shift.detach\(\)"):
        epilogue(x, shift.clone().requires_grad_(), scale=scale)
    scale.requires_grad_()
    with pytest.raises(ValueError, match=r"scale: requires grad, .* pass scale.detach\(\)"):
        epilogue(x, shift, scale=scale)
    with torch.no_grad():
        assert torch.equal(epilogue(x, shift, scale=scale), expected)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_the_reference_has_every_gradient(full: bool, relu: bool, device: torch.device) -> None:
    gen = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 3, 2, 2, generator=gen, dtype=torch.float64).to(device) for _ in range(2))
    shift, scale = (torch.randn(3, generator=gen, dtype=torch.float64).to(device) for _ in range(2))
    given = [t.requires_grad_() for t in (x, shift, scale, residual)[: 4 if full else 2]]

    def reference(x: Tensor, shift: Tensor, scale: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return epilogue_reference(x, shift, scale=scale, residual=residual, relu=relu)

    assert torch.autograd.gradcheck(reference, given) and torch.autograd.gradgradcheck(reference, given)


@pytest.mark.parametrize("relu", [True, False])
def test_the_gradient_has_none(relu: bool, device: torch.device) -> None:
    x, residual = (t.requires_grad_() for t in batch((2, 3, 4, 4), device))
    shift, scale = of_channels(3, device, 0.25)
    for given in ({}, {"scale": scale}, {"scale": scale, "residual": residual}):
        y = epilogue(x, shift, relu=relu, **given)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated again"):
            grad.square().sum().backward()


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    x, residual = batch((2, 3, 4, 4), device)
    last = residual.contiguous(memory_format=torch.channels_last)
    shift, scale = of_channels(3, device, 0.25)
    for message, args, given in [
        (r"x: shape \(2, 3, 4\); needs \(B, C, H, W\)", (x[..., 0], shift), {}),
        (r"x: torch.int64; needs one of", (x.long(), shift), {}),
        (r"x: strides .* leave holes", (x[..., ::2], shift), {}),
        (r"x: strides .* needs contiguous or channels-last", (x.transpose(2, 3), shift), {}),
        (r"shift: shape \(2,\); needs \(3,\)", (x, shift[:2]), {}),
        (r"shift: torch.float16; needs torch.float32", (x, shift.half()), {}),
        (r"shift: stride 0", (x, shift[:1].expand(3)), {}),
        (r"scale: shape \(3, 1\); needs \(3,\)", (x, shift), {"scale": scale[:, None]}),
        (r"scale: torch.int64; needs torch.float32", (x, shift), {"scale": scale.long()}),
        (r"residual: shape \(1, 3, 4, 4\), but x", (x, shift), {"residual": residual[:1]}),
        (r"residual: torch.bfloat16, but x is torch.float32", (x, shift), {"residual": residual.bfloat16()}),
        (r"residual: strides .* one dense layout", (x, shift), {"residual": last}),
    ]:
        with pytest.raises(ValueError, match=message):
            epilogue(*args, **given)


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_are_well_formed_ops(dtype: torch.dtype, layout: torch.memory_format, full: bool, device: torch.device) -> None:
    x, residual = (t.requires_grad_() for t in batch((2, 3, 4, 4), device, dtype, layout))
    shift, scale = of_channels(3, device, 0.25)
    optional = (scale, residual) if full else (None, None)
    for relu in (True, False):
        torch.library.opcheck(torch.ops.retemper.epilogue.default, (x, shift, *optional, relu))
    y = epilogue(x, shift).detach()
    for grad in (x.detach(), x.detach().contiguous(), torch.ones((), device=device, dtype=dtype).expand(x.shape)):
        torch.library.opcheck(torch.ops.retemper.epilogue_backward.default, (grad, y, optional[0], full))


@each_layout
def test_compiles_into_one_graph(layout: torch.memory_format, device: torch.device) -> None:
    x, residual = (t.requires_grad_() for t in batch((2, 3, 4, 4), device, layout=layout))
    shift, scale = of_channels(3, device, 0.25)

    def block(x: Tensor, residual: Tensor) -> Tensor:
        y = epilogue(2 * x, shift, scale=scale)
        y = epilogue(y * 3, shift, residual=residual)
        return epilogue(y, shift, relu=False)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(x, residual), block(x, residual)
    assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() == x.stride()
    pairs = (torch.autograd.grad(y.square().sum(), [x, residual]) for y in (ours, theirs))
    assert all(map(torch.equal, *pairs))
