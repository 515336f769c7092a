"""What a run has to remember to go on, at the end of an epoch or between any two of its steps, and how it takes it up.

The order of the images, their views and the random starts are functions of the seed, the epoch and the step: they need
no memory. torch's own generators are kept for methods that draw from them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retemper.engine.epoch_stats import ClassMeans
from retemper.engine.state import State


def snapshot(state: State) -> dict[str, Any]:
    """Return a copy on the host of all that changes from step to step, for `restore`; the device is waited for."""
    average = {} if state.average is None else {"average": state.average.state()}
    return on_host(
        {
            "student": state.student.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "class_state": state.class_state,
            "generators": _generators(state.device),
            **average,
        }
    )


def epoch_so_far(state: State) -> dict[str, Any]:
    """Return a copy on the host of what the steps of the running epoch have summed up."""
    return on_host(
        {
            "sums": {name: vars(sums) for name, sums in state.sums.items()},
            "measured": {name: vars(means) for name, means in state.measured.items()},
            "loss_sum": state.loss_sum,
            "noise_seed": state.noise_seed,
        }
    )


def own_part(state: State) -> dict[str, Any]:
    """Return a copy on the host of what each of several processes has of its own."""
    own = {"statistics": _statistics(state), "generators": _generators(state.device)}
    return on_host(own) | {"so_far": epoch_so_far(state)}


def restore(state: State, saved: Mapping[str, Any], own: Mapping[str, Any], running: bool) -> None:
    """Take over what was saved; within a `running` epoch its sums too, after `State.start_epoch`.

    Args:
        saved: what `snapshot` returned.
        own: what `own_part` returned; or `saved`, with `epoch_so_far` under "so_far", for a process on its own.
    Raises:
        RuntimeError, ValueError, KeyError, TypeError, AttributeError: it is not of such a run.
    """
    state.student.load_state_dict(saved["student"])
    rates = [group["lr"] for group in state.optimizer.param_groups]
    state.optimizer.load_state_dict(saved["optimizer"])
    for group, lr in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr  # the tensor that a captured step reads, not the saved one's copy
    state.scaler.load_state_dict(saved["scaler"])
    state.move_classes(saved["class_state"])
    if state.average is not None:
        state.average.load(saved["average"])
    _copy(_statistics(state), own.get("statistics", {}))
    torch.set_rng_state(own["generators"]["cpu"])
    if "cuda" in own["generators"]:
        torch.cuda.set_rng_state(own["generators"]["cuda"], state.device)
    if running:
        _take_sums(state, own["so_far"])


def _take_sums(state: State, saved: Mapping[str, Any]) -> None:
    for name, sums in state.sums.items():
        _copy(vars(sums), saved["sums"][name])
    for name, values in saved["measured"].items():
        if name not in state.measured:
            classes, width = values["total_KD"].shape
            state.measured[name] = ClassMeans.zeros(classes, width, state.device)
        _copy(vars(state.measured[name]), values)
    _copy(vars(state), {name: saved[name] for name in ("loss_sum", "noise_seed")})


def _statistics(state: State) -> dict[str, Tensor]:
    """Return the statistics of batch norm, by network and name."""
    networks = {"student": state.student, "kept": state.kept}
    return {f"{which}.{name}": value for which, one in networks.items() for name, value in one.named_buffers()}


def _copy(into: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Copy in place: a captured step knows the tensors' addresses."""
    for name, value in values.items():
        into[name].copy_(value)


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def on_host(value: Any) -> Any:
    """Return `value` with each tensor in its mappings and lists copied to the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: on_host(one) for name, one in value.items()}
    return [on_host(one) for one in value] if isinstance(value, list) else value
