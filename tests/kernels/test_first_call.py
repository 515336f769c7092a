"""What the first call of an operation imports: nothing that takes seconds."""

import os
import subprocess
import sys

FIRST_CALL = """
import sys
import torch
from retemper import kernels
clean, label = torch.rand(2, 3, 4, 4), torch.tensor([0, 2])
student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
before = set(sys.modules)
for call in CALLS:
    exec(call)
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert "torch._dynamo" not in sys.modules and not new & {"sympy", "torch._inductor", "torch.fx", "networkx"}, call
"""
CALLS = [
    "kernels.random_start_(torch.empty_like(clean), clean, 0.1, seed=0)",
    "kernels.random_start_(torch.empty_like(clean), clean, 0.1, seed=0, noise='normal', norm='l2')",
    "kernels.pgd_step_(clean.clone(), clean, clean, 0.01, 0.1)",
    "kernels.pgd_step_(clean.clone(), clean, clean, 0.01, 0.1, norm='l2')",
    "kernels.class_temperature_kl(student, teacher, label, torch.ones(3)).backward()",
    "kernels.class_temperature_kl(student, teacher, label, 2.0).backward()",
    "kernels.class_temperature_kl_grad_(student.detach(), teacher, label, torch.ones(3))",
    "kernels.class_sums(teacher, label, 3)",
    "kernels.epilogue(clean.requires_grad_(), torch.zeros(3)).sum().backward()",
    "kernels.augment(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), label)",
]


def test_imports_no_compiler() -> None:
    code = FIRST_CALL.replace("CALLS", repr(CALLS))
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)
