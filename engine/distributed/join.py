"""Join the process group of a command that torchrun, or any launcher that sets the same variables, has started.

RANK and WORLD_SIZE say which process of how many this is, LOCAL_RANK which one on its machine, MASTER_ADDR and
MASTER_PORT where the processes meet. On CPUs the group goes by gloo; on GPUs, one for each process, by NCCL and gloo.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from retemper.console import only_errors, several
from retemper.engine.device import pick_device
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.errors import UsageError

TIME_LIMIT_S = 180.0  # of a collective operation, unless RETEMPER_RANK_TIMEOUT is set; a first step may compile kernels
PATIENCE = timedelta(days=30)
VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined(device_name: str | None) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the process group, and leave it at the end; yield it and the device of this process.

    Args:
        device_name: as in `pick_device`; of several processes each takes the GPU of its local rank.
    Raises:
        UsageError: there is no such device here, or a variable of the launcher is missing.
        RankLost: the other processes do not come.
    """
    if not several():
        yield ALONE, pick_device(device_name)
        return
    missing = [name for name in VARIABLES if name not in os.environ]
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
    """Make the process group, of one process too, and wait for all to come. Raises RankLost as `joined` does."""
    limit = timedelta(seconds=float(os.environ.get("RETEMPER_RANK_TIMEOUT", TIME_LIMIT_S)))
    on_gpu = device.type == "cuda"
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    with Ranks(rank, world_size).checked():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit, device_id=device if on_gpu else None)
        host = dist.new_group(backend="gloo", timeout=limit) if on_gpu else dist.group.WORLD
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(rank, world_size, True, host, patient)


def _own_device(name: str | None) -> torch.device:
    """Return cuda:LOCAL_RANK where there are GPUs, or the CPU."""
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
    """Return the number in an environment variable. Raises UsageError if it holds none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name}={text}: a launcher sets it to a number")
    return int(text)
