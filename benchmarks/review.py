"""What becomes of students at other radii, in other norms, under other attacks, and on corrupted images?

    python benchmarks/review.py --data digits --images 200
    python benchmarks/review.py --data fashion_mnist_small --methods rslad,absld --from runs/fairness

Takes the students of each method, seed 0, from --from, where benchmarks/fairness.py has left them, and copies them to
--out; trains none. Each goes through `retemper evaluate --review` on --images class-balanced test images, through the
folded network. What is finished is not repeated. Writes to --results two tables (radii.md and corruptions.md), all
checks against theory as review.json, and the runs' records, from which `retemper report` draws the curves.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairness import KEPT, NAMES
from records import RECORDS, pack
from runs import DEVICE, commits, folder_of, require_methods
from summary import markdown, words_of, write_summary

from retemper.cli import reported
from retemper.console import Progress, say
from retemper.engine.catalogue import find_setting
from retemper.engine.checkpoints.header import Facts, read_header
from retemper.engine.evaluation.curve_file import curves_in
from retemper.engine.evaluation.evaluate import EvaluationRequest, evaluate_target
from retemper.engine.evaluation.norms import TITLES
from retemper.engine.evaluation.protocols import OF_USUAL
from retemper.engine.evaluation.review import review
from retemper.errors import DataError
from retemper.files import file_digest, read_json, write_atomically
from retemper.loaders import usual_eps

CURVES = tuple(f"curve{norm}.{kind}" for norm in ("", "-l2", "-l1") for kind in ("json", "csv"))
RESULTS = Path("benchmarks/results/review")


def reviewed(setting: str, words: argparse.Namespace) -> Path:
    """Return the folder of the reviewed student of METHOD:SETTING, seed 0. Raises DataError if it was not trained."""
    there, folder = (folder_of(setting, 0, place) for place in (words.source, words.out))
    if read_header(there / "last.safetensors").get("epoch") != str(find_setting(setting)[2].recipe.optim.epochs):
        raise DataError(f"{there} has no finished student: train it by benchmarks/fairness.py --data {words.data}")
    if not folder.exists():
        copy = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(copy, ignore_errors=True)
        kept = shutil.ignore_patterns(".*", "*.state", "evaluation*", "autoattack*")
        shutil.copytree(there, copy, ignore=kept)
        copy.rename(folder)
    elif file_digest(folder / "best.safetensors") != file_digest(there / "best.safetensors"):
        raise DataError(f"{folder} was copied from another student than {there}: name another --out")
    done = folder / "evaluation.json"
    if done.exists() and (was := read_json(done)["protocol"])["images"] != words.images:
        if was["subset"] != "all" or was["images"] > words.images:
            raise DataError(f"{folder} was reviewed on {was['images']} images: name another --out for {words.images}")
    asked = EvaluationRequest(target=folder, device=DEVICE, facts=Facts(), fold=True, limit=words.images)
    for one in review(asked):
        evaluate_target(one)
    return folder


def radii_table(runs: Mapping[str, Path]) -> str:
    """Return a Markdown table with a line for each student and norm: average and worst class at each radius."""
    head = ["student", "norm, usual radius", *(f"x {share:g}" for share in OF_USUAL), "images beyond AutoAttack"]
    return markdown(head, [line for name, run in runs.items() for line in _lines(name, run)])


def _lines(name: str, run: Path) -> list[list[str]]:
    """Return the lines of one student, one a norm."""
    lines = []
    for curve in map(read_json, curves_in(run)):
        norm, entries = curve["protocol"]["norm"], curve["attacks"]["cross-check"]["radii"]
        usual = usual_eps(curve["protocol"]["dataset"], norm)
        reached = [f"{one['average']:.1%} / {one['worst']:.1%}" for one in entries]
        lines.append([NAMES.get(name, name), f"{TITLES[norm]} {usual:.3g}", *reached, _beyond(entries)])
    return lines


def _beyond(entries: list[dict[str, Any]]) -> str:
    """Return how many images the cross-checks broke that AutoAttack had left, by radius and attack."""
    told = []
    for share, entry in zip(OF_USUAL, entries, strict=True):
        broken = [
            f"{attack} {one['images']}" for attack, one in entry.get("beats_autoattack", {}).items() if one["images"]
        ]
        told += [f"x {share:g}: {', '.join(broken)}"] if broken else []
    return "; ".join(told) or "none"


def corruption_table(runs: Mapping[str, Path]) -> str:
    """Return a Markdown table with a line for each student: the mean over all corruptions, and the hardest of them."""
    lines = []
    for name, run in runs.items():
        content = read_json(run / "evaluation.json")
        clean, found = content["attacks"]["clean"], content["corruptions"]
        count = torch.tensor(found["count"], dtype=torch.float64)
        means = {
            kind: float((torch.tensor(of, dtype=torch.float64) @ count).mean() / count.sum())
            for kind, of in found["accuracy"].items()
        }
        hardest = sorted(means, key=lambda kind: means[kind])[:3]
        told = ", ".join(f"{kind.replace('_', ' ')} {means[kind]:.1%}" for kind in hardest)
        both = [f"{one['average']:.1%} / {one['worst']:.1%}" for one in (clean, found)]
        lines.append([NAMES.get(name, name), *both, told])
    return markdown(["student", "clean, average / worst", "corrupted, average / worst", "hardest, average"], lines)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line, or end with an error in one line."""
    parser = words_of(__doc__)
    parser.add_argument("--data", default="digits", choices=("digits", "fashion_mnist_small", "cifar10_small"))
    parser.add_argument("--methods", default="rslad,absld")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--from", type=Path, default=Path("runs/fairness"), dest="source", help="where students lie")
    parser.add_argument("--out", type=Path, default=Path("runs/review"))
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}/DATA")
    words = parser.parse_args()
    if words.images < 10:
        parser.error(f"--images {words.images}: at least one of each of the ten classes")
    words.settings = require_methods(parser, words.data, words.methods)
    words.results = words.results or RESULTS / words.data
    return words


def main() -> None:
    words = arguments()
    torch.set_num_threads(1)  # the same bits on every machine
    words.out.mkdir(parents=True, exist_ok=True)
    runs = {}
    with Progress("review", len(words.settings)) as progress:
        for name, setting in words.settings.items():
            say(setting)
            runs[name] = reviewed(setting, words)
            progress.advance(1)
    words.results.mkdir(parents=True, exist_ok=True)
    pack(runs.values(), (*KEPT, *CURVES), words.results / RECORDS)
    for name, text in (("radii", radii_table(runs)), ("corruptions", corruption_table(runs))):
        print(f"{text}\n")
        write_atomically(words.results / f"{name}.md", text.encode())
    consistency = {name: read_json(run / "curve-l1.json")["consistency"] for name, run in runs.items()}
    content = {"setting": words.data, "images": words.images, "consistency": consistency}
    write_summary(words.results / "review.json", content | {"trained_at": commits(runs.values())}, DEVICE)


if __name__ == "__main__":
    sys.exit(reported(main, goes_on=True))
