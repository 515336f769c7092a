"""The kernels without the rest: the distribution retemper-kernels, and the repository for the Hugging Face Hub."""

import json
import os
import runpy
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from retemper import __version__, kernels

ROOT = Path(__file__).parent.parent
# What torch itself imports. Everything else that is installed here stands for what may not be installed elsewhere.
TORCH_ALONE = """
import sys
from importlib.metadata import packages_distributions

torch = "torch torchgen functorch filelock typing_extensions sympy mpmath networkx jinja2 markupsafe fsspec".split()
blocked = packages_distributions().keys() - {*torch, *ALLOWED}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, TESTS)
from each_operation import run_each
"""
OF_THE_WHEEL = """
from retemper import kernels
assert kernels.__file__.startswith(SITE), kernels.__file__
run_each(kernels)
assert not {"triton", "numpy"} & set(sys.modules)
"""
# As their library loads a build: the package's file, under the name that metadata.json gives it.
OF_THE_HUB = """
import importlib.util, json
from pathlib import Path

build = Path(TREE, "build", "torch-cpu")
name = json.loads((build / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
package = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
found = run_each(package)
assert not any(module.partition(".")[0] == "retemper" for module in sys.modules)

blocked.discard("retemper")
import torch
from retemper import kernels
for operation, expected in run_each(kernels).items():
    assert found[operation].equal(expected), operation
assert package.__all__ == kernels.__all__
own, usual = (copy.operators.LIBRARY._op_defs for copy in (package, kernels))
assert {one.partition("::")[2] for one in own} == {one.partition("::")[2] for one in usual}
assert all(one.startswith(name + "::") for one in own)
"""


def run_beside_torch_alone(code: str, allowed: tuple[str, ...] = (), path: str = "", **names: str) -> None:
    """Run code where only torch and the packages `allowed` can be imported; the names are strings in it."""
    given = {"ALLOWED": list(allowed), "TESTS": str(ROOT / "tests"), **names}
    lines = "".join(f"{name} = {value!r}\n" for name, value in given.items())
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", lines + TORCH_ALONE + code]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of the kernels through its source distribution, and return its path."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), "publish/retemper-kernels"]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def described(wheel: Path) -> Message:
    """The metadata of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_kernels_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    of_kernels = {f"retemper/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert held == {"retemper/__init__.py", "retemper/py.typed"} | of_kernels


def test_the_wheel_needs_torch_and_nothing_else(described: Message) -> None:
    assert described.get_all("Requires-Dist") == ["torch>=2.10"]
    assert described["Name"] == "retemper-kernels" and described["Version"] == __version__


def test_every_operation_of_the_wheel_runs_beside_torch_alone(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)  # all that installing a wheel of pure Python does
    run_beside_torch_alone(OF_THE_WHEEL, ("retemper",), str(tmp_path), SITE=str(tmp_path))


def test_every_operation_is_among_those_run() -> None:
    operations = {name for name in kernels.__all__ if f"{name.rstrip('_')}_reference" in kernels.__all__}
    run_each = runpy.run_path(str(ROOT / "tests/each_operation.py"))["run_each"]
    assert run_each(kernels).keys() == operations


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository for the Hub."""
    folder = tmp_path_factory.mktemp("hub") / "tree"
    subprocess.run([sys.executable, str(ROOT / "publish/hugging_face.py"), str(folder)], check=True)
    return folder


def test_the_repository_of_the_hub_has_what_their_builder_takes_and_makes(tree: Path) -> None:
    modules = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {path.name for path in (tree / "torch-ext/retemper_kernels").iterdir()} == modules
    assert {path.name for path in tree.iterdir()} > {"build.toml", "flake.nix", "CARD.md", "LICENSE"}
    for build in (tree / "build").iterdir():
        what = json.loads((build / "metadata.json").read_text())
        assert build.name == f"torch-{what['backend']['type']}"
        assert {path.name for path in build.iterdir()} == modules | {"_ops.py", "metadata.json"}
        assert what["digest"]["files"].keys() == modules | {"_ops.py"}


def test_a_build_of_the_hub_runs_beside_the_usual_kernels_and_agrees_to_the_bit(tree: Path) -> None:
    run_beside_torch_alone(OF_THE_HUB, path=str(ROOT / "src"), TREE=str(tree))


def test_a_folder_that_holds_something_is_left_alone(tree: Path) -> None:
    command = [sys.executable, str(ROOT / "publish/hugging_face.py"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"{tree}: is not empty; name another folder, or empty it\n"
