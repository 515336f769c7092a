"""What a process pays once: the imports, and the first call of each kernel and of the chain that it stands for.

Each figure comes from a process of its own, which imports torch and retemper.kernels, makes the inputs and then times
one call. On a GPU the call ends when the device has done its work, and ours compiles its kernel, or finds it in
Triton's cache on disk.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from retemper.bench.case import Case, Contender, PlannedCase, Request
from retemper.bench.kernel_cases import EAGER, OURS
from retemper.kernels.language import HAS_TRITON

ROUNDS = 5
INPUTS = """
import torch
from retemper.kernels import *
from torch.nn import functional as F
clean, adv, grad, x = torch.rand(4, 4, 3, 4, 4).unbind()
student, teacher = torch.randn(2, 4, 10).unbind()
label, temperature, shift = torch.arange(4), torch.linspace(0.5, 5, 10), torch.rand(3)
image, view = torch.zeros(4, 4, 4, 3, dtype=torch.uint8), torch.arange(4)
seed, zeros = torch.zeros(1, dtype=torch.int64), torch.zeros(10)
"""
SCRIPT = f"""
import sys
from time import perf_counter
what, device = sys.argv[1:]
for name in ("torch", "triton", "retemper.kernels"):  # the time of each without those before it
    if name != "triton" or what == "import triton":
        start = perf_counter()
        __import__(name)
        taken = perf_counter() - start
    if what == "import " + name:
        print(taken)
        sys.exit()
import torch
torch.set_default_device(device)
{INPUTS}
if "backward" in what:
    student = student.clone().requires_grad_()
call = compile(what, "call", "eval")
if device != "cpu":
    torch.cuda.synchronize()
start = perf_counter()
eval(call)
if device != "cpu":
    torch.cuda.synchronize()
print(perf_counter() - start)
"""
CALLS = {  # a name of kernels.py -> ours and the chain, with the names of INPUTS
    "pgd_step_": (
        "pgd_step_(adv, grad, clean, 0.01, 0.03)",
        "torch.min(torch.max(adv + 0.01 * grad.sign(), clean - 0.03), clean + 0.03).clamp(0, 1)",
    ),
    "random_start_": (
        "random_start_(adv, clean, 0.03, seed=seed)",
        "(clean + torch.empty_like(clean).uniform_(-0.03, 0.03)).clamp_(0, 1)",
    ),
    "class_temperature_kl forward": (
        "class_temperature_kl(student, teacher, label, temperature)",
        "F.kl_div(student.log_softmax(1), (teacher / temperature[label][:, None]).softmax(1), reduction='batchmean')",
    ),
    "class_temperature_kl forward and backward": (
        "class_temperature_kl(student, teacher, label, temperature).backward()",
        "F.kl_div(student.log_softmax(1), (teacher / temperature[label][:, None]).softmax(1), reduction='batchmean')"
        ".backward()",
    ),
    "class_temperature_kl_grad_": (
        "class_temperature_kl_grad_(student, teacher, label, temperature)",
        "student.softmax(1) - (teacher / temperature[label][:, None]).softmax(1)",
    ),
    "class_temperature_js forward": (
        "class_temperature_js(student, teacher, label, temperature)",
        "F.kl_div(((student.softmax(1) + teacher.softmax(1)) / 2).log(), teacher.softmax(1), reduction='batchmean')",
    ),
    "class_pair forward": (
        "class_pair(student, teacher, student.softmax(1))",
        "(student.softmax(1) * (student - teacher) ** 2).sum(1).mean()",
    ),
    "class_sums": (
        "class_sums(student, label, 10)",
        "zeros.index_add(0, label, F.cross_entropy(student, label, reduction='none'))",
    ),
    "augment": ("augment(image, view)", "image.flip(2).permute(0, 3, 1, 2).float() / 255"),
    "epilogue shift relu": ("epilogue(x, shift)", "F.relu(x + shift[:, None, None])"),
}


def first_call_cases(request: Request) -> Iterator[PlannedCase]:
    """Yield the cases of the imports and of the first call of each kernel; with --quick a few processes alone."""
    imports = ["import torch", *(["import triton"] if HAS_TRITON else []), "import retemper.kernels"]
    rounds = 1 if request.quick else ROUNDS

    def contender(name: str, what: str, exactness: str) -> Contender:
        call = partial(seconds_of, what, request.device.type)
        return Contender(name=name, call=call, exactness=exactness, tells=True)

    def case(name: str, contenders: list[Contender]) -> PlannedCase:
        return PlannedCase(name, lambda: Case(name=name, contenders=contenders, rounds=rounds, warm_up=0))

    if not request.quick:
        yield case("first call, imports", [contender(what, what, "peer") for what in imports])
    for name, (ours, chain) in list(CALLS.items())[: 1 if request.quick else None]:
        contenders = [contender(OURS, ours, "rounding"), contender(EAGER, chain, "peer")]
        yield case(f"first call, {name}", contenders[: 1 if request.quick else None])


def seconds_of(what: str, device: str) -> float:
    """Return the seconds that an import or the first call takes in a process of its own.

    Raises:
        RuntimeError: the process failed; its last line says why.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = [sys.executable, "-c", SCRIPT, what, device]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return float(ran.stdout)
