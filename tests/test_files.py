"""Files are whole or as they were, locks end with their holders, JSON is strict."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retemper import files
from retemper.errors import DataError, UsageError
from retemper.files import (
    atomic_write,
    file_digest,
    finite,
    json_bytes,
    locked,
    read_json,
    sweep,
    write_atomically,
    write_json,
)

HOLDER = """
import sys
from retemper.files import locked
with locked(sys.argv[1], "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.safetensors"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if moment == "write":
        with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
            file.write(b"half")
            file.flush()
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt
    else:
        monkeypatch.setattr(os, moment, fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
        monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_content_reaches_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, order = tmp_path / "config.json", []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        assert Path(source).parent == path.parent
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_atomically(str(path), b"new content")
    assert order == [len(b"new content"), "rename", "folder"]
    assert path.read_bytes() == b"new content"


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "atomic", b"")
    with locked(tmp_path / ".lock"):
        pass
    modes = {name: (tmp_path / name).stat().st_mode for name in ("plain", "atomic", ".lock")}
    assert len(set(modes.values())) == 1, modes


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "gone" / "file", b"x")


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    """The name holds what a pattern would take for a wild card."""
    path, others = tmp_path / "a[1]*.json", [".a1x.json.12.tmp", ".a[1]*.json.lock", "a[1]*.json", ".b.json.12.tmp"]
    for name in [".a[1]*.json.0123abcd.tmp", *others]:
        (tmp_path / name).touch()
    sweep(path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def killed(work: Callable[[], object]) -> None:
    """Let a process die in `work`, or at its end."""
    if not (pid := os.fork()):
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def test_what_a_dead_process_left_is_swept_by_the_next_writer_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write() -> None:
        with atomic_write(path):
            os._exit(0)

    killed(write)
    (left,) = os.listdir(tmp_path)
    with atomic_write(path) as file:
        sweep(path)
        assert os.listdir(tmp_path) == [Path(file.name).name] != [left]
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_temporary_file_that_another_process_takes_for_a_dead_one_s_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, names = files.fcntl.flock, []

    def lock_late(file: Any, how: int) -> None:
        if not names:
            os.unlink(file.name)  # as `sweep` does between the opening and the lock
        names.append(file.name)
        lock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", lock_late)
    write_atomically(tmp_path / "file", b"content")
    assert len(names) == 2 and (tmp_path / "file").read_bytes() == b"content" and os.listdir(tmp_path) == ["file"]


def test_the_kernel_releases_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=r"^busy, wait$"), locked(lock, "busy, wait"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(str(lock), "busy"):
        pass
    with locked(lock):  # without a message it waits, here for nobody
        assert lock.exists()
    assert lock.exists()


def test_a_lock_makes_its_folder_or_says_why_not(tmp_path: Path) -> None:
    with locked(tmp_path / "a/b/.lock", "busy"):
        assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / ".lock", "busy"):
        pass


def test_a_lock_is_released_when_its_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / ".lock", "busy"):
        raise ZeroDivisionError
    with locked(tmp_path / ".lock", "busy"):
        pass


def test_the_digest_is_sha256(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(files, "BLOCK", 2)
    monkeypatch.setattr(files, "SHOW_FROM", 3)
    assert file_digest(str(tmp_path / "abc")) == hashlib.sha256(b"abc").hexdigest()
    assert capsys.readouterr().err == "checking abc: 2 to do\n"


def test_json_is_strict_and_ends_with_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(str(path), {"a": (1, 2.5), "b": None})
    assert path.read_bytes() == json_bytes({"a": [1, 2.5], "b": None}) and path.read_text().endswith("}\n")
    assert read_json(path) == read_json(str(path)) == {"a": [1, 2.5], "b": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"a": [1, 2.5], "b": None}
    content = {"a": [float("inf"), (float("nan"), 1.0)], "b": {"c": np.float64("nan")}, "d": "nan"}
    write_json(path, finite(content))
    assert read_json(path) == {"a": [None, [None, 1.0]], "b": {"c": None}, "d": "nan"}


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff", "[" * 10_000, '{"a": ' * 500 + "1" + "}" * 500])
def test_damaged_json_is_refused_with_its_path(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(DataError, match=r"^\S+x\.json is damaged \([^\n]+\)$"):
        read_json(path)
    with pytest.raises(DataError, match=r"gone\.json does not exist: is .* the folder of a run\?"):
        read_json(tmp_path / "gone.json")


def test_the_ground_needs_no_library() -> None:
    code = "import sys, retemper.errors, retemper.console, retemper.files, retemper.provenance; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {name.partition(".")[0] for name in names} & {"torch", "numpy", "triton", "filelock", "tqdm"}
    assert json.dumps(sorted(name for name in names if name.startswith("retemper."))) == json.dumps(
        [f"retemper.{name}" for name in ("console", "errors", "files", "provenance", "shape")]
    )
