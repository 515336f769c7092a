"""A pool: what its files may be, what is refused, and the images that come out of them."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retemper.loaders import DataError, Split, open_pool
from retemper.loaders.pool_files import pool_files

RNG = np.random.default_rng(1)
IMAGE = RNG.integers(0, 256, (90, 6, 5, 3), dtype=np.uint8)
LABEL = RNG.integers(0, 4, 90)


def write(path: Path, compressed: bool = False, **arrays: Any) -> Path:
    given: dict[str, Any] = {"image": IMAGE, "label": LABEL} | arrays
    (np.savez_compressed if compressed else np.savez)(path, **{k: v for k, v in given.items() if v is not None})
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_images_come_out_as_they_were_written(split: Split, tmp_path: Path, parts: int, compressed: bool) -> None:
    for number, (image, label) in enumerate(zip(np.split(IMAGE, parts), np.split(LABEL, parts), strict=True), 9):
        write(tmp_path / f"1m_part{number - 8:02}.npz", compressed, image=image, label=label)
    pool = open_pool(tmp_path if parts > 1 else tmp_path / "1m_part01.npz", split, tmp_path / "cache")
    assert len(pool) == 90 and pool.bytes == IMAGE.nbytes and pool.unlabelled == 0
    assert pool.labels.tolist() == LABEL.tolist() and pool.labels.dtype == np.int16
    at = np.random.default_rng(2).integers(0, 90, 200)
    out = np.zeros((201, 6, 5, 3), np.uint8)
    pool.take(at, out)
    pool.take(at[:3], out[:3])
    np.testing.assert_array_equal(out[:200], IMAGE[at])
    assert not out[200].any()
    unpacked = list((tmp_path / "cache").rglob("*.npy"))
    assert len(unpacked) == parts * compressed
    stamps = [file.stat().st_mtime_ns for file in unpacked]
    again = open_pool(pool.path, split, tmp_path / "cache")  # what is unpacked serves again
    assert stamps == [file.stat().st_mtime_ns for file in unpacked] and again.fingerprint == pool.fingerprint


def test_the_fingerprint_is_of_the_content(split: Split, tmp_path: Path) -> None:
    other = LABEL.copy()
    other[7] = (other[7] + 1) % 4
    names = {"a": {}, "b": {}, "c": {"label": other}, "d": {"label": None}}
    found = {
        name: open_pool(write(tmp_path / f"{name}.npz", name == "b", **arrays), split, tmp_path).fingerprint
        for name, arrays in names.items()
    }
    assert found["a"] == found["b"] and len({*found.values()}) == 3


def test_labels_may_be_missing(split: Split, tmp_path: Path) -> None:
    some = np.where(np.arange(90) < 30, -1, LABEL)
    assert open_pool(write(tmp_path / "some.npz", label=some), split, tmp_path).unlabelled == 30
    assert open_pool(write(tmp_path / "none.npz", label=None), split, tmp_path).labels.tolist() == [-1] * 90


BAD = {
    "image 4 has label 9, but toy has 4 classes": {"label": np.where(np.arange(90) == 4, 9, LABEL)},
    "image 0 has label -2": {"label": LABEL - 2 - LABEL[0]},
    "image is float32, not uint8": {"image": IMAGE.astype(np.float32) / 255},
    "its images are 5 x 6 x 3, those of the run 6 x 5 x 3": {"image": IMAGE.reshape(90, 5, 6, 3)},
    "its images are 6 x 5, ": {"image": IMAGE[..., 0]},
    "90 images, but label has the shape (89,)": {"label": LABEL[:89]},
    "label is float64: write whole numbers": {"label": LABEL.astype(float)},
    "it holds no image": {"image": IMAGE[:0], "label": LABEL[:0]},
    'has no array "image", but label, x': {"image": None, "x": IMAGE},
    "label is a pickle of Python objects and was not run": {"label": LABEL.astype(object)},
    "Fortran": {"image": np.asfortranarray(IMAGE)},
}


@pytest.mark.parametrize("said", BAD)
def test_what_is_no_pool_is_refused_in_one_line(split: Split, tmp_path: Path, said: str) -> None:
    path = write(tmp_path / "pool.npz", **BAD[said])
    with pytest.raises(DataError) as error:
        open_pool(path, split, tmp_path / "cache")
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_file_is_refused(split: Split, tmp_path: Path, compressed: bool) -> None:
    path = write(tmp_path / "pool.npz", compressed)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"pool\.npz is cut short, or no \.npz .*: fetch it again"):
            open_pool(path, split, tmp_path / "cache")
    middle = zipfile.ZipFile(write(path, compressed)).getinfo("image.npy").compress_size // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    if compressed:  # an array that is read in place is not read through
        with pytest.raises(DataError, match=r"pool\.npz is cut short"):
            open_pool(path, split, tmp_path / "cache")
        assert not list((tmp_path / "cache").rglob("*.npy"))


def test_a_file_that_has_become_shorter_is_told(split: Split, tmp_path: Path) -> None:
    pool = open_pool(write(tmp_path / "pool.npz"), split, tmp_path)
    os.truncate(tmp_path / "pool.npz", 4000)
    with pytest.raises(DataError, match=r"cannot read .*pool\.npz \(it has become shorter\): fetch it again"):
        pool.take(np.arange(90), np.empty_like(IMAGE))


def test_numbered_parts_are_a_pool_and_a_gap_is_not(tmp_path: Path) -> None:
    def names(pattern: str, *numbers: int) -> Path:
        folder = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for number in numbers:
            (folder / pattern.format(number)).touch()
        return folder

    ten = names("50m_part{}.npz", *range(1, 11))
    assert [file.name for file in pool_files(ten)][1:] == [f"50m_part{n}.npz" for n in range(2, 11)]
    assert pool_files(ten / "50m_part*.npz") == pool_files(ten) and len(pool_files(ten / "50m_part3.npz")) == 1
    assert len(pool_files(names("p-{:05}-of-00003.npz", 0, 1, 2))) == 3
    for pattern, numbers, missing in (
        ("a{}.npz", (1, 3), 2),
        ("a{}.npz", (2, 3), 1),
        ("p-{:05}-of-00004.npz", (0, 1, 2), 3),
        ("p-{}of4.npz", (1, 2, 3), 4),
    ):
        with pytest.raises(DataError, match=f"part {missing} is missing beside "):
            pool_files(names(pattern, *numbers))
    (ten / "other.npz").touch()
    with pytest.raises(DataError, match="are no parts of one pool"):
        pool_files(ten)
    for path, said in ((tmp_path / "none", "does not exist"), (tmp_path, "holds no .npz")):
        with pytest.raises(DataError, match=said):
            pool_files(path)


def test_hidden_files_are_no_parts(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"part{number}.npz") for number in (1, 2)]
    (tmp_path / "._part1.npz").write_text("what a Mac leaves on foreign disks")
    assert pool_files(tmp_path) == parts
