"""What every race of a kernel has in common: ours, the eager chain that it stands for, and that chain compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retemper.engine.bench.plan import Request
from retemper.engine.bench.timing import Check, Contestant, Race, Work

OURS, EAGER, COMPILED = "retemper", "eager chain", "torch.compile of it"
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # of the largest value
CHECKED = 512  # samples, the first ones, where a check needs a copy in float64


def compiled(request: Request, chain: Callable[..., Any], call: Callable[[Any], Any], check: Check) -> Contestant:
    """`chain` under torch.compile, for static shapes and without graph breaks; `call` calls it."""
    if request.quick:
        return Contestant(name=COMPILED, run=None, reason="left out by --quick")
    fast = torch.compile(chain, fullgraph=True, dynamic=False)
    return Contestant(name=COMPILED, run=lambda: call(fast), check=check, compiled=True)


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def race(title: str, precision: str, contestants: list[Contestant], must_move: int) -> Race:
    return Race(name=title, contestants=contestants, work=Work(bytes=must_move), precision=precision)
