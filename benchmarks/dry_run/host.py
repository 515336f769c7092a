"""How long a call of a kernel holds the host, in a process of the recorder: python -m dry_run.host FILE.

The cases are those of `retemper bench kernels --only "host time"`, and PGD on ResNet-18 against a plain loop. On the
recorder a launch costs next to nothing, so that what is measured is Python's and PyTorch's part. Writes to FILE, for
each case, the microseconds of ours and of the plain chain, and their ratio.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time
from typing import Any

import torch

from dry_run.record import Recorder
from dry_run.values import sound_values
from retemper.bench import attack, kernels
from retemper.bench.case import Case, Request
from retemper.bench.kernel_cases import EAGER
from retemper.console import say

ROUNDS, ROUND_S = 15, 0.02
PREFIX = "host time, "
ATTACK = "resnet18 ce PGD-10 tf32 batch 128"
PLAIN_LOOP = "plain loop"


def compared(case: Case, name: str) -> dict[str, float]:
    """Return the microseconds of our call and of the contender called `name`, and the ratio: the least of many rounds.

    The rounds alternate, so that what slows the machine slows both.
    """
    ours, theirs = case.contenders[0], next(one for one in case.contenders if one.name == name)
    calls = [prepared(one.call, one.prepare) for one in (ours, theirs)]
    numbers = [max(1, round(ROUND_S / spent(call, 1))) for call in calls]
    rounds = [[spent(call, number) for call, number in zip(calls, numbers, strict=True)] for _ in range(ROUNDS)]
    us, their_us = (1e6 * min(times) for times in zip(*rounds, strict=True))
    case.close()
    return {"us": us, "their us": their_us, "ratio": us / their_us}


def prepared(call: Callable[[], Any] | None, prepare: Callable[[], object] | None) -> Callable[[], Any]:
    """Return the call after its warm-up."""
    assert call is not None
    if prepare is not None:
        prepare()
    for _ in range(5):
        call()
    return call


def spent(call: Callable[[], Any], number: int) -> float:
    """Return the processor's seconds of one of so many calls."""
    begin = process_time()
    for _ in range(number):
        call()
    return max(process_time() - begin, 1e-9) / number


def comparisons(device: torch.device) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name of each case, and what `compared` says of it."""
    for planned in kernels.cases(Request(what="kernels", device=device, quick=True)):
        if planned.name.startswith(PREFIX):
            say(planned.name)
            yield planned.name.removeprefix(PREFIX), compared(planned.build(), EAGER)
    for planned in attack.cases(Request(what="attack", device=device)):
        if planned.name == ATTACK:
            say(planned.name)
            yield ATTACK, compared(planned.build(), PLAIN_LOOP)


def main() -> None:
    Recorder().pause()
    with sound_values():
        found = dict(comparisons(torch.device("cuda")))
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
