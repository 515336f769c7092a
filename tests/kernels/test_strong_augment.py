"""Strong views: byte for byte what Pillow makes of them, whatever the path."""

import math

import pytest
import torch
from torch import Tensor

from retemper.kernels import strong_augment, strong_augment_reference
from retemper.kernels.view_draws import Drawn, view_draws

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one ulp below 1 in bfloat16, because the interpreter truncates where a GPU rounds; otherwise to the bit
TOLERANCE = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2**-8}


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


def test_a_cutout_is_in_every_view(device: torch.device) -> None:
    image, view = images((1, 9, 5, 1)).to(device) | 1, random_views(9).to(device)
    out = strong_augment(image, view, index=view * 0, policy="crop", padding=0, cutout=3)
    assert all(2 * 2 <= int((one == 0).sum()) <= 3 * 3 for one in out)


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
