"""A run's folder: what is written there, in what order, and how a run goes on after it was killed.

Every file is replaced atomically, and `last.state` is written last in an epoch: whatever the moment of a kill, it names
an epoch and a step whose weights, class state and score are whole, and lines of `metrics.jsonl` beyond it are dropped
on resume. The state before it stays as `last.1.state`, for the day that the disk damages the newest. What the attack
"pgi" keeps of each image lies beside them in a file for each of the two (`prior-EPOCH-STEP.state`), written first.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retemper.console import say
from retemper.engine.checkpoints.find import same_network
from retemper.engine.checkpoints.weights import save_weights
from retemper.engine.recipe import Method
from retemper.engine.run.changed import changed_options, flat_options
from retemper.engine.run.content import RECORDED, Config, EpochLine, Saved
from retemper.engine.run.state_file import Damaged, unpack, write_state
from retemper.errors import DataError, UsageError
from retemper.files import (
    atomic_write,
    locked,
    read_json,
    read_json_lines,
    sweep,
    sync,
    write_atomically,
    write_json,
)
from retemper.shape import misfit

PRIOR = re.compile(r"prior-(\d+)-(\d+)\.state")
ANEW = "delete the folder to start the run anew"


class RunFolder:
    """The files of one run, under `path`.

    Of several processes the first writes them, and process `rank` one alone: its part of the batch that diverged.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self.config, self.metrics = path / "config.json", path / "metrics.jsonl"
        self.last, self.best, self.state = path / "last.safetensors", path / "best.safetensors", path / "last.state"
        self.older, self.damaged = path / "last.1.state", path / "damaged.state"
        self.evaluation = path / "evaluation.json"
        self.diverged = path / (f"diverged.rank{rank}.pt" if rank else "diverged.pt")

    def require_place(self) -> None:
        """Raise UsageError where there is a file in the folder's place: before a teacher is trained for nothing."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not there.is_dir():
            raise UsageError(f"cannot write to {self.path} ({there} is a file): name another folder with --out")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, and make it if it does not exist.

        Raises:
            UsageError: another process holds it, or it cannot be written to.
        """
        new = not os.path.lexists(self.path)
        with ExitStack() as held:
            try:
                busy = f"another process is writing to {self.path}: wait for it or name another --out"
                held.enter_context(locked(self.path / ".lock", busy))
            except OSError as error:
                why = f"cannot write to {self.path} ({error.strerror}): name another folder with --out"
                raise UsageError(why) from None
            for file in (self.config, self.metrics, self.last, self.best, self.state, self.older, self.diverged):
                sweep(file)
            try:
                yield
            finally:
                with suppress(OSError):  # it may be gone
                    if new and os.listdir(self.path) == [".lock"]:  # a start that failed leaves nothing
                        (self.path / ".lock").unlink()
                        self.path.rmdir()

    def read_config(self) -> dict[str, Any]:
        """Return the run's config.json, its recipe's options by flat name (files of earlier versions hold no groups).

        Raises:
            DataError: it is not there, or is not what a run writes.
        """
        config = read_json(self.config, Config, ANEW)
        recipe = config["recipe"] = flat_options(config["recipe"])
        for name, one in RECORDED.items():
            try:
                if wrong := misfit(recipe.get(name), one.kind, at=name):
                    raise ValueError(wrong)
                if one.kind is not str:  # of another version's networks and data sets a report can be written
                    one.check(recipe.get(name))
            except ValueError as error:
                raise DataError(f"{self.config} is damaged ({error}): {ANEW}") from None
        return config

    def begin(self, config: dict[str, Any], method: type[Method] = Method) -> None:
        """Write the config, or check that the run found here is the same one.

        Args:
            method: the run's, whose own options have defaults.
        Raises:
            UsageError: the folder holds a run of another recipe, seed or teacher.
        """
        config = json.loads(json.dumps(config))  # tuples become lists, as in the file
        if not self.config.exists():
            if self.state.exists():
                raise DataError(f"{self.path} holds a run without its config.json: name another folder with --out")
            with _telling(self.config):
                write_json(self.config, config)
            return
        differing = _differences(self.read_config(), config, method)
        if differing:
            raise UsageError(
                f"{self.path} holds another run ({'; '.join(differing)}): "
                "repeat its own options to go on with it, or name another folder with --out"
            )

    def save_epoch(
        self, line: dict[str, Any], weights: Mapping[str, Tensor], metadata: dict[str, str], state: dict[str, Any]
    ) -> None:
        """Write one epoch: its metrics line, the weights, and at last the state that resuming reads.

        Raises:
            DataError: the disk is full, or does not let us; what was there is intact.
        """
        self._write_metrics(line["epoch"] - 1, line)
        self.save_weights(self.last, weights, metadata)
        self.save_state(state)

    def save_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Write the lines of a run that is made at once, in place of all there were. Raises as `save_epoch`."""
        self._write_metrics(0, *lines)

    def save_weights(self, path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        """Write `last` or `best`. Raises as `save_epoch`."""
        with _telling(path):
            save_weights(path, weights, metadata)

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the state that resuming reads, of an epoch or of a step within one. Raises as `save_epoch`."""
        at = state["epoch"], state["step"]
        if "prior" in state:  # much larger than the rest; it is there before a state asks for it
            path = self._prior(*at)
            with _telling(path), atomic_write(path) as file:
                write_state(file, state["prior"])
            state = state | {"prior": True}
        with _telling(self.state):
            with atomic_write(self.state) as file:
                write_state(file, state)
                sync(file)
                if self.state.exists():
                    self._keep_the_one_before()  # only now that the new one is on the disk
            self._sweep_priors(at)

    def _prior(self, epoch: int, step: int) -> Path:
        """Return the file of what the attack "pgi" keeps of each image, that goes with the state at this place."""
        return self.path / f"prior-{epoch}-{step}.state"

    def _sweep_priors(self, at: tuple[int, int]) -> None:
        """Remove the files that neither the state at this place asks for nor the one before it."""
        places = {
            (int(found[1]), int(found[2])) for path in self.path.iterdir() if (found := PRIOR.fullmatch(path.name))
        }
        asked = sorted(place for place in places if place <= at)[-2:]
        for place in places - {*asked}:
            self._prior(*place).unlink(missing_ok=True)

    def _keep_the_one_before(self) -> None:
        """Name `last.state` `last.1.state` too, so that at no moment there is none."""
        spare = self.path / f".{self.older.name}.link.tmp"
        spare.unlink(missing_ok=True)
        try:
            os.link(self.state, spare)
        except OSError:  # a file system without hard links
            os.replace(self.state, self.older)
            return
        try:
            os.replace(spare, self.older)
        finally:
            spare.unlink(missing_ok=True)  # it is still there where both were one file before: a rename does nothing

    def load_state(self) -> dict[str, Any] | None:
        """Return what was last saved, or before that if the newest is damaged; None for a run not yet begun.

        The metrics are trimmed to its epoch. The damaged newest is put aside, or it would come before the good one.

        Raises:
            DataError: no state can be read.
        """
        damaged: list[str] = []
        for path in (path for path in (self.state, self.older) if path.exists()):
            try:
                state = unpack(path, Saved)
                if state.get("prior"):
                    prior = self._prior(state["epoch"], state["step"])
                    if not prior.exists():
                        raise Damaged(f"{path} asks for {prior.name}, which is gone")
                    state["prior"] = unpack(prior)
            except Damaged as error:
                damaged.append(str(error))
                continue
            if damaged:
                where = f"epoch {state['epoch']}, step {state['step']} of the next"
                say(f"{damaged[0]}: going on from the one before it, {where}")
                with _telling(self.damaged):
                    os.replace(self.state, self.damaged)
            self._write_metrics(state["epoch"])
            return state
        if damaged:
            raise DataError(f"{', and '.join(damaged)}: {ANEW}")
        self._write_metrics(0)
        return None

    def save_diverged(self, content: dict[str, Any]) -> None:
        """Write what is to be looked at after a run left the finite numbers. Raises as `save_epoch`."""
        with _telling(self.diverged), atomic_write(self.diverged) as file:
            torch.save(content, file)

    def _write_metrics(self, last: int, *more: dict[str, Any]) -> None:
        """Leave the lines up to epoch `last`, but for those that cannot be read, and `more` behind them."""
        lines = [line for line in read_json_lines(self.metrics, EpochLine)[0] if line["epoch"] <= last]
        content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in (*lines, *more))
        with _telling(self.metrics):
            write_atomically(self.metrics, content.encode())


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Say in one line that a file could not be written."""
    try:
        yield
    except OSError as error:
        advice = "mend that and run the same command again; it goes on from what was saved before"
        raise DataError(f"cannot write {path} ({error.strerror or error}): {advice}") from None


def _differences(old: dict[str, Any], new: dict[str, Any], method: type[Method]) -> list[str]:
    """Say what makes `new` another run than `old`, as "field: old, now new"."""
    was, now = old["recipe"], flat_options(new["recipe"])
    changed = [(name, was.get(name), now[name]) for name in changed_options(was, now, method)]
    changed += [
        (name, old.get(name), new.get(name))
        for name in ("method", "seed", "student_source", "jpeg_quality")
        if old.get(name) != new.get(name)
    ]
    for what in ("teacher", "clean_teacher", "start"):
        before, after = (config.get(what) or {} for config in (old, new))
        if not same_network(before, after):
            changed.append((what, before.get("sha256", "none"), after.get("sha256", "none")))
    before, after = ((config.get("extra") or {}).get("fingerprint", "none") for config in (old, new))
    if before != after:
        changed.append(("extra", before, after))
    return [f"{name}: {before}, now {after}" for name, before, after in changed]
