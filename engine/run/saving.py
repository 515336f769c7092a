"""Where a run stands, in memory and on the disk; how it is saved, and how it goes on from what was saved.

It goes on at the end of an epoch or between any two of its steps. The order of the images, their views and the random
starts are functions of the seed, the epoch and the step: they need no memory. torch's own generators are kept for
methods that draw from them.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from retemper.engine.device import is_out_of_memory
from retemper.engine.epoch_stats import ClassMeans
from retemper.engine.recipe import Recipe
from retemper.engine.run.diverged import LOWER
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.selection import Best, newest_best
from retemper.engine.run.state_file import on_host
from retemper.engine.state import State
from retemper.errors import DataError, Diverged, UsageError


class Saver:
    """The position of a run, and its saves.

    Attributes:
        finished, done: the epochs, and the steps of the next one, that the state in memory is behind.
        saved: both, as they are on the disk.
        tail: the state at the end of an epoch's steps, while that epoch is being concluded.
        started: when the epoch would have begun, had it not been cut in two; monotonic seconds.
        next_save: when the state is to be saved within the epoch; monotonic seconds.
        best: the best epoch so far.
    """

    def __init__(
        self, folder: RunFolder, recipe: Recipe, state: State, *, seed: int, save_every: float, header: dict[str, str]
    ) -> None:
        """`save_every` is in seconds of training; `header` is what every file of weights says of the network."""
        self.folder, self.recipe, self.state, self.ranks = folder, recipe, state, state.part.ranks
        self.seed, self.save_every, self.header = seed, save_every, header
        self.finished, self.done, self.saved = 0, 0, (0, 0)
        self.tail: dict[str, Any] | None = None
        self.started = time.monotonic()
        self.next_save = self.started + save_every
        self.best = Best()

    def resume(self, config: dict[str, Any]) -> bool:
        """Begin the folder with its config.json, or take up the state in it; say whether the run is a new one.

        Raises:
            UsageError: the folder is another run's, or was saved by another number of processes within an epoch.
            DataError: what was saved is damaged.
        """
        found: dict[str, Any] = {}
        if self.ranks.is_first:
            self.folder.begin(config)
            found["state"] = self.folder.load_state()
            found["best"] = asdict(newest_best(self.folder, found["state"]))
        found = self.ranks.broadcast(found)
        saved = found["state"]
        if saved is None:
            return True
        as_many = saved.get("world_size", 1) == self.ranks.world_size
        if saved["step"] and not as_many:
            raise UsageError(
                f"{self.folder.state} was saved within an epoch, on {saved.get('world_size', 1)} processes: start as "
                "many again (between epochs the number may change)"
            )
        try:
            self.finished, self.done = self.saved = saved["epoch"], saved["step"]
            if self.done:
                self.start_epoch(self.finished + 1)
            parts = saved["processes"] if self.ranks.joined and as_many else []
            restore(self.state, saved, parts[self.ranks.rank] if parts else saved, running=self.done > 0)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise DataError(f"{self.folder.state} is not this run's: delete the folder to start it anew") from None
        self.best = Best(**found["best"])
        self.started = time.monotonic() - saved["seconds"]
        return False

    def start_epoch(self, epoch: int) -> None:
        """Set the state to the start of `epoch`."""
        self.state.start_epoch(self.recipe, epoch, self.noise_seed(epoch))

    def noise_seed(self, epoch: int) -> int:
        """Return the noise seed of the epoch's first step; each step adds one."""
        return (self.seed << 40) + (epoch << 24)

    def hold_tail(self, epoch: int) -> None:
        """Keep the state at the end of the steps of `epoch`: a signal may come before the epoch is concluded."""
        if not self.ranks.joined:  # of several processes, none is interrupted in between
            self.tail = self._snapshot(epoch - 1, self.done)

    def keep_as_best(self, score: float, epoch: int) -> None:
        """Write the weights as the best so far."""
        self.best = Best(score, epoch)
        if self.ranks.is_first:
            header = self.header | {"epoch": str(epoch), "score": repr(score)}
            self.folder.save_weights(self.folder.best, self.state.kept, header)

    def save_epoch(self, epoch: int, line: dict[str, Any]) -> None:
        """Save the state after `epoch`, with its line of metrics.jsonl."""
        state = self._snapshot(epoch, 0)
        if self.ranks.is_first:
            self.folder.save_epoch(line, self.state.kept, self.header | {"epoch": str(epoch)}, state)
        self.finished, self.done, self.tail = epoch, 0, None
        self._was_saved()

    def save_here(self) -> None:
        """Save the state as it stands after the newest step. Every step so far must have been finite."""
        state = self.tail or self._snapshot(self.finished, self.done)
        if self.ranks.is_first:
            self.folder.save_state(state)
        self.ranks.barrier()
        self._was_saved()

    def save_cut(self, score: float, cut: str) -> None:
        """Write the weights of a run that is cut before its end, so that it can be evaluated; its state is saved.

        They stand in for the best where no epoch was the best yet. Their headers say `cut`, where that was.
        """
        if not self.ranks.is_first:
            return
        header = self.header | {"epoch": str(self.finished), "cut": cut}
        if self.best == Best():
            self.folder.save_weights(self.folder.best, self.state.kept, header | {"score": repr(score)})
        self.folder.save_weights(self.folder.last, self.state.kept, header)

    def to_do(self, max_steps: int | None = None) -> str:
        """Say which epochs are left, and after how many steps in all the run is cut."""
        after = f" (after step {self.done})" if self.done else ""
        cut = "" if max_steps is None else f", cut after {max_steps:,} steps (--max-steps)"
        return f"epochs {self.finished + 1}{after} to {self.recipe.optim.epochs}{cut}"

    def where(self, steps: int) -> str:
        """Say where the newest save is; `steps` is how many an epoch has."""
        if not any(self.saved):
            return "nothing was trained yet"
        within = f"step {self.done} of {steps} in epoch {self.finished + 1}"
        return f"saved at {within if self.done else f'epoch {self.finished}'} in {self.folder.path}"

    def kept(self) -> str:
        """Say what a run that diverged leaves on the disk."""
        finished, done = self.saved
        within = f" and {done} steps of the next" if done else ""
        return f"{self.folder.state} holds epoch {finished}{within}" if any(self.saved) else "no state was saved yet"

    def _snapshot(self, finished: int, done: int) -> dict[str, Any]:
        """Return all that going on needs, on the host.

        Raises:
            Diverged: a weight or a statistic is not finite: the last update was made before anything was seen.
        """
        state, own = self.state, own_part(self.state)
        saved = {
            "student": state.student.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "class_state": state.class_state,
            "generators": own["generators"],
            **({} if state.average is None else {"average": state.average.state()}),
            "epoch": finished,
            "step": done,
            "so_far": own["so_far"] if done else {},
            "seconds": time.monotonic() - self.started if done else 0.0,
            "best": asdict(self.best),
            "world_size": self.ranks.world_size,
            "processes": self.ranks.gather(own) if self.ranks.joined else [],
        }
        saved = on_host(saved)
        if self.ranks.any(not all(value.isfinite().all() for value in saved["student"].values())) == [True]:
            when = f"epoch {finished + 1}, step {done}" if done else f"epoch {finished}"
            raise Diverged(f"the weights are not finite after {when}; {self.kept()}. {LOWER}")
        return saved

    def _was_saved(self) -> None:
        self.saved, self.next_save = (self.finished, self.done), time.monotonic() + self.save_every


def own_part(state: State) -> dict[str, Any]:
    """Return a copy on the host of what each of several processes has of its own.

    That is the statistics of its batch norm, its random generators, and what its steps of the epoch have summed up.
    """
    generators = {"cpu": torch.get_rng_state()}
    if state.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(state.device)
    so_far = {
        "sums": {name: vars(sums) for name, sums in state.sums.items()},
        "measured": {name: vars(means) for name, means in state.measured.items()},
        "loss_sum": state.loss_sum,
        "noise_seed": state.noise_seed,
    }
    return on_host({"statistics": _statistics(state), "generators": generators, "so_far": so_far})


def restore(state: State, saved: Mapping[str, Any], own: Mapping[str, Any], running: bool) -> None:
    """Take over what was saved; within a `running` epoch its sums too, after `State.start_epoch`.

    Args:
        saved: what `Saver` saved.
        own: what `own_part` returned there, in one of several processes; `saved` in a process on its own.
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
