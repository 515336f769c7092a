"""The fifteen corruptions: what they do to known images, whose draws are whose, and how they are evaluated."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retemper.cli import run
from retemper.engine.evaluation import corrupted
from retemper.engine.evaluation.corrupted import add_corruptions, corrupted_accuracies, corruption_table
from retemper.engine.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from retemper.engine.evaluation.places import fuller
from retemper.loaders.split import split_of_arrays

CPU = torch.device("cpu")
RANDOM = "gaussian_noise shot_noise impulse_noise glass_blur motion_blur snow frost fog elastic_transform".split()


def pictures(number: int, side: int = 32, channels: int = 3) -> np.ndarray:
    """Return smooth images with an edge, as photographs have."""
    row, column = np.mgrid[:side, :side] / side
    phase = np.arange(number)[:, None, None, None] + np.arange(channels)
    image = 0.5 + 0.3 * np.sin(6 * (row + column)[None, :, :, None] + phase) + 0.15 * (column > 0.5)[None, :, :, None]
    return (255 * image).astype(np.uint8)


def change(image: np.ndarray, name: str, severity: int) -> float:
    changed = corrupt(image, name, severity, np.arange(len(image)))
    assert changed.shape == image.shape and changed.dtype == np.uint8
    return float(np.abs(changed.astype(float) - image).mean())


@pytest.mark.parametrize("side, channels", [(32, 3), (8, 1), (28, 1)])
def test_every_corruption_changes_images_of_any_size_and_grows(side: int, channels: int) -> None:
    image = pictures(4, side, channels)
    for name in CORRUPTIONS:
        first, last = change(image, name, 1), change(image, name, 5)
        if name == "elastic_transform":  # whose severities trade the shift of the whole for waves
            assert first > 0 and last > 0
        else:
            assert last > first or (side == 8 and name in ("defocus_blur", "motion_blur") and last >= first), name


def test_whole_batches_come_back_dense() -> None:
    """einsum picks its order by the sizes, and with it the strides of what it returns."""
    assert corrupt(pictures(256, 14, 1), "zoom_blur", 3, np.arange(256)).flags.c_contiguous


def test_what_is_not_random_is_what_its_constants_say() -> None:
    image, index = pictures(2), np.arange(2)
    lighter = image.max(axis=-1) + 0.3 * 255
    np.testing.assert_allclose(corrupt(image, "brightness", 5, index).max(axis=-1), lighter.clip(0, 255), atol=1)
    mean = image.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(corrupt(image, "contrast", 5, index), mean + 0.15 * (image - mean), atol=1)
    flat = np.full((1, 32, 32, 3), 100, np.uint8)
    for name in ("defocus_blur", "zoom_blur", "motion_blur", "glass_blur", "elastic_transform", "pixelate"):
        assert np.abs(corrupt(flat, name, 5, np.arange(1)).astype(int) - 100).max() <= 1, name
    point = np.zeros((1, 32, 32, 1), np.uint8)
    point[0, 16, 16] = 250
    lit = corrupt(point, "defocus_blur", 5, np.arange(1))[0, :, :, 0]  # a disk of 9 pixels
    assert (lit > 25).sum() == 9 and lit.sum() == pytest.approx(250, abs=9)
    assert corrupt(point, "pixelate", 5, np.arange(1)).max() < 150  # 32 pixels to 20


def test_the_noise_has_the_strength_of_its_constants() -> None:
    grey = np.full((8, 32, 32, 3), 128, np.uint8)
    index = np.arange(8)
    assert corrupt(grey, "gaussian_noise", 5, index).std() == pytest.approx(25.5, rel=0.03)
    assert corrupt(grey, "shot_noise", 5, index).std() == pytest.approx(255 * np.sqrt(128 / 255 / 50), rel=0.03)
    struck = corrupt(grey, "impulse_noise", 5, index)
    assert np.isin(struck, (0, 255)).mean() == pytest.approx(0.07, rel=0.1)
    assert abs((struck == 0).mean() - (struck == 255).mean()) < 0.01


def test_an_image_s_draws_are_its_own() -> None:
    image = pictures(6)
    for name in RANDOM:
        whole = corrupt(image, name, 3, np.arange(6))
        np.testing.assert_array_equal(corrupt(image[4:5], name, 3, np.array([4])), whole[4:5])
        assert (corrupt(image[4:5], name, 3, np.array([5])) != whole[4:5]).any()
        assert (corrupt(image[4:5], name, 3, np.array([4]), seed=1) != whole[4:5]).any()


@pytest.mark.parametrize(
    "image, name", [(np.zeros((1, 8, 8, 2), np.uint8), "fog"), (np.zeros((1, 8, 8, 3)), "fog"), (pictures(1), "haze")]
)
def test_what_cannot_be_corrupted_is_refused(image: np.ndarray, name: str) -> None:
    with pytest.raises(ValueError, match=r"image_BHWC|gaussian_noise"):
        corrupt(image, name, 1, np.arange(1))


class Bright(nn.Module):
    """Calls an image 1 where it is brighter than half, else 0; of three classes the last has no image."""

    def forward(self, image: Tensor) -> Tensor:
        light = image.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-light, light, torch.full_like(light, -9.0)], dim=1)


def light_and_dark() -> Any:
    images = np.concatenate([np.full((3, 8, 8, 1), 40, np.uint8), np.full((5, 8, 8, 1), 220, np.uint8)])
    return split_of_arrays("toy", "test", images, np.array([0] * 3 + [1] * 5), ("dark", "light", "none"), "0")


def test_accuracies_are_by_class_and_go_on_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    split, order = light_and_dark(), np.arange(8)[::-1].copy()
    made: list[tuple[str, int, int]] = []

    def counted(image: np.ndarray, name: str, severity: int, *rest: Any) -> np.ndarray:
        made.append((name, severity, len(image)))
        return corrupt(image, name, severity, *rest)

    monkeypatch.setattr(corrupted, "corrupt", counted)
    whole = list(corrupted_accuracies(Bright(), split, order, device=CPU, batch_size=5))
    assert [len(one["accuracy"]) for one in whole] == list(range(1, 16))
    assert [one["complete"] for one in whole] == [False] * 14 + [True]
    assert len(made) == 15 * 5 * 2 and sum(size for *_, size in made) == 15 * 5 * 8
    last = whole[-1]
    assert last["count"] == [3, 5, 0] and last["accuracy"]["contrast"] == [[1.0, 1.0, None]] * 5
    assert last["class"][2] is None and last["worst"] == min(last["class"][:2])
    assert last["average"] == pytest.approx((3 * last["class"][0] + 5 * last["class"][1]) / 8)
    made.clear()
    again = list(corrupted_accuracies(Bright(), split, order, device=CPU, known=json.loads(json.dumps(whole[9]))))
    assert again[-1] == last and {name for name, *_ in made} == set(list(CORRUPTIONS)[10:])
    made.clear()
    assert list(corrupted_accuracies(Bright(), split, order, device=CPU, known=last)) == [last] and not made
    next(iter(corrupted_accuracies(Bright(), split, order, device=CPU, known=last, seed=1)))
    assert made  # other draws are another evaluation


def test_each_is_written_and_the_fuller_of_two_is_kept() -> None:
    written: list[int] = []
    file: Any = SimpleNamespace(content={"protocol": {"classes": ["dark", "light", "none"]}})
    file.write = lambda: written.append(len(file.content["corruptions"]["accuracy"]))
    add_corruptions(file, Bright(), light_and_dark(), np.arange(8), device=CPU)
    assert written == list(range(1, 16))
    table = corruption_table(file.content).splitlines()
    assert len(table) == 18 and table[0].split()[:2] == ["corruption", "1"] and table[16].startswith("mean")
    assert table[12].split() == ["contrast", *["100.0%"] * 7, "dark"]
    whole = file.content["corruptions"]
    part = whole | {"accuracy": {"fog": whole["accuracy"]["fog"]}}
    assert fuller({}, {"corruptions": part}) == {"corruptions": part} and fuller({}, {}) == {}
    assert fuller({"corruptions": part}, {"corruptions": whole})["corruptions"] == whole
    old = whole | {"constants": "another"}
    assert fuller({"corruptions": part}, {"corruptions": old})["corruptions"] == part


def test_there_are_fifteen_at_five_severities_and_a_shard_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(CORRUPTIONS) == 15 and all(len(constants) == len(SEVERITIES) for _, constants in CORRUPTIONS.values())
    assert run(["evaluate", "x", "--attacks", "autoattack", "--shard", "1/2", "--corruptions"]) == 2
    assert "--corruptions is not for a shard" in capsys.readouterr().err
