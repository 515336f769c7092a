"""A benchmark from its request to its result, case after case."""

import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from retemper.bench.case import Case, PlannedCase, Request
from retemper.bench.machine import Rates
from retemper.bench.result import COLUMNS, Row, header
from retemper.bench.timing import failure, measure
from retemper.console import Progress
from retemper.errors import UsageError


def bench(
    request: Request,
    after_case: Callable[[dict[str, Any], list[Row]], None],
    begun: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the cases of step.py, kernels.py, loaders.py or attack.py.

    Args:
        after_case: is given the result so far and the rows of the last case, to show and to save: a benchmark that is
            cut short keeps what it has.
        begun: the result of the same request that was cut short; its tables are not measured again.
    Returns:
        The result, as result.py describes it.
    Raises:
        UsageError: no case has such a name.
    """
    until = None if request.seconds is None else time.perf_counter() + request.seconds
    module = import_module(f"retemper.bench.{request.what}")
    planned = [
        one for one in module.cases(request) if not request.only or any(word in one.name for word in request.only)
    ]
    if not planned:
        raise UsageError(f"--only {' '.join(request.only)}: bench {request.what} has no such table")
    result, rates = begun or header(request), Rates(request.device, request.quick)
    if begun is None:
        result["notes"] += module.notes(request) if hasattr(module, "notes") else []
    done = {row["table"] for row in result["rows"]}
    planned = [one for one in planned if one.name not in done]
    with Progress(f"bench {request.what}", len(planned)) as progress:
        for one in planned:
            if until is not None and time.perf_counter() >= until:
                return result
            progress.advance(0, one.name)
            rows, conclusion = _measured(one, request, rates, until)
            result["notes"] += [conclusion] if conclusion else []
            if request.on_gpu:
                torch.cuda.empty_cache()
            result["rows"] += rows
            result["rates"] = rates.as_json() if rates.best else result["rates"]
            if rows:
                after_case(result, rows)
            progress.advance(1)
    result["complete"] = True
    return result


def _measured(
    planned: PlannedCase, request: Request, rates: Rates, until: float | None
) -> tuple[list[Row], str | None]:
    """Return the rows of a case and its conclusion; one row with the reason where it cannot even be built."""
    try:
        case = _chosen(planned.build(), request)
    except Exception as error:  # too large for this GPU, say: hours of other cases are not to be lost for it
        traceback.print_exc()
        row = dict.fromkeys(COLUMNS) | {"table": planned.name, "name": "the case", "exactness": "rounding"}
        return [row | {"precision": "fp32", "reason": failure(error), "rounds": 0}], None
    try:
        rows = measure(case, request.device, request.rounds, rates, until) if case.contenders else []
        return rows, case.conclude(rows) if rows else None
    finally:
        case.close()


def _chosen(case: Case, request: Request) -> Case:
    """Return the case with the rows that the request asks for, unchecked if it says so."""
    contenders = [one for one in case.contenders if request.wants(one.name)]
    if not request.checked:
        contenders = [replace(one, check=None) for one in contenders]
    return replace(case, contenders=contenders)
