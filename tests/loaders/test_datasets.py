"""The data sets by name: what every one of them promises, and digits."""

from pathlib import Path

import numpy as np
import pytest

from retemper.loaders import DATASETS, DataError, Split, UsageError, load_split, split_of_arrays


def test_digits_are_all_there_two_thirds_of_each_class_to_train() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    train, test = load_split("digits", "train"), load_split("digits", "test")
    assert (train.images.shape, test.images.shape) == ((1198, 8, 8, 1), (599, 8, 8, 1))
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int64
    assert train.classes == tuple("0123456789")
    in_class = np.bincount(labels)
    np.testing.assert_array_equal(np.bincount(train.labels), np.rint(in_class * 2 / 3))
    np.testing.assert_array_equal(np.bincount(test.labels), in_class - np.rint(in_class * 2 / 3))
    ours = sorted(
        (int(y), x.tobytes()) for half in (train, test) for x, y in zip(half.images, half.labels, strict=True)
    )
    grey = np.rint(pixels * 255 / 16).astype(np.uint8)  # 0 ... 16 to 0 ... 255
    assert ours == sorted((int(y), x.tobytes()) for x, y in zip(grey, labels, strict=True))


def test_the_split_of_digits_is_the_same_every_time_and_mixes_the_writers() -> None:
    first, second = load_split("digits", "train"), load_split("digits", "train")
    np.testing.assert_array_equal(first.images, second.images)
    assert first.fingerprint == second.fingerprint != load_split("digits", "test").fingerprint
    # scikit-learn's are in order of writer; a third from one end would test on writers never seen
    assert len(np.unique(np.diff(np.flatnonzero(first.labels == 0)))) > 5


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="no data set 'cifar'; there are digits, fashion-mnist"):
        load_split("cifar", "train")
    with pytest.raises(UsageError, match="no half 'val'"):
        load_split("digits", "val")
    with pytest.raises(UsageError, match="image-size 32"):
        load_split("digits", "train", image_size=32)
    assert set(DATASETS) == {"digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet", "folder"}


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn", "tiny-imagenet", "folder"])
def test_a_data_root_is_asked_for_by_name(dataset: str, tmp_path) -> None:
    with pytest.raises(DataError, match=f"{dataset} needs --data-root"):
        load_split(dataset, "train")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_split(dataset, "train", tmp_path / "nowhere")
    with pytest.raises(DataError, match=str(tmp_path)):
        load_split(dataset, "train", tmp_path)


def test_a_root_that_is_named_for_digits_must_be_there_and_is_said_not_to_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder: leave it out"):
        load_split("digits", "train", tmp_path / "nowhere")
    assert len(load_split("digits", "train", str(tmp_path))) == 1198
    assert f"nothing is read from --data-root {tmp_path}" in capsys.readouterr().err


def test_a_split_holds_what_it_says() -> None:
    images, labels = np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 1, 0])
    assert len(split_of_arrays("toy", "train", images, labels, ("a", "b"), "")) == 3
    with pytest.raises(DataError, match="label 1, but there are 1 classes"):
        split_of_arrays("toy", "train", images, labels, ("a",), "")
    with pytest.raises(DataError, match="label -1"):
        split_of_arrays("toy", "train", images, labels - 1, ("a", "b"), "")
    with pytest.raises(DataError, match="holds no image"):
        split_of_arrays("toy", "train", images[:0], labels[:0], ("a",), "")
    with pytest.raises(DataError, match="3 labels"):
        Split("toy", "train", labels, ("a", "b"), (2, 2, 1), "", read=lambda: images[:2]).images  # noqa: B018


def test_pixels_are_read_once_and_can_be_shared_with_torch() -> None:
    times = []

    def read() -> np.ndarray:
        times.append(1)
        return np.frombuffer(bytes(12), np.uint8).reshape(3, 2, 2, 1)  # read-only

    split = Split("toy", "train", np.zeros(3, np.int64), ("a",), (2, 2, 1), "", read)
    assert not times
    assert split.images is split.images
    assert len(times) == 1
    assert split.images.flags.writeable and split.images.flags.c_contiguous


def test_a_file_that_may_not_be_read_is_the_users_to_mend() -> None:
    def read() -> np.ndarray:
        raise PermissionError(13, "Permission denied", "secret.bin")

    with pytest.raises(DataError, match=r"cannot read secret\.bin: Permission denied"):
        Split("toy", "train", np.zeros(3, np.int64), ("a",), (2, 2, 1), "", read).images  # noqa: B018
