"""Strong views: byte for byte what Pillow makes of them, whatever the path; and what a view draws."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.kernels import strong_augment, strong_augment_reference
from retemper.kernels.view_draws import POLICIES, Drawn, _words, view_draws

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one ulp below 1 in bfloat16, because the interpreter truncates where a GPU rounds; otherwise to the bit
TOLERANCE = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2**-8}
MANY = 200_000


def images(shape: tuple[int, ...]) -> Tensor:
    """Return bytes, those of every other image in a narrow range, as autocontrast and equalize need."""
    found = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found[::2] = found[::2] // 3 + 20
    return found


def random_views(number: int, seed: int = 0) -> Tensor:
    return torch.randint(2**63 - 1, (number,), generator=torch.Generator().manual_seed(seed))


def views_of_each_operation(policy: str, each: int) -> Tensor:
    """Return so many views of each operation that the policy has."""
    view = random_views(4000)
    operation = view_draws(view, 32, 32, policy).operation
    return torch.cat([view[operation == one][:each] for one in operation.unique()])


def by_pillow(image: Tensor, drawn: Drawn, row: int, cutout: int) -> Tensor:
    """Return a view of one (H, W, C) image, uint8, by the steps of the authors' transforms on a PIL image."""
    numpy, pil = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    enhance, ops = pytest.importorskip("PIL.ImageEnhance"), pytest.importorskip("PIL.ImageOps")
    one = {name: value[row].item() for name, value in drawn._asdict().items()}
    height, width, channels = image.shape
    seen = pil.fromarray(image.numpy() if channels == 3 else image[..., 0].numpy())
    if one["flip"]:
        seen = seen.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
    box = [
        one[edge] + one[f"shift_{axis}"]
        for edge, axis in (("left", "x"), ("top", "y"), ("right", "x"), ("bottom", "y"))
    ]
    kept, seen = seen.crop(box), pil.new(seen.mode, seen.size, 0)
    seen.paste(kept, (one["left"], one["top"]))

    along, down = one["x_by_y"] / 2**32, one["y_by_x"] / 2**32
    sheared = [1, along, -along * height / 2, down, 1, -down * width / 2]
    seen = [
        lambda: enhance.Color(seen).enhance(one["strength"]),
        lambda: enhance.Brightness(seen).enhance(one["strength"]),
        lambda: enhance.Contrast(seen).enhance(one["strength"]),
        lambda: enhance.Sharpness(seen).enhance(one["strength"]),
        lambda: ops.autocontrast(seen),
        lambda: ops.equalize(seen),
        lambda: seen.transform(seen.size, pil.Transform.AFFINE, sheared, pil.Resampling.NEAREST, fillcolor=0),
        lambda: seen.rotate(round(math.degrees(math.asin(down))), fillcolor=0),
        lambda: seen,
    ][one["operation"]]()

    found = torch.from_numpy(numpy.array(seen).reshape(height, width, channels))
    for y, x, tall, wide in (
        (one["erase_y"], one["erase_x"], one["erase_height"], one["erase_width"]),
        (one["cutout_y"], one["cutout_x"], cutout, cutout),
    ):
        found[max(0, y) : max(0, y + tall), max(0, x) : max(0, x + wide)] = 0
    return found


@pytest.mark.parametrize(
    ("policy", "shape", "cutout"),
    [
        ("idbh-strong", (32, 32, 3), 0),
        ("idbh-weak", (28, 28, 1), 7),
        ("idbh-svhn", (13, 9, 3), 0),
        ("idbh-svhn", (8, 8, 1), 3),
        ("idbh-strong", (2, 2, 3), 0),
        ("cropshift", (12, 7, 3), 2),
    ],
    ids=str,
)
def test_does_what_pillow_does(
    policy: str, shape: tuple[int, int, int], cutout: int, path: str, device: torch.device
) -> None:
    view = views_of_each_operation(policy, 3 if path == "triton" else 60)
    image = images((len(view), *shape))
    out = strong_augment(image.to(device), view.to(device), policy=policy, cutout=cutout)
    byte = (out * 255).round().to(torch.uint8).cpu().permute(0, 2, 3, 1)
    assert torch.equal(byte.float().permute(0, 3, 1, 2) / 255, out.cpu())
    drawn = view_draws(view, *shape[:2], policy, cutout=cutout)
    wrong = [row for row in range(len(view)) if not torch.equal(byte[row], by_pillow(image[row], drawn, row, cutout))]
    assert not wrong, [int(drawn.operation[row]) for row in wrong]
    assert not torch.equal(byte, image)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_both_paths_agree(policy: str, padding_mode: str, device: torch.device) -> None:
    view = random_views(12, seed=1)
    view[0] = -1
    for shape, more in (((7, 9, 11, 3), {}), ((7, 5, 4, 1), {"flip": False, "cutout": 3})):
        index = torch.arange(12) % 9 - 1  # some out of range: clamped
        given = images(shape).to(device), view.to(device)
        how: dict[str, Any] = {"policy": policy, "padding_mode": padding_mode, "padding": 3, "index": index.to(device)}
        out = strong_augment(*given, **how, **more)
        assert torch.equal(out, strong_augment_reference(*given, **how, **more))
        assert torch.equal(out[0].cpu(), images(shape)[0].permute(2, 0, 1) / 255)  # a view below 0


def test_a_crop_is_that_of_the_padded_image(device: torch.device) -> None:
    image, view = images((1, 6, 6, 2)), random_views(400)
    drawn = view_draws(view, 6, 6, "crop", padding=2)
    index = torch.zeros_like(view)
    out = strong_augment_reference(image, view, index=index, policy="crop", padding=2)
    shown = set()
    for row in range(len(view)):
        flipped = image[0].flip(1) if drawn.flip[row] else image[0]
        padded = torch.nn.functional.pad(flipped, (0, 0, 2, 2, 2, 2))
        y, x = int(drawn.shift_y[row]) + 2, int(drawn.shift_x[row]) + 2
        assert torch.equal(out[row], padded[y : y + 6, x : x + 6].permute(2, 0, 1) / 255)
        shown.add((y, x, int(drawn.flip[row])))
    assert len(shown) == 50


def share_of(values: Tensor, expected: dict[int, float]) -> None:
    """Check how often each whole number occurs: within five standard deviations."""
    count, number = Counter(values.tolist()), len(values)
    assert count.keys() <= expected.keys()
    for value, share in expected.items():
        assert abs(count[value] - number * share) <= 5 * math.sqrt(number * share * (1 - share)) + 1e-9, value


def uniform(values: Tensor, low: float, high: float) -> None:
    """Check that numbers are uniform in a range, by the largest distance of their distribution."""
    place = ((values.double() - low) / (high - low)).sort().values
    rank = (torch.arange(len(place)) + 0.5) / len(place)
    assert place[0] >= 0 and place[-1] <= 1 and (place - rank).abs().max() < 2.2 / math.sqrt(len(place))


def test_words_are_those_of_splitmix64() -> None:
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert _words(torch.tensor([1234567]))[0, :5].tolist() == [word >> 32 for word in known]


@pytest.mark.parametrize("side", [32, 8])
def test_crop_shift_is_drawn_as_the_authors_draw_it(side: int) -> None:
    drawn, most = view_draws(random_views(MANY), side, side, "cropshift"), 10 * side // 32
    cut_x, cut_y = side - (drawn.right - drawn.left), side - (drawn.bottom - drawn.top)
    share_of(drawn.flip, {0: 0.5, 1: 0.5})
    share_of(cut_x + cut_y, dict.fromkeys(range(most + 1), 1 / (most + 1)))
    for cut in range(most + 1):
        share_of(cut_x[cut_x + cut_y == cut], dict.fromkeys(range(cut + 1), 1 / (cut + 1)))
    for first, shift, lost in ((drawn.left, drawn.shift_x, cut_x), (drawn.top, drawn.shift_y, cut_y)):
        for cut in range(most + 1):
            here = lost == cut
            for place in (first[here], (first + shift)[here]):  # where it lies, and where it was
                share_of(place, dict.fromkeys(range(cut + 1), 1 / (cut + 1)))
    assert torch.corrcoef(torch.stack([drawn.left.float(), (drawn.left + drawn.shift_x).float()]))[0, 1] < 0.6


@pytest.mark.parametrize(
    ("policy", "shares", "shear", "turns", "erased"),
    [
        ("idbh-weak", [0.125] * 8, 0.15, 10, 0.5),
        ("idbh-strong", [0.125] * 8, 0.15, 10, 1.0),
        ("idbh-svhn", [0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.3, 0.3], 0.35, 30, 1.0),
    ],
)
def test_operations_are_drawn_as_the_authors_draw_them(
    policy: str, shares: list[float], shear: float, turns: int, erased: float
) -> None:
    drawn = view_draws(random_views(MANY), 32, 32, policy)
    operation, strength = drawn.operation, drawn.strength
    share_of(operation, dict(enumerate(shares)))
    for kind, low in ((0, 0.1), (1, 0.5), (2, 0.5), (3, 0.1)):
        uniform(strength[operation == kind], low, 1.9)
    slope = (drawn.x_by_y + drawn.y_by_x)[operation == 6].double() / 2**32
    uniform(slope.abs().atan(), 0.05 - 1e-5, shear + 1e-5)
    share_of((slope > 0).long(), {0: 0.5, 1: 0.5})
    share_of((drawn.x_by_y[operation == 6] != 0).long(), {0: 0.5, 1: 0.5})
    degrees = (drawn.y_by_x[operation == 7].double() / 2**32).asin() * 180 / math.pi
    share_of(degrees.round().long(), {sign * d: 0.5 / turns for sign in (-1, 1) for d in range(1, turns + 1)})
    found = float((drawn.erase_height > 0).double().mean())
    assert abs(found - erased) < (0.006 if erased < 1 else 5e-5)  # six tries may all fail
    assert drawn.scale[operation < 6].unique().tolist() == [2**32]


@pytest.mark.parametrize(("policy", "most", "side"), [("idbh-strong", 0.33, 32), ("idbh-svhn", 0.5, 8)])
def test_rectangles_are_drawn_as_torchvision_draws_them(policy: str, most: float, side: int) -> None:
    drawn, generator = view_draws(random_views(MANY), side, side, policy), torch.Generator().manual_seed(1)
    area, ratio = torch.rand(2, 2 * MANY, generator=generator, dtype=torch.float64)
    area, ratio = side * side * (0.02 + (most - 0.02) * area), (0.3 * (3.3 / 0.3) ** ratio)
    tall, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (tall < side) & (wide < side)
    expected = (tall * side + wide)[fits].bincount(minlength=side * side).double() / fits.sum()
    found = (drawn.erase_height * side + drawn.erase_width).bincount(minlength=side * side).double() / MANY
    assert (found - expected).abs().max() < 5 * math.sqrt(2 * float(expected.max()) / MANY)
    for first, length in ((drawn.erase_y, drawn.erase_height), (drawn.erase_x, drawn.erase_width)):
        share_of(first[length == side // 4], dict.fromkeys(range(side - side // 4 + 1), 1 / (side - side // 4 + 1)))


def test_cutout_lies_around_any_pixel() -> None:
    drawn = view_draws(random_views(MANY), 9, 5, "crop", cutout=4)
    share_of(drawn.cutout_y, dict.fromkeys(range(-2, 7), 1 / 9))
    share_of(drawn.cutout_x, dict.fromkeys(range(-2, 3), 1 / 5))
    out = strong_augment_reference(images((1, 9, 5, 1)) | 1, random_views(50), index=torch.zeros(50).long(), cutout=4)
    assert all((one == 0).any() for one in out)


def test_a_view_depends_on_nothing_else(device: torch.device) -> None:
    image, view = images((6, 8, 8, 3)).to(device), random_views(6).to(device)
    out = strong_augment(image, view)
    assert torch.equal(strong_augment(image[2:4], view[2:4]), out[2:4])
    plain, crop = view_draws(view, 8, 8, "cropshift"), view_draws(view, 8, 8, "idbh-weak")
    assert all(torch.equal(one, other) for one, other in zip(plain[:7], crop[:7], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_and_layout(dtype: torch.dtype, device: torch.device) -> None:
    image, view = images((3, 9, 7, 3)).to(device), random_views(3).to(device)
    out = strong_augment(image, view, dtype=dtype)
    assert out.shape == (3, 3, 9, 7) and out.dtype == dtype and out.stride() == (189, 1, 21, 3)
    expected = strong_augment_reference(image, view, dtype=dtype)
    assert expected.stride() == out.stride()
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[dtype])
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert strong_augment(image, none, index=none, dtype=dtype).shape == (0, 3, 9, 7)


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    image, view = images((3, 8, 8, 3)).to(device), torch.zeros(3, dtype=torch.int64, device=device)
    for message, args, options in [
        (r"image: torch.float32 of shape", (image.float(), view), {}),
        (r"image: strides .* call .contiguous\(\)", (image.permute(0, 2, 1, 3), view), {}),
        (r"view: 2 ids for 3 images", (image, view[:2]), {}),
        (r"view: torch.int32; needs torch.int64", (image, view.int()), {}),
        (r"policy: 'idbh'; needs one of crop, cropshift, idbh-weak", (image, view), {"policy": "idbh"}),
        (r"padding: 8; must be below 8", (image, view), {"policy": "crop", "padding": 8, "padding_mode": "reflect"}),
        (r"cutout: -1; needs 0 or more", (image, view), {"cutout": -1}),
        (r"image: 2 channels; policy 'idbh-weak' needs 3, or 1", (image[..., :2].contiguous(), view), {}),
        (r"a side may have 16,384 pixels", (image.new_zeros(1, 2**15, 1, 1), view[:1]), {}),
        (r"dtype: torch.float64; needs one of", (image, view), {"dtype": torch.float64}),
    ]:
        with pytest.raises(ValueError, match=message):
            strong_augment(*args, **options)


@pytest.mark.parametrize("gather", [False, True])
def test_is_a_well_formed_op(gather: bool, device: torch.device) -> None:
    image, view = images((3, 5, 5, 3)).to(device), random_views(3).to(device)
    index = torch.arange(3, device=device) if gather else None
    given = image, view, index, "idbh-weak", torch.float32, True, 4, "zeros", 2
    torch.library.opcheck(torch.ops.retemper.strong_augment.default, given)


def test_compiles_into_one_graph(device: torch.device) -> None:
    image, view = images((3, 5, 5, 3)).to(device), random_views(3).to(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def views(image: Tensor, view: Tensor) -> Tensor:
        return strong_augment(image, view, index=view % 3, dtype=torch.float16) * 2

    expected = strong_augment(image, view, index=view % 3, dtype=torch.float16) * 2
    out = views(image, view)
    assert torch.equal(out, expected) and out.stride() == expected.stride()
