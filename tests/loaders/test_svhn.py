"""SVHN: from MATLAB's files and from class folders, and files that are not right."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from retemper.loaders import DataError, load_split


@pytest.mark.parametrize("below", [".", "svhn", "SVHN"])
def test_reads_what_was_written_and_ten_is_the_digit_nought(tmp_path: Path, datafiles: ModuleType, below: str) -> None:
    truth = datafiles.make_svhn(tmp_path / below)
    (tmp_path / below / "extra_32x32.mat").touch()  # not read
    assert scipy.io.loadmat(tmp_path / below / "train_32x32.mat")["y"].min() == 1
    for half, (images, labels) in truth.items():
        split = load_split("svhn", half, tmp_path)
        assert (split.shape, split.classes) == ((32, 32, 3), tuple("0123456789"))
        np.testing.assert_array_equal(split.labels, labels)
        np.testing.assert_array_equal(split.images, images)
    assert np.bincount(load_split("svhn", "train", tmp_path).labels).tolist() == [1, 11, *[1] * 8]


def test_pixels_are_read_when_they_are_asked_for(
    tmp_path: Path, datafiles: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    datafiles.make_svhn(tmp_path)
    load, read = scipy.io.loadmat, []

    def spy(path: Path, variable_names: list[str]) -> dict[str, Any]:
        read.extend(variable_names)
        return load(path, variable_names=variable_names)

    monkeypatch.setattr(scipy.io, "loadmat", spy)
    split = load_split("svhn", "train", tmp_path)
    assert read == ["y"]
    assert split.images is split.images and read == ["y", "X"]


def test_another_file_is_another_fingerprint(tmp_path: Path, datafiles: ModuleType) -> None:
    datafiles.make_svhn(tmp_path)
    marks = {load_split("svhn", half, tmp_path).fingerprint for half in ("train", "test")}
    datafiles.make_svhn(tmp_path, n=30)
    marks.add(load_split("svhn", "train", tmp_path).fingerprint)
    assert len(marks) == 3


def make_class_folders(root: Path, images: np.ndarray, labels: np.ndarray, half: str) -> None:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / half / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / half / str(label) / f"{i:05}.png")


@pytest.mark.parametrize(("below", "test"), [(".", "test"), ("svhn", "val")])
def test_class_folders_hold_it_too(tmp_path: Path, datafiles: ModuleType, below: str, test: str) -> None:
    truth = datafiles.make_svhn(tmp_path / "files")
    for half, name in (("train", "train"), ("test", test)):
        images, labels = truth[half]
        make_class_folders(tmp_path / below, images, labels, name)
        split, order = load_split("svhn", half, tmp_path), np.argsort(labels, kind="stable")
        assert (split.name, split.split, split.classes) == ("svhn", half, tuple("0123456789"))
        np.testing.assert_array_equal(split.labels, labels[order])
        np.testing.assert_array_equal(split.images, images[order])


def test_other_class_folders_are_not_it(tmp_path: Path, datafiles: ModuleType) -> None:
    images, labels = datafiles.make_svhn(tmp_path / "files")["test"]
    make_class_folders(tmp_path, images, np.where(labels == 9, 10, labels), "train")
    with pytest.raises(DataError, match=r"train must hold the class folders 0 to 9: of others it is --dataset folder"):
        load_split("svhn", "train", tmp_path)


def test_what_is_missing_is_named(tmp_path: Path, datafiles: ModuleType) -> None:
    (tmp_path / "train").mkdir()  # the full numbers, format 1, come in such a folder
    with pytest.raises(DataError, match=r"no train_32x32\.mat in .*format 2.* into "):
        load_split("svhn", "train", tmp_path)
    datafiles.make_svhn(tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"no test_32x32\.mat in "):
        load_split("svhn", "test", tmp_path)


def test_damaged_files_are_named(tmp_path: Path, datafiles: ModuleType) -> None:
    images, labels = datafiles.make_svhn(tmp_path)["train"]
    path = tmp_path / "train_32x32.mat"
    whole, pixels, one = path.read_bytes(), images.transpose(1, 2, 3, 0), labels[:, None].astype(np.uint8)
    again = rf".*{path}.*: delete it and fetch {path.name} again"
    for raw in (b"", b"no MATLAB file" * 40, whole[:200], whole[:-30], whole[:5000] + bytes(50) + whole[5050:]):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=again):
            load_split("svhn", "train", tmp_path).images  # noqa: B018
    for content, message in [
        ({"y": one}, r"no \(32, 32, 3, N\) bytes under 'X'"),
        ({"X": images, "y": one}, r"no \(32, 32, 3, N\) bytes under 'X'"),
        ({"X": pixels / 255, "y": one}, r"no \(32, 32, 3, N\) bytes under 'X'"),
        ({"X": pixels}, r"no 20 labels from 1 to 10 under 'y'"),
        ({"X": pixels, "y": one[1:]}, r"no 20 labels from 1 to 10 under 'y'"),
        ({"X": pixels, "y": one + 9}, r"no 20 labels from 1 to 10 under 'y'"),
        ({"X": pixels, "y": one / 2}, r"no 20 labels from 1 to 10 under 'y'"),
        ({"X": pixels, "y": "one two"}, r"no 20 labels from 1 to 10 under 'y'"),
        ({"X": pixels, "y": np.resize([0, 10, 1], one.shape)}, r"labels 0 and 10 under 'y', which are one class here"),
    ]:
        scipy.io.savemat(path, content)
        with pytest.raises(DataError, match=message):
            load_split("svhn", "train", tmp_path)
    scipy.io.savemat(path, {"X": pixels, "y": one.astype(float).T})  # as MATLAB itself keeps numbers
    np.testing.assert_array_equal(load_split("svhn", "train", tmp_path).labels, labels)
