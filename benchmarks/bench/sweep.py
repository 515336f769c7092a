"""The sweep of a kernel's constants on this GPU: one kernel against itself, a row for each setting.

The constants are the capitals at the head of kernels/*.py that are named here. They are put in place around every
call, and put back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from itertools import product
from types import ModuleType
from typing import Any

from retemper.bench.case import Call, Case, PlannedCase, Request
from retemper.kernels import launch

VALUES = {  # of each constant, wherever a module has it
    "BLOCK": (256, 512, 1024, 2048, 4096),
    "TILE": (512, 1024, 2048, 4096),
    "PER_THREAD": (8, 16, 32, 64),
    "WORDS": (64, 128, 256, 512, 1024),
    "WARPS": (1, 2, 4, 8),
}
MODULES = {  # the first word of a case's name -> the module with its constants
    "pgd_step_": "ascent_kernels",
    "random_start_": "noise_kernels",
    "augment": "augment",
    "epilogue": "epilogue_kernels",
    "class_temperature_kl": "logit_rows",
    "class_temperature_kl_grad_": "logit_rows",
    "class_temperature_js": "logit_rows",
    "class_pair": "logit_rows",
    "class_sums": "class_sums_kernels",
}
Setting = dict[str, int]


def sweep(planned: PlannedCase, request: Request) -> PlannedCase:
    """Return the case of the first contender of `planned` under all settings, the present one first."""
    return PlannedCase(f"sweep {planned.name}", lambda: _case(planned, request))


def _case(planned: PlannedCase, request: Request) -> Case:
    case, module = planned.build(), import_module(f"retemper.kernels.{MODULES[planned.name.split()[0]]}")
    ours, now = case.contenders[0], constants_of(module)
    reason = None if request.on_gpu else "needs a GPU"
    if not now:
        reason = f"{module.__name__} has none of the constants {', '.join(VALUES)}"
    assert ours.call is not None
    calls = {f"as it is: {spelled(now)}": ours.call}
    calls |= {spelled(setting): _under(module, setting, ours.call) for setting in settings(now)}
    rows = [replace(ours, name=name, call=None if reason else call, reason=reason) for name, call in calls.items()]
    return replace(case, name=f"sweep {case.name}", contenders=rows, conclude=best)


def constants_of(module: ModuleType) -> Setting:
    """Return the constants of VALUES that the module has, with their present values."""
    found = {name: getattr(module, name, None) for name in VALUES}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def settings(now: Setting) -> list[Setting]:
    """Return all combinations of the values of the constants, but the present one."""
    combinations = (dict(zip(now, values, strict=True)) for values in product(*(VALUES[name] for name in now)))
    return [setting for setting in combinations if setting != now]


def spelled(setting: Setting) -> str:
    return " ".join(f"{name}={value}" for name, value in setting.items())


@contextmanager
def in_place(module: ModuleType, setting: dict[str, Any]) -> Iterator[None]:
    """Give the module's constants the values of `setting` within the context."""
    before = {name: getattr(module, name) for name in setting}
    try:
        vars(module).update(setting)
        yield
    finally:
        vars(module).update(before)


def _under(module: ModuleType, setting: Setting, call: Call) -> Call:
    """Return `call` under a setting of the module's constants, from which its launches are prepared apart."""
    prepared: dict[Any, Any] = {}

    def under() -> Any:
        with in_place(module, setting), in_place(launch, {"READY": prepared}):
            return call()

    return under


def best(rows: list[dict[str, Any]]) -> str | None:
    """Return a line that names the fastest row; None where there is no time."""
    timed = [row for row in rows if row["ms"] and row["ratio"]]
    if not timed:
        return None
    first = min(timed, key=lambda row: row["ms"]["median"])
    ratio = first["ratio"]
    return (
        f"{first['table']}: best is {first['name']}, {ratio['median']:.3f} of the time of {rows[0]['name']} "
        f"({ratio['p10']:.3f} to {ratio['p90']:.3f})"
    )
