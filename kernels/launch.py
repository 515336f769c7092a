"""The launch of a Triton kernel, prepared once for each kind of arguments.

Triton binds the arguments at every launch and looks at each: 7 to 15 us of the host's time, more than PyTorch takes for
a chain of small operations. What it looks at stays the same from call to call: shapes, strides, dtypes, devices,
whether an address is a multiple of 16, and all numbers but floats. So do the checks of the arguments, and the constants
that follow from them. For each such kind they are found out once. Later calls hand the arguments to the machine code
that Triton compiled, which takes 1 us.

Triton's own path is taken by its interpreter, by ROCm (where Triton looks at the size of a tensor's memory too), under
a profiler of Triton's launches, and by versions of Triton whose machine code may be called in another way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retemper.kernels.language import HAS_TRITON, INTERPRETED, triton
from retemper.kernels.runtime import EXACT, launching

KNOWN = ("3.6", "3.7", "3.8", "3.9")  # the versions of Triton whose machine code is called as in `_repeated`
DIRECT: bool = (
    HAS_TRITON and not INTERPRETED and torch.version.hip is None and triton.__version__.rpartition(".")[0] in KNOWN
)
TRITON: Any = triton  # of whose types not all are declared
MOST = 10_000  # kinds that are kept
Again = Callable[[int, tuple[Any, ...]], None]  # takes the number of the device, and the arguments
READY: dict[tuple[Any, ...], Again] = {}  # what launches again, by the kind of the arguments


class Launch(NamedTuple):
    """A launch of a kernel on a grid; `named` are its arguments after those that are given, constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    named: dict[str, Any]


def launch_prepared(prepare: Callable[..., Launch | None], *arguments: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor.

    Args:
        prepare: checks the arguments and returns the launch, or None if there is nothing to do. It is not called again
            for arguments of a kind that it has seen. So it may look at all but the values of tensors and of floats, and
            of an address at no more than what is left of its division by 16.
        arguments: the first ones of the kernel: tensors, numbers, strings and None. Each number but a float makes a
            kind of its own.
    """
    first = arguments[0]
    if not (DIRECT and first.is_cuda):
        _launch_first(prepare, arguments)
        return
    kind: list[Any] = [prepare]
    for given in arguments:
        if given is None:
            kind.append(None)
        elif isinstance(given, Tensor):
            kind += (given.shape, given.stride(), given.dtype, given.get_device(), given.data_ptr() & 15)
        else:
            kind.append(float if type(given) is float else given)
    key, index = tuple(kind), first.get_device()
    again = READY.get(key)
    if again is None or _profiled():
        again = _launch_first(prepare, arguments)
        if again is not None and len(READY) < MOST:
            READY[key] = again
    elif index == torch.cuda.current_device():
        again(index, arguments)
    else:
        with torch.cuda.device(index):
            again(index, arguments)


def _launch_first(prepare: Callable[..., Launch | None], arguments: tuple[Any, ...]) -> Again | None:
    """Launch the kernel by Triton, and return what launches it again, where Triton says so."""
    planned = prepare(*arguments)
    if planned is None:
        return _nothing
    kernel, grid, named = planned
    with launching(arguments[0]):
        compiled = kernel[grid](*arguments, **named, **EXACT)
    if compiled is None or not DIRECT:
        return None
    return _repeated(compiled, grid, [named[name] for name in kernel.arg_names[len(arguments) :]])


def _repeated(compiled: Any, grid: tuple[int, ...], rest: list[Any]) -> Again:
    """Return what launches the machine code on other arguments, followed by the same rest."""
    run, stream = compiled.run, TRITON.runtime.driver.active.get_current_stream
    launched = compiled.function, compiled.packed_metadata, None, None, None  # no profiler
    over = (*grid, 1, 1)[:3]

    def again(index: int, arguments: tuple[Any, ...]) -> None:
        run(*over, stream(index), *launched, *arguments, *rest)

    return again


def _nothing(index: int, arguments: tuple[Any, ...]) -> None:
    """Launch nothing."""


def _profiled() -> bool:
    """Say whether a profiler wants to hear of each launch of Triton."""
    enter, leave = TRITON.knobs.runtime.launch_enter_hook, TRITON.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # one in a chain, or set alone
