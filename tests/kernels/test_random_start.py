"""The random start: known answers of its generator, one draw on every device, and what the draw looks like."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retemper.kernels import philox_reference, random_start_, random_start_reference

EPS = 8 / 255
SHAPES = [(1,), (1, 1, 1, 1), (2, 3, 32, 32), (3, 3, 31, 33)]  # one; whole blocks; a ragged tail
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SEEDS = [0, 1, 2**32 + 1, -1, 2**63 - 1, -(2**63)]
# normal draws of at most 5.8 scale = 0.0058: logarithm, root and cosine to a few ulp, then one rounding of a pixel in
# [0, 1]; halves to one ulp, since the interpreter truncates
TOLERANCE = {torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-8}


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


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # kat_vectors of Random123 (Salmon et al.), philox4x32 10
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    word0, word1, word2, word3, key0, key1 = torch.tensor([*counter, *key])[:, None]
    words = philox_reference((word0, word1, word2, word3), (key0, key1))
    assert [word.item() for word in words] == answer


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_philox_of_the_place_and_the_seed(seed: int, device: torch.device) -> None:
    clean = torch.full((3, 700), 0.5, device=device)
    drawn = random_start_(clean.clone(), clean, 0.5, seed=seed).flatten().cpu()
    for place in (0, 1, 699, 700, 2099):
        counter = [torch.tensor([word]) for word in (place, 0, 0, 0)]
        key = torch.tensor([seed & 0xFFFFFFFF]), torch.tensor([seed >> 32 & 0xFFFFFFFF])
        bits = int(philox_reference((counter[0], counter[1], counter[2], counter[3]), key)[0]) >> 8
        assert drawn[place].item() == pytest.approx(bits / 2**24, abs=2**-24)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clip", [False, True])
def test_uniform_is_the_same_everywhere_to_the_bit(
    shape: tuple[int, ...], layout: torch.memory_format, seed: int, clip: bool, device: torch.device
) -> None:
    clean = images(shape, device, layout=layout)
    eps = torch.linspace(0, EPS, shape[0] + 1, device=device)[1:]
    for radius in (EPS, eps):
        cpu_radius = radius.cpu() if isinstance(radius, Tensor) else radius
        expected = random_start_reference(clean.cpu(), cpu_radius, seed=torch.tensor([seed]), clip=clip)
        adv = random_start_(torch.empty_like(clean), clean, radius, seed=seed, clip=clip)
        assert adv.stride() == clean.stride()
        assert torch.equal(adv.cpu(), expected)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_reference(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, noise: str, device: torch.device
) -> None:
    clean = images(shape, device, dtype, layout)
    seed = on_device(7, device)
    expected = random_start_reference(clean.double(), EPS, seed=seed, noise=noise).to(dtype)
    adv = random_start_(torch.empty_like(clean), clean, EPS, seed=seed, noise=noise)
    torch.testing.assert_close(adv, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("noise", ["uniform", "normal"])
@settings(max_examples=20)
@given(seed=st.integers(-(2**63), 2**63 - 1), eps=st.floats(0, 1), scale=st.floats(0, 1))
def test_stays_in_the_ball_and_the_image(noise: str, seed: int, eps: float, scale: float, device: torch.device) -> None:
    clean = images((2, 3, 5, 7), device)
    free = random_start_(torch.empty_like(clean), clean, eps, noise=noise, scale=scale, seed=seed, clip=False)
    assert (free >= clean - eps).all() and (free <= clean + eps).all()
    clipped = random_start_(torch.empty_like(clean), clean, eps, noise=noise, scale=scale, seed=seed)
    assert torch.equal(clipped, free.clamp(0, 1))
    wider = random_start_(
        torch.empty_like(clean), clean, eps, noise=noise, scale=scale, seed=seed, lower=-0.25, upper=0.5
    )
    assert torch.equal(wider, free.clamp(-0.25, 0.5))


@pytest.mark.parametrize("seed", [3, -3])
def test_a_seed_in_a_tensor_draws_what_the_number_draws(seed: int, device: torch.device) -> None:
    clean = images((2, 3, 8, 8), device)
    by_number = random_start_(torch.empty_like(clean), clean, EPS, seed=seed)
    for tensor in (on_device(seed, device), on_device(seed, device)[0]):
        assert torch.equal(random_start_(torch.rand_like(clean), clean, EPS, seed=tensor), by_number)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("by_sample", [False, True])
def test_rows_of_a_larger_batch_get_its_draws(
    by_sample: bool, layout: torch.memory_format, noise: str, device: torch.device
) -> None:
    whole = images((7, 3, 31, 33), device, layout=layout)  # a ragged tail in every image
    eps = torch.linspace(0, EPS, 8, device=device)[1:] if by_sample else EPS
    drawn = random_start_(torch.empty_like(whole), whole, eps, noise=noise, seed=2**40 + 3)
    for first, apart in ((0, 2), (1, 2), (2, 3), (3, 1), (6, 4)):
        part = whole[first::apart].contiguous(memory_format=layout)
        own = eps[first::apart].contiguous() if isinstance(eps, Tensor) else eps
        rows = (first, apart)
        adv = random_start_(torch.empty_like(part), part, own, noise=noise, seed=2**40 + 3, rows=rows)
        assert torch.equal(adv, drawn[first::apart])


def test_places_beyond_32_bits_are_told_apart(device: torch.device) -> None:
    clean = torch.full((2, 64), 0.5, device=device)
    seed = on_device(5, device)
    for rows in ((2**26, 1), (2**26 - 1, 1), (3, 2**27)):  # 64 * 2**26 = 2**32
        expected = random_start_reference(clean.cpu(), 0.5, seed=seed.cpu(), rows=rows)
        assert torch.equal(random_start_(clean.clone(), clean, 0.5, seed=5, rows=rows).cpu(), expected)
    assert not torch.equal(
        random_start_(clean.clone(), clean, 0.5, seed=5, rows=(2**26, 1)),
        random_start_(clean.clone(), clean, 0.5, seed=5),
    )


def test_the_moments_are_those_of_the_distribution(device: torch.device) -> None:
    clean = torch.full((4, 50_000), 0.5, device=device)
    uniform = random_start_(clean.clone(), clean, 0.25, seed=1) - clean
    normal = random_start_(clean.clone(), clean, 0.5, seed=1, noise="normal", scale=0.0625) - clean
    for draw, deviation, fourth in ((uniform, 0.25 / math.sqrt(3), 1.8), (normal, 0.0625, 3.0)):
        standard = draw.double().flatten() / deviation  # 200,000 draws: bounds of five standard errors
        assert abs(standard.mean()) < 5 / math.sqrt(standard.numel())
        assert abs(standard.square().mean() - 1) < 5 * math.sqrt((fourth - 1) / standard.numel())
        assert abs(standard.pow(4).mean() - fourth) < 0.13
        lagged = (standard[1:] * standard[:-1]).mean()
        assert abs(lagged) < 5 / math.sqrt(standard.numel())


def test_seeds_are_independent(device: torch.device) -> None:
    clean = torch.full((1, 50_000), 0.5, device=device)
    draws = [random_start_(clean.clone(), clean, 0.5, seed=s).sub(0.5).flatten().double() for s in (0, 1, 2**32, -1)]
    correlation = torch.corrcoef(torch.stack(draws))
    assert (correlation - torch.eye(4, device=device)).abs().max() < 5 / math.sqrt(50_000)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_a_pixel_that_is_not_a_number_stays_so(noise: str, device: torch.device) -> None:
    clean = torch.tensor([[0.5, float("nan")]], device=device)
    for image in (clean, clean.double()):
        assert random_start_(image.clone(), image, EPS, seed=0, noise=noise).isnan().tolist() == [[False, True]]


def test_the_draws_of_the_papers_fit_the_ball(device: torch.device) -> None:
    clean = torch.full((1, 100_000), 0.5, device=device)
    near, far = (random_start_(clean.clone(), clean, eps, seed=3, noise="normal") for eps in (0.006, 8 / 255))
    assert torch.equal(near, far)


def test_takes_an_empty_batch(device: torch.device) -> None:
    empty = torch.zeros(0, 3, 4, 4, device=device)
    assert random_start_(empty, empty.clone(), EPS, seed=0).shape == (0, 3, 4, 4)


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    clean = images((2, 3, 8, 8), device)
    adv = torch.empty_like(clean)
    with pytest.raises(ValueError, match=r"clean: shape \(1, 3, 8, 8\), but adv"):
        random_start_(adv, clean[:1], EPS, seed=0)
    with pytest.raises(ValueError, match=r"clean: strides .* one dense layout"):
        random_start_(adv, clean.contiguous(memory_format=torch.channels_last), EPS, seed=0)
    with pytest.raises(ValueError, match="noise: 'pink'; needs one of uniform, normal"):
        random_start_(adv, clean, EPS, seed=0, noise="pink")
    with pytest.raises(ValueError, match="seed: 9223372036854775808 does not fit"):
        random_start_(adv, clean, EPS, seed=2**63)
    for seed in (torch.tensor([0, 1], device=device), torch.tensor([0.5], device=device)):
        with pytest.raises(ValueError, match="seed: torch"):
            random_start_(adv, clean, EPS, seed=seed)
    with pytest.raises(ValueError, match=r"eps: .* shape \(3,\)"):
        random_start_(adv, clean, torch.ones(3, device=device), seed=0)
    for rows in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=r"rows: .* needs a row from 0 on"):
            random_start_(adv, clean, EPS, seed=0, rows=rows)
    for eps in (-1, 8, float("nan")):
        with pytest.raises(ValueError, match=rf"eps: {eps}.*; needs 0 to 1, .* 8/255, not 8"):
            random_start_(adv, clean, eps, seed=0)
    with pytest.raises(ValueError, match="the range of a pixel is empty"):
        random_start_(adv, clean, EPS, seed=0, lower=0.5, upper=0.5)
    with pytest.raises(ValueError, match="adv: requires grad"):
        random_start_(adv.requires_grad_(), clean, EPS, seed=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("noise", ["uniform", "normal"])
@pytest.mark.parametrize("by_sample", [False, True])
def test_is_a_well_formed_op(layout: torch.memory_format, noise: str, by_sample: bool, device: torch.device) -> None:
    clean = images((2, 3, 8, 8), device, layout=layout)
    eps = torch.full((2,), EPS, device=device) if by_sample else None
    args = (clean.clone(), clean, on_device(0, device), EPS, eps, noise, 0.001, True)
    for rows in ((), (1, 2)):
        torch.library.opcheck(torch.ops.retemper.random_start_.default, (*args, *rows))


def test_compiles_into_one_graph(device: torch.device) -> None:
    clean = images((2, 3, 8, 8), device)
    counter = on_device(5, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def start(clean: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        first = random_start_(torch.empty_like(clean), clean, EPS, seed=seed)
        return first, random_start_(torch.empty_like(clean), clean, EPS, seed=6, noise="normal")

    first, second = start(clean, counter)
    assert torch.equal(first, random_start_(torch.empty_like(clean), clean, EPS, seed=5))
    assert torch.equal(second, random_start_(torch.empty_like(clean), clean, EPS, seed=6, noise="normal"))
