"""A pickle of numpy arrays is read; anything else that it asks for is refused before it happens."""

import os
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from retemper.loaders import DataError, load_split
from retemper.loaders.pickles import read_pickle


class Runs:
    """An object that makes a file when it is unpickled: a stand-in for any code at all."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_code_does_not(tmp_path: Path, protocol: int) -> None:
    path, mark = tmp_path / "batch", tmp_path / "it ran"
    raw = pickle.dumps({"data": b"", "labels": Runs(mark)}, protocol)
    pickle.loads(raw)
    mark.rmdir()  # it does run when it is let
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"was not run \(it asks for (posix|nt)\.mkdir\): delete it"):
        read_pickle(path)
    assert not mark.exists()


def test_a_malicious_batch_of_cifar_is_refused(tmp_path: Path, datafiles: ModuleType) -> None:
    datafiles.make_cifar10(tmp_path, version="python")
    mark = tmp_path / "it ran"
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").write_bytes(pickle.dumps(Runs(mark), 2))
    with pytest.raises(DataError, match="data_batch_4 is not a CIFAR batch and was not run"):
        load_split("cifar10", "train", tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "asked",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "numpy.load",
        "numpy.lib._utils_impl.source",
        "copyreg.__newobj__",
    ],
)
def test_no_other_name_is_looked_up(tmp_path: Path, asked: str) -> None:
    module, _, name = asked.rpartition(".")
    path = tmp_path / "batch"
    path.write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(DataError, match=f"asks for {asked}"):
        read_pickle(path)


def test_a_dotted_name_does_not_reach_through_an_admitted_one(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile.\x93.")
    with pytest.raises(DataError, match="was not run"):
        read_pickle(path)


def test_only_latin1_is_encoded(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(
        b"\x80\x02}X\x01\x00\x00\x00kc_codecs\nencode\nX\x03\x00\x00\x00\xc3\xa9!X\x06\x00\x00\x00latin1\x86Rs."
    )
    assert read_pickle(path) == {"k": b"\xe9!"}
    path.write_bytes(path.read_bytes().replace(b"latin1", b"idna  "))
    with pytest.raises(DataError, match="encodes text as"):
        read_pickle(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_python_3_are_read(tmp_path: Path, protocol: int) -> None:
    content = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2], b"scale": np.float32(0.5)}
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol))
    found = read_pickle(tmp_path / "batch")
    np.testing.assert_array_equal(found[b"data"], content[b"data"])
    assert found[b"labels"] == [1, 2] and found[b"scale"] == np.float32(0.5)


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    raw = pickle.dumps({"data": np.arange(8, dtype=np.uint8)}, 5).replace(b"u1", b"O8")
    (tmp_path / "batch").write_bytes(raw)
    with pytest.raises(DataError, match="was not run"):
        read_pickle(tmp_path / "batch")


def test_a_truncated_pickle_is_refused_wherever_it_ends(tmp_path: Path, datafiles: ModuleType) -> None:
    whole = datafiles.python2_pickle({"data": np.zeros((2, 30), np.uint8), "labels": [1, 2]})
    path = tmp_path / "batch"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match="is not a CIFAR batch"):
            read_pickle(path)


def test_another_kind_of_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="it holds a list"):
        read_pickle(tmp_path / "batch")
