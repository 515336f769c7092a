"""What every folder of tests may use, and how the suite stays small in memory."""

import ctypes
import gc
import importlib
import importlib.util
import inspect
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU, Triton's functions are made to be interpreted. That is settled while they are imported, so it comes
# first; and is taken back, so that no process a test starts inherits it. Only tests/kernels drives the interpreter: the
# other folders take the reference, which is quicker.
with pytest.MonkeyPatch.context() as during_import:
    if not torch.cuda.is_available():
        during_import.setenv("TRITON_INTERPRET", "1")
    from retemper import kernels
    from retemper.kernels import runtime

    for found in pkgutil.iter_modules(kernels.__path__):  # some are the engine's alone, which the package does not load
        importlib.import_module(f"{kernels.__name__}.{found.name}")
runtime.TRITON_ON_CPU = False
if torch.cuda.is_available():  # without it cuBLAS refuses deterministic algorithms, and looks at it once
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell: tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the tests' tensors are too small to share, and a busy machine makes sharing slow
# The same examples every time, on every machine, however slow it is.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

GROWTH = 100 << 20  # bytes, after which a test's memory is given back at once
RESIDENT = pytest.StashKey[int]()  # bytes, when memory was last given back
PEAKS = pytest.StashKey[dict[str, str]]()  # what each process took


def resident() -> int:
    """The bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def pytest_collection_finish() -> None:
    """Keep what every test needs, a million objects, out of each search for garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter's end find all that is to go: Triton's library complains of what is left."""
    gc.unfreeze()


def give_memory_back(config: pytest.Config) -> None:
    """Free what is garbage, and return to the system what is free: glibc keeps it, gigabytes of networks otherwise."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    config.stash[RESIDENT] = resident()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Give memory back after every file, and after a test that took much."""
    done = yield
    last_of_file = nextitem is None or nextitem.path != item.path
    if last_of_file or resident() > item.config.stash.get(RESIDENT, 0) + GROWTH:
        give_memory_back(item.config)
    if last_of_file:
        gc.freeze()  # modules that the file imported
    return done


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked `own_process` in a fork of this process, which takes the test's memory with it."""
    if pyfuncitem.get_closest_marker("own_process") is None:
        return None
    if torch.cuda.is_available():  # CUDA does not survive a fork
        return None
    given = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    with tempfile.TemporaryFile("w+") as failure:
        pid = fork()
        if not pid:
            code = 1
            try:
                pyfuncitem.obj(**given)
                code = 0
            except BaseException:
                traceback.print_exc(file=failure)
                failure.flush()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        failure.seek(0)
        if status:
            pytest.fail(failure.read() or f"its process ended with {os.waitstatus_to_exitcode(status)}", pytrace=False)
    return True


def fork() -> int:
    """`os.fork`, without the warning that Python 3.12 gives beside other threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return os.fork()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Note the peak of this process's memory, and of the largest process that it started and waited for."""
    own, child = (resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    said = f"{own:.2f} GiB, its largest child {child:.2f} GiB"
    getattr(session.config, "workeroutput", {})["peak"] = said
    session.config.stash.setdefault(PEAKS, {})["this process"] = said


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect what a worker of pytest-xdist noted."""
    node.config.stash.setdefault(PEAKS, {})[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak", "unknown")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how much memory the suite took; a worker should stay below 1.5 GiB."""
    for name, peak in config.stash.get(PEAKS, {}).items():
        terminalreporter.write_line(f"peak memory of {name}: {peak}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def digits_of_float32(device: torch.device) -> None:
    """On a GPU, products and convolutions have the digits of float32, the same ones each time, unless a test says else.

    PyTorch's defaults there are TF32, and convolutions that add up in an order of chance.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True


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
    """Return the cache folder of runs that name no --cache, in place of the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("retemper.console"):  # retemper-kernels, the kernels alone, has none
            patch.setattr("retemper.console.LINE_EVERY_S", inf)  # a slow machine adds no lines to what a test reads
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "retemper"


SHORT = ["--attack-steps", "2", "--holdout-per-class", "5", "--select-steps", "2", "--batch-size", "256"]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: SAT on digits, two short epochs."""
    from retemper.cli import run  # not above: the engine must find Triton imported as it is meant to be

    out = tmp_path_factory.mktemp("teacher") / "sat"
    assert run(["train", "sat:digits", "--epochs", "2", "--out", str(out), *SHORT]) == 0
    return out


@pytest.fixture
def train(teacher: Path) -> Callable[..., int]:
    """Train a student of `teacher` on digits for two short epochs; the exit code."""
    from retemper.cli import run

    def run_it(recipe: str, out: Path, *options: str) -> int:
        words = ["train", recipe, "--teacher", str(teacher), "--out", str(out), "--epochs", "2", *SHORT, *options]
        return run(words)

    return run_it


@pytest.fixture
def values_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernels' references look at no value on a CPU, where it costs nothing: they act as on a GPU."""
    monkeypatch.setattr(importlib.import_module("retemper.kernels.philox"), "_numpy", lambda: None)
    monkeypatch.setattr(importlib.import_module("retemper.kernels.class_sums"), "_all_known", lambda *_: False)
