"""Does a run survive kills, signals, damaged files, full disks and bad numbers? Each is injected for real and counted.

    python benchmarks/faults.py --json benchmarks/results/cpu/faults.json

Runs are forks of this process on digits, a few seconds each. "held" counts the tries that ended as they must: for kills
and signals every file whole and the finished run bit for bit that of an undisturbed one, for damage a refusal. Seconds
are from the fault to the end of the process, or of one check. Root mounts a small disk for the disk faults. Prints a
table; writes it to --json with a note on each try that did not end as it must.
"""

import io
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from campaign import Campaign, Fork, Row, process_runs
from summary import markdown, words_of, write_summary

from retemper.engine import create_model, load_checkpoint
from retemper.engine.run import state_file
from retemper.engine.run.state_file import unpack
from retemper.engine.run.teacher_table import TeacherTable
from retemper.loaders import DataError, ViewSpace, convert, load_split, verify
from retemper.loaders.ffcv_backend import FfcvLoader, _pump_class
from retemper.loaders.loader import Plan

CPU = torch.device("cpu")
WRITES = 8000  # by its thread; a state takes nine hundred, a run makes sixty thousand


def kills(campaign: Campaign, number: int) -> None:
    """Kill with -9 a run that saves after every step: at random moments, and at random writes of its thread."""

    def at_any_moment(out: Path) -> Fork:
        process = campaign.fork(out, "--save-every", "0")
        let_run(campaign, process, out)
        os.kill(process.pid, signal.SIGKILL)
        return process

    def at_any_write(out: Path) -> Fork:
        write = campaign.rng.randrange(WRITES)
        return campaign.fork(out, "--save-every", "0", prepare=lambda: die_at_write(write))

    kill(campaign, "kill -9 while training and saving", number, at_any_moment)
    kill(campaign, "kill -9 amid a write of a state", number // 2, at_any_write)


def kill(campaign: Campaign, fault: str, number: int, strike: Callable[[Path], Fork], chain: int = 20) -> None:
    """Have runs struck dead, each up to `chain` times; what they leave must be whole, and their end undisturbed."""
    row = campaign.row(fault)
    while row.tried < number:
        out, best = campaign.fresh(), False
        for _ in range(min(chain, number - row.tried)):
            process = strike(out)
            began, problem = time.monotonic(), ""
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
        if not campaign.ends_as_undisturbed(out):
            row.lost += 1
            row.notes.append("another result")
        campaign.forget(out)


def die_at_write(number: int) -> None:
    """Have this process die just before a write of its saving thread, counted from 0."""
    whole, made = state_file._Sink._pass_on, count()

    def watched(self: Any, data: bytes | memoryview) -> None:
        if next(made) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, data)

    state_file._Sink._pass_on = watched


def let_run(campaign: Campaign, process: Fork, out: Path) -> None:
    """Wait a random while: now and then till it has hardly begun, else to some moment after its next save."""
    if campaign.rng.random() < 0.2:
        time.sleep(campaign.rng.random() * 0.5)
        return
    state = out / "last.state"
    before = state.stat().st_mtime_ns if state.exists() else 0
    while process_runs(process) and not (state.exists() and state.stat().st_mtime_ns > before):
        time.sleep(0.002)
    time.sleep(campaign.rng.random() * 0.3)


def signals(campaign: Campaign, number: int) -> None:
    """Send each signal to a process of its own, so that the end of Python counts too."""
    for kind in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        row, out, left = campaign.row(kind.name), campaign.fresh(), False
        for _ in range(number):
            words = [sys.executable, "-m", "retemper", *campaign.words(out)]
            child = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            assert child.stderr is not None
            for line in child.stderr:
                if ": epochs " in line or "are done in" in line:
                    break
            time.sleep(campaign.rng.random() * 0.4)
            began = time.monotonic()
            child.send_signal(kind)
            said = child.communicate()[1]
            if child.returncode == 0:
                campaign.forget(out)  # it was done before: another one
                continue
            left = True
            lines = [line for line in said.splitlines() if line.startswith("retemper: interrupted; ")]
            row.count(child.returncode == 75 and len(lines) == 1, time.monotonic() - began, said)
        if left and not campaign.ends_as_undisturbed(out):
            row.lost += 1
            row.notes.append("another result")
        campaign.forget(out)


def damage(campaign: Campaign, number: int) -> None:
    """Damage every kind of file that a run reads back: change a byte, or cut it, at a random place."""
    model = create_model("tiny_resnet", 10)
    beton = campaign.root / "digits.beton"
    convert(load_split("digits", "train", None), beton, progress=False)
    spoil(
        campaign, "checkpoint", campaign.whole / "last.safetensors", lambda path: load_checkpoint(path, model), number
    )
    spoil(campaign, "training state", campaign.whole / "last.state", unpack, number)
    spoil(campaign, ".beton", beton, verify, number)
    size = 60, ViewSpace(1).count, 10
    table = TeacherTable(campaign.root / "table", *size, {})
    index, view = (axis.reshape(-1) for axis in np.indices(size[:2]))
    logits = np.random.default_rng(0).normal(size=(len(index), 10)).astype(np.float32)

    def read(_: Path) -> None:
        right, found = TeacherTable(campaign.root / "table", *size, {}).look_up(index, view)
        if not np.array_equal(logits[right], found[right]):
            raise AssertionError("a wrong answer was believed")
        if not right.all():
            raise DataError("asked again")

    table.keep(index, view, logits)
    for name in ("logits.f32", "checksums.u32"):
        spoil(campaign, f"teacher's table, {name}", table.folder / name, read, number // 2)


def spoil(campaign: Campaign, what: str, path: Path, read: Callable[[Path], object], number: int) -> None:
    """Damage one file `number` times, a fifth of them cuts; `read` must refuse it each time."""
    whole = path.read_bytes()
    read(path)
    for kind, tries in (("byte changed", number - number // 5), ("cut", number // 5)):
        row = campaign.row(f"{what}: {kind}")
        for _ in range(tries):
            at, spoilt = campaign.rng.randrange(len(whole)), bytearray(whole)
            spoilt[at] ^= campaign.rng.randrange(1, 256)
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


def disks(campaign: Campaign, number: int) -> None:
    """Fill the disk at some moment of a run, then make room and let it go on; or make the disk read-only."""
    full, readonly = campaign.row("disk full"), campaign.row("disk read-only")
    small = campaign.root / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", small]).returncode:
        full.notes.append("not tried: needs root")
        return
    try:
        for _ in range(number):
            out = small / "run"
            (small / "others").write_bytes(bytes(campaign.rng.randrange(6_200_000, 8_200_000)))
            campaign.one_line(full, out, "cannot write")
            (small / "others").unlink()
            if not campaign.ends_as_undisturbed(out):
                full.lost += 1
                full.notes.append("another result")
            campaign.forget(out)
        for _ in range(number):
            subprocess.run(["mount", "-o", "remount,ro", small], check=True)
            campaign.one_line(readonly, small / "run", "--out", code=2)
            subprocess.run(["mount", "-o", "remount,rw", small], check=True)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def rest(campaign: Campaign, number: int) -> None:
    """Let no file grow, take the folder away, leave too little memory, make the numbers overflow."""
    kinds = {name: campaign.row(name) for name in ("quota", "folder taken away", "out of memory", "not finite")}
    for _ in range(number):
        out, most = campaign.fresh(), campaign.rng.randrange(3_000, 600_000)
        off = "--teacher-table", "off"
        campaign.one_line(
            kinds["quota"], out, "cannot write", *off,
            prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),  # noqa: B023  # at once
        )  # fmt: skip
        campaign.forget(out)
        take_away(campaign, kinds["folder taken away"])
        big = "--batch-size", "1024", "--student", "wrn34_10"
        campaign.one_line(kinds["out of memory"], out, "out of memory", *big, code=2, prepare=little_memory)
        campaign.forget(out)
        campaign.one_line(kinds["not finite"], out, "the update was not made", "--lr", "1e30", code=4)
        campaign.forget(out)


def take_away(campaign: Campaign, row: Row) -> None:
    """Move the run's folder elsewhere once it has saved."""
    out = campaign.fresh()
    process = campaign.fork(out, "--save-every", "0")
    while process_runs(process) and not (out / "last.state").exists():
        time.sleep(0.002)
    began = time.monotonic()
    os.rename(out, f"{out}.cache/away")
    code, said = process.wait(), process.log.read_text()
    unpack(Path(f"{out}.cache/away/last.state"))
    row.count(code == 3 and said.count("retemper: error: cannot write") == 1, time.monotonic() - began, said)
    campaign.forget(out)


def loaders(campaign: Campaign) -> None:
    """Let FFCV's reading thread die, and stand still."""
    split, beton = load_split("digits", "train", None), campaign.root / "digits.beton"
    pump = _pump_class()
    whole = pump.run_pipeline

    def dies(*_: object) -> None:
        raise ValueError("no more")

    for fault, broken in (
        ("FFCV's thread dies", dies),
        ("FFCV's thread stalls (limit 2 s)", lambda *_: time.sleep(9)),
    ):
        row = campaign.row(fault)
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


def little_memory() -> None:
    """Leave room for a part of a network of 185 MB, so that an allocation of torch's fails.

    With less room its library of convolutions has been seen to crash, and no program can answer for that.
    """
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (100 << 20), -1))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each fault."""
    lines = []
    for row in rows:
        times = row["seconds"]
        shown = ("", "") if times is None else tuple(f"{times[name]:.3g}" for name in ("p50", "max"))
        lines.append([row["fault"], f"{row['tried']:,}", f"{row['held']:,}", row["lost"], *shown])
    return markdown(["fault", "tried", "held", "lost", "seconds: median", "most"], lines)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder that is deleted in the end; the caches of the runs lie in it too."""
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
        kills(campaign, words.kills)
        signals(campaign, words.signals)
        disks(campaign, words.others)
        rest(campaign, words.others)
        damage(campaign, words.damages)
        loaders(campaign)
    content = {
        "command": " ".join(["python", *sys.argv]),
        "rows": [row.as_json() for row in campaign.rows],
        "seconds": time.monotonic() - began,
    }
    print(table(content["rows"]))
    write_summary(words.json, content, CPU)


if __name__ == "__main__":
    main()
