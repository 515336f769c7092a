"""Tiny-ImageNet and folders of images: decoded, resized, and refused with the fix."""

from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.mark.parametrize("below", ["", "images"])
def test_tiny_imagenets_val_may_be_sorted_into_class_folders(tmp_path: Path, datafiles: ModuleType, below: str) -> None:
    images, labels = datafiles.make_tiny_imagenet(tmp_path)["test"]
    val = tmp_path / "tiny-imagenet-200" / "val"
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        (val / wnid / below).mkdir(parents=True, exist_ok=True)
        (val / "images" / name).rename(val / wnid / below / name)
    (val / "images").rmdir()
    split = load_split("tiny-imagenet", "test", tmp_path)
    np.testing.assert_array_equal(split.labels, labels)  # the same images in the same order, as before
    np.testing.assert_array_equal(split.images, images)


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
    with pytest.raises(DataError, match=f"{datafiles.WNIDS[1]} holds no images"):
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


def one_image(root: Path, name: str, image: Image.Image, **how: Any) -> np.ndarray:
    """Return the pixels that `image` has once it is saved as the only one of a training set."""
    (root / "train" / "one").mkdir(parents=True, exist_ok=True)
    image.save(root / "train" / "one" / name, **how)
    return load_split("folder", "train", root).images[0]


GREYS = np.array([[0, 1, 127, 128], [129, 200, 254, 255]], np.uint8)


@pytest.mark.parametrize("name", ["16.png", "16.tiff", "big-endian.tiff", "16.pgm"])
def test_sixteen_bits_become_eight_of_the_same_grey(tmp_path: Path, name: str) -> None:
    wide = GREYS.astype(">u2" if "big" in name else "<u2") * 257
    if name.endswith("pgm"):
        (tmp_path / "train" / "one").mkdir(parents=True)
        (tmp_path / "train" / "one" / name).write_bytes(b"P5 4 2 65535\n" + wide.astype(">u2").tobytes())
        pixels = load_split("folder", "train", tmp_path).images[0]
    else:
        pixels = one_image(tmp_path, name, Image.fromarray(wide))
    np.testing.assert_array_equal(pixels, np.repeat(GREYS[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_eight_bits_keeps_its_colours(tmp_path: Path, mode: str) -> None:
    colour = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8))
    truth = colour.convert(mode)
    name = "image.tiff" if mode in ("CMYK", "YCbCr") else "image.png"
    np.testing.assert_array_equal(one_image(tmp_path, name, truth), np.asarray(truth.convert("RGB")))


def test_what_is_transparent_is_laid_on_white(tmp_path: Path) -> None:
    image = np.zeros((2, 2, 4), np.uint8)
    image[0, 0], image[0, 1], image[1] = (10, 20, 30, 255), (0, 0, 0, 0), (0, 0, 0, 51)
    white, grey = [255, 255, 255], [204, 204, 204]
    assert one_image(tmp_path / "a", "rgba.png", Image.fromarray(image)).tolist() == [
        [[10, 20, 30], white],
        [grey, grey],
    ]
    assert one_image(tmp_path / "b", "la.png", Image.fromarray(image[:1, :, [0, 3]])).tolist() == [
        [[10, 10, 10], white]
    ]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([9, 8, 7, 6, 5, 4])
    assert one_image(tmp_path / "c", "p.png", palette, transparency=1).tolist() == [[[9, 8, 7], white]]
    assert one_image(tmp_path / "d", "p.gif", palette, transparency=1).tolist() == [[[9, 8, 7], white]]


@pytest.mark.parametrize(("orientation", "turned"), [(3, 2), (6, 3), (8, 1)])
def test_a_camera_that_was_held_on_its_side_gives_an_upright_picture(
    tmp_path: Path, orientation: int, turned: int
) -> None:
    upright = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    exif = Image.Exif()
    exif[0x112] = orientation
    lies = Image.fromarray(np.rot90(upright, -turned).copy())
    np.testing.assert_array_equal(one_image(tmp_path, "photo.png", lies, exif=exif), upright)


def test_pixels_whose_range_is_not_known_are_refused(tmp_path: Path) -> None:
    for name, numbers in (("float.tiff", np.ones((2, 2), np.float32)), ("int.tiff", np.ones((2, 2), np.int32))):
        with pytest.raises(DataError, match=rf"{name} has pixels of mode [FI], .* save it as 8-bit RGB or grey"):
            one_image(tmp_path / name, name, Image.fromarray(numbers))


@pytest.mark.parametrize("name", ["moves.gif", "moves.png", "moves.webp", "pages.tiff"])
def test_a_file_of_several_pictures_is_refused(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    with pytest.raises(DataError, match=f"{name} holds 3 pictures"):
        one_image(tmp_path, name, frames[0], save_all=True, append_images=frames[1:])


def test_hidden_files_and_folders_are_no_classes_and_no_images(
    tmp_path: Path, datafiles: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = datafiles.make_folder(tmp_path)
    picture = (tmp_path / "train" / "ant" / "0.png").read_bytes()
    for litter in (".ipynb_checkpoints/a.png", "__pycache__/b.png", ".DS_Store", "__MACOSX/c.png", "._d.png"):
        for place in ("train", "test", "train/ant", "test/bee"):
            path = tmp_path / place / litter
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(picture)
    for half, (images, labels) in truth.items():
        split = load_split("folder", half, tmp_path)
        assert split.classes == ("ant", "bee")
        np.testing.assert_array_equal(split.labels, labels)
        np.testing.assert_array_equal(split.images, images)
    assert "left out" not in capsys.readouterr().err


def test_files_that_are_left_out_are_told(
    tmp_path: Path, datafiles: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    datafiles.make_folder(tmp_path)
    for name in ("a.heic", "b.heic", "notes.txt"):
        (tmp_path / "train" / "ant" / name).touch()
    (tmp_path / "train" / "ant" / "0.png").rename(tmp_path / "train" / "0.PNG")
    assert len(load_split("folder", "train", tmp_path)) == 5
    told = capsys.readouterr().err
    assert "are left out: 2 x .heic, 1 x .txt" in told
    assert f"1 images in {tmp_path / 'train'} itself, in no class folder, are left out: 0.PNG" in told


def test_linked_folders_are_followed_and_circles_refused(tmp_path: Path, datafiles: ModuleType) -> None:
    truth = datafiles.make_folder(tmp_path / "real")
    for half in ("train", "test"):
        (tmp_path / "set" / half / "ant").mkdir(parents=True)
        (tmp_path / "set" / half / "ant" / "linked").symlink_to(tmp_path / "real" / half / "ant")  # within a class
        (tmp_path / "set" / half / "bee").symlink_to(tmp_path / "real" / half / "bee")  # a whole class
        np.testing.assert_array_equal(load_split("folder", half, tmp_path / "set").images, truth[half][0])
    ant = tmp_path / "set" / "train" / "ant"
    (ant / "circle").symlink_to(ant)
    with pytest.raises(DataError, match=r"circle leads to .*ant, which .*ant holds already: remove the link"):
        load_split("folder", "train", tmp_path / "set")
    (ant / "circle").unlink()
    for name in ("nowhere", "nowhere.png"):
        (ant / name).symlink_to(tmp_path / "gone")
        with pytest.raises(DataError, match=f"{name} is a link that leads nowhere"):
            load_split("folder", "train", tmp_path / "set")
        (ant / name).unlink()
    (ant.parent / "cat").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="cat is a link that leads nowhere"):
        load_split("folder", "train", tmp_path / "set")
    (ant.parent / "cat").unlink()
    (ant.parent / "cat").symlink_to(ant)
    with pytest.raises(DataError, match=r"cat and .*ant are one folder"):
        load_split("folder", "train", tmp_path / "set")


def test_training_images_in_the_place_of_the_test_images_are_told(
    tmp_path: Path, datafiles: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    datafiles.make_folder(tmp_path, test="val")
    (tmp_path / "test").symlink_to("train")
    assert len(load_split("folder", "test", tmp_path)) == 6
    assert "no image there is new to the network" in capsys.readouterr().err
