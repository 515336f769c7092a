"""The kernels without Triton: everything imports, and every operation takes its reference."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retemper.kernels.language import cdiv, next_power_of_2, triton

WITHOUT_TRITON = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "numpy"):
            raise ModuleNotFoundError(name, name=name.partition(".")[0])

sys.meta_path.insert(0, Blocked())
import torch
from retemper import kernels
from retemper.kernels import language
assert not language.HAS_TRITON
clean, label = torch.rand(2, 3, 4, 4), torch.tensor([0, 2])
adv = kernels.random_start_(torch.empty_like(clean), clean, 0.1, seed=0)
kernels.pgd_step_(adv, torch.ones_like(adv), clean, 0.01, 0.1)
logits = torch.randn(2, 3, requires_grad=True)
kernels.class_temperature_kl(logits, torch.randn(2, 3), label, torch.ones(3)).backward()
kernels.class_sums(logits.detach(), label, 3)
kernels.epilogue(clean, torch.zeros(3))
kernels.augment(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), label)
assert not {"triton", "numpy", "torch._dynamo"} & set(sys.modules)
"""


def test_every_operation_works_without_triton_and_numpy() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)


@pytest.mark.parametrize(
    ("source", "imports"), [("", True), ("import no_such_module", False)], ids=["a folder of that name", "broken"]
)
def test_what_is_called_triton_and_is_not(source: str, imports: bool, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(source)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from retemper.kernels import language"
    done = subprocess.run([sys.executable, "-c", f"{code}; assert not language.HAS_TRITON"], capture_output=True)
    assert (done.returncode == 0) == imports, done.stderr


@pytest.mark.triton
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 1023, 1024, 1025])
def test_whole_numbers_are_tritons(number: int) -> None:
    assert next_power_of_2(number) == triton.next_power_of_2(number)
    assert cdiv(number, 7) == triton.cdiv(number, 7) == math.ceil(number / 7)
