"""What every folder of tests may use."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Without a GPU, Triton's functions are made to be interpreted. That is settled while they are imported, so it comes
# first; and is taken back, so that no process a test starts inherits it. Only tests/kernels drives the interpreter: the
# other folders take the reference, which is quicker.
with pytest.MonkeyPatch.context() as during_import:
    if not torch.cuda.is_available():
        during_import.setenv("TRITON_INTERPRET", "1")
    from retemper.kernels import runtime
runtime.TRITON_ON_CPU = False
torch.set_num_threads(1)  # the tests' tensors are too small to share, and a busy machine makes sharing slow


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def datafiles() -> ModuleType:
    """tests/datafiles.py, the makers of tiny data sets; loaded by path, since the tests are no package."""
    spec = importlib.util.spec_from_file_location("datafiles", Path(__file__).with_name("datafiles.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["datafiles"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where runs that name no --cache keep things, in place of the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "retemper"


SHORT = ["--attack-steps", "2", "--holdout-per-class", "5", "--select-steps", "2", "--batch-size", "256"]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: SAT on digits, two short epochs."""
    from retemper.engine.cli import run  # not above: the engine must find Triton imported as it is meant to be

    out = tmp_path_factory.mktemp("teacher") / "sat"
    assert run(["train", "sat:digits", "--epochs", "2", "--out", str(out), *SHORT]) == 0
    return out


@pytest.fixture
def train(teacher: Path) -> Callable[..., int]:
    """Train a student of `teacher` on digits for two short epochs; the exit code."""
    from retemper.engine.cli import run

    def run_it(recipe: str, out: Path, *options: str) -> int:
        words = ["train", recipe, "--teacher", str(teacher), "--out", str(out), "--epochs", "2", *SHORT, *options]
        return run(words)

    return run_it
