"""Packages that import torchvision where its own library cannot be loaded."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from retemper.packages import VISION_OPERATORS, import_package

VISION = """
import sys, torch
sys.tried = getattr(sys, "tried", 0) + 1  # as torchvision beside a torch without CUDA
if sys.tried == 1 or not hasattr(torch.ops.torchvision, "nms") or not hasattr(torch.ops.torchvision, "qnms"):
    raise RuntimeError("operator torchvision::nms does not exist")
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "tried", 0, raising=False)
    return tmp_path


def test_a_package_that_imports_torchvision_is_imported(site: Path) -> None:
    (site / "vision_stand_in.py").write_text(VISION)
    (site / "above_vision.py").write_text("import warnings, vision_stand_in\nwarnings.warn('old')\nname = 'above'")
    assert import_package("above_vision").name == "above"
    assert all(hasattr(torch.ops.torchvision, name) for name in VISION_OPERATORS)


def test_the_real_one_is_imported() -> None:
    if find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    assert import_package("torchvision.transforms").ToTensor


def test_other_errors_come_through(site: Path) -> None:
    (site / "broken_package.py").write_text("raise RuntimeError('broken')")
    with pytest.raises(RuntimeError, match="broken"):
        import_package("broken_package")
    with pytest.raises(ModuleNotFoundError):
        import_package("no_such_package")
