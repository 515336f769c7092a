"""CIFAR in both its versions: right when whole, refused with the fix when not."""

import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from retemper.loaders import DataError, load_split


@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_reads_what_was_written(tmp_path: Path, datafiles: ModuleType, dataset: str, version: str) -> None:
    truth = getattr(datafiles, f"make_{dataset}")(tmp_path, version=version)
    (folder,) = tmp_path.iterdir()
    for half, (images, labels) in truth.items():
        for root in (tmp_path, str(folder)):
            split = load_split(dataset, half, root)
            np.testing.assert_array_equal(split.images, images)
            np.testing.assert_array_equal(split.labels, labels)
            assert split.labels.dtype == np.int64 and split.images.flags.c_contiguous
    names = datafiles.CIFAR10_CLASSES if dataset == "cifar10" else tuple(f"fine_{i}" for i in range(100))
    assert load_split(dataset, "train", tmp_path).classes == names


def test_the_binary_version_is_preferred(tmp_path: Path, datafiles: ModuleType) -> None:
    datafiles.make_cifar10(tmp_path, n=10, version="python")
    datafiles.make_cifar10(tmp_path, n=20, version="binary")
    assert len(load_split("cifar10", "test", tmp_path)) == 20


@pytest.mark.parametrize("dataset, other", [("cifar10", "CIFAR10"), ("cifar10", "cifar-10"), ("cifar100", "cifar100")])
def test_a_folder_named_as_the_set_is_looked_into(
    tmp_path: Path, datafiles: ModuleType, dataset: str, other: str
) -> None:
    make = getattr(datafiles, f"make_{dataset}")
    images, _ = make(tmp_path / "one" / other)["test"]  # with the archive's folder in it
    np.testing.assert_array_equal(load_split(dataset, "test", tmp_path / "one").images, images)
    images, _ = make(tmp_path / "unpacked")["test"]
    (folder,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "two").mkdir()
    folder.rename(tmp_path / "two" / other)  # or the files themselves
    np.testing.assert_array_equal(load_split(dataset, "test", tmp_path / "two").images, images)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_batches_that_python_3_has_written_are_read(tmp_path: Path, datafiles: ModuleType, protocol: int) -> None:
    truth = datafiles.make_cifar100(tmp_path, n=3, version="python")
    for half, (images, labels) in truth.items():
        planes = images.transpose(0, 3, 1, 2).reshape(3, -1)
        for content in (labels, labels.tolist(), list(labels)):  # an array, numbers, and numpy's numbers
            raw = pickle.dumps({"data": planes, "fine_labels": content}, protocol)
            (tmp_path / "cifar-100-python" / half).write_bytes(raw)
            names = [f"class {k}" for k in range(100)]
            (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol))
            split = load_split("cifar100", half, tmp_path)
            np.testing.assert_array_equal(split.images, images)
            np.testing.assert_array_equal(split.labels, labels)
            assert split.classes == tuple(names)


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path, datafiles: ModuleType) -> None:
    datafiles.make_cifar10(tmp_path)
    batch = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    marks = {load_split("cifar10", half, tmp_path).fingerprint for half in ("train", "test", "train")}
    batch.write_bytes(batch.read_bytes())  # same bytes, another time
    assert len(marks) == 2 and load_split("cifar10", "train", tmp_path).fingerprint not in marks


@pytest.mark.parametrize("archive", ["cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"])
def test_a_packed_archive_is_met_with_the_command(tmp_path: Path, archive: str) -> None:
    (tmp_path / archive).touch()
    with pytest.raises(DataError, match=f"run `tar -xzf {tmp_path / archive} -C {tmp_path}`"):
        load_split("cifar10", "train", tmp_path)


def test_a_command_to_type_is_quoted(tmp_path: Path) -> None:
    root = tmp_path / "my data"
    root.mkdir()
    with pytest.raises(DataError, match=f"`tar -xzf cifar-10-binary.tar.gz -C '{root}'`"):
        load_split("cifar10", "train", root)
    (root / "cifar-10-binary.tar.gz").touch()
    with pytest.raises(DataError, match=f"`tar -xzf '{root}/cifar-10-binary.tar.gz' -C '{root}'`"):
        load_split("cifar10", "train", root)


@pytest.mark.parametrize(
    ("version", "missing"),
    [("bin", "data_batch_3.bin"), ("bin", "batches.meta.txt"), ("py", "data_batch_3"), ("py", "batches.meta")],
)
def test_a_missing_file_is_named(tmp_path: Path, datafiles: ModuleType, version: str, missing: str) -> None:
    datafiles.make_cifar10(tmp_path, version="binary" if version == "bin" else "python")
    path = tmp_path / f"cifar-10-batches-{version}" / missing
    path.unlink()
    with pytest.raises(DataError, match=f"{path} is missing: unpack"):
        load_split("cifar10", "train", tmp_path)


def test_damaged_records_are_refused(tmp_path: Path, datafiles: ModuleType) -> None:
    datafiles.make_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    whole = path.read_bytes()
    damage = {
        whole[:-1]: "not whole records of 3,073",
        b"": "0 bytes are not whole records",
        whole[:-3073]: "data_batch_3.bin: 9",
        b"\x0b" + whole[1:]: "label 11, but there are 10 classes",
    }
    for raw, message in damage.items():
        path.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            load_split("cifar10", "train", tmp_path)


def test_batches_of_another_form_are_refused(tmp_path: Path, datafiles: ModuleType) -> None:
    folder = tmp_path / "cifar-100-python"
    datafiles.make_cifar100(tmp_path, version="python")
    data, labels = np.zeros((3, 3072), np.uint8), [0, 1, 2]
    wrong = [
        ({"fine_labels": labels}, "'data'"),
        ({"fine_labels": labels, "data": data.astype(np.int16)}, "'data'"),
        ({"data": data}, "'fine_labels'"),
        ({"fine_labels": ["a", "b", "c"], "data": data}, "'fine_labels'"),
        ({"fine_labels": labels[:2], "data": data}, "for 2 labels"),
        ({"fine_labels": labels, "data": data[:, 1:].copy()}, "for 3 labels"),
    ]
    for batch, message in wrong:
        (folder / "train").write_bytes(datafiles.python2_pickle(batch))
        with pytest.raises(DataError, match=message):
            load_split("cifar100", "train", tmp_path)
    (folder / "meta").write_bytes(datafiles.python2_pickle({"fine_label_names": "all"}))
    with pytest.raises(DataError, match="no list of names"):
        load_split("cifar100", "test", tmp_path)


def test_folders_of_images_in_the_place_of_the_set_are_known(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="--dataset folder"):
        load_split("cifar10", "train", tmp_path)
