"""Do the full-size settings work on real images, where there is no GPU to train them to the end?

    python benchmarks/full_size.py --data-root DIR
    python benchmarks/full_size.py --data-root DIR --teacher robustbench:NAME --batch-size 128

Starts each setting of --settings through the command line: it is cut after --steps steps, goes on with the same command
for as many more, and is evaluated on a few test images. A second run takes all the steps at once; that both end in the
same weights is asserted. Without --teacher a WRN-34-10 with weights from a seed stands in: it answers at the real cost,
and says nothing about what a student learns. Writes what was seen, command by command, to --results/seen.md.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from summary import markdown, words_of

from retemper.cli import reported
from retemper.console import say
from retemper.engine import create_model, save_weights
from retemper.errors import DataError
from retemper.files import read_json, write_atomically
from retemper.provenance import commit

SETTINGS = "absld:cifar10_resnet18,absld:cifar10_mobilenet_v2"
RESULTS = Path("benchmarks/results/full_size")


def told_by(*words: object) -> tuple[str, float]:
    """Run a verb of the command line; return the last line about the run's cut, if there is one, and its seconds.

    Raises:
        DataError: it failed.
    """
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "retemper", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"retemper {words[0]} {words[1]} ended with {done.returncode}: {done.stderr.splitlines()[-1:]}")
    cuts = [line for line in done.stderr.splitlines() if ": cut after" in line]
    return "".join(cuts[-1:]).partition(": ")[2].partition(";")[0], time.perf_counter() - begun


def stand_in(path: Path) -> Path:
    """Return the file of a WRN-34-10 with weights from a seed; written where it is not there."""
    if not path.exists():
        torch.manual_seed(0)
        save_weights(path, create_model("wrn34_10", 10), {})
    return path


def seen(setting: str, words: argparse.Namespace, teacher: Path | str) -> list[list[str]]:
    """Return the rows of a setting: what was done, what was said, and the seconds."""
    name = setting.replace(":", "-")
    cut, whole = words.out / f"{name}-cut", words.out / f"{name}-whole"
    given = ["--data-root", words.data_root, "--batch-size", words.batch_size, "--teacher", teacher]
    given += ["--holdout-per-class", 1, "--images-per-class", words.images_per_class, "--teacher-table", "off"]

    def train(out: Path, steps: int) -> tuple[str, float]:
        return told_by("train", setting, *given, "--out", out, "--max-steps", steps)

    rows = []
    for what, (out, steps) in {
        f"{words.steps} steps": (cut, words.steps),
        "the same command again, twice as many": (cut, 2 * words.steps),
        "all of them at once": (whole, 2 * words.steps),
    }.items():
        said, seconds = train(out, steps)
        say(f"{setting}, {what}: {seconds:.0f} s")
        rows.append([setting, what, said, f"{seconds:.0f}"])
    one, other = (load_file(folder / "last.safetensors") for folder in (cut, whole))
    if not all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys()):
        raise DataError(f"{setting}: the run that was cut and went on has other weights than the one that was not")
    rows.append([setting, "weights of both", f"equal bits, {len(one)} tensors", ""])
    chosen = ["--attacks", "clean,pgd20", "--limit", words.images, "--weights", "last", "--data-root", words.data_root]
    seconds = told_by("evaluate", cut, *chosen)[1]
    found = read_json(cut / "evaluation-last.json")["attacks"]
    said = ", ".join(f"{name} {found[name]['average']:.0%}" for name in ("clean", "pgd20"))
    rows.append([setting, f"evaluated on {words.images} test images", said, f"{seconds:.0f}"])
    return rows


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = words_of(__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--settings", default=SETTINGS)
    parser.add_argument("--teacher", help="a WRN-34-10 as `retemper train --teacher` takes it")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images-per-class", type=int, default=200, help="of the training images")
    parser.add_argument("--images", type=int, default=20, help="test images to evaluate on")
    parser.add_argument("--out", type=Path, default=Path("runs/full_size"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    words = arguments()
    for folder in (words.out, words.results):
        folder.mkdir(parents=True, exist_ok=True)
    teacher = words.teacher or stand_in(words.out / "wrn34_10.safetensors")
    rows = [row for setting in words.settings.split(",") for row in seen(setting, words, teacher)]
    table = markdown(["setting", f"batches of {words.batch_size}", "what was seen", "seconds"], rows)
    print(table)
    write_atomically(words.results / "seen.md", f"{table}\nAt commit {commit()}.\n".encode())


if __name__ == "__main__":
    sys.exit(reported(main, goes_on=True))
