"""A job: a recipe with its name, and where and on what it runs."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from retemper.engine.parallel.ranks import ALONE, Ranks
from retemper.engine.recipe import Recipe
from retemper.loaders.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe with its name, and where and on what it runs. Its networks are named as in networks/find.py."""

    method: str
    setting: str
    recipe: Recipe
    out: Path
    seed: int = 0
    data_root: Path | None = None
    teacher: str | Path | None = None
    clean_teacher: str | Path | None = None
    start: str | Path | None = None
    cache: Path
    beton: Path | None = None
    device: torch.device
    tensorboard: bool = False
    save_every: float = 600.0  # seconds of training after which the state is saved within an epoch
    deterministic: bool = False
    ranks: Ranks = ALONE  # the processes that do it together

    @property
    def name(self) -> str:
        return f"{self.method}:{self.setting}"


def default_out(method: str, setting: str, seed: int) -> Path:
    """Where a run goes that is given no --out."""
    return Path("runs") / f"{method}-{setting}-seed{seed}"


def default_cache() -> Path:
    """Where converted data and teachers' answers go that are given no --cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "retemper"


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
