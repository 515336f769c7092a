"""What a result was made with: versions, commit, driver."""

import shutil
import subprocess
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Of retemper, torch, triton and Python."""
    import platform

    import triton

    from retemper import __version__

    return {
        "retemper": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit that this module's source is checked out at; None where git does not track it."""

    def git(*words: str) -> str:
        answer = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    here = Path(__file__).resolve().parent
    return git("rev-parse", "HEAD") or None if shutil.which("git") and git("ls-files", Path(__file__).name) else None


def driver() -> str | None:
    """The version of the NVIDIA driver, if there is one to ask."""
    if not shutil.which("nvidia-smi"):
        return None
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(words, capture_output=True, text=True)
    return answer.stdout.split()[0] if answer.returncode == 0 and answer.stdout.split() else None


def uncommitted_changes() -> bool | None:
    """Whether the source differs from its commit; None where git does not track it."""
    if commit() is None:
        return None
    words = ["git", "status", "--porcelain", "--untracked-files=no"]
    return bool(subprocess.run(words, cwd=Path(__file__).resolve().parent, capture_output=True).stdout.strip())
