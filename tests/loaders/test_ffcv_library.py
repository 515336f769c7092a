"""An FFCV that is missing or broken is a reason, not a traceback."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from retemper.loaders import UsageError, ffcv_problem
from retemper.loaders import ffcv_library as module
from retemper.loaders.ffcv_library import ffcv_module


@pytest.fixture
def without_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the process look as if FFCV had never been imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("without_ffcv")
def test_a_missing_ffcv_is_met_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert ffcv_problem() == "ffcv is not installed"
    with pytest.raises(UsageError, match=r"ffcv is not installed: run `apt-get install pkg-config"):
        ffcv_module("writer")


@pytest.mark.usefixtures("without_ffcv")
@pytest.mark.parametrize(
    "error", ["ImportError('libopencv_core.so.406: cannot open')", "OSError('libc.so.6')", "AttributeError('np.bool')"]
)
def test_a_broken_ffcv_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv" / "__init__.py").write_text(f"import torch\ntorch.set_num_threads(1)\nraise {error}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    before = torch.get_num_threads()
    message = error.split("'")[1]
    assert ffcv_problem() == f"ffcv is installed but does not load: {message}"
    assert torch.get_num_threads() == before
