"""The device that tensors live on, and how torch computes there: threads, TF32, tuned and repeatable kernels, memory.

Every switch of torch that is global is a context manager here, which puts it back as it was.
"""

import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from retemper.errors import UsageError

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUT_OF_MEMORY = (  # in the words of Linux; torch's allocator; oneDNN, for a convolution; CUDA; cuBLAS and cuDNN
    *("Cannot allocate memory", "can't allocate memory", "could not create a primitive"),
    *("out of memory", "STATUS_ALLOC_FAILED"),
)


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory that this process has held so far, in MiB: on a GPU that of its tensors, else the host's.

    The host does not wait for the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`: "cpu", "cuda" or "cuda:N"; the first GPU, or else the CPU, for None.

    Raises:
        UsageError: there is no such device here; or this is one of several processes, whose devices
            `distributed.join` picks.
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
    """Return the model of the GPU, or the model of the CPU and the number of threads that torch uses there."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            threads = torch.get_num_threads()
            return f"cpu: {line.partition(':')[2].strip()}, {threads} thread{'s' * (threads != 1)}"
    return "cpu"


def cpu_threads(number: int | None) -> AbstractContextManager[None]:
    """Compute with `number` CPU threads inside; None keeps the number that torch has."""
    return _switched(number or torch.get_num_threads(), (torch.get_num_threads, torch.set_num_threads))


def tuned_convolutions() -> AbstractContextManager[None]:
    """Let cuDNN time its convolutions on every new shape inside, and use the fastest."""
    return _switched(True, _attribute(torch.backends.cudnn, "benchmark"))


@contextmanager
def repeatable() -> Iterator[None]:
    """Get the same bits from the same work inside, on a GPU too: slower wherever two threads could race.

    Fresh memory is not filled with NaN, which PyTorch would do by a launch for each tensor. It is there to show what
    reads memory that nothing wrote; the kernels' tests keep it on, and PyTorch's own operators need it no more than
    elsewhere.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS may sum in another order
    filling = _attribute(torch.utils.deterministic, "fill_uninitialized_memory")
    algorithms = torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    with _switched(True, algorithms), _switched(False, filling):
        yield


def exact_fp32() -> AbstractContextManager[None]:
    """Compute float32 products and convolutions in float32 inside: recent GPUs use TF32 by default."""
    return in_precision("fp32")


def in_precision(precision: str) -> AbstractContextManager[None]:
    """Compute float32 products and convolutions in TF32 inside if `precision` is "tf32", and in float32 otherwise.

    "bf16" and "fp16" are dtypes of tensors (`DTYPES`), so that no switch belongs to them.
    """
    owners = torch.backends.cuda.matmul, torch.backends.cudnn
    return _switched(precision == "tf32", *(_attribute(owner, "allow_tf32") for owner in owners))


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Return how an attribute is read and how it is set."""
    return partial(getattr, owner, name), partial(setattr, owner, name)


@contextmanager
def _switched(value: Any, *switches: tuple[Callable[[], Any], Callable[[Any], None]]) -> Iterator[None]:
    """Set switches inside; each is given by what reads it and what sets it."""
    before = [read() for read, _ in switches]
    try:
        for _, put in switches:
            put(value)
        yield
    finally:
        for (_, put), was in zip(switches, before, strict=True):
            put(was)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator of Python, torch, oneDNN, CUDA or Linux raised `error` for want of memory.

    Whoever catches all that somebody else's code may raise asks this first, and lets such an error pass: it says
    nothing about that code or its data.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in OUT_OF_MEMORY)
