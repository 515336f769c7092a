"""A pool of a million images beside CIFAR-10: memory, speed, kills and two processes, on this machine.

    python benchmarks/pool.py --data-root data --scratch /tmp/pool --json benchmarks/results/pool/pool.json

The pool is made of the real training images: cropped, mirrored, and each pixel moved by up to 8 levels; it takes 3.1 GB
of the scratch folder. Then, each in processes of its own:

    memory   an epoch of batches of 128, 70 % from the pool on the disk: the peak of what the process holds
    ways     CPU time to read 90 images at random: by their place in the file, and from a memory map of it
    speed    images/s of the plain loader, of the pool on the disk and in memory, in turns
    kills    a training run killed with -9 again and again, at random moments, against an undisturbed one
    ranks    the rows that each of two processes is given, against those of one

DIR of --data-root holds CIFAR-10 in its own format, or JPEG copies in it: the figures do not depend on which.
"""

import json
import mmap
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from campaign import Fork
from safetensors.torch import load_file
from summary import markdown, words_of, write_summary

from retemper.engine.run import teachers  # noqa: F401  # what a fork need not import again
from retemper.kernels import augment
from retemper.loaders import Batch, Extra, Loader, Split, ViewSpace, load_split, make_loader, open_pool
from retemper.loaders.mixed import Where
from retemper.loaders.views import random_words

CPU = torch.device("cpu")
BATCH, FRACTION, VIEWS = 128, 0.7, ViewSpace(4)
CHUNK, LEVELS = 5000, 8
ROUNDS, ROUND_BATCHES = 7, 100
LIMIT_S = 3600.0  # of a run, which hangs if it takes longer
MIB = 2**20
RUN = (
    "--student tiny_resnet --images-per-class 40 --epochs 2 --batch-size 64 --attack-steps 1 --holdout-per-class 5 "
    "--select-steps 1 --device cpu --cpu-threads 1 --save-every 0 --loader resident"
).split()


def make_pool(path: Path, split: Split, images: int) -> None:
    """Write a pool of augmented real images, a chunk at a time; nothing where it is there."""
    if path.exists():
        return
    index = (random_words(images, 1) % np.uint64(len(split))).astype(np.int64)
    view, rng, real = VIEWS.draw(images, 0, 0), np.random.default_rng(0), torch.from_numpy(split.images)
    with zipfile.ZipFile(path.with_suffix(".part"), "w") as file:
        with file.open("image.npy", "w", force_zip64=True) as out:
            told = {"descr": "|u1", "fortran_order": False, "shape": (images, *split.shape)}
            np.lib.format.write_array_header_1_0(out, told)
            for start in range(0, images, CHUNK):
                rows = slice(start, min(start + CHUNK, images))
                seen = augment(real, torch.from_numpy(view[rows]), index=torch.from_numpy(index[rows]))
                levels = (seen.permute(0, 2, 3, 1).numpy() * 255).astype(np.int16)
                levels += rng.integers(-LEVELS, LEVELS + 1, levels.shape, dtype=np.int16)
                out.write(levels.clip(0, 255).astype(np.uint8).tobytes())
        with file.open("label.npy", "w") as out:
            np.lib.format.write_array(out, split.labels[index])
    path.with_suffix(".part").rename(path)


def loader(split: Split, path: Path | None, where: Where = "disk", **part: Any) -> Loader:
    """Return the plain loader, or that with the pool."""
    extra = None if path is None else Extra(open_pool(path, split, path.parent), FRACTION, where)
    return make_loader("resident", split, batch_size=BATCH, seed=0, views=VIEWS, device=CPU, extra=extra, **part)


def held() -> dict[str, float]:
    """Return what this process holds, in MiB: anonymous memory, mapped files, and the peak of both."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {words[0][:-1]: words[1] for words in lines if len(words) > 1}
    return {name: int(sizes[name]) / 1024 for name in ("RssAnon", "RssFile", "VmHWM")}


def memory(split: Split, path: Path) -> dict[str, Any]:
    """Walk through an epoch of the pool on the disk; return the peaks in MiB, before and in it."""
    split.images  # noqa: B018  # the real ones are in memory either way
    reading = held()["VmHWM"]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew: it was in reading the real images
    before, peak = held(), dict.fromkeys(("RssAnon", "RssFile"), 0.0)
    for batch in loader(split, path).epoch(1):
        augment(batch.image, batch.view)
        now = held()
        peak = {name: max(value, now[name]) for name, value in peak.items()}
    peak |= {"VmHWM": held()["VmHWM"]}
    return {"reading": reading, "before": before, "peak": peak, "pool": os.path.getsize(path) / MIB}


def ways(split: Split, path: Path) -> dict[str, list[float]]:
    """Return the milliseconds of CPU that a read of 90 images takes in each round, by how it is done.

    The pages of the map are let go after every 32 images, or never.
    """
    _read_once(path)
    pool, out = open_pool(path, split, path.parent), np.empty((90, *split.shape), np.uint8)
    part = pool.parts[0]
    with path.open("rb") as file:
        lent = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    lent.madvise(mmap.MADV_RANDOM)
    image = np.frombuffer(lent, np.uint8, len(pool) * part.size, part.start).reshape(len(pool), *split.shape)

    def from_map(index: np.ndarray, rows: int = 32) -> None:
        for start in range(0, len(index), rows):
            at = slice(start, start + rows)
            np.take(image, index[at], axis=0, out=out[at], mode="clip")
            if rows == 32:
                lent.madvise(mmap.MADV_DONTNEED)

    how: dict[str, Callable[[np.ndarray], object]] = {
        "by place": lambda index: pool.take(index, out),
        "a map, let go": from_map,
        "a map, kept": lambda index: from_map(index, 90),
    }
    found: dict[str, list[float]] = {name: [] for name in how}
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        for name, read in how.items():
            drawn = [rng.integers(0, len(pool), 90) for _ in range(100)]
            begun = time.process_time()
            for index in drawn:
                read(index)
            found[name].append(10 * (time.process_time() - begun))
        lent.madvise(mmap.MADV_DONTNEED)
    return found


def _read_once(path: Path) -> None:
    """Have the system keep the file in memory, as far as there is room."""
    with path.open("rb") as file:
        while file.read(MIB):
            pass


def speed(split: Split, path: Path) -> dict[str, Any]:
    """Return the images/s of each loader in each round, and those by the CPU time of all threads: a busy machine moves
    the first. They take turns, in another order each time.
    """
    loaders = {
        "plain": loader(split, None),
        "on the disk": loader(split, path),
        "in memory": loader(split, path, "device"),
    }

    _read_once(path)

    def once(one: Loader, epoch: int, use: Callable[[Batch], object]) -> tuple[float, float]:
        batches, images = one.epoch(epoch), 0
        use(next(batches))  # the epoch's order is drawn, and its thread at work
        begun, cpu = time.perf_counter(), time.process_time()
        for _ in range(ROUND_BATCHES):
            batch = next(batches)
            use(batch)
            images += len(batch.label)
        return images / (time.perf_counter() - begun), images / (time.process_time() - cpu)

    found: dict[str, Any] = {}
    uses: dict[str, Callable[[Batch], object]] = {
        "loader alone": lambda _: None,
        "with crop and flip": lambda batch: augment(batch.image, batch.view),
    }
    for what, use in uses.items():
        rates, of_cpu = ({name: list[float]() for name in loaders} for _ in range(2))
        for number in range(ROUNDS + 1):
            for name in random.Random(number).sample([*loaders], len(loaders)):
                rate, cpu_rate = once(loaders[name], number + 1, use)
                if number:  # the first round warms up
                    rates[name].append(rate)
                    of_cpu[name].append(cpu_rate)
        found[what], found[f"{what}, by CPU time"] = rates, of_cpu
    return found


def counted(split: Split, path: Path, rank: str, world_size: str) -> list[list[int]]:
    """Return the positions in each batch of an epoch that this process is given."""
    return [batch.index.tolist() for batch in loader(split, path, rank=int(rank), world_size=int(world_size)).epoch(1)]


def ranks(call: Callable[..., Any]) -> dict[str, Any]:
    """Return what two processes are given of each batch, and whether it is what one process sees."""
    alone, parts = call("count", "0", "1"), [call("count", rank, "2") for rank in ("0", "1")]
    same = all(parts[0][n] == batch[0::2] and parts[1][n] == batch[1::2] for n, batch in enumerate(alone))

    def shares(batches: list[list[int]]) -> Iterator[float]:
        return (sum(row < 0 for row in batch) / len(batch) for batch in batches)

    told = {f"rank {rank}": sorted({round(s, 4) for s in shares(part)}) for rank, part in enumerate(parts)}
    drawn = [row for batch in alone for row in batch if row < 0]
    return {
        "asked": FRACTION,
        "batches": len(alone),
        "share of each batch": told,
        "rows of two are those of one": same,
        "draws": len(drawn),
        "different images drawn": len({*drawn}),
    }


def kills(data_root: Path, path: Path, scratch: Path, number: int) -> dict[str, Any]:
    """Kill a run again and again, and compare its weights with those of an undisturbed one."""
    words = ["--data-root", str(data_root), "--cache", str(scratch / "cache"), *RUN]
    teacher, whole, struck = (scratch / name for name in ("teacher", "whole", "struck"))
    first = ["train", "sat:cifar10_resnet18", *words, "--epochs", "1", "--out", str(teacher)]
    if not (teacher / "best.safetensors").exists():
        assert Fork(first, scratch / "teacher.log").wait(LIMIT_S) == 0, "the teacher was not trained"
    mixed = ["--extra", str(path), "--extra-fraction", str(FRACTION), "--teacher", str(teacher)]
    mixed = ["train", "rslad:cifar10_resnet18", "--teacher-model", "tiny_resnet", *words, *mixed, "--out"]
    undisturbed = Fork([*mixed, str(whole)], scratch / "whole.log")
    _, status, usage = os.wait4(undisturbed.pid, 0)
    assert status == 0, "the undisturbed run failed"
    rng, places = random.Random(0), []
    while len(places) < number:
        process = Fork([*mixed, str(struck)], scratch / "struck.log")
        saves, wanted, stamp = 0, rng.randint(1, 3), _stamp(struck)
        while saves < wanted:
            assert process.ended() is None, f"it ended after {len(places)} kills"
            time.sleep(0.005)
            now = _stamp(struck)
            saves, stamp = saves + (now != stamp), now
        time.sleep(rng.random() * 0.1)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended after {len(places)} kills"
        state = torch.load(struck / "last.state", weights_only=True)
        places.append([state["epoch"], state["step"]])
    assert Fork([*mixed, str(struck)], scratch / "struck.log").wait(LIMIT_S) == 0, "the killed run did not end"
    pairs = [(load_file(whole / name), load_file(struck / name)) for name in ("last.safetensors", "best.safetensors")]
    equal = all(torch.equal(one[name], two[name]) for one, two in pairs for name in one)
    lines = [[_told(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, struck)]
    return {
        "kills": len(places),
        "killed after epoch and step": places,
        "weights bit for bit": equal,
        "metrics but for the clock": lines[0] == lines[1],
        "peak of the undisturbed run, its teacher and its real images included (MiB)": usage.ru_maxrss / 1024,
    }


def _stamp(out: Path) -> int:
    """Return when the state of a run was last saved; 0 for never."""
    try:
        return (out / "last.state").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _told(line: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(line).items() if "second" not in name}


def table(found: dict[str, Any]) -> str:
    """Return the figures of the parts that there are, as Markdown."""
    rows: list[tuple[str, str]] = []
    if "memory" in found:
        memory, peak, before = found["memory"], found["memory"]["peak"], found["memory"]["before"]
        rows = [
            ("the pool's file (MiB); a quarter of it", f"{memory['pool']:,.0f}; {memory['pool'] / 4:,.0f}"),
            ("peak resident memory of an epoch (MiB)", f"{peak['VmHWM']:,.0f}"),
            ("of it anonymous, and pages of files (peaks)", f"{peak['RssAnon']:,.0f}, {peak['RssFile']:,.0f}"),
            ("before the pool is opened: both", f"{before['RssAnon']:,.0f}, {before['RssFile']:,.0f}"),
            ("earlier, while the real images were read (peak)", f"{memory['reading']:,.0f}"),
        ]
    for name, own in found.get("ways", {}).items():
        told = f"{statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f})"
        rows.append((f"CPU time of 90 images, {name} (ms)", told))
    for what, rates in found.get("speed", {}).items():
        for name, own in rates.items():
            ratio = sorted(a / b for a, b in zip(own, rates["plain"], strict=True))
            against = f"{statistics.median(ratio):.2f} x plain ({ratio[0]:.2f} to {ratio[-1]:.2f})"
            rows.append((f"{what}, {name} (images/s)", f"{statistics.median(own):,.0f}; {against}"))
    for part in ("ranks", "kills"):
        told = found.get(part, {})
        rows += [(name, str(value)) for name, value in told.items() if name != "killed after epoch and step"]
    return markdown(("", "measured"), rows)


PARTS = ("memory", "ways", "speed", "ranks", "kills")


def main() -> None:
    """Measure the parts that are asked for, or in a process of its own one of them."""
    parser = words_of(__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, help="what it holds of other parts stays")
    parser.add_argument("--part", nargs="+", default=[], help="of this script alone: one part, its result on stdout")
    words = parser.parse_args()
    torch.set_num_threads(1)
    words.scratch.mkdir(parents=True, exist_ok=True)
    path, split = words.scratch / "pool.npz", load_split("cifar10", "train", words.data_root)
    if words.part:
        parts: dict[str, Callable[..., Any]] = {"memory": memory, "ways": ways, "speed": speed, "count": counted}
        print(json.dumps(parts[words.part[0]](split, path, *words.part[1:])))
        return
    make_pool(path, split, words.images)

    def call(*part: str) -> Any:
        command = [
            sys.executable,
            __file__,
            "--data-root",
            words.data_root,
            "--scratch",
            words.scratch,
            "--part",
            *part,
        ]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    of_its_own = {
        "ranks": lambda: ranks(call),
        "kills": lambda: kills(words.data_root, path, words.scratch, words.kills),
    }
    for part in words.only:
        found = {part: of_its_own[part]() if part in of_its_own else call(part)}
        earlier = json.loads(words.json.read_text()) if words.json is not None and words.json.exists() else {}
        found = {"images": words.images} | {name: earlier[name] for name in PARTS if name in earlier} | found
        write_summary(words.json, found, CPU)
        print(table(found))


if __name__ == "__main__":
    main()
