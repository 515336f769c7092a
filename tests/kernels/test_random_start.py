"""The random start: one draw on every device, what the draw looks like in either norm, and what is refused."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from retemper.kernels import philox_reference, random_start_, random_start_reference

EPS = 8 / 255
SHAPES = [(1,), (1, 1, 1, 1), (2, 2, 32, 32), (2, 1, 33, 35)]  # one; whole blocks; a ragged tail
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SEEDS = [0, 1, 2**32 + 1, -1, 2**63 - 1, -(2**63)]
KINDS = [("uniform", "linf"), ("normal", "linf"), ("uniform", "l2"), ("normal", "l2")]
# normal draws of at most 6.7 scale = 0.0067, or of a ball of radius 0.5: logarithm, root, sine and the length to a few
# ulp, then one rounding of a pixel in [0, 1]; halves to one ulp, since the interpreter truncates
TOLERANCE = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}

each_kind = pytest.mark.parametrize(("noise", "norm"), KINDS, ids=map("-".join, KINDS))
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def images(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = LAYOUTS[0],
) -> Tensor:
    clean = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return clean.contiguous(memory_format=layout) if clean.dim() == 4 else clean


def on_device(seed: int, device: torch.device) -> Tensor:
    return torch.tensor([seed], device=device)


def started(clean: Tensor, eps: float | Tensor, **options: Any) -> Tensor:
    return random_start_(torch.empty_like(clean), clean, eps, **options)


def on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_philox_of_the_place_and_the_seed(seed: int, device: torch.device) -> None:
    clean = torch.full((3, 700), 0.5, device=device)  # a row takes 88 counters, the last for half as many pixels
    drawn = started(clean, 0.5, seed=seed).cpu()
    for row, pixel in ((0, 0), (0, 1), (0, 9), (0, 699), (1, 0), (2, 699)):
        place, zero = torch.tensor([88 * row + pixel // 8]), torch.tensor([0])
        words = philox_reference((place, zero, zero, zero), (torch.tensor([seed]), zero))
        word = int(words[pixel % 8 // 2]) >> 32 * (pixel % 2) & 0xFFFFFFFF
        signed = word - 2**32 if word >= 2**31 else word
        assert drawn[row, pixel].item() == pytest.approx(0.5 + signed / 2**32, abs=2**-24)


@pytest.mark.parametrize("seed", SEEDS)
@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clip", [False, True])
def test_uniform_is_the_same_everywhere_to_the_bit(
    shape: tuple[int, ...], layout: torch.memory_format, seed: int, clip: bool, device: torch.device
) -> None:
    clean = images(shape, device, layout=layout)
    for radius in (EPS, torch.linspace(0, EPS, shape[0] + 1, device=device)[1:]):
        expected = random_start_reference(clean.cpu(), on_cpu(radius), seed=torch.tensor([seed]), clip=clip)
        adv = started(clean, radius, seed=seed, clip=clip)
        assert adv.stride() == clean.stride()
        assert torch.equal(adv.cpu(), expected)


@each_kind
@each_layout
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_reference(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, noise: str, norm: str, device: torch.device
) -> None:
    clean = images(shape, device, dtype, layout)
    seed, eps = on_device(7, device), EPS if norm == "linf" else 0.5
    given: dict[str, Any] = {"seed": seed, "noise": noise, "norm": norm, "scale": 0.001 if norm == "linf" else 0.01}
    expected = random_start_reference(clean.double(), eps, **given).to(dtype)
    torch.testing.assert_close(started(clean, eps, **given), expected, rtol=0, atol=TOLERANCE[dtype])


@each_kind
@each_layout
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 2, 3, 5)], ids=str)
def test_radius_and_bounds_differ_by_sample_and_by_channel(
    shape: tuple[int, ...], layout: torch.memory_format, noise: str, norm: str, device: torch.device
) -> None:
    clean = images(shape, device, layout=layout) * 4 - 2
    samples, channels = (torch.linspace(0.05, 0.3, n, device=device) for n in shape[:2])
    of_channels = {"lower": -channels, "upper": channels[:, None, None]}
    given: dict[str, Any] = {"noise": noise, "norm": norm, "scale": 0.01 if norm == "l2" else 0.1}
    free = started(torch.zeros_like(clean), 1.0, seed=3, clip=False, **given)
    radii = [samples, samples[:, None, None, None], samples[0], samples[:1]]
    if norm == "linf":
        radii += [channels[:, None, None], channels[None, :, None, None]]
    for eps in radii:
        for bounds in ({"lower": -1.0, "upper": 1.0}, of_channels, {"lower": -1.0, "upper": channels}):
            adv = started(clean, eps, seed=3, **given, **bounds)
            lower, upper = (b.view(-1, 1, 1) if isinstance(b, Tensor) else b for b in bounds.values())
            expected = clean + within(free, eps.view(-1, 1, 1, 1) if eps.dim() == 1 else eps, noise, norm)
            torch.testing.assert_close(adv, expected.clamp(min=lower).clamp(max=upper), rtol=0, atol=2**-20)


def within(free: Tensor, eps: Tensor, noise: str, norm: str) -> Tensor:
    """Return the noise of a ball: `free` is that of a unit ball, or normal noise that no ball holds back."""
    if noise == "uniform":
        return free * eps
    length = free.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return free.clamp(-eps, eps) if norm == "linf" else free * (eps / length).clamp(max=1)


def test_a_radius_below_0_in_a_tensor_counts_as_0(device: torch.device) -> None:
    clean = images((2, 3, 4, 4), device)
    eps = torch.tensor([-0.25, 0.25], device=device)
    for noise, norm in KINDS:
        for image in (clean, clean.double()):
            adv = started(image, eps, seed=0, noise=noise, norm=norm)
            assert torch.equal(adv[0], image[0]) and not torch.equal(adv[1], image[1])


@pytest.mark.parametrize("noise", ["uniform", "normal"])
@settings(max_examples=10)
@given(seed=st.integers(-(2**63), 2**63 - 1), eps=st.floats(0, 1), scale=st.floats(0, 1))
def test_stays_in_the_ball_and_the_image(noise: str, seed: int, eps: float, scale: float, device: torch.device) -> None:
    clean = images((2, 3, 5, 7), device)
    given: dict[str, Any] = {"noise": noise, "scale": scale, "seed": seed}
    free = started(clean, eps, clip=False, **given)
    assert (free >= clean - eps).all() and (free <= clean + eps).all()
    assert torch.equal(started(clean, eps, **given), free.clamp(0, 1))
    assert torch.equal(started(clean, eps, lower=-0.25, upper=0.5, **given), free.clamp(-0.25, 0.5))
    ball = started(clean, eps, clip=False, norm="l2", **given)
    assert ((ball - clean).flatten(1).norm(dim=1) <= eps * (1 + 1e-6) + 1e-6).all()


def test_images_of_another_range_keep_it(device: torch.device) -> None:
    clean = images((2, 3, 8, 8), device) * 2 - 1
    for noise, norm in KINDS:
        adv = started(clean, 0.25, seed=1, noise=noise, norm=norm, lower=-1, upper=1)
        assert adv.min() < -0.5 and adv.max() > 0.5 and adv.abs().max() <= 1
        assert (adv - clean).abs().max() <= 0.25 + 1e-6


@pytest.mark.parametrize("seed", [3, -3])
def test_a_seed_in_a_tensor_draws_what_the_number_draws(seed: int, device: torch.device) -> None:
    clean = images((2, 3, 8, 8), device)
    by_number = started(clean, EPS, seed=seed)
    for tensor in (on_device(seed, device), on_device(seed, device)[0]):
        assert torch.equal(random_start_(torch.rand_like(clean), clean, EPS, seed=tensor), by_number)


@each_kind
@each_layout
@pytest.mark.parametrize("by_sample", [False, True])
def test_rows_of_a_larger_batch_get_its_draws(
    by_sample: bool, layout: torch.memory_format, noise: str, norm: str, device: torch.device
) -> None:
    for shape in ((7, 3, 3, 7), (7, 2, 4, 4)):  # a ragged tail in every image, and none
        whole = images(shape, device, layout=layout)
        eps = torch.linspace(0, EPS, 8, device=device)[1:] if by_sample else EPS
        drawn = started(whole, eps, noise=noise, norm=norm, seed=2**40 + 3)
        for first, apart in ((0, 2), (2, 3), (3, 1), (6, 4)):
            part = whole[first::apart].contiguous(memory_format=layout)
            own = eps[first::apart].contiguous() if isinstance(eps, Tensor) else eps
            adv = started(part, own, noise=noise, norm=norm, seed=2**40 + 3, rows=(first, apart))
            assert torch.equal(adv, drawn[first::apart])


def test_places_beyond_32_bits_are_told_apart(device: torch.device) -> None:
    clean = torch.full((2, 512), 0.5, device=device)
    seed = on_device(5, device)
    for noise, norm in KINDS:
        given: dict[str, Any] = {"noise": noise, "norm": norm, "seed": seed}
        elsewhere: dict[str, Any] = given | {"seed": seed.cpu()}
        for rows in ((2**26, 1), (2**26 - 1, 1), (3, 2**27)):  # 64 counters * 2**26 = 2**32
            expected = random_start_reference(clean.cpu(), 0.5, **elsewhere, rows=rows)
            adv = started(clean, 0.5, rows=rows, **given).cpu()
            torch.testing.assert_close(adv, expected, rtol=0, atol=0 if (noise, norm) == KINDS[0] else 2**-20)
        assert not torch.equal(started(clean, 0.5, rows=(2**26, 1), **given), started(clean, 0.5, **given))


@each_kind
def test_a_pixel_that_is_not_a_number_stays_so(noise: str, norm: str, device: torch.device) -> None:
    clean = torch.tensor([[0.5, float("nan")]], device=device)
    for image in (clean, clean.double()):
        assert started(image, EPS, seed=0, noise=noise, norm=norm).isnan().tolist() == [[False, True]]


@each_kind
def test_clean_images_may_lie_otherwise_and_be_of_another_dtype(noise: str, norm: str, device: torch.device) -> None:
    clean = images((2, 3, 5, 7), device)
    given: dict[str, Any] = {"noise": noise, "norm": norm, "seed": 1}
    expected = started(clean, EPS, **given)
    wide = torch.zeros(2, 3, 5, 8, device=device)[..., :7].copy_(clean)
    for other in (
        clean.contiguous(memory_format=torch.channels_last),
        wide,
        clean.transpose(1, 3).clone().transpose(1, 3),
    ):
        assert torch.equal(random_start_(torch.empty_like(expected), other, EPS, **given), expected)
    same = images((1, 3, 5, 7), device).expand(2, 3, 5, 7)
    assert torch.equal(
        random_start_(torch.empty_like(expected), same, EPS, **given), started(same.contiguous(), EPS, **given)
    )
    half = random_start_(torch.empty_like(clean, dtype=torch.bfloat16), clean, EPS, **given)
    torch.testing.assert_close(half, expected.bfloat16(), rtol=0, atol=2**-8)
    fine = random_start_(torch.empty_like(clean), clean.double(), EPS, **given)
    torch.testing.assert_close(fine, expected, rtol=0, atol=2**-22)


def test_an_image_may_be_its_own_start(device: torch.device) -> None:
    clean = images((2, 3, 5, 7), device)
    for noise, norm in KINDS:
        expected = started(clean, EPS, seed=1, noise=noise, norm=norm)
        adv = clean.clone()
        assert torch.equal(random_start_(adv, adv, EPS, seed=1, noise=noise, norm=norm), expected)


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_clean_images_may_overlap_their_starts(path: str, device: torch.device, request: pytest.FixtureRequest) -> None:
    if path == "reference":
        request.getfixturevalue("reference_path")
    for view in (lambda memory: memory[:-1], lambda memory: memory[1:2].expand(2, -1, -1, -1)):
        for noise, norm in KINDS:
            memory = images((3, 3, 20, 20), device)
            expected = started(view(memory).clone(), EPS, seed=1, noise=noise, norm=norm)
            out = random_start_(memory[1:], view(memory), EPS, seed=1, noise=noise, norm=norm)
            torch.testing.assert_close(out, expected, rtol=0, atol=2**-22)


def test_takes_an_empty_batch(device: torch.device) -> None:
    empty = torch.zeros(0, 3, 4, 4, device=device)
    assert (
        random_start_reference(empty, EPS, seed=torch.zeros(1, dtype=torch.int64, device=device)).shape == empty.shape
    )
    for norm in ("linf", "l2"):
        assert random_start_(empty, empty.clone(), EPS, seed=0, norm=norm).shape == (0, 3, 4, 4)


def test_norms_have_their_usual_names(device: torch.device) -> None:
    clean = images((2, 3, 4, 4), device)
    for name, aliases in {"linf": (math.inf, "inf", "Linf"), "l2": (2, 2.0, "L2")}.items():
        expected = started(clean, EPS, seed=0, norm=name)
        for alias in aliases:
            assert torch.equal(started(clean, EPS, seed=0, norm=alias), expected)


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("noise: 'pink'; needs one of uniform, normal", {"noise": "pink"}),
        ("seed: 9223372036854775808 does not fit", {"seed": 2**63}),
        ("seed: torch.int64 of shape", {"seed": torch.tensor([0, 1])}),
        ("seed: torch.float32 of shape", {"seed": torch.tensor([0.5])}),
        ("scale: -1", {"scale": -1.0}),
        (r"rows: \(-1, 1\); needs a row from 0 on", {"rows": (-1, 1)}),
        (r"rows: \(0, 0\); needs a row from 0 on", {"rows": (0, 0)}),
        ("norm: 'l1'; needs one of linf, l2; a step in L1", {"norm": "l1"}),
        ("norm: 3; needs one of linf, l2$", {"norm": 3}),
        (r"eps: -1.*; needs 0 to 1, .* 8/255, not 8", {"eps": -1}),
        (r"eps: 8.*; needs 0 to 1, .* 8/255, not 8", {"eps": 8}),
        (r"eps: nan; needs 0 to 1, .* 8/255, not 8", {"eps": math.nan}),
        (r"eps: 14.0; needs 0 to 13.8564, as pixels", {"eps": 14, "norm": "l2"}),
        (r"eps: .* shape \(5,\); needs a number, or", {"eps": torch.ones(5)}),
        (r"eps: torch.int64 of shape", {"eps": torch.ones(2, dtype=torch.int64)}),
        (r"eps: differs by channel", {"eps": torch.ones(3, 1, 1), "norm": "l2"}),
        (r"lower: .* shape \(2,\); needs a number, or", {"lower": torch.ones(2)}),
        ("the range of a pixel is empty", {"lower": 0.5, "upper": 0.5}),
        ("eps: requires grad", {"eps": torch.ones(2, requires_grad=True)}),
        ("upper: requires grad", {"upper": torch.ones((), requires_grad=True)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_it_cannot_do(message: str, given: dict[str, Any], device: torch.device) -> None:
    clean = images((2, 3, 8, 8), device)
    given = {"eps": EPS, "seed": 0} | {
        name: value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    with pytest.raises(ValueError, match=message):
        random_start_(torch.empty_like(clean), clean, **given)


@pytest.mark.parametrize("seed", [0.5, None, "7", torch.Generator()], ids=lambda seed: type(seed).__name__)
def test_refuses_a_seed_that_is_no_whole_number(seed: Any, device: torch.device) -> None:
    clean = images((2, 3, 8, 8), device)
    with pytest.raises(TypeError, match=f"seed: a {type(seed).__name__}; needs an int, or one int64 in a tensor"):
        random_start_(torch.empty_like(clean), clean, EPS, seed=seed)


def test_refuses_tensors_that_do_not_fit(device: torch.device) -> None:
    clean = images((2, 3, 8, 8), device)
    adv = torch.empty_like(clean)
    with pytest.raises(ValueError, match=r"clean: shape \(1, 3, 8, 8\), but adv"):
        random_start_(adv, clean[:1], EPS, seed=0)
    with pytest.raises(ValueError, match=r"clean: torch.int64; needs one of"):
        random_start_(adv, clean.long(), EPS, seed=0)
    with pytest.raises(ValueError, match=r"adv: strides .* leave holes"):
        random_start_(torch.zeros(2, 3, 8, 9, device=device)[..., :8], clean, EPS, seed=0)
    with pytest.raises(TypeError, match="eps: a list; needs a number or a tensor"):
        random_start_(adv, clean, [EPS], seed=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="clean: requires grad, and its gradient is not computed"):
        random_start_(adv, clean.clone().requires_grad_(), EPS, seed=0)
    with pytest.raises(ValueError, match="adv: requires grad"):
        random_start_(adv.requires_grad_(), clean, EPS, seed=0)
    with torch.no_grad():
        random_start_(adv, clean.clone().requires_grad_(), EPS, seed=0)


@each_layout
@each_kind
@pytest.mark.parametrize("by_tensor", [False, True])
def test_is_a_well_formed_op(
    layout: torch.memory_format, noise: str, norm: str, by_tensor: bool, device: torch.device
) -> None:
    clean = images((2, 3, 8, 8), device, layout=layout)
    eps = torch.full((2,), EPS, device=device) if by_tensor else None
    bounds = (torch.zeros(3, device=device), torch.ones((), device=device)) if by_tensor else (None, None)
    args = (clean.clone(), clean, on_device(0, device), EPS, eps, noise, 0.001, True)
    rows = (1, 2) if by_tensor else (0, 1)
    torch.library.opcheck(torch.ops.retemper.random_start_.default, (*args, *rows, 0.0, 1.0, *bounds, norm))


def test_compiles_into_one_graph(device: torch.device) -> None:
    clean = images((2, 3, 8, 8), device)
    counter = on_device(5, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def start(clean: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        first = random_start_(torch.empty_like(clean), clean, EPS, seed=seed)
        return first, random_start_(torch.empty_like(clean), clean, EPS, seed=6, noise="normal", norm=math.inf)

    first, second = start(clean, counter)
    assert torch.equal(first, started(clean, EPS, seed=5))
    assert torch.equal(second, started(clean, EPS, seed=6, noise="normal"))


@pytest.mark.usefixtures("reference_path")
def test_takes_many_radii_when_compiled(device: torch.device) -> None:
    clean = images((2, 3, 4, 4), device)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def start(clean: Tensor, eps: float | Tensor, norm: str) -> Tensor:
        return random_start_(torch.empty_like(clean), clean, eps, seed=5, norm=norm)

    for norm in ("linf", "l2"):
        torch._dynamo.reset()
        half = clean.bfloat16()
        for eps in (0.1, 0.3):  # which bfloat16 does not hold
            assert torch.equal(start(half, eps, norm), started(half, eps, seed=5, norm=norm))
        for tenth in range(1, 11):
            assert torch.equal(start(clean, tenth / 10, norm), started(clean, tenth / 10, seed=5, norm=norm))
        for tenth in range(1, 11):
            eps = torch.tensor(tenth / 10, device=device)
            assert torch.equal(start(clean, eps, norm), started(clean, eps, seed=5, norm=norm))
    assert counter.frame_count <= 10  # of a norm: a number, any number, a tensor; and of halves a number, any number


@each_kind
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("reference_path")
def test_a_cpu_that_takes_a_few_samples_at_a_time_starts_at_the_same_points(
    noise: str, norm: str, dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    clean, eps = images((5, 2, 5, 7), cpu, dtype, layout), torch.linspace(0, EPS, 5)
    options = dict(seed=on_device(7, cpu), noise=noise, norm=norm, rows=(1, 3), upper=torch.tensor([0.5, 0.7]))
    whole = started(clean, eps, **options)
    monkeypatch.setattr("retemper.kernels.noise.MANY", 0)
    monkeypatch.setattr("retemper.kernels.noise.PART", 2 * clean[0].numel() // torch.get_num_threads())
    torch.testing.assert_close(started(clean, eps, **options), whole)
