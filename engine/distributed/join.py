"""Several processes of one command meet, as torchrun starts them, or any launcher that sets the same variables.

RANK and WORLD_SIZE say which process of how many this is, LOCAL_RANK which of its machine, MASTER_ADDR and MASTER_PORT
where they meet. On a CPU every method of `Ranks` goes by gloo; on GPUs, one a process, tensors there go by NCCL.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from retemper.console import only_errors
from retemper.engine.device import pick_device
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.errors import UsageError

TIME_LIMIT_S = 180.0  # RETEMPER_RANK_TIMEOUT has another; a step waits so long for the slowest, compilation included
PATIENCE = timedelta(days=30)
PLACES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def several() -> bool:
    """Whether a launcher has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Whether this process is to speak where several have the same to say."""
    return not several() or os.environ.get("RANK") == "0"


def speaker() -> str:
    """Who an error is of, for its line: nobody in particular where there is one process."""
    return f"process {os.environ.get('RANK', 'without RANK')} of {os.environ['WORLD_SIZE']}: " if several() else ""


@contextmanager
def joined(device_name: str | None) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that the launcher has started; the device that this one is to use.

    Raises:
        UsageError: no such device here, or a launcher that does not say where the others are.
        RankLost: the others do not come.
    """
    if not several():
        yield ALONE, pick_device(device_name)
        return
    missing = [name for name in PLACES if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is set and {', '.join(missing)} not: start the processes with torchrun")
    device = _own_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    only_errors(_number("RANK", 0) > 0)
    ranks = join(device)
    try:
        yield ranks, device
    finally:
        only_errors(False)
    dist.destroy_process_group()  # after an error the others may be anywhere: the end of the process is enough


def join(device: torch.device) -> Ranks:
    """The processes, met: by the launcher's variables, even if there is one alone."""
    limit = timedelta(seconds=float(os.environ.get("RETEMPER_RANK_TIMEOUT", TIME_LIMIT_S)))
    on_gpu = device.type == "cuda"
    ranks = Ranks(_number("RANK", 0), _number("WORLD_SIZE", 1))
    with ranks.checked():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit, device_id=device if on_gpu else None)
        words = dist.new_group(backend="gloo", timeout=limit) if on_gpu else dist.group.WORLD
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(ranks.rank, ranks.world_size, True, words, patient)


def _own_device(name: str | None) -> torch.device:
    """cuda:LOCAL_RANK where there are GPUs, or the CPU."""
    if name not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {name}: every process takes the GPU of its number; say cuda or cpu")
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    number, here = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if number >= here:
        raise UsageError(
            f"no GPU for the process of LOCAL_RANK {number}, torch sees {here} here: start {here} or fewer"
        )
    return torch.device("cuda", number)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name}={text}: a launcher sets it to a number")
    return int(text)
