"""Where a run stands, in memory and on the disk; how it is saved, and how it goes on from what was saved.

It goes on at the end of an epoch or between any two of its steps. The order of the images, their views and the random
starts are functions of the seed, the epoch and the step: they need no memory. torch's own generators are kept for
methods that draw from them.

A save copies the state to the host, for which nothing waits on a GPU, and leaves the rest, digests and files, to a
thread. One save is on its way at a time: a newer one waits for it, as both are made in the same memory.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from retemper.engine.device import is_out_of_memory
from retemper.engine.epoch_stats import ClassMeans
from retemper.engine.recipe import Recipe
from retemper.engine.run.diverged import LOWER
from retemper.engine.run.host_memory import HostMemory, on_host
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.selection import Best, newest_best
from retemper.engine.run.writer import Writer
from retemper.engine.state import State
from retemper.errors import DataError, Diverged, UsageError


class Saver:
    """The position of a run, and its saves.

    Attributes:
        finished, done: the epochs, and the steps of the next one, that the state in memory is behind.
        saved: both, as they are on the disk; the thread sets it.
        tail: the state at the end of an epoch's steps, while that epoch is being concluded.
        started: when the epoch would have begun, had it not been cut in two; monotonic seconds.
        next_save: when the state is to be saved within the epoch; monotonic seconds.
        best: the best epoch so far.
        is_better: whether that is the epoch that is being concluded, so that its weights are to be written.
    """

    def __init__(
        self, folder: RunFolder, recipe: Recipe, state: State, *, seed: int, save_every: float, header: dict[str, str]
    ) -> None:
        """`save_every` is in seconds of training; `header` is what every file of weights says of the network."""
        self.folder, self.recipe, self.state, self.ranks = folder, recipe, state, state.part.ranks
        self.seed, self.save_every, self.header = seed, save_every, header
        self.finished, self.done, self.saved = 0, 0, (0, 0)
        self.tail: dict[str, Any] | None = None
        self.before_s = 0.0  # what an earlier process took for the epoch
        self.start_clock()
        self.best, self.is_better = Best(), False
        self.memory, self.writer = HostMemory(state.device), Writer()

    def resume(self, config: dict[str, Any]) -> bool:
        """Begin the folder with its config.json, or take up the state in it; say whether the run is a new one.

        Raises:
            UsageError: the folder is another run's, or was saved by another number of processes within an epoch.
            DataError: what was saved is damaged.
        """
        found: dict[str, Any] = {}
        if self.ranks.is_first:
            self.folder.begin(config, type(self.recipe.method))
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
        self.best, self.before_s = Best(**found["best"]), saved["seconds"]
        return False

    def start_clock(self) -> None:
        """Begin to count the seconds of training: the first step comes now."""
        self.started = time.monotonic() - self.before_s
        self.next_save = time.monotonic() + self.save_every

    def lap_s(self) -> float:
        """Return the seconds of the epoch, which ends now; the next one begins."""
        now = time.monotonic()
        seconds, self.started = now - self.started, now
        return seconds

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
        """Take the weights for the best so far; `save_epoch` has them written."""
        self.best, self.is_better = Best(score, epoch), True

    def save_epoch(self, epoch: int, line: dict[str, Any]) -> None:
        """Have the state after `epoch` saved, its weights, and its line of metrics.jsonl. Raises as `settle`."""
        state = self._snapshot(epoch, 0)
        self.finished, self.done, self.tail = epoch, 0, None
        header = self.header | {"epoch": str(epoch)}
        best = header | {"score": repr(self.best.score)} if self.is_better else None
        self.is_better = False

        def write() -> None:
            weights = state["average"]["network"] if "average" in state else state["student"]
            if best is not None:
                self.folder.save_weights(self.folder.best, weights, best)
            self.folder.save_epoch(line, weights, header, state)

        self._write(state, write)

    def save_here(self) -> None:
        """Have the state saved as it is; every step so far must have been finite. Raises as `settle`."""
        state = self.tail or self._snapshot(self.finished, self.done)
        self._write(state, lambda: self.folder.save_state(state))

    def look(self) -> None:
        """Raise as `settle` where a save has failed by now; wait for none."""
        self.writer.look()

    def settle(self) -> None:
        """Wait until all is saved; a save that failed is tried again.

        Raises:
            DataError: the disk is full, or does not let us.
            Diverged: a weight or a statistic is not finite: the last update was made before anything was seen.
        """
        self.writer.settle()

    def save_cut(self, score: float, cut: str) -> None:
        """Write the weights of a run that is cut before its end, so that it can be evaluated, once its state is saved.

        They stand in for the best where no epoch was the best yet. Their headers say `cut`, where that was.
        """
        if not self.ranks.is_first:
            return
        header = self.header | {"epoch": str(self.finished), "cut": cut}
        if self.best == Best():
            self.folder.save_weights(self.folder.best, self.state.kept.state_dict(), header | {"score": repr(score)})
        self.folder.save_weights(self.folder.last, self.state.kept.state_dict(), header)

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
        """Say what a run that diverged leaves on the disk. Raises as `settle`."""
        self.settle()
        return on_disk(self.folder, self.saved)

    def _snapshot(self, finished: int, done: int) -> dict[str, Any]:
        """Return all that going on needs, on the host, once `memory.wait` has returned there. Raises as `settle`."""
        self.settle()
        if self.state.prior is not None:
            self.state.prior.merge(self.ranks)
        own = own_part(self.state)
        saved = self.memory.copy(
            {
                **(stepped_part(self.state) if self.tail is None else {}),
                **moving_part(self.state),
                "generators": own["generators"],
                "epoch": finished,
                "step": done,
                "so_far": own["so_far"] if done else {},
                "seconds": time.monotonic() - self.started if done else 0.0,
                "best": asdict(self.best),
                "world_size": self.ranks.world_size,
                "processes": self.ranks.gather(on_host(own)) if self.ranks.joined else [],
            }
        )
        if self.tail is not None:
            stepped = ("student", "optimizer", "peer", "prior")  # `stepped_part` is copied already
            saved |= {name: self.tail[name] for name in stepped if name in self.tail}
        if self.ranks.joined:  # all of them leave then
            self.memory.wait()
            if self.ranks.any(not is_finite(saved)) == [True]:
                raise diverged(saved, on_disk(self.folder, self.saved))
        return saved

    def _write(self, state: dict[str, Any], write: Callable[[], None]) -> None:
        """Have the thread call `write` for what `_snapshot` returned, unless a weight in it is not finite."""

        def job() -> None:
            self.memory.wait()
            if not is_finite(state):
                raise diverged(state, on_disk(self.folder, self.saved))
            write()
            self.saved = state["epoch"], state["step"]

        if self.ranks.is_first:
            self.writer.begin(job)
        else:
            self.saved = state["epoch"], state["step"]
        self.next_save = time.monotonic() + self.save_every


def on_disk(folder: RunFolder, saved: tuple[int, int]) -> str:
    """Say what a folder holds, where `saved` are the epochs and the steps of the next one that its state is behind."""
    finished, done = saved
    within = f" and {done} steps of the next" if done else ""
    return f"{folder.state} holds epoch {finished}{within}" if any(saved) else "no state was saved yet"


def stepped_part(state: State) -> dict[str, Any]:
    """Return what the steps of an epoch move, and nothing that follows them."""
    peer = {} if state.peer is None else {"peer": state.peer.network.state_dict()}
    prior = {} if state.prior is None or not state.part.ranks.is_first else {"prior": state.prior.places}
    return {"student": state.student.state_dict(), "optimizer": state.optimizer.state_dict(), **peer, **prior}


def moving_part(state: State) -> dict[str, Any]:
    """Return what the end of an epoch moves too."""
    average = {} if state.average is None else {"average": state.average.state()}
    fallback = {} if state.fallback is None else {"fallback": state.fallback}
    return {"scaler": state.scaler.state_dict(), "class_state": state.class_state, **average, **fallback}


def diverged(saved: Mapping[str, Any], kept: str) -> Diverged:
    """Return the error that a saved state is not finite, where the disk holds what `kept` says."""
    epoch, step = saved["epoch"], saved["step"]
    when = f"epoch {epoch + 1}, step {step}" if step else f"epoch {epoch}"
    return Diverged(f"the weights are not finite after {when}; {kept}. {LOWER}")


def is_finite(saved: Mapping[str, Any]) -> bool:
    """Say whether every weight and statistic of the student, and of a peer, in a saved state is finite."""
    networks = [saved[name] for name in ("student", "peer") if name in saved]
    return all(bool(value.isfinite().all()) for network in networks for value in network.values())


def own_part(state: State) -> dict[str, Any]:
    """Return what each of several processes has of its own.

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
    return {"statistics": _statistics(state), "generators": generators, "so_far": so_far}


def restore(state: State, saved: Mapping[str, Any], own: Mapping[str, Any], running: bool) -> None:
    """Take over what was saved; within a `running` epoch its sums too, after `State.start_epoch`.

    Args:
        saved: what `Saver` saved.
        own: what `own_part` returned there, in one of several processes; `saved` in a process on its own.
    Raises:
        RuntimeError, ValueError, KeyError, TypeError, AttributeError: it is not of such a run.
    """
    state.student.load_state_dict(saved["student"])
    if state.peer is not None:
        state.peer.network.load_state_dict(saved["peer"])
    rates = [group["lr"] for group in state.optimizer.param_groups]
    state.optimizer.load_state_dict(saved["optimizer"])
    for group, lr in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr  # the tensor that a captured step reads, not the saved one's copy
    state.scaler.load_state_dict(saved["scaler"])
    state.move_classes(saved["class_state"])
    state.fallback = saved.get("fallback")
    if state.fallback is not None:
        state.prior = None
    if state.prior is not None:
        state.prior.load(saved["prior"])
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
    networks |= {} if state.peer is None else {"peer": state.peer.network}
    return {f"{which}.{name}": value for which, one in networks.items() for name, value in one.named_buffers()}


def _copy(into: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Copy in place: a captured step knows the tensors' addresses."""
    for name, value in values.items():
        into[name].copy_(value)
