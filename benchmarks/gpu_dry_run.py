"""Does the GPU code do what it should, as far as that can be seen without a GPU?

    make gpu-dry-run                                    with a CUDA build of PyTorch in an environment of its own
    python benchmarks/gpu_dry_run.py                    everything, with the Python of such an environment
    python benchmarks/gpu_dry_run.py counts host        these parts alone
    python benchmarks/gpu_dry_run.py lower              lower the budgets to what was counted last
    python benchmarks/gpu_dry_run.py table              write the table of launches from what was counted last
    python benchmarks/gpu_dry_run.py ops absld:cifar10_resnet18 average=ema    the operators of a step
    python benchmarks/gpu_dry_run.py run python -m retemper doctor             any command on the recorder

The CUDA build of PyTorch runs on a recorder of CUDA's calls (benchmarks/dry_run/recorder). What is launched, captured,
refused or waited for is seen, and in which layout; what a call costs the host. No value is computed and no time of a
device is known. What was found lies in build/gpu_dry_run/; the exit status is 1 where a check failed.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dry_run import budgets
from dry_run.environment import ROOT, Unavailable, built, on_recorder
from dry_run.table import write_table

OUT = ROOT / "build/gpu_dry_run"
RUNS = OUT / "runs"
IMAGES = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package; without it the digits, which are always there
DATA, ROOT_OF_IMAGES = ("fashion_mnist_small", ["--data-root", str(IMAGES)]) if IMAGES.is_dir() else ("digits", [])
COMMANDS = (
    f"train sat:{DATA} --max-steps 6 --out {RUNS}/teacher",
    f"train sat:{DATA} --max-steps 12 --out {RUNS}/teacher",
    f"train absld:{DATA} --teacher {RUNS}/teacher --max-steps 12 --save-every 0 --out {RUNS}/student",
    f"evaluate {RUNS}/student --limit 512",
)
TESTS = [  # of the flow: what is captured, in which order it runs, what is refused
    *(f"tests/kernels/test_{name}.py" for name in ("cuda_graph", "operators", "runtime")),
    *(f"tests/engine/test_{name}.py" for name in ("attack", "capture", "fold", "step", "optim")),
]
ON_A_GPU = ["-m", "gpu", "tests/engine/test_ranks.py"]  # of a file whose other tests need none
SUMMARY = "addopts=--import-mode=importlib --strict-markers -rfE"  # of what fails, not of what is about values


def process(env: dict[str, str], *words: str) -> int:
    """Run this Python on the recorder; return its exit status."""
    print(f"$ python {shlex.join(words)}", flush=True)
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env).returncode


def part(env: dict[str, str], name: str) -> Any:
    """Run one of the modules of dry_run, and return what it has written; None where it failed."""
    file = OUT / f"{name}.json"
    file.unlink(missing_ok=True)
    status = process(env, "-m", f"dry_run.{name}", str(file))
    return json.loads(file.read_text()) if status == 0 else None


def counts(env: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with the steps that have budgets, and with every method's capture."""
    if (found := part(env, "counting")) is None:
        yield "the steps cannot be counted"
        return
    for name, one in (found["settings"] | found["methods"]).items():
        yield from (f"{name}: {fault}" for fault in one["faults"])
    yield from compared(counted(found))


def host(env: dict[str, str]) -> Iterator[str]:
    """Yield the calls that hold the host for longer than their budget."""
    found = part(env, "host")
    yield from ["what a call costs the host cannot be measured"] if found is None else compared(ratios(found))


def syncs(env: dict[str, str]) -> Iterator[str]:
    """Yield the steps in which PyTorch would wait for the device."""
    found = part(env, "syncs")
    yield from ["the steps cannot be watched"] if found is None else found


def replays(env: dict[str, str]) -> Iterator[str]:
    """Yield the attacks and evaluations that do not replay from a graph as they should."""
    found = part(env, "replays")
    yield from ["what is captured beyond the step cannot be watched"] if found is None else found


def command(env: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with a run that is trained, gone on with and evaluated on real images."""
    shutil.rmtree(RUNS, ignore_errors=True)
    for number, line in enumerate(COMMANDS):
        file = OUT / f"command_{number}.json"
        file.unlink(missing_ok=True)
        process(env, "-W", "error", "-m", "dry_run.observed", str(file), *line.split(), *ROOT_OF_IMAGES)
        if not file.exists():
            yield f"retemper {line}: it was cut off"
            continue
        found = json.loads(file.read_text())
        if found["status"] != 0:
            yield f"retemper {line}: exit status {found['status']}"
        yield from (f"retemper {line}: illegal, {times} times: {what}" for what, times in found["illegal"].items())


def tests(env: dict[str, str]) -> Iterator[str]:
    """Yield a line where tests fail on the recorder for another reason than a value."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "dry_run.pytest_plugin", "--tb=short", "-o", SUMMARY]
    for chosen in (TESTS, ON_A_GPU):
        if status := process(env, *words, *chosen):
            yield f"tests fail, exit status {status}: {shlex.join(chosen)}"


PARTS: dict[str, Callable[[dict[str, str]], Iterator[str]]] = {
    "counts": counts,
    "syncs": syncs,
    "replays": replays,
    "command": command,
    "tests": tests,
    "host": host,
}


def counted(found: dict[str, Any]) -> dict[str, Any]:
    """Return what has budgets of what `dry_run.counting` has written."""
    kept = "launches", "megabytes", "other layouts in the attack"
    settings = {name: {what: one[what] for what in kept} for name, one in found["settings"].items()}
    return {"settings": settings, "methods": {name: one["launches"] for name, one in found["methods"].items()}}


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Return what has budgets of what `dry_run.host` has written."""
    return {budgets.HOST: {name: round(one["ratio"], 2) for name, one in found.items()}}


def compared(found: dict[str, Any]) -> Iterator[str]:
    """Yield what is above its budget or has none; say what is below."""
    verdict = budgets.check(budgets.load(), found)
    print(*(f"below its budget: {line}" for line in verdict.below), sep="\n")
    if verdict.below:
        print("  to lower them: python benchmarks/gpu_dry_run.py lower")
    yield from (f"above its budget: {line}" for line in verdict.above)
    yield from verdict.unmatched


def last(name: str) -> Any:
    """Return what a part has written when it was run last; an empty mapping where it was not."""
    file = OUT / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def lower() -> None:
    """Lower the budgets to what was counted last."""
    steps, calls = last("counting"), last("host")
    found = (counted(steps) if steps else {}) | (ratios(calls) if calls else {})
    budgets.save(budgets.lowered(budgets.load(), found))
    print(f"{budgets.FILE.relative_to(ROOT)} holds what was counted last, where that is lower")


def recorder() -> dict[str, str]:
    """Return the environment of a process of the recorder, which is built where that is not done.

    Raises:
        SystemExit: it cannot be built here.
    """
    try:
        library = built(OUT / "recorder")
    except Unavailable as error:
        sys.exit(str(error))
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # so that `python` is this one
    cache = {"XDG_CACHE_HOME": str(OUT / "cache")}  # not the user's: a teacher's answers are zeros here
    return on_recorder(library, {**os.environ, **own, **cache})


def main() -> int:
    what = sys.argv[1:] or list(PARTS)
    OUT.mkdir(parents=True, exist_ok=True)
    match what[0]:
        case "-h" | "--help":
            print(__doc__)
            return 0
        case "run" | "ops":
            words = what[1:] if what[0] == "run" else ["python", "-m", "dry_run.ops", *what[1:]]
            os.execvpe(words[0], words, recorder())
        case "lower":
            lower()
            return 0
        case "table":
            print(f"written: {write_table(last('counting')).relative_to(ROOT)}")
            return 0
    if unknown := set(what) - PARTS.keys():
        sys.exit(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    env, faults = recorder(), list[str]()
    for name in what:
        begin = time.monotonic()
        found = list(PARTS[name](env))
        print(f"== {name}: {'ok' if not found else 'FAILED'}, {time.monotonic() - begin:.0f} s", flush=True)
        faults += [f"{name}: {fault}" for fault in found]
    print(*faults, sep="\n", end="\n" if faults else "")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
