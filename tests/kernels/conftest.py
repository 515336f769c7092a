"""The kernels' tests drive the kernels: compiled where there is a GPU, interpreted where there is none.

Without Triton, or without the NumPy that its interpreter needs, they drive the references.
"""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from retemper.kernels import launch, runtime

# What the kernels do not need, but Triton on this machine does, and is not installed.
NEEDED = ["triton"] if torch.cuda.is_available() else ["triton", "numpy"]
MISSING = [name for name in NEEDED if find_spec(name) is None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test of Triton's side where it cannot run: one so marked, or a case of the path "triton"."""
    case = getattr(getattr(item, "callspec", None), "params", {})
    of_triton = "triton" in [value for value in case.values() if isinstance(value, str)]
    if MISSING and (of_triton or item.get_closest_marker("triton")):
        pytest.skip(f"needs {' and '.join(MISSING)}")


def mend_the_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreters of Triton 3.6 and 3.7 take the number of a NaN and a number as maximum, as a GPU does."""
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder

    patch.setattr(InterpreterBuilder, "create_maxnumf", lambda self, lhs, rhs: self.binary_op(lhs, rhs, numpy.fmax))


@pytest.fixture(autouse=True, scope="module")
def triton_path() -> Iterator[None]:
    """The Triton path on any device, and fresh memory full of NaN, so that what a kernel forgets to write shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "TRITON_ON_CPU", not MISSING)
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")  # as when the kernels were imported (tests/conftest.py)
        if runtime.TRITON_ON_CPU:
            mend_the_interpreter(patch)
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def unprepared() -> Iterator[None]:
    """No launch is prepared: a test may have replaced a kernel, or a constant that launches follow from."""
    launch.READY.clear()
    yield
    launch.READY.clear()


@pytest.fixture
def reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of a CPU without the interpreter: the references."""
    monkeypatch.setattr(runtime, "TRITON_ON_CPU", False)


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> str:
    """Both paths of a CPU; on a GPU there is one for these dtypes."""
    if request.param == "reference":
        if device.type != "cpu":
            pytest.skip("the reference is a CPU's path")
        monkeypatch.setattr(runtime, "TRITON_ON_CPU", False)
    return request.param
