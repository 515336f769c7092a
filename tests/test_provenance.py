"""A result names the commit that its code ran from, and no other checkout's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retemper import provenance

ASK = "from retemper.provenance import commit, uncommitted_changes; print(commit(), uncommitted_changes())"


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    own |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}  # no signatures or hooks of the user's
    return subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit, and in it a package of the two modules."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    package = tmp_path / "src" / "retemper"
    package.mkdir(parents=True)
    for name in ("__init__.py", "provenance.py"):
        shutil.copy(Path(provenance.__file__).with_name(name), package)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "x")
    return tmp_path


def asked(path: Path, **variables: str) -> list[str]:
    """Return `commit` and `uncommitted_changes` of the package in `path`, by a process that stands elsewhere."""
    command, env = [sys.executable, "-c", ASK], os.environ | {"PYTHONPATH": str(path)} | variables
    found = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def test_a_checkout_is_named_by_its_commit(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert asked(checkout / "src") == [head, "False"]
    (checkout / "new.txt").touch()
    assert asked(checkout / "src") == [head, "False"]
    with open(checkout / "src/retemper/__init__.py", "a") as file:
        file.write("x = 1\n")
    assert asked(checkout / "src") == [head, "True"]


def test_a_repository_that_a_hook_of_git_names_is_not_taken_for_the_checkouts(checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkout / "src/retemper", other)
    git(other, "init", "--quiet")
    git(other, "add", ".")
    git(other, "commit", "--quiet", "--message", "another")
    assert asked(checkout / "src", GIT_DIR=str(other / ".git")) == [git(checkout, "rev-parse", "HEAD"), "False"]


def test_a_package_installed_within_a_checkout_is_not_of_its_commit(checkout: Path) -> None:
    site = checkout / ".venv/site-packages"
    shutil.copytree(checkout / "src/retemper", site / "retemper")
    assert asked(site) == ["None", "None"]


def test_a_copy_without_git_is_named_by_the_variable(checkout: Path, tmp_path: Path) -> None:
    assert asked(checkout / "src", RETEMPER_COMMIT="abc") == [git(checkout, "rev-parse", "HEAD"), "False"]
    shutil.copytree(checkout / "src/retemper", tmp_path / "copy/retemper")
    shutil.rmtree(checkout / ".git")
    assert asked(tmp_path / "copy", RETEMPER_COMMIT="abc") == ["abc", "None"]


def test_the_clocks_are_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho clocks.sm\necho 1980 MHz\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.clocks() == "clocks.sm; 1980 MHz"
    tool.unlink()
    assert provenance.clocks() is None


def test_without_git_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None and provenance.uncommitted_changes() is None and provenance.driver() is None


def test_the_driver_is_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.driver() == "580.1"
    tool.write_text("#!/bin/sh\necho no devices\nexit 1\n")
    assert provenance.driver() is None
