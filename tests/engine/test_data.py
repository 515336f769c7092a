"""The images of a run: how many of each class, and from where."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from retemper.cli import run
from retemper.engine.catalogue import find_setting
from retemper.engine.groups import Data
from retemper.engine.run.data import chosen_indices, training_split
from retemper.engine.state import clean_images
from retemper.kernels import augment_reference, strong_augment_reference
from retemper.loaders import DataError, UsageError, convert, load_split, split_of_arrays


def test_images_per_class_takes_as_many_of_every_class_and_says_which_have_fewer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [6, 58, 58]))
    split = split_of_arrays("toy", "train", np.zeros((122, 2, 2, 1), np.uint8), labels, ("ant", "bee", "cat"), "")
    recipe = find_setting("sat:digits")[2].recipe.replace(holdout_per_class=0, images_per_class=20)
    train, held = chosen_indices(split, recipe)
    assert np.bincount(labels[train]).tolist() == [6, 20, 20] and len(held) == 0
    assert train.tolist() == sorted(train) and "fewer to train on: ant 6" in capsys.readouterr().err
    for k in (1, 2):  # the first ones of each class
        assert train[labels[train] == k].tolist() == np.flatnonzero(labels == k)[:20].tolist()
    chosen_indices(split, recipe.replace(images_per_class=6))
    assert capsys.readouterr().err == ""


def test_a_long_tail_is_of_what_is_left_to_train_on_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], 60))
    split = split_of_arrays("toy", "train", np.zeros((180, 2, 2, 1), np.uint8), labels, ("ant", "bee", "cat"), "")
    recipe = find_setting("sat:digits")[2].recipe.replace(holdout_per_class=10, imbalance=25.0)
    train, held = chosen_indices(split, recipe)
    assert np.bincount(labels[train]).tolist() == [50, 10, 2] and np.bincount(labels[held]).tolist() == [10, 10, 10]
    assert not set(train) & set(held)
    assert capsys.readouterr().err == "--imbalance 25: 62 training images, from 50 of ant down to 2 of cat\n"
    fewer, _ = chosen_indices(split, recipe.replace(images_per_class=20))
    assert np.bincount(labels[fewer], minlength=3).tolist() == [20, 4, 0]
    said = capsys.readouterr().err
    assert "from 20 of ant down to 0 of cat\nwarning: there is no image to train on of cat\n" in said


def test_the_inverse_of_an_imbalance_factor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "sat:digits", "--imbalance", "0.01", "--out", str(tmp_path / "run")]) == 2
    assert "imbalance = 0.01: it is the largest class over the smallest, so give its inverse, 100" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_a_converted_file_serves_by_itself(tmp_path: Path, datafiles: ModuleType) -> None:
    datafiles.make_cifar10(tmp_path / "data", n=10)
    beton = tmp_path / "train.beton"
    convert(load_split("cifar10", "train", tmp_path / "data"), beton, progress=False)
    data = Data(dataset="cifar10")
    split, truth = training_split(data, None, beton), training_split(data, tmp_path / "data", beton)
    np.testing.assert_array_equal(split.images, truth.images)
    assert (split.fingerprint, split.classes) == (truth.fingerprint, truth.classes)
    with pytest.raises(DataError, match="holds cifar10 train, the run needs cifar100 train"):
        training_split(replace(data, dataset="cifar100"), None, beton)
    with pytest.raises(DataError, match="cifar10 needs --data-root"):
        training_split(data, None, None)


def test_a_run_on_a_converted_file_alone_says_what_its_evaluation_needs(
    tmp_path: Path, datafiles: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    datafiles.make_cifar10(tmp_path / "data", n=4)
    beton, out = tmp_path / "train.beton", tmp_path / "run"
    convert(load_split("cifar10", "train", tmp_path / "data"), beton, progress=False)
    short = "--student tiny_resnet --epochs 1 --attack-steps 1 --holdout-per-class 0 --batch-size 16".split()
    assert run(["train", "sat:cifar10_resnet18", "--beton", str(beton), "--out", str(out), *short]) == 0
    assert f"next: retemper evaluate {out} --data-root DIR --check\n" in capsys.readouterr().err
    assert run(["evaluate", str(out), "--attacks", "clean"]) == 3
    assert "cifar10 needs --data-root" in capsys.readouterr().err
    assert run(["evaluate", str(out), "--attacks", "clean", "--data-root", str(tmp_path / "data")]) == 0


def test_a_converted_file_of_another_size_is_not_trained_on_by_itself(tmp_path: Path) -> None:
    convert(load_split("digits", "train", image_size=4), tmp_path / "small.beton", progress=False)
    with pytest.raises(UsageError, match="holds images of 4 px a side: give --image-size 4"):
        training_split(Data(dataset="digits"), None, tmp_path / "small.beton")
    assert training_split(Data(dataset="digits", image_size=4), None, tmp_path / "small.beton").shape == (4, 4, 1)


def test_images_are_padded_as_the_recipe_says() -> None:
    recipe = find_setting("sat:digits")[2].recipe.replace(padding=3)
    image = torch.from_numpy(load_split("digits", "test").images[:98])
    view = torch.arange(98)
    seen = {mode: clean_images(recipe.replace(padding_mode=mode), image, view) for mode in ("zeros", "reflect")}
    for mode, found in seen.items():
        assert torch.equal(found, augment_reference(image, view, padding=3, padding_mode=mode))
    assert torch.equal(clean_images(recipe, image, view), seen["zeros"]) and not torch.equal(*seen.values())


def test_images_are_augmented_as_the_recipe_says() -> None:
    plain = find_setting("sat:digits")[2].recipe
    image, view = torch.from_numpy(load_split("digits", "test").images[:50]), torch.arange(50) * 2**50
    for options in (
        dict(augment="cropshift"),
        dict(augment="idbh-weak", cutout=3),
        dict(augment="crop", cutout=2, padding=3, padding_mode="reflect", flip=False),
    ):
        recipe = plain.replace(**options)
        how: dict[str, Any] = {
            name: getattr(recipe.data, name) for name in ("flip", "padding", "padding_mode", "cutout")
        }
        seen = clean_images(recipe, image, view)
        assert torch.equal(seen, strong_augment_reference(image, view, policy=recipe.data.augment, **how))
        assert recipe.data.strong and not plain.data.strong


def test_a_square_that_hides_an_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "sat:digits", "--cutout", "8", "--out", str(tmp_path / "run")]) == 2
    assert "--cutout 8: images of 8 px a side can lose 7 px a side at most" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_images_are_reflected_as_far_as_they_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Data(dataset="digits", padding_mode="reflect", padding=7)
    assert training_split(data, None, None).shape == (8, 8, 1)
    command = ["train", "sat:digits", "--padding-mode", "reflect", "--padding", "8", "--out", str(tmp_path / "run")]
    assert run(command) == 2
    assert "--padding 8: images of 8 px a side can be reflected by 7 at most" in capsys.readouterr().err
