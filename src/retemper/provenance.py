"""What a result was made with: the versions, the commit of the source, the driver of the GPU."""

import os
import shutil
import subprocess
from pathlib import Path

OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # git sets them for its hooks, of whatever repository


def versions() -> dict[str, str]:
    """Return the versions of retemper, torch, Python, triton where it is installed, and timm where it is in use."""
    import platform
    import sys

    import torch

    from retemper import __version__

    found = {"retemper": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if timm := sys.modules.get("timm"):
        found["timm"] = str(getattr(timm, "__version__", "unknown"))
    try:
        from triton import __version__ as triton
    except ImportError:
        return found
    return found | {"triton": triton}


def commit() -> str | None:
    """Return the commit that the running source is checked out at; None for an installed package, or without git.

    A checkout that was copied without its .git says what the variable RETEMPER_COMMIT says.
    """
    return _head() or os.environ.get("RETEMPER_COMMIT") or None


def uncommitted_changes() -> bool | None:
    """Return whether tracked files of the checkout differ from its commit; None where git does not know one."""
    return None if _head() is None else bool(_git("status", "--porcelain", "--untracked-files=no"))


def driver() -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    words = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    return words[0] if words else None


def clocks() -> str | None:
    """Return what the GPU's clocks are and may be, its temperature and power, in nvidia-smi's words; None without."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv").replace("\n", "; ") or None


def _head() -> str | None:
    """Return the commit of the git checkout that this module lies in, if it belongs to one."""
    return _git("rev-parse", "HEAD") or None if _git("ls-files", Path(__file__).name) else None


def _git(*words: str) -> str:
    """Return what git says of the folder that this module lies in; "" where it fails."""
    return _output("git", "-C", str(Path(__file__).resolve().parent), *words)


def _output(program: str, *words: str) -> str:
    """Return what a program prints, stripped; "" where it is not installed or fails."""
    if not shutil.which(program):
        return ""
    own = {name: value for name, value in os.environ.items() if name not in OF_A_HOOK}
    answer = subprocess.run([program, *words], env=own, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else ""
