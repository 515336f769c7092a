"""A campaign of faults: the processes that suffer them, the undisturbed run beside them, and the counts."""

import io
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from retemper import interrupts
from retemper.cli import run
from retemper.engine.run.state_file import unpack

SHORT = "--device cpu --attack-steps 2 --holdout-per-class 5 --select-steps 2 --batch-size 128 --select-every 1".split()
EPOCHS = 6


@dataclass
class Row:
    """A line of the table: the tries of one fault, and how they ended."""

    fault: str
    tried: int = 0
    held: int = 0
    lost: int = 0  # kills and signals: runs whose state, best or result was not what it had to be
    seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what did not hold

    def count(self, held: bool, seconds: float, note: str = "") -> None:
        """Count one more try, which held or not, and the seconds it took."""
        self.tried, self.held = self.tried + 1, self.held + held
        self.seconds.append(seconds)
        if not held:
            self.lost += 1
            self.notes.append(note[-300:])

    def as_json(self) -> dict[str, Any]:
        """Return the row for JSON, with the median and the largest of the seconds in place of all."""
        times = {"p50": statistics.median(self.seconds), "max": max(self.seconds)} if self.seconds else None
        return {"fault": self.fault, "tried": self.tried, "held": self.held, "lost": self.lost} | {
            "seconds": times,
            "notes": self.notes,
        }


class Fork:
    """A fork of this process that runs `retemper WORDS`."""

    def __init__(self, words: list[str], log: Path, prepare: Callable[[], object] = lambda: None) -> None:
        self.log = log
        log.touch()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 99
            try:
                with open(log, "w", buffering=1) as err, redirect_stderr(err), redirect_stdout(io.StringIO()):
                    prepare()
                    interrupts.install()
                    code = run(words)
            finally:
                os._exit(code)

    def ended(self) -> int | None:
        """Return the exit code of the fork, minus the signal for a killed one; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, limit: float = 120.0) -> int:
        """Wait for the end of the fork and return its exit code; 124 after a limit, which counts as a hang."""
        end = time.monotonic() + limit
        while (code := self.ended()) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return 124
            time.sleep(0.002)
        return code


class Campaign:
    """A scratch folder with a teacher and an undisturbed run, and the rows of the faults tried in it.

    Attributes:
        rng: draws the moments and the places of the faults.
        whole: the folder of the undisturbed run.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.rng, self.runs = root, random.Random(seed), 0
        self.rows: list[Row] = []
        self.say(["train", "sat:digits", "--epochs", "1", "--out", str(root / "teacher"), *SHORT])
        self.whole = root / "whole"
        self.say(self.words(self.whole))

    def say(self, words: list[str]) -> None:
        """Run `retemper WORDS` in this process, in silence."""
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            assert run(words) == 0, words

    def words(self, out: Path, *more: str) -> list[str]:
        """Return the command line of a run to disturb, with a cache of its own for the teacher's answers."""
        own = ["--teacher", str(self.root / "teacher"), "--out", str(out), "--cache", f"{out}.cache"]
        return ["train", "absld:digits", "--epochs", str(EPOCHS), *SHORT, *own, *more]

    def row(self, fault: str) -> Row:
        """Begin the row of a fault, and return it."""
        self.rows.append(Row(fault))
        print(f"{fault} ...", file=sys.stderr, flush=True)
        return self.rows[-1]

    def fresh(self) -> Path:
        """Return a folder for one more run."""
        self.runs += 1
        return self.root / f"run{self.runs}"

    def fork(self, out: Path, *more: str, prepare: Callable[[], object] = lambda: None) -> Fork:
        """Start the run in a fork, which calls `prepare` first."""
        return Fork(self.words(out, *more), self.root / "log", prepare)

    def ends_as_undisturbed(self, out: Path) -> bool:
        """Resume the run to its end; say whether last weights, best weights and class state are those undisturbed."""
        if self.fork(out).wait() != 0:
            return False
        pairs = [
            (load_file(folder / f"{name}.safetensors") for folder in (self.whole, out)) for name in ("last", "best")
        ]
        states = (unpack(folder / "last.state")["class_state"] for folder in (self.whole, out))
        return all(
            one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
            for one, two in [*pairs, states]
        )

    def forget(self, out: Path) -> None:
        """Delete the run and its cache."""
        for folder in (out, Path(f"{out}.cache")):
            shutil.rmtree(folder, ignore_errors=True)

    def one_line(
        self, row: Row, out: Path, says: str, *more: str, code: int = 3, prepare: Callable[[], object] = lambda: None
    ) -> None:
        """Start the run: it must end with this code and one line of error that says so."""
        began = time.monotonic()
        cache = ("--cache", str(self.root / "cache"))
        process = self.fork(out, *cache, *more, prepare=prepare)
        found, said = process.wait(), process.log.read_text()
        lines = [line for line in said.splitlines() if line.startswith("retemper: error: ")]
        good = found == code and len(lines) == 1 and says in lines[0] and "Traceback" not in said
        row.count(good, time.monotonic() - began, f"exit code {found}: {said[-250:]}")


def process_runs(process: Fork) -> bool:
    """Say whether the fork still runs; its exit code is left to `wait`."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
