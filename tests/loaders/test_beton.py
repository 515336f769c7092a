"""A converted file is whole or refused, whatever happens while it is written or afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retemper.files import locked
from retemper.loaders import DataError, Split, UsageError, beton, beton_split, convert, split_of_arrays, verify
from retemper.loaders.beton import cached, sidecar_path

pytestmark = pytest.mark.usefixtures("ffcv")


@pytest.fixture(scope="module")
def written(split: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "toy.beton"
    convert(split, path, progress=False)
    return path


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A fresh copy of file and digest, to be spoilt."""
    for path in (written, sidecar_path(written)):
        shutil.copy(path, tmp_path)
    return tmp_path / written.name


def other(split: Split) -> Split:
    """Return a split of the same form with other pixels."""
    return split_of_arrays("toy", "train", split.images[::-1].copy(), split.labels, split.classes, "e" * 64)


def test_the_digest_says_what_the_file_holds(split: Split, written: Path) -> None:
    facts = json.loads(sidecar_path(written).read_text())
    assert facts["dataset"] == "toy" and facts["split"] == "train" and facts["images"] == 130
    assert facts["shape"] == [6, 5, 3] and facts["classes"] == ["a", "b", "c", "d"]
    assert facts["bytes"] == written.stat().st_size and len(facts["sha256"]) == 64
    assert verify(written).matches(split)
    assert {path.name for path in written.parent.iterdir()} == {".toy.beton.lock", "toy.beton", "toy.beton.json"}


def test_writing_twice_gives_the_same_bytes(split: Split, written: Path, tmp_path: Path) -> None:
    convert(split, tmp_path / "deep" / "toy.beton", progress=False)
    assert (tmp_path / "deep" / "toy.beton").read_bytes() == written.read_bytes()
    mode = (tmp_path / "deep" / "toy.beton").stat().st_mode
    (tmp_path / "plain").touch()
    assert mode == (tmp_path / "plain").stat().st_mode  # as readable as any file one makes


def test_every_flipped_byte_and_every_cut_is_found(copy: Path) -> None:
    whole = copy.read_bytes()
    rng = np.random.default_rng(0)
    for position in [0, len(whole) - 1, *rng.integers(0, len(whole), 60)]:
        with copy.open("r+b") as handle:
            handle.seek(position)
            handle.write(bytes([whole[position] ^ 1]))
        with pytest.raises(
            DataError, match=r"is damaged \(its digest differs\): delete it and run `retemper convert toy"
        ):
            verify(copy)
        with copy.open("r+b") as handle:
            handle.seek(position)
            handle.write(whole[position : position + 1])
    verify(copy)
    for end in (len(whole) - 1, len(whole) // 2, 0):
        os.truncate(copy, end)
        with pytest.raises(DataError, match=f"truncated at {end:,} of {len(whole):,} bytes"):
            verify(copy)
    copy.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="too long"):
        verify(copy)


def test_a_file_without_a_good_digest_is_refused(copy: Path) -> None:
    facts = sidecar_path(copy)
    good = facts.read_text()
    for bad in ("", "{", "[]", "{}", good.replace('"bytes"', '"octets"'), good.replace("130", '"many"', 0)[:-20]):
        facts.write_text(bad)
        with pytest.raises(DataError, match=r"toy.beton.json is damaged"):
            verify(copy)
    facts.write_text(good.replace('"format": 1', '"format": 99'))
    with pytest.raises(DataError, match="has format 99"):
        verify(copy)
    facts.unlink()
    with pytest.raises(DataError, match="may be half written"):
        verify(copy)
    copy.unlink()
    with pytest.raises(DataError, match="is not there: run `retemper convert"):
        verify(copy)


def test_a_crash_at_any_step_leaves_old_or_new_or_a_file_that_is_refused(
    split: Split, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power failing before each step that touches the disk: never a file that passes and holds something else."""

    class Crash(BaseException):
        pass

    fsync, replace, unlink = os.fsync, os.replace, Path.unlink
    old, new = copy.read_bytes(), other(split)
    convert(new, copy.with_name("new.beton"), progress=False)
    fresh = copy.with_name("new.beton").read_bytes()
    states = []
    for crash_at in range(1, 20):
        steps = 0

        def step(crash_at: int = crash_at) -> None:
            nonlocal steps
            steps += 1
            if steps == crash_at:
                raise Crash

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: (step(), fsync(handle)))
            patch.setattr(os, "replace", lambda path, to: (step(), replace(path, to)))
            patch.setattr(
                Path, "unlink", lambda path, **kw: (step() if path.suffix == ".json" else None, unlink(path, **kw))
            )
            try:
                convert(new, copy, progress=False)
            except Crash:
                pass
            else:
                assert copy.read_bytes() == fresh and verify(copy).fingerprint == new.fingerprint
                break
        try:
            facts = verify(copy)
        except DataError as error:
            assert "may be half written" in str(error)
            states.append("refused")
        else:
            assert copy.read_bytes() == (old if facts.fingerprint == split.fingerprint else fresh)
            states.append("old" if facts.fingerprint == split.fingerprint else "new")
        convert(split, copy, progress=False)  # whatever it was, converting again mends it
        assert copy.read_bytes() == old and verify(copy).fingerprint == split.fingerprint
    assert states == ["old"] * 3 + ["refused"] * 6 + ["new"]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from retemper.loaders import convert, split_of_arrays
from retemper.loaders.ffcv_library import ffcv_module

writer = ffcv_module("writer")
whole = writer.handle_sample

def dies_at_100(sample, i, *rest):
    if i == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(sample, i, *rest)

writer.handle_sample = dies_at_100
split = split_of_arrays("toy", "train", np.zeros((130, 6, 5, 3), np.uint8), np.arange(130) % 4, tuple("abcd"), "d" * 64)
convert(split, Path(sys.argv[1]))
"""


def test_a_killed_conversion_leaves_nothing_under_the_name(split: Split, tmp_path: Path) -> None:
    out = tmp_path / "toy.beton"
    run = subprocess.run([sys.executable, "-c", KILLED, str(out)], capture_output=True, text=True, timeout=600)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert "converting toy train: 130 to do" in run.stderr
    assert not out.exists() and not sidecar_path(out).exists()
    assert len(list(tmp_path.glob(".*.tmp"))) == 2
    convert(split, out, progress=False)  # the lock died with its holder, so the files left are nobody's
    assert verify(out).images == 130
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_dead_conversions_of_other_names_left_is_swept_but_nothing_of_a_live_one(
    split: Split, tmp_path: Path
) -> None:
    left = [tmp_path / f".{name}.0a1b2c3d.tmp" for name in ("dead.beton", "dead.beton.json", "old name.beton")]
    live = [tmp_path / f".{name}.0a1b2c3d.tmp" for name in ("live.beton", "live.beton.json")]
    foreign = [tmp_path / name for name in (".notes.0a1b2c3d.tmp", ".dead.beton.mine", "dead.beton.tmp")]
    for path in (*left, *live, *foreign):
        path.touch()
    with locked(tmp_path / ".live.beton.lock"):
        convert(split, tmp_path / "toy.beton", progress=False)
    assert not any(path.exists() for path in left) and all(path.exists() for path in (*live, *foreign))
    cached(split, tmp_path)  # a run that converts by itself, or need not any more
    assert not any(path.exists() for path in live)


def test_a_split_is_read_back_from_its_converted_file_alone(split: Split, written: Path, tmp_path: Path) -> None:
    found = beton_split(str(written))
    assert (found.name, found.split, found.classes, found.shape) == ("toy", "train", split.classes, split.shape)
    assert found.fingerprint == split.fingerprint
    np.testing.assert_array_equal(found.labels, split.labels)
    np.testing.assert_array_equal(found.images, split.images)
    convert(found, tmp_path / "again.beton", progress=False)
    assert (tmp_path / "again.beton").read_bytes() == written.read_bytes()


def test_a_sample_that_cannot_be_written_is_an_error_at_once(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFCV's own writer would wait for ever here."""

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(beton.ffcv_module("writer"), "handle_sample", full)
    with pytest.raises(DataError, match=r"cannot write .*toy.beton: No space left on device"):
        convert(split, tmp_path / "toy.beton", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [".toy.beton.lock"]


def test_a_damaged_data_set_stops_the_conversion_before_it_begins(tmp_path: Path) -> None:
    def read() -> np.ndarray:
        raise DataError("3.jpg is damaged")

    split = Split("toy", "train", np.zeros(3, np.int64), ("a",), (2, 2, 1), "", read)
    with pytest.raises(DataError, match=r"3\.jpg is damaged"):
        convert(split, tmp_path / "toy.beton")
    assert [path.name for path in tmp_path.iterdir()] == [".toy.beton.lock"]


def test_only_a_beton_is_written(split: Split, tmp_path: Path) -> None:
    (tmp_path / "folder.beton").mkdir()
    for name in ("thesis.tex", "folder.beton", "beton"):
        with pytest.raises(UsageError, match=r"must be a file named something.beton"):
            convert(split, tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        convert(split, tmp_path / "file" / "toy.beton")


def test_a_cached_file_is_written_once_and_mends_itself(split: Split, tmp_path: Path) -> None:
    path = cached(split, tmp_path / "cache")
    assert path.name == "toy-train-ffffffffffffffff.beton"
    first = path.stat().st_ino
    assert cached(split, tmp_path / "cache").stat().st_ino == first
    assert cached(other(split), tmp_path / "cache") != path
    os.truncate(path, 1000)
    assert cached(split, tmp_path / "cache").stat().st_ino != first
    changed = split_of_arrays("toy", "train", split.images, split.labels, split.classes, "f" * 16 + "0" * 48)
    assert cached(changed, tmp_path / "cache") == path  # the name holds only the beginning of the fingerprint ...
    assert verify(path).fingerprint == changed.fingerprint  # ... so the digest's is looked at
    assert verify(path).matches(split)


def test_pixels_are_not_read_where_a_cached_file_stands(split: Split, tmp_path: Path) -> None:
    cached(split, tmp_path)

    def read() -> np.ndarray:
        raise AssertionError("the pixels were read")

    lazy = Split(split.name, split.split, split.labels, split.classes, split.shape, split.fingerprint, read)
    assert cached(lazy, tmp_path).is_file()


def test_large_images_fit_a_page(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 300, 400, 3), dtype=np.uint8)
    split = split_of_arrays("large", "train", images, np.zeros(5), ("a",), "c" * 64)
    convert(split, tmp_path / "large.beton", progress=False)
    reader = beton.ffcv_module("reader").Reader(str(tmp_path / "large.beton"))
    assert reader.page_size == 1 << 23  # 16 images are 5.8 MB
    raw = np.fromfile(tmp_path / "large.beton", np.uint8)
    for image, start in zip(images, reader.metadata["f0"], strict=True):
        np.testing.assert_array_equal(raw[int(start) :][: image.size], image.reshape(-1))
