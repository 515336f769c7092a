"""The kernels' tests drive the kernels: compiled where there is a GPU, interpreted where there is none."""

from collections.abc import Iterator

import pytest
import torch

from retemper.kernels import runtime


@pytest.fixture(autouse=True, scope="module")
def triton_path() -> Iterator[None]:
    """The Triton path on any device, and fresh memory full of NaN, so that what a kernel forgets to write shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "TRITON_ON_CPU", True)
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")  # as when the kernels were imported (tests/conftest.py)
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of a CPU without the interpreter: the references."""
    monkeypatch.setattr(runtime, "TRITON_ON_CPU", False)
