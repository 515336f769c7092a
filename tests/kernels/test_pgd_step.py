"""The fused step against its reference, and the promises an attack relies on."""

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retemper.kernels import pgd_step_, pgd_step_reference

STEP, EPS = 2 / 255, 8 / 255
SHAPES = [(1,), (7,), (1, 1, 1, 1), (2, 3, 32, 32), (3, 3, 31, 33), (2, 2, 2, 2, 2)]  # one; whole blocks; ragged tails
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# values in [0, 1]: four roundings of half an ulp in float32; one ulp in the others, since the interpreter truncates
TOLERANCE = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def batch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    clean = torch.rand(shape, generator=gen)
    adv = (clean + EPS * (2 * torch.rand(shape, generator=gen) - 1)).clamp(0, 1)
    grad = torch.randn(shape, generator=gen).mul(2).round() / 2  # round: some exact zeros
    return adv.to(device, dtype), grad.to(device, dtype), clean.to(device, dtype)


def margins(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return steps and radii that differ by sample, one radius of zero."""
    eps = torch.linspace(0, 2 * EPS, size + 1, device=device)[:size]
    return eps / 4 + STEP, eps


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linf_is_eager_to_the_bit(shape: tuple[int, ...], device: torch.device) -> None:
    adv, grad, clean = batch(shape, torch.float32, device)
    released = adv + STEP * torch.sign(grad)  # as in the code of TRADES and all that follow it
    released = torch.min(torch.max(released, clean - EPS), clean + EPS)
    assert torch.equal(pgd_step_reference(adv, grad, clean, STEP, EPS), released.clamp(0, 1))
    assert torch.equal(pgd_step_(adv, grad, clean, STEP, EPS), released.clamp(0, 1))


@pytest.mark.parametrize("mixed", [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_margin_may_be_a_number_while_the_other_is_not(
    mixed: tuple[bool, bool], dtype: torch.dtype, device: torch.device
) -> None:
    adv, grad, clean = batch((3, 5), dtype, device)
    step, eps = (torch.full((3,), v, device=device) if one else v for v, one in zip((0.25, 0.5), mixed, strict=True))
    expected = pgd_step_(adv.clone(), grad, clean, 0.25, 0.5)
    assert torch.equal(pgd_step_(adv, grad, clean, step, eps), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32), eps=st.floats(1e-4, 1), step=st.floats(-1, 1), scale=st.sampled_from([1e-30, 1.0, 1e30])
)
def test_stays_in_the_ball_and_the_image(
    norm: str, seed: int, eps: float, step: float, scale: float, device: torch.device
) -> None:
    gen = torch.Generator().manual_seed(seed)
    clean, adv, grad = (torch.rand(2, 3, 5, 7, generator=gen).to(device) for _ in range(3))
    lower, upper = 0.25, 0.75
    clean = clean.clamp(lower, upper)
    pgd_step_(adv, scale * (grad - 0.5), clean, step, eps, norm=norm, lower=lower, upper=upper)
    delta = (adv - clean).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.square().sum(1).sqrt()
    assert length.max() <= eps + 2e-7  # clean + eps is rounded, to half an ulp of 1
    assert lower <= adv.min() and adv.max() <= upper


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_pixel_that_is_not_a_number_stays_so(dtype: torch.dtype, norm: str, device: torch.device) -> None:
    adv = torch.tensor([[0.5, float("nan")]], device=device, dtype=dtype)
    out = pgd_step_(adv, torch.ones_like(adv), torch.full_like(adv, 0.5), STEP, EPS, norm=norm)
    assert out.isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_ball_without_a_radius_is_its_centre(dtype: torch.dtype, norm: str, device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), dtype, device)
    grad[0], adv[0] = 0, clean[0]
    for eps in (0.0, torch.zeros(2, device=device)):
        assert torch.equal(pgd_step_(adv.clone(), grad, clean, STEP, eps, norm=norm), clean)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0)])
def test_takes_an_empty_batch(shape: tuple[int, ...], device: torch.device) -> None:
    empty = torch.zeros(shape, device=device)
    eps = torch.zeros(shape[:1], device=device)
    assert pgd_step_(empty, empty.clone(), empty.clone(), STEP, eps, norm="l2").shape == shape


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    with pytest.raises(ValueError, match=r"grad: shape \(1, 3, 8, 8\), but adv"):
        pgd_step_(adv, grad[:1], clean, STEP, EPS)
    with pytest.raises(ValueError, match=r"adv: strides .* leave holes or overlap"):
        pgd_step_(torch.rand(2, 3, 8, 16, device=device)[..., ::2], grad, clean, STEP, EPS)
    with pytest.raises(ValueError, match=r"grad: torch.int64; needs one of"):
        pgd_step_(adv, grad.long(), clean, STEP, EPS)
    for norm in ("l1", 1, "linfinity", 3):
        with pytest.raises(ValueError, match=rf"norm: {norm!r}; needs one of linf, l2"):
            pgd_step_(adv, grad, clean, STEP, EPS, norm=norm)
    with pytest.raises(
        ValueError, match=r"step: .* shape \(4,\); needs a number, or floats \(2,\) by sample or \(3, 1, 1\)"
    ):
        pgd_step_(adv, grad, clean, torch.ones(4, device=device), EPS)
    with pytest.raises(ValueError, match=r"eps: torch.int64"):
        pgd_step_(adv, grad, clean, STEP, torch.ones(2, device=device, dtype=torch.int64))
    for eps in (-0.1, 8, float("nan")):
        with pytest.raises(ValueError, match=rf"eps: {eps}.*; needs 0 to 1, .* 8/255, not 8"):
            pgd_step_(adv, grad, clean, STEP, eps)
    with pytest.raises(ValueError, match=r"step: 2.0; needs 0 to 1"):
        pgd_step_(adv, grad, clean, 2, EPS)
    with pytest.raises(ValueError, match=r"lower: 1.0, upper: 0.0; the range of a pixel is empty"):
        pgd_step_(adv, grad, clean, STEP, EPS, lower=1.0, upper=0.0)
    with pytest.raises(TypeError, match="step: a str; needs a number or a tensor of floats"):
        pgd_step_(adv, grad, clean, "small", EPS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="adv, grad, clean: they must be tensors"):
        pgd_step_(adv, 1.0, clean, STEP, EPS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"lower: .* shape \(2,\); needs a number, or floats \(3, 1, 1\) by channel"):
        pgd_step_(adv, grad, clean, STEP, EPS, lower=torch.zeros(2, device=device))
    with pytest.raises(ValueError, match="eps: it differs by channel; with norm='l2' a sample has one eps"):
        pgd_step_(adv, grad, clean, STEP, torch.ones(3, device=device), norm="l2")
    with pytest.raises(ValueError, match="clip_first: it is for norm='l2'"):
        pgd_step_(adv, grad, clean, STEP, EPS, clip_first=True)
    with pytest.raises(ValueError, match=r"mask: torch.float32; needs torch.bool"):
        pgd_step_(adv, grad, clean, STEP, EPS, mask=torch.ones_like(adv))
    with pytest.raises(ValueError, match=r"mask: shape \(3,\), which does not broadcast to \(2, 3, 8, 8\)"):
        pgd_step_(adv, grad, clean, STEP, EPS, mask=torch.ones(3, dtype=torch.bool, device=device))
    with pytest.raises(ValueError, match=r"momentum: shape"):
        pgd_step_(adv, grad, clean, STEP, EPS, momentum=adv[:1])
    shared: dict[str, dict[str, Any]] = {
        "clean": {"previous": clean},
        "grad": {"momentum": grad},
        "adv": {"previous": adv},
    }
    for name, buffers in shared.items():
        with pytest.raises(ValueError, match=rf"it is the memory of {name}, and is overwritten; pass a clone\(\)"):
            pgd_step_(adv, grad, clean, STEP, EPS, **buffers)
    stacked = torch.rand(3, 3, 8, 8, device=device)
    with pytest.raises(ValueError, match="previous: it is the memory of adv"):  # all but a sample of it
        pgd_step_(stacked[1:], grad, clean, STEP, EPS, previous=stacked[:-1])
    with pytest.raises(ValueError, match="norm: 'l3'; needs one of linf, l2"):
        torch.ops.retemper.pgd_step_(adv, grad, clean, STEP, EPS, 0.0, 1.0, "l3")
    pgd_step_(adv, grad, clean, 2, 8, lower=0.0, upper=255.0)  # other units
    pgd_step_(adv, grad, clean, 2, 8, norm="l2")  # 192 pixels: the ball is longer than any one of them
    with pytest.raises(ValueError, match=r"adv: requires grad .* adv.detach\(\)"):
        pgd_step_(adv.requires_grad_(), grad, clean, STEP, EPS)
    with torch.no_grad():
        pgd_step_(adv, grad, clean, STEP, EPS)


def test_refuses_what_is_no_buffer_and_no_weight(device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    wrong: dict[str, Any] = {"mask": [True, False], "momentum": 0.9, "previous": 1}
    for name, value in wrong.items():
        with pytest.raises(TypeError, match=rf"{name}: a {type(value).__name__}; needs a tensor"):
            pgd_step_(adv, grad, clean, STEP, EPS, **{name: value})
    weights: list[tuple[Any, str]] = [(math.nan, "nan"), (math.inf, "inf"), (torch.ones((), device=device), "a tensor")]
    for value, shown in weights:
        for name, buffer in {"decay": "momentum", "inertia": "previous"}.items():
            with pytest.raises(ValueError, match=rf"{name}: {shown}; needs a finite number"):
                pgd_step_(adv, grad, clean, STEP, EPS, **{name: value, buffer: torch.zeros_like(adv)})


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_needs_a_gradient_is_refused(norm: str, device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    one = torch.tensor(0.1, device=device)
    given: dict[str, Any] = {"grad": grad, "clean": clean, "step": one, "eps": one, "lower": 0 * one, "upper": 10 * one}
    given |= {"momentum": torch.zeros_like(adv), "previous": adv.clone()}
    for name, value in given.items():
        with pytest.raises(ValueError, match=rf"{name}: requires grad.* pass {name}.detach\(\)"):
            pgd_step_(adv, norm=norm, **given | {name: value.clone().requires_grad_()})
    with torch.no_grad():
        pgd_step_(adv, norm=norm, **{name: value.clone().requires_grad_() for name, value in given.items()})


# numbers, and what they are beside an image (2, 3, 4, 5)
FORMS = {
    "()": (torch.tensor(0.25), torch.full((2, 3), 0.25)),
    "(1,)": (torch.tensor([0.25]), torch.full((2, 3), 0.25)),
    "(B,)": (torch.tensor([0.25, 0.5]), torch.tensor([[0.25], [0.5]]).expand(2, 3)),
    "(B, 1, 1, 1)": (torch.tensor([0.25, 0.5]).view(2, 1, 1, 1), torch.tensor([[0.25], [0.5]]).expand(2, 3)),
    "(1, B)": (torch.tensor([[0.25, 0.5]]), torch.tensor([[0.25], [0.5]]).expand(2, 3)),
    "(C,)": (torch.tensor([0.25, 0.5, 1]), torch.tensor([[0.25, 0.5, 1]]).expand(2, 3)),
    "(C, 1, 1)": (torch.tensor([0.25, 0.5, 1]).view(3, 1, 1), torch.tensor([[0.25, 0.5, 1]]).expand(2, 3)),
    "(1, C, 1, 1)": (torch.tensor([0.25, 0.5, 1]).view(1, 3, 1, 1), torch.tensor([[0.25, 0.5, 1]]).expand(2, 3)),
    "(B, C, 1, 1)": (torch.arange(6).view(2, 3, 1, 1) / 8, torch.arange(6).view(2, 3) / 8),
    "strided": (torch.tensor([0.25, 9, 0.5]).double()[::2], torch.tensor([[0.25], [0.5]]).expand(2, 3)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_numbers_may_differ_by_sample_and_by_channel(
    form: str, layout: torch.memory_format, device: torch.device
) -> None:
    adv, grad, clean = (t.contiguous(memory_format=layout) for t in batch((2, 3, 4, 5), torch.float32, device))
    numbers, whole = (t.to(device) for t in FORMS[form])
    whole = whole.float()[..., None, None].expand(adv.shape)
    low, high = (0.3 + 0.1 * t for t in (whole, whole + 0.5))
    eager = adv + (whole - 0.5) * grad.sign()
    eager = torch.min(torch.max(eager, clean - whole), clean + whole)
    out = pgd_step_(adv.clone(), grad, clean, numbers - 0.5, numbers)
    assert torch.equal(out, eager.clamp(0, 1))
    assert torch.equal(pgd_step_reference(adv, grad, clean, numbers - 0.5, numbers), out)
    if form in ("()", "(1,)", "(C,)", "(C, 1, 1)", "(1, C, 1, 1)"):
        bounds: dict[str, Any] = {"lower": 0.3 + 0.1 * numbers, "upper": 0.3 + 0.1 * (numbers + 0.5)}
        assert torch.equal(pgd_step_(adv, grad, clean, numbers - 0.5, numbers, **bounds), eager.clamp(low, high))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_radius_of_a_tensor_below_0_counts_as_0(norm: str, device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    eps = torch.tensor([-0.1, 0.5], device=device)
    for out in (
        pgd_step_reference(adv, grad, clean, STEP, eps, norm=norm),
        pgd_step_(adv, grad, clean, STEP, eps, norm=norm),
    ):
        assert torch.equal(out[0], clean[0]) and not torch.equal(out[1], clean[1])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_negative_step_moves_against_the_gradient(norm: str, device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    expected = pgd_step_(adv.clone(), -grad, clean, STEP, EPS, norm=norm)
    for step in (-STEP, torch.full((2,), -STEP, device=device)):
        assert torch.equal(pgd_step_(adv.clone(), grad, clean, step, EPS, norm=norm), expected)


@pytest.mark.parametrize(
    ("alias", "norm"), [(math.inf, "linf"), ("Linf", "linf"), ("inf", "linf"), (2, "l2"), ("2", "l2"), ("L2", "l2")]
)
def test_norms_go_by_other_names(alias: str | float, norm: str, device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    expected = pgd_step_(adv.clone(), grad, clean, STEP, EPS, norm=norm)
    assert torch.equal(pgd_step_(adv, grad, clean, STEP, EPS, norm=alias), expected)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_tensor_may_be_the_iterate_and_the_centre(norm: str, device: torch.device) -> None:
    _, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    step = 4 * EPS  # out of the ball, so that the projection shows
    expected = pgd_step_(clean.clone(), grad, clean, step, EPS, norm=norm)
    assert torch.equal(pgd_step_(clean, grad, clean.detach(), step, EPS, norm=norm), expected)


@pytest.mark.parametrize("path", ["triton", "reference"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_is_read_may_overlap_what_is_written(
    norm: str, path: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if path == "reference":
        request.getfixturevalue("reference_path")
    other = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1)).to(device)
    views = {
        "one sample of it": lambda memory: memory[1:2].expand(2, -1, -1, -1),
        "turned": lambda memory: memory[1:].transpose(2, 3),
        "moved by a sample": lambda memory: memory[:-1],
    }
    for view in views.values():
        for read in ("grad", "clean"):
            memory = batch((3, 3, 20, 20), torch.float32, device)[0]
            given: dict[str, Any] = {"grad": other, "clean": other.sigmoid()}
            expected = pgd_step_(
                memory[1:].clone(), **given | {read: view(memory).clone()}, step=0.5, eps=1.0, norm=norm
            )
            out = pgd_step_(memory[1:], **given | {read: view(memory)}, step=0.5, eps=1.0, norm=norm)
            torch.testing.assert_close(out, expected, rtol=0, atol=2**-22)


def test_two_buffers_may_lie_in_turns(device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    apart: dict[str, Any] = {"momentum": torch.zeros_like(adv), "previous": adv.clone()}
    memory = torch.stack(list(apart.values()), 1)
    together: dict[str, Any] = {"momentum": memory[:, 0], "previous": memory[:, 1]}
    expected = pgd_step_(adv.clone(), grad, clean, STEP, EPS, **apart)
    assert torch.equal(pgd_step_(adv, grad, clean, STEP, EPS, **together), expected)
    assert torch.equal(memory, torch.stack(list(apart.values()), 1))


@pytest.mark.parametrize("inertia", [1.0, 0.75])
def test_linf_with_inertia_is_that_of_auto_pgd_to_the_bit(inertia: float, device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    previous = (adv + 0.02 * torch.randn_like(adv)).clamp(0, 1)
    reached = adv + STEP * torch.sign(grad)
    reached = torch.min(torch.max(reached, clean - EPS), clean + EPS).clamp(0, 1)
    expected = adv + (reached - adv) * inertia + (adv - previous) * (1 - inertia)
    expected = torch.min(torch.max(expected, clean - EPS), clean + EPS).clamp(0, 1)
    old = adv.clone()
    for step in (pgd_step_reference, pgd_step_):
        buffer = previous.clone()
        assert torch.equal(step(adv, grad, clean, STEP, EPS, previous=buffer, inertia=inertia), expected)
        assert torch.equal(buffer, old)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_l2_may_clip_before_it_projects(dtype: torch.dtype, device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), dtype, device)
    wide = adv.double(), grad.double(), clean.double()
    bounds: dict[str, Any] = {"lower": torch.tensor([0.1, 0.2, 0.3], device=device), "upper": 0.9}
    low = bounds["lower"].double().view(3, 1, 1)
    moved = wide[0] + 3 * wide[1] / wide[1].square().sum((1, 2, 3), keepdim=True).sqrt()
    delta = torch.min(torch.max(moved, low), torch.full_like(moved, 0.9)) - wide[2]
    expected = wide[2] + delta * (0.5 / delta.square().sum((1, 2, 3), keepdim=True).sqrt()).clamp(max=1)
    last = pgd_step_reference(*wide, 3.0, 0.5, norm="l2", **bounds)
    pgd_step_(adv, grad, clean, 3.0, 0.5, norm="l2", clip_first=True, **bounds)
    torch.testing.assert_close(adv, expected.to(dtype), rtol=0, atol=TOLERANCE.get(dtype, 1e-7))
    assert (expected - last).abs().max() > 0.01  # the order matters


def everything(norm: str, device: torch.device) -> tuple[Any, ...]:
    """Return the arguments of the operator, none left out, grad and mask in layouts of their own."""
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    by = margins(2, device)
    bounds = torch.tensor([0.0, 0.1, 0.2], device=device), torch.tensor(0.9, device=device)
    mask = (torch.arange(8, device=device) % 2 == 0).expand(8, 8)
    grad = grad.contiguous(memory_format=torch.channels_last)
    return (
        adv,
        grad,
        clean,
        STEP,
        EPS,
        0.0,
        1.0,
        norm,
        *by,
        *bounds,
        mask,
        grad.clone(),
        0.5,
        adv.clone(),
        0.5,
        norm == "l2",
    )


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_is_a_well_formed_op(norm: str, device: torch.device) -> None:
    op = torch.ops.retemper.pgd_step_.default
    for layout in LAYOUTS:
        adv, grad, clean = (t.contiguous(memory_format=layout) for t in batch((2, 3, 8, 8), torch.float32, device))
        torch.library.opcheck(op, (adv, grad, clean, STEP, EPS, 0.0, 1.0, norm))
    torch.library.opcheck(op, everything(norm, device))


def test_compiles_into_one_graph(device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), torch.float32, device)
    step, eps = margins(2, device)
    one = torch.tensor(EPS, device=device)
    momentum, previous = torch.zeros_like(adv), clean.clone()

    def steps(adv: Tensor, momentum: Tensor, previous: Tensor) -> Tensor:
        pgd_step_(adv, grad, clean, STEP, one, mask=step > 0, momentum=momentum, previous=previous)
        return pgd_step_(adv, grad, clean, step, eps, norm="l2", lower=0 * one) + 1

    expected = [adv.clone(), momentum.clone(), previous.clone()]
    result = steps(*expected)
    found = torch.compile(steps, fullgraph=True, backend="aot_eager")(adv, momentum, previous)
    for one_, other in zip((found, adv, momentum, previous), (result, *expected), strict=True):
        assert torch.equal(one_, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_numbers_are_not_ten_graphs(dtype: torch.dtype, device: torch.device) -> None:
    adv, grad, clean = batch((2, 3, 8, 8), dtype, device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(adv: Tensor, step: float, eps: float, lower: float) -> Tensor:
        return pgd_step_(adv, grad, clean, step, eps, lower=lower, upper=2 * eps + 0.5)

    for turn in range(10):
        numbers = (0.01 * (turn + 1), 0.02 * (turn + 1), 0.03 * turn)
        expected = pgd_step_(adv.clone(), grad, clean, *numbers[:2], lower=numbers[2], upper=2 * numbers[1] + 0.5)
        torch.testing.assert_close(step(adv.clone(), *numbers), expected, rtol=0, atol=TOLERANCE[dtype] / 2)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("reference_path")
def test_a_cpu_that_takes_a_few_samples_at_a_time_takes_the_same_step(
    norm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    adv, grad, clean = batch((5, 3, 4, 6), dtype, torch.device("cpu"))
    step, eps = margins(5, adv.device)
    whole: dict[str, Any]
    parted: dict[str, Any]
    mask = torch.arange(5) != 1
    whole, parted = (  # the buffers are overwritten
        dict(step=step, eps=eps, norm=norm, mask=mask, momentum=torch.ones_like(adv), previous=clean.clone())
        for _ in range(2)
    )
    expected = pgd_step_(adv.clone(), grad, clean, **whole)
    monkeypatch.setattr("retemper.kernels.ascent.MANY", 0)
    monkeypatch.setattr("retemper.kernels.ascent.PART", 2 * adv[0].numel() // torch.get_num_threads())
    torch.testing.assert_close(pgd_step_(adv, grad, clean, **parted), expected)
    for buffer in ("momentum", "previous"):
        torch.testing.assert_close(parted[buffer], whole[buffer])


@pytest.mark.parametrize("other", ["clean", "grad"])
@pytest.mark.usefixtures("reference_path")
def test_a_cpu_that_takes_a_few_samples_at_a_time_reads_none_that_it_has_overwritten(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = torch.rand(6, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    adv, later = memory[1:], memory[:5]  # a sample of `later` is the one before it of `adv`
    apart = {"clean": torch.rand(5, 3, 4, 6), "grad": torch.randn(5, 3, 4, 6)}
    alone, shared = (apart | {other: one} for one in (later.clone(), later))
    expected = pgd_step_(adv.clone(), alone["grad"], alone["clean"], STEP, EPS)
    monkeypatch.setattr("retemper.kernels.ascent.MANY", 0)
    monkeypatch.setattr("retemper.kernels.ascent.PART", 2 * adv[0].numel() // torch.get_num_threads())
    assert torch.equal(pgd_step_(adv, shared["grad"], shared["clean"], STEP, EPS), expected)


@pytest.mark.usefixtures("reference_path")
def test_a_cpu_finds_the_length_of_gradients_whose_squares_float32_does_not_hold() -> None:
    clean = torch.full((5, 3, 4, 6), 0.5)
    grad = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    grad *= torch.tensor([1e-30, 1.0, 1e30, 0.0, 1e-16])[:, None, None, None]
    found = pgd_step_(clean.clone(), grad, clean, 0.25, 0.5, norm="l2")
    expected = pgd_step_(clean.double(), grad.double(), clean.double(), 0.25, 0.5, norm="l2")
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2**-22)
    alone = pgd_step_(clean[1:2].clone(), grad[1:2], clean[1:2], 0.25, 0.5, norm="l2")
    assert torch.equal(found[1:2], alone), "a sample's step depends on the others"
