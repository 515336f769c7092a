"""Out of memory, said in numbers and with what to try, in place of an allocator's complaint."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from retemper.engine.device import is_out_of_memory
from retemper.engine.recipe import Recipe
from retemper.errors import UsageError

GIB = 2**30


@contextmanager
def memory_advice(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Turn an allocation that failed inside the block into a UsageError that says what to try."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(_advice(recipe, device, str(error))) from None


def _advice(recipe: Recipe, device: torch.device, words: str) -> str:
    size, batch_size, execution = recipe.data.image_size, recipe.optim.batch_size, recipe.execution
    wanted = re.search(r"(?:[Tt]ried to allocate|allocate) ([\d.]+ ?[KMGT]?i?[Bb]\w*)", words)
    images = f"batch size {batch_size}" + (f", images of {size} px" if size else f", {recipe.data.dataset}")
    tries = [f"--batch-size {max(1, batch_size // 2)}"]
    if device.type == "cuda":
        tries += ["--precision bf16"] * (execution.dtype_on(device) is torch.float32)
        tries += ["--teacher-ahead 1"] * (execution.teacher_ahead > 1)
    tries += ["--loader ffcv (resident keeps all images in memory)"] * (execution.loader != "ffcv")
    asked = f" for {wanted.group(1)}" if wanted else ""
    return f"out of memory{asked} at {images}, {recipe.networks.student}; {_taken(device)}: try {', '.join(tries)}"


def _taken(device: torch.device) -> str:
    """Say how full the memory is."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours, taken = torch.cuda.memory_allocated(device) / GIB, (total - free) / GIB
        return f"{ours:.1f} GiB of {total / GIB:.1f} GiB on {device} are this run's, {taken:.1f} GiB taken in all"
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(facts[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    limited = f", and this process may have {limit / GIB:.1f} GiB (ulimit -v)" * (limit != resource.RLIM_INFINITY)
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"{ours:.1f} GiB are this run's at most, {free:.1f} GiB of {total:.1f} GiB are free{limited}"
