"""Runs the kernels' tests with several versions of Python, PyTorch and Triton, each in an environment of its own.

    make matrix                                          # those below
    make matrix COMBINATIONS="3.12:2.12:3.7 3.11:2.13:none"

A combination is PYTHON:TORCH:TRITON; with "none" Triton and NumPy are left out, so that the tests see PyTorch alone.
Into each environment goes retemper-kernels as it is published, then tests/kernels runs whole. Without a GPU the kernels
are interpreted, and compiled for GPUs that need not be there. An interpreter is looked for on the path, then among
those of pyenv and uv. pip's own settings say where packages come from: with the index of PyTorch's builds for CPUs in
PIP_EXTRA_INDEX_URL, an environment takes one gigabyte in place of seven.

One line says how each went. The exit code is 1 where one failed, or none could be tried.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Every version at least once; Triton as that PyTorch brings it for GPUs, and with one PyTorch every Triton.
COMBINATIONS = """
    3.10:2.10:3.6 3.12:2.11:3.6 3.12:2.12:3.7 3.13:2.14:3.8
    3.11:2.13:none 3.11:2.13:3.6 3.11:2.13:3.7 3.11:2.13:3.8 3.11:2.13:3.9
""".split()
VERSIONS = """
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
def of(name):
    try: return version(name)
    except PackageNotFoundError: return "none"
print(python_version(), *map(of, ("torch", "triton", "numpy")))
"""
WORDS = {True: "passed", False: "FAILED", None: "not tried"}


class Unavailable(Exception):
    """What a combination needs is not to be had on this machine."""


def main(combinations: list[str]) -> int:
    """Try the combinations, those of one Python and PyTorch in one environment; return the exit code."""
    environments: dict[tuple[str, str], list[str]] = {}
    for combination in combinations:
        python, torch, triton = combination.split(":")
        environments.setdefault((python, torch), []).append(triton)
    results = []
    print(f"{'Python':9}{'torch':14}{'Triton':9}{'NumPy':9}", flush=True)
    for (python, torch), tritons in environments.items():
        for versions, passed, said in tried(python, torch, tritons):
            print(*(f"{v:{w}}" for v, w in zip(versions, (8, 13, 8, 8), strict=True)), WORDS[passed], said, flush=True)
            results.append(passed)
    counts = [results.count(outcome) for outcome in WORDS]
    print("{} passed, {} failed, {} skipped".format(*counts))
    return int(counts[1] > 0 or counts[0] == 0)


Result = tuple[list[str], bool | None, str]  # the versions, whether the tests passed (None: not run), the last words


def tried(python: str, torch: str, tritons: list[str]) -> Iterator[Result]:
    """Make the environment of one Python and one PyTorch, and run the tests in it with each Triton."""
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        folder = Path(name)
        try:
            environment(folder, interpreter(python), torch)
        except Unavailable as reason:
            yield from (([python, torch, triton, ""], None, str(reason)) for triton in tritons)
            return
        for triton in tritons:
            try:
                choose(folder, triton)
            except Unavailable as reason:
                yield [python, torch, triton, ""], None, str(reason)
                continue
            versions = run(folder, "-c", VERSIONS).stdout.split()
            yield versions, *tested(folder)


def interpreter(version: str) -> str:
    """Return the path of a Python of that version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    if shutil.which("uv"):
        found = subprocess.run(["uv", "python", "find", version], capture_output=True, text=True)
        places.append(found.stdout.strip() if found.returncode == 0 else None)
    for place in filter(None, places):
        asked = subprocess.run([place, "-c", "import ensurepip, venv"], capture_output=True)
        if asked.returncode == 0:  # a shim of pyenv may stand for none
            return str(place)
    raise Unavailable(f"no Python {version} on the path, nor of pyenv or uv")


def environment(folder: Path, python: str, torch: str) -> None:
    """Make an environment with PyTorch, retemper-kernels and what the tests are written with."""
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
    install(folder, f"torch=={torch}.*", "pytest", "hypothesis")
    shutil.copytree(ROOT / "publish/retemper-kernels", folder / "source")  # what it links to; no build stays here
    install(folder, "--no-deps", str(folder / "source"))


def choose(folder: Path, triton: str) -> None:
    """Have that Triton in the environment, and NumPy for its interpreter; or neither."""
    run(folder, "-m", "pip", "uninstall", "--yes", "triton", "numpy")
    if triton != "none":  # PyTorch's own metadata names one Triton, and it works with others
        numpy = (
            "numpy<2.4" if triton == "3.6" else "numpy"
        )  # whose interpreter takes an array of one number as a number
        install(folder, "--no-deps", f"triton=={triton}.*", numpy)


def install(folder: Path, *words: str) -> None:
    """Install with pip."""
    done = run(folder, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *words)
    if done.returncode:
        raise Unavailable(done.stderr.strip().splitlines()[-1])


def tested(folder: Path) -> tuple[bool, str]:
    """Run the kernels' tests; return whether they passed, and what they say last."""
    begin = time.monotonic()
    done = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=10", "--tb=short", "tests/kernels")
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["said nothing"]
    if done.returncode:
        print(*lines[-200:-1], sep="\n", file=sys.stderr)
    return done.returncode == 0, f"{lines[-1].partition(' in ')[0]} in {time.monotonic() - begin:.0f} s"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the environment's Python at the top of the checkout."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = own | {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [str(folder / "venv/bin/python"), *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or COMBINATIONS))
