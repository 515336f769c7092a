"""Fashion-MNIST: the real set, tiny ones in every place it may lie, and files that are not right."""

import gzip
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from retemper.loaders import DataError, load_split
from retemper.loaders import fashion_mnist as module


def test_the_real_set_is_found_and_whole(debian_fashion_mnist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = load_split("fashion-mnist", "train", debian_fashion_mnist)
    test = load_split("fashion-mnist", "test")
    assert capsys.readouterr().err == ""
    assert train.images.shape == (60_000, 28, 28, 1) and test.images.shape == (10_000, 28, 28, 1)
    assert np.bincount(train.labels).tolist() == [6_000] * 10
    assert np.bincount(test.labels).tolist() == [1_000] * 10
    assert train.classes[train.labels[0]] == "Ankle boot"
    assert round(train.images.mean() / 255, 4) == 0.2860  # the mean that everybody normalises by


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", [".", "raw", "fashion-mnist", "FashionMNIST/raw"])
def test_reads_what_was_written(tmp_path: Path, datafiles: ModuleType, below: str, packed: bool) -> None:
    truth = datafiles.make_fashion_mnist(tmp_path / below, packed=packed)
    for half, (images, labels) in truth.items():
        split = load_split("fashion-mnist", half, tmp_path)
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)


def test_debians_copy_serves_whoever_names_no_root_and_nobody_else(
    tmp_path: Path, datafiles: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEBIAN", tmp_path / "debian")
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_split("fashion-mnist", "train", tmp_path / "mine")
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_split("fashion-mnist", "train")
    datafiles.make_fashion_mnist(tmp_path / "debian")
    assert len(load_split("fashion-mnist", "train")) == 30
    with pytest.raises(
        DataError, match=rf"not in {tmp_path / 'mine'}, nor .* leave it out: {tmp_path / 'debian'} holds"
    ):
        load_split("fashion-mnist", "train", tmp_path / "mine")
    with pytest.raises(DataError, match="typo is not a folder"):
        load_split("fashion-mnist", "train", tmp_path / "typo")


def test_mnist_under_fashion_mnists_name_is_told(
    tmp_path: Path, datafiles: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    datafiles.make_fashion_mnist(tmp_path)
    load_split("fashion-mnist", "test", tmp_path)  # no set of that size: somebody's own part of it
    assert capsys.readouterr().err == ""
    head = b"\0\0\x08\x01" + (10_000).to_bytes(4, "big")
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(head + bytes(range(10)) * 1000))
    load_split("fashion-mnist", "test", tmp_path)
    assert f"{labels} does not hold Fashion-MNIST's labels" in capsys.readouterr().err


def test_damaged_files_are_named(tmp_path: Path, datafiles: ModuleType) -> None:
    datafiles.make_fashion_mnist(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    plain = gzip.decompress(whole)
    damage = {
        whole[:-20]: "is damaged",
        whole[:200] + bytes(50) + whole[250:]: "is damaged",
        b"not gzip at all": "is damaged",
        gzip.compress(plain[:-1]): "ends after 23,519 of 23,520 values",
        gzip.compress(plain + b"x"): "ends after 23,521 of 23,520 values",
        gzip.compress(b"\0\0\x08\x01" + plain[4:]): "magic number 0x803",
        gzip.compress(plain[:10]): "magic number 0x803",
        gzip.compress(plain[:8] + b"\0\0\0\x1b" + plain[12:]): "not 28 x 28",
        gzip.compress(plain[:4] + b"\0\0\0\x1d" + plain[8 : 16 + 29 * 784]): "30 labels",
    }
    for raw, message in damage.items():
        images.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            load_split("fashion-mnist", "train", tmp_path).images  # noqa: B018
    images.write_bytes(whole)
    labels.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x1e" + b"\x0a" * 30))
    with pytest.raises(DataError, match="label 10, but there are 10 classes"):
        load_split("fashion-mnist", "train", tmp_path)
