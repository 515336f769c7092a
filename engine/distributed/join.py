"""Join the process group of a command that torchrun, or any launcher that sets the same variables, has started.

RANK and WORLD_SIZE say which process of how many this is, LOCAL_RANK which one on its machine, MASTER_ADDR and
MASTER_PORT where the processes meet. On CPUs the group goes by gloo; on GPUs, one for each process, by NCCL and gloo.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from retemper.console import only_errors, several
from retemper.engine.device import pick_device
from retemper.engine.distributed.pulse import pulse_of
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.errors import UsageError

TIME_LIMIT_S = 180.0  # of a collective operation, unless RETEMPER_RANK_TIMEOUT is set; a first step may compile kernels
LONGEST_LIMIT_S = 7 * 24 * 3600
PATIENCE = timedelta(days=30)  # of the groups whose waiting `Pulse` ends
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
        if ranks.pulse is not None:
            ranks.pulse.stop()
    dist.destroy_process_group()  # after an error the others may be anywhere: the end of the process is enough


def join(device: torch.device) -> Ranks:
    """Make the process group, of one process too, and wait for all to come. Raises RankLost as `joined` does."""
    limit = timedelta(seconds=_time_limit_s())
    on_gpu = device.type == "cuda"
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if rank >= world_size or not 0 < _number("MASTER_PORT", 0) < 2**16:
        places = " ".join(f"{name}={os.environ.get(name)}" for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        raise UsageError(f"{places}: a launcher sets RANK below WORLD_SIZE, and a port of 1 .. 65535")
    with Ranks(rank, world_size).checked():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit, device_id=device if on_gpu else None)
        pulse = pulse_of(rank, world_size, limit.total_seconds())
        host = dist.new_group(backend="gloo", timeout=limit) if on_gpu else dist.group.WORLD
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.barrier(group=host)  # the first to be ready may hold the store that others still read: it waits for them
    return Ranks(rank, world_size, True, host, patient, pulse)


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


def _time_limit_s() -> float:
    """Return the time limit of RETEMPER_RANK_TIMEOUT, in seconds. Raises UsageError if it is none."""
    text = os.environ.get("RETEMPER_RANK_TIMEOUT", str(TIME_LIMIT_S))
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = math.nan
    if not 1 <= limit_s <= LONGEST_LIMIT_S:
        raise UsageError(f"RETEMPER_RANK_TIMEOUT={text}: give it in seconds, from 1 to {LONGEST_LIMIT_S:,}")
    return limit_s


def _number(name: str, default: int) -> int:
    """Return the number in an environment variable. Raises UsageError if it holds none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name}={text}: a launcher sets it to a number")
    return int(text)
