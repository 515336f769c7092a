"""How long one call holds the host: each kernel on tensors so small that the arithmetic costs nothing.

In an eager loop Python is the limit at the sizes of CIFAR. On a CPU the time of a call is the host's. On a GPU it is
`host ms`, the time until the call came back, and the ratios are of it. "the operators alone" are the calls of
torch.ops.retemper that ours makes, without the functions around them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from retemper.bench.case import Call, Case, Contender, PlannedCase, Request, Work
from retemper.bench.kernel_cases import EAGER, KernelSize
from retemper.kernels.operators import NAMESPACE

TINY = {"batch": 4, "classes": 10, "side": 8, "channels": 4}


def host_case(name: str, build: Callable[[KernelSize], Case], form: str, request: Request) -> PlannedCase:
    """Return the case of a kernel's host time, in fp32."""

    def built() -> Case:
        size = KernelSize(title="", request=replace(request, quick=True), precision="fp32", form=form, **TINY)
        case = build(size)
        ours, eager = case.contenders[0], next(one for one in case.contenders if one.name == EAGER)
        call = operators_alone(ours)
        reason = None if call else "it calls none on this device"
        alone = Contender(name="the operators alone", call=call, reason=reason, exactness=ours.exactness)
        contenders = [ours, alone, eager]
        own = {"name": f"host time, {name}", "work": Work(), "by_host": True, "conclude": lambda rows: None}
        return replace(case, contenders=contenders, **own)

    return PlannedCase(f"host time, {name}", built)


def operators_alone(contender: Contender) -> Call | None:
    """Return a call of the operators of ours that the contender calls, on the same arguments; None if it calls none."""
    assert contender.call is not None
    with _Recorder() as recorder:
        contender.call()

    def alone() -> None:
        for operator, args, kwargs in recorder.calls:
            operator(*args, **kwargs)

    return alone if recorder.calls else None


class _Recorder(TorchDispatchMode):
    """A mode that keeps the calls of operators of ours within it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))
