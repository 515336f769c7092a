"""What a run survives: kills, signals, damaged files, full disks, bad numbers, each injected for real, and counted.

    python benchmarks/faults.py --json benchmarks/results/cpu/faults.json

Runs are forks of this process on digits, a few seconds each. "held" counts the tries that ended as they must: for kills
and signals every file whole and the finished run bit for bit that of an undisturbed one, for damage a refusal. Seconds
are from the fault to the end of the process, or of one check. Root mounts a small disk for the disk faults. Prints a
table; writes it to --json with a note on each try that did not end as it must.
"""

import io
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from summary import markdown, words_of, write_summary

from retemper.engine import create_model, load_checkpoint
from retemper.engine.cli import run
from retemper.engine.run import interrupts
from retemper.engine.run.state_file import unpack
from retemper.engine.run.teacher_table import TeacherTable
from retemper.loaders import DataError, ViewSpace, convert, load_split, verify
from retemper.loaders.ffcv_backend import FfcvLoader, _pump_class
from retemper.loaders.loader import Plan

SHORT = "--device cpu --attack-steps 2 --holdout-per-class 5 --select-steps 2 --batch-size 128 --select-every 1".split()
EPOCHS = 6
CPU = torch.device("cpu")


@dataclass
class Row:
    """One line of the table."""

    fault: str
    tried: int = 0
    held: int = 0
    lost: int = 0  # kills and signals: runs whose state, best or result was not what it had to be
    seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what did not hold

    def count(self, held: bool, seconds: float, note: str = "") -> None:
        """One more try."""
        self.tried, self.held = self.tried + 1, self.held + held
        self.seconds.append(seconds)
        if not held:
            self.lost += 1
            self.notes.append(note[-300:])

    def as_json(self) -> dict[str, Any]:
        """With the median and the largest of the seconds in their place."""
        times = {"p50": statistics.median(self.seconds), "max": max(self.seconds)} if self.seconds else None
        return {"fault": self.fault, "tried": self.tried, "held": self.held, "lost": self.lost} | {
            "seconds": times,
            "notes": self.notes,
        }


class Fork:
    """`retemper WORDS` in a fork of this process."""

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
        """Its exit code, minus the signal for a killed one; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, limit: float = 120.0) -> int:
        """Its exit code; 124 after a limit, which counts as a hang."""
        end = time.monotonic() + limit
        while (code := self.ended()) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return 124
            time.sleep(0.002)
        return code


class Campaign:
    """The faults, in a scratch folder with a teacher and an undisturbed run."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.rng, self.runs = root, random.Random(seed), 0
        self.rows: list[Row] = []
        self.say(["train", "sat:digits", "--epochs", "1", "--out", str(root / "teacher"), *SHORT])
        self.whole = root / "whole"
        self.say(self.words(self.whole))

    def say(self, words: list[str]) -> None:
        """Run the words here, in silence."""
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            assert run(words) == 0, words

    def words(self, out: Path, *more: str) -> list[str]:
        """The run that everything happens to; its table is its own."""
        own = ["--teacher", str(self.root / "teacher"), "--out", str(out), "--cache", f"{out}.cache"]
        return ["train", "absld:digits", "--epochs", str(EPOCHS), *SHORT, *own, *more]

    def row(self, fault: str) -> Row:
        """A new line."""
        self.rows.append(Row(fault))
        print(f"{fault} ...", file=sys.stderr, flush=True)
        return self.rows[-1]

    def fresh(self) -> Path:
        """A folder for one more run."""
        self.runs += 1
        return self.root / f"run{self.runs}"

    def fork(self, out: Path, *more: str, prepare: Callable[[], object] = lambda: None) -> Fork:
        return Fork(self.words(out, *more), self.root / "log", prepare)

    def ends_as_undisturbed(self, out: Path) -> bool:
        """Go on with the run to its end: whether its weights, the best's and the class state are the very same."""
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

    # kills and signals

    def kills(self, number: int, chain: int = 20) -> None:
        """kill -9 at random moments of a run that saves after every step, from its first instant to its last."""
        row = self.row("kill -9 while training and saving")
        while row.tried < number:
            out, best = self.fresh(), False
            for _ in range(min(chain, number - row.tried)):
                process = self.fork(out, "--save-every", "0")
                self.let_run(process, out)
                began, problem = time.monotonic(), ""
                os.kill(process.pid, signal.SIGKILL)
                if process.wait() == 0:
                    break  # it was done before
                try:
                    if (out / "last.state").exists():
                        unpack(out / "last.state")
                    if best or (out / "best.safetensors").exists():
                        best = True
                        load_checkpoint(out / "best.safetensors", create_model("tiny_resnet", 10))
                except DataError as error:
                    problem = str(error)
                row.count(not problem, time.monotonic() - began, problem)
            if not self.ends_as_undisturbed(out):
                row.lost += 1
                row.notes.append("another result")
            self.forget(out)

    def let_run(self, process: Fork, out: Path) -> None:
        """For a random while: now and then hardly begun, else to some moment after its next save."""
        if self.rng.random() < 0.2:
            time.sleep(self.rng.random() * 0.5)
            return
        state = out / "last.state"
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process_runs(process) and not (state.exists() and state.stat().st_mtime_ns > before):
            time.sleep(0.002)
        time.sleep(self.rng.random() * 0.3)

    def signals(self, number: int) -> None:
        """Each in a process of its own, so that the end of Python counts too."""
        for kind in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            row, out, left = self.row(kind.name), self.fresh(), False
            for _ in range(number):
                words = [sys.executable, "-m", "retemper.engine", *self.words(out)]
                child = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
                assert child.stderr is not None
                for line in child.stderr:
                    if ": epochs " in line or "are done in" in line:
                        break
                time.sleep(self.rng.random() * 0.4)
                began = time.monotonic()
                child.send_signal(kind)
                said = child.communicate()[1]
                if child.returncode == 0:
                    self.forget(out)  # it was done before: another one
                    continue
                left = True
                lines = [line for line in said.splitlines() if line.startswith("retemper: interrupted; ")]
                row.count(child.returncode == 75 and len(lines) == 1, time.monotonic() - began, said)
            if left and not self.ends_as_undisturbed(out):
                row.lost += 1
                row.notes.append("another result")
            self.forget(out)

    def forget(self, out: Path) -> None:
        for folder in (out, Path(f"{out}.cache")):
            shutil.rmtree(folder, ignore_errors=True)

    # damage

    def damage(self, number: int) -> None:
        """A byte changed, or a file cut, at a random place; one in five is a cut."""
        model = create_model("tiny_resnet", 10)
        beton = self.root / "digits.beton"
        convert(load_split("digits", "train", None), beton, progress=False)
        self.spoil("checkpoint", self.whole / "last.safetensors", lambda path: load_checkpoint(path, model), number)
        self.spoil("training state", self.whole / "last.state", unpack, number)
        self.spoil(".beton", beton, verify, number)
        size = 60, ViewSpace(1).count, 10
        table = TeacherTable(self.root / "table", *size, {})
        index, view = (axis.reshape(-1) for axis in np.indices(size[:2]))
        logits = np.random.default_rng(0).normal(size=(len(index), 10)).astype(np.float32)

        def read(_: Path) -> None:
            right, found = TeacherTable(self.root / "table", *size, {}).look_up(index, view)
            if not np.array_equal(logits[right], found[right]):
                raise AssertionError("a wrong answer was believed")
            if not right.all():
                raise DataError("asked again")

        table.keep(index, view, logits)
        for name in ("logits.f32", "checksums.u32"):
            self.spoil(f"teacher's table, {name}", table.folder / name, read, number // 2)

    def spoil(self, what: str, path: Path, read: Callable[[Path], object], number: int) -> None:
        whole = path.read_bytes()
        read(path)
        for kind, tries in (("byte changed", number - number // 5), ("cut", number // 5)):
            row = self.row(f"{what}: {kind}")
            for _ in range(tries):
                at, spoilt = self.rng.randrange(len(whole)), bytearray(whole)
                spoilt[at] ^= self.rng.randrange(1, 256)
                with open(path, "r+b") as file:  # in place: the table is mapped
                    if kind == "cut":
                        file.truncate(at)
                    else:
                        file.seek(at)
                        file.write(spoilt[at : at + 1])
                began, note = time.monotonic(), f"believed at byte {at}"
                with redirect_stderr(io.StringIO()):
                    try:
                        read(path)
                    except DataError:
                        note = ""
                row.count(not note, time.monotonic() - began, note)
                with open(path, "r+b") as file:
                    file.write(whole)
                    file.truncate()

    # disks, memory, numbers, loaders

    def disks(self, number: int) -> None:
        """A disk that fills at some moment of the run; then there is room, and the run goes on."""
        full, readonly = self.row("disk full"), self.row("disk read-only")
        small = self.root / "small"
        small.mkdir()
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", small]).returncode:
            full.notes.append("not tried: needs root")
            return
        try:
            for _ in range(number):
                out = small / "run"
                (small / "others").write_bytes(bytes(self.rng.randrange(6_200_000, 8_200_000)))
                self.one_line(full, out, "cannot write")
                (small / "others").unlink()
                if not self.ends_as_undisturbed(out):
                    full.lost += 1
                    full.notes.append("another result")
                self.forget(out)
            for _ in range(number):
                subprocess.run(["mount", "-o", "remount,ro", small], check=True)
                self.one_line(readonly, small / "run", "--out", code=2)
                subprocess.run(["mount", "-o", "remount,rw", small], check=True)
        finally:
            subprocess.run(["umount", "-l", small], check=True)

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

    def rest(self, number: int) -> None:
        """A file that may not grow, a folder taken away, too little memory, numbers that are not finite."""
        kinds = {name: self.row(name) for name in ("quota", "folder taken away", "out of memory", "not finite")}
        for _ in range(number):
            out, most = self.fresh(), self.rng.randrange(3_000, 600_000)
            off = "--teacher-table", "off"
            self.one_line(
                kinds["quota"], out, "cannot write", *off,
                prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),  # noqa: B023  # at once
            )  # fmt: skip
            self.forget(out)
            self.take_away(kinds["folder taken away"])
            big = "--batch-size", "1024", "--student", "wrn34_10"
            self.one_line(kinds["out of memory"], out, "out of memory", *big, code=2, prepare=little_memory)
            self.forget(out)
            self.one_line(kinds["not finite"], out, "the update was not made", "--lr", "1e30", code=4)
            self.forget(out)

    def take_away(self, row: Row) -> None:
        out = self.fresh()
        process = self.fork(out, "--save-every", "0")
        while process_runs(process) and not (out / "last.state").exists():
            time.sleep(0.002)
        began = time.monotonic()
        os.rename(out, f"{out}.cache/away")
        code, said = process.wait(), process.log.read_text()
        unpack(Path(f"{out}.cache/away/last.state"))
        row.count(code == 3 and said.count("retemper: error: cannot write") == 1, time.monotonic() - began, said)
        self.forget(out)

    def loaders(self) -> None:
        """FFCV's reading thread dies, or stands still."""
        split, beton = load_split("digits", "train", None), self.root / "digits.beton"
        pump = _pump_class()
        whole = pump.run_pipeline

        def dies(*_: object) -> None:
            raise MemoryError("no more")

        for fault, broken in (
            ("FFCV's thread dies", dies),
            ("FFCV's thread stalls (limit 2 s)", lambda *_: time.sleep(9)),
        ):
            row = self.row(fault)
            plan = Plan(np.arange(256), 32, 0, ViewSpace(0, False))
            loader = FfcvLoader(split, beton, plan, CPU, "a test", timeout_s=2.0 if "stalls" in fault else 120.0)
            if "stalls" not in fault:
                list(loader.epoch(0))  # it compiles first
            pump.run_pipeline = broken
            began, note = time.monotonic(), "no error"
            try:
                next(loader.epoch(1))
            except DataError as error:
                note = "" if "use --loader resident" in str(error) else str(error)
            finally:
                pump.run_pipeline = whole
            row.count(not note, time.monotonic() - began, note)


def process_runs(process: Fork) -> bool:
    """Whether it has not ended; its end is left to `wait`."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def little_memory() -> None:
    """Room for a part of a network of 185 MB: what fails is an allocation of torch's. Where little is left for all that
    follows, the library of its convolutions has been seen to crash, and no program can answer for that."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (100 << 20), -1))


def table(rows: list[dict[str, Any]]) -> str:
    """A line a fault."""
    lines = []
    for row in rows:
        times = row["seconds"]
        shown = ("", "") if times is None else tuple(f"{times[name]:.3g}" for name in ("p50", "max"))
        lines.append([row["fault"], f"{row['tried']:,}", f"{row['held']:,}", row["lost"], *shown])
    return markdown(["fault", "tried", "held", "lost", "seconds: median", "most"], lines)


@contextmanager
def scratch() -> Iterator[Path]:
    with TemporaryDirectory(prefix="retemper-faults-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        yield Path(folder)


def main() -> None:
    parser = words_of(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=2500, help="of each of four kinds of file")
    parser.add_argument("--signals", type=int, default=10, help="of each of three")
    parser.add_argument("--others", type=int, default=10, help="of each other fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with scratch() as root:
        campaign = Campaign(root, words.seed)
        campaign.kills(words.kills)
        campaign.signals(words.signals)
        campaign.disks(words.others)
        campaign.rest(words.others)
        campaign.damage(words.damages)
        campaign.loaders()
    content = {
        "command": " ".join(["python", *sys.argv]),
        "rows": [row.as_json() for row in campaign.rows],
        "seconds": time.monotonic() - began,
    }
    print(table(content["rows"]))
    write_summary(words.json, content, CPU)


if __name__ == "__main__":
    main()
