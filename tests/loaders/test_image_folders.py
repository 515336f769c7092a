"""Tiny-ImageNet and folders of images: decoded, resized, and refused with the fix."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from retemper.loaders import DataError, load_split


def test_tiny_imagenet_is_read_as_it_was_written(tmp_path: Path, datafiles: ModuleType) -> None:
    truth = datafiles.make_tiny_imagenet(tmp_path)
    for half, (images, labels) in truth.items():
        for root in (tmp_path, tmp_path / "tiny-imagenet-200"):
            split = load_split("tiny-imagenet", half, root)
            np.testing.assert_array_equal(split.labels, labels)
            np.testing.assert_array_equal(split.images, images)
    assert load_split("tiny-imagenet", "test", tmp_path).classes == ("word 0", "word 1", "word 2")


def test_tiny_imagenets_classes_have_names_of_their_own(tmp_path: Path, datafiles: ModuleType) -> None:
    datafiles.make_tiny_imagenet(tmp_path)
    words, wnids = tmp_path / "tiny-imagenet-200" / "words.txt", datafiles.WNIDS
    words.write_text(f"{wnids[0]}\tcrane\n{wnids[1]}\tcrane\n")  # a bird and a machine; the third has no word
    assert load_split("tiny-imagenet", "train", tmp_path).classes == wnids
    words.unlink()
    assert load_split("tiny-imagenet", "train", tmp_path).classes == wnids


def test_an_incomplete_tiny_imagenet_is_refused(tmp_path: Path, datafiles: ModuleType) -> None:
    with pytest.raises(DataError, match="unzip -q"):
        load_split("tiny-imagenet", "train", tmp_path)
    (tmp_path / "tiny-imagenet-200.zip").touch()
    with pytest.raises(DataError, match="still packed: run `unzip -q"):
        load_split("tiny-imagenet", "train", tmp_path)
    datafiles.make_tiny_imagenet(tmp_path)
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images" / "val_3.JPEG").unlink()
    with pytest.raises(DataError, match=r"val_3\.JPEG is missing"):
        load_split("tiny-imagenet", "test", tmp_path)
    table = root / "val" / "val_annotations.txt"
    for row in ("val_0.JPEG\tn99999999\t0\t0\t1\t1", "val_0.JPEG", "../../secret.JPEG\tn01443537"):
        table.write_text(row + "\n")
        with pytest.raises(DataError, match="names no class"):
            load_split("tiny-imagenet", "test", tmp_path)
    table.unlink()
    with pytest.raises(DataError, match=r"val_annotations\.txt is missing"):
        load_split("tiny-imagenet", "test", tmp_path)
    for path in (root / "train" / datafiles.WNIDS[1] / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=f"{datafiles.WNIDS[1]}/images holds no images"):
        load_split("tiny-imagenet", "train", tmp_path)


def test_pixels_wait_until_they_are_asked_for(tmp_path: Path, datafiles: ModuleType) -> None:
    datafiles.make_tiny_imagenet(tmp_path)
    (path, *_) = (tmp_path / "tiny-imagenet-200" / "train" / datafiles.WNIDS[1] / "images").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    split = load_split("tiny-imagenet", "train", tmp_path)
    assert len(split) == 12
    with pytest.raises(DataError, match=f"{path} is damaged"):
        split.images  # noqa: B018
    path.write_text("not an image")
    with pytest.raises(DataError, match=f"{path} is not an image"):
        load_split("tiny-imagenet", "train", tmp_path).images  # noqa: B018


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_is_read_as_it_was_written(tmp_path: Path, datafiles: ModuleType, test: str) -> None:
    truth = datafiles.make_folder(tmp_path, size=(12, 9), test=test)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image, and not counted")
    for half, (images, labels) in truth.items():
        split = load_split("folder", half, tmp_path)
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        assert split.classes == ("ant", "bee") and split.shape == (12, 9, 3)


def test_images_of_many_sizes_need_an_image_size(tmp_path: Path, datafiles: ModuleType) -> None:
    truth = datafiles.make_folder(tmp_path, size=(12, 12))
    Image.new("RGB", (30, 20), (10, 20, 30)).save(tmp_path / "train" / "bee" / "wide.png")
    with pytest.raises(DataError, match=r"wide.png is 30 x 20, others are 12 x 12: pass --image-size"):
        load_split("folder", "train", tmp_path).images  # noqa: B018
    split = load_split("folder", "train", tmp_path, image_size=12)
    np.testing.assert_array_equal(split.images[:6], truth["train"][0])  # those of the right size are not touched
    assert (split.images[6] == (10, 20, 30)).all()
    assert split.fingerprint != load_split("folder", "train", tmp_path, image_size=8).fingerprint


def test_resizing_averages_the_shorter_side_and_keeps_the_middle(tmp_path: Path) -> None:
    stripes = np.zeros((16, 40, 3), np.uint8)
    stripes[:, ::2] = 200  # averages to 100 when halved
    stripes[:, :12], stripes[:, 28:] = 0, 0  # all but the middle 16 columns
    for half in ("train", "test"):
        (tmp_path / half / "one").mkdir(parents=True)
        Image.fromarray(stripes).save(tmp_path / half / "one" / "0.png")
    image = load_split("folder", "train", tmp_path, image_size=8).images[0]
    assert image.shape == (8, 8, 3)
    assert np.abs(image[:, 1:-1].astype(int) - 100).max() <= 15


def test_a_folder_that_is_not_right_is_refused(tmp_path: Path, datafiles: ModuleType) -> None:
    with pytest.raises(DataError, match="holds no class folders"):
        load_split("folder", "train", tmp_path)
    datafiles.make_folder(tmp_path)
    (tmp_path / "test" / "cat").mkdir()
    with pytest.raises(DataError, match="different classes: cat in one only"):
        load_split("folder", "test", tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="train/cat holds no images"):
        load_split("folder", "train", tmp_path)
