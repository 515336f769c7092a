"""From what was asked to a result: race after race."""

import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch

from retemper.console import Progress
from retemper.engine.bench.machine import Rates
from retemper.engine.bench.plan import Plan, Request
from retemper.engine.bench.record import COLUMNS, header
from retemper.engine.bench.timing import failure, run_race
from retemper.errors import UsageError


def bench(request: Request, after_race: Callable[[dict[str, Any], list[dict[str, Any]]], None]) -> dict[str, Any]:
    """Measure.

    Args:
        after_race: is given the result so far and the rows of the last race, to show and to save: a benchmark that is
            cut short keeps what it has.

    Returns:
        What record.py describes.

    Raises:
        UsageError: no race has such a name.
    """
    plans = list(_plans(request))
    if not plans:
        raise UsageError(f"--only {' '.join(request.only)}: bench {request.what} has no such table")
    result = header(request.what, request.device, request.command, request.rounds)
    module = import_module(f"retemper.engine.bench.{request.what}")
    result["notes"] += module.notes(request) if hasattr(module, "notes") else []
    rates = Rates(request.device, request.quick)
    with Progress(f"bench {request.what}", len(plans)) as progress:
        for plan in plans:
            progress.advance(0, plan.name)
            rows, conclusion = _run(plan, request, rates)
            result["notes"] += [conclusion] if conclusion else []
            if request.on_gpu:
                torch.cuda.empty_cache()
            result["rows"] += rows
            result["rates"] = rates.as_json()
            after_race(result, rows)
            progress.advance(1)
    result["complete"] = True
    return result


def _run(plan: Plan, request: Request, rates: Rates) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a race, and what it comes to; one row with the reason where it cannot even be built."""
    try:
        race = plan.build()
    except Exception as error:  # too large for this GPU, say: hours of other races are not to be lost for it
        traceback.print_exc()
        row = dict.fromkeys(COLUMNS) | {"table": plan.name, "name": "the race", "exactness": "rounding"}
        return [row | {"precision": "fp32", "reason": failure(error), "rounds": 0}], None
    try:
        rows = run_race(race, request.device, request.rounds, rates)
        return rows, race.conclude(rows)
    finally:
        race.close()


def _plans(request: Request) -> Iterator[Plan]:
    for plan in import_module(f"retemper.engine.bench.{request.what}").plan(request):
        if not request.only or any(word in plan.name for word in request.only):
            yield plan
