"""What every folder of tests may use."""

import importlib.util
import sys
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
