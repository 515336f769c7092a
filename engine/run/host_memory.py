"""Copies of a state on the host, for which the host does not wait.

On a GPU they lie in pinned memory, and are queued on the stream that trains. What stands behind them there waits until
they are made: no step overwrites a weight before it is copied. A stream of their own would have to be waited for at the
same place, and a copy on the device first would take memory for one more state, where the bus is busy for a few
milliseconds.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class HostMemory:
    """The memory for one state, which is kept from one copy to the next: to pin it takes longer than to fill it.

    Attributes:
        tensors: by the names on the way to each.
        copied: marks the end of the newest copies on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensors: dict[tuple[object, ...], Tensor] = {}
        self.copied = torch.cuda.Event(blocking=True) if device.type == "cuda" else None

    def copy(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return `value` with a copy of each tensor in it, to be read after `wait`. Earlier ones of that name change.

        Args:
            value: numbers, words, tensors of any kind, and mappings and lists of them.
        """
        copies = on_host(value, self._copy)
        if self.copied is not None:
            self.copied.record()
        return copies

    def wait(self) -> None:
        """Wait until the copies are made; any thread may."""
        if self.copied is not None:
            self.copied.synchronize()

    def is_ready(self) -> bool:
        """Say whether the copies are made by now."""
        return self.copied is None or self.copied.query()

    def _copy(self, value: Tensor, names: tuple[object, ...]) -> Tensor:
        place = self.tensors.get(names)
        if place is None or (place.shape, place.dtype, place.stride()) != (value.shape, value.dtype, value.stride()):
            place = self.tensors[names] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return place.copy_(value, non_blocking=True)


def copied(value: Tensor, names: tuple[object, ...] = ()) -> Tensor:
    """Return a copy on the host, made before it returns."""
    return value.detach().to("cpu", copy=True)


def on_host(
    value: Any, copy: Callable[[Tensor, tuple[object, ...]], Tensor] = copied, names: tuple[object, ...] = ()
) -> Any:
    """Return `value` with each tensor in its mappings and lists replaced by `copy` of it and the names on the way."""
    if isinstance(value, Tensor):
        return copy(value.detach(), names)
    if isinstance(value, Mapping):
        return {name: on_host(one, copy, (*names, name)) for name, one in value.items()}
    if isinstance(value, list):
        return [on_host(one, copy, (*names, at)) for at, one in enumerate(value)]
    return value
