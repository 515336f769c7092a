"""Which backend is taken, and what is said about it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from retemper.loaders import DataError, Split, UsageError, ViewSpace, choose, convert, make_loader, split_of_arrays
from retemper.loaders.ffcv_backend import FfcvLoader
from retemper.loaders.resident import ResidentLoader


def make(kind: Any, split: Split, **options: Any) -> Any:
    return make_loader(kind, split, batch_size=16, seed=0, views=ViewSpace(), device=torch.device("cpu"), **options)


@pytest.fixture
def no_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "ffcv_problem", lambda: "ffcv is not installed")


def test_resident_needs_nothing(split: Split) -> None:
    loader = make("resident", split)
    assert isinstance(loader, ResidentLoader) and loader.num_images == 130
    assert loader.description == "loader: resident on cpu (as asked)"


@pytest.mark.usefixtures("no_ffcv")
def test_without_ffcv_auto_is_resident_and_says_so(split: Split, tmp_path: Path) -> None:
    loader = make("auto", split, cache_dir=tmp_path)
    assert isinstance(loader, ResidentLoader)
    assert loader.description == "loader: resident on cpu (ffcv is not installed)"
    with pytest.raises(UsageError, match=r"apt-get install pkg-config .* && pip install 'retemper\[ffcv\]'"):
        make("ffcv", split, cache_dir=tmp_path)


@pytest.mark.usefixtures("ffcv")
def test_with_ffcv_auto_converts_and_says_so(split: Split, tmp_path: Path) -> None:
    loader = make("auto", split, cache_dir=tmp_path)
    assert isinstance(loader, FfcvLoader)
    (path,) = tmp_path.glob("*.beton")
    assert loader.description == f"loader: ffcv from {path} (it is installed and the set is converted)"
    assert make("ffcv", split, cache_dir=str(tmp_path)).description == f"loader: ffcv from {path} (as asked)"


@pytest.mark.usefixtures("ffcv")
def test_auto_stays_resident_where_nothing_can_be_written(split: Split, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    loader = make("auto", split, cache_dir=tmp_path / "file")
    assert isinstance(loader, ResidentLoader)
    assert "ffcv cannot serve it: cannot write" in loader.description
    with pytest.raises(DataError, match="cannot write"):
        make("ffcv", split, cache_dir=tmp_path / "file")
    assert "no folder for a converted file" in make("auto", split).description
    with pytest.raises(UsageError, match="run `retemper convert`"):
        make("ffcv", split)


@pytest.mark.usefixtures("ffcv")
def test_a_file_that_was_named_is_taken_or_refused(split: Split, tmp_path: Path) -> None:
    path = tmp_path / "mine.beton"
    convert(split, path, progress=False)
    moved = split_of_arrays("toy", "train", split.images, split.labels, split.classes, "moved elsewhere")
    assert isinstance(make("auto", moved, beton=str(path)), FfcvLoader)
    os.truncate(path, 100)
    for kind in ("auto", "ffcv"):
        with pytest.raises(DataError, match="truncated"):
            make(kind, split, beton=path)


@pytest.mark.usefixtures("no_ffcv")
@pytest.mark.parametrize("kind", ["auto", "ffcv", "resident"])
def test_a_named_file_is_never_passed_over(kind: str, split: Split, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ffcv"):
        make(kind, split, beton=tmp_path / "named.beton")


def test_an_unknown_kind_is_refused(split: Split) -> None:
    with pytest.raises(UsageError, match="no loader 'dali'"):
        make("dali", split)
