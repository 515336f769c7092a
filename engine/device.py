"""The device and how it computes: which one, how many threads, TF32, precision, repeatability."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from retemper.errors import UsageError

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is.

    Raises:
        UsageError: no such device here; or this is one of several processes (parallel/ranks.py has the device of each).
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("torchrun is for retemper train and evaluate: leave it out, or say --nproc-per-node 1")
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch("cpu|cuda(:[0-9]+)?", name):
        raise UsageError(f"--device {name}: it must be cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no GPU here; leave the option out to train on the CPU")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"cpu: {line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return "cpu"


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Torch computes with so many threads inside; None leaves them alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Let cuDNN try its convolutions on the shapes it meets and keep the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def repeatable() -> Iterator[None]:
    """The same bits from the same work inside, on a GPU too: slower wherever two threads could race."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS may sum in another order
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def exact_fp32() -> AbstractContextManager[None]:
    """Compute float32 without TF32 inside: convolutions on recent GPUs use it by default."""
    return in_precision("fp32")


@contextmanager
def in_precision(precision: str) -> Iterator[None]:
    """Matrix products and convolutions of float32 in TF32 where the group is "tf32", in full float32 otherwise.

    The others, "bf16" and "fp16", name the dtype of the tensors; nothing is switched for them.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = precision == "tf32"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
