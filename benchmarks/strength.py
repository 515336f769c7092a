"""What does a stronger recipe move? Methods trained as in their papers and by the preset strong, under AutoAttack.

    python benchmarks/strength.py --data digits --seeds 3
    python benchmarks/strength.py --data digits --seeds 1 --quick --results runs/strength/quick     to try it out

Both presets have one teacher, which is trained as in its paper. Trains what is not trained yet under --out and
evaluates it: clean and PGD-20 on all test images, AutoAttack on a class-balanced subset, through the folded network.
Writes to --results the table of each attack (ATTACK.md), with the differences of strong less paper, seed by seed on the
same images, all figures with their intervals as strength.json, and the runs' config.json, metrics.jsonl,
evaluation.json and evaluation.csv as records.json.xz.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fairness import KEPT, NAMES, TITLES
from records import RECORDS, pack
from runs import DEVICE, Protocol, commits, folder_of, require_methods, settings_on, trained_and_evaluated
from summary import common_radius, markdown, mean_and_range, told, words_of, write_summary

from retemper.cli import reported
from retemper.console import Progress, say
from retemper.engine.evaluation.compare import Comparison, compare
from retemper.engine.evaluation.verdicts import read_evaluated
from retemper.files import finite, read_json, write_atomically

METHODS = "rslad,absld"
PRESETS = ("paper", "strong")
ATTACKS = ("clean", "pgd20", "autoattack")
SHOWN = ("pgd20", "autoattack")
RESULTS = Path("benchmarks/results/strength")

Runs = Mapping[str, Mapping[str, list[Path]]]  # by method and preset, the folders of its seeds


def trained(words: argparse.Namespace, settings: Mapping[str, str]) -> dict[str, dict[str, list[Path]]]:
    """Return the runs of each method by preset, trained and evaluated where that is not done."""
    runs: dict[str, dict[str, list[Path]]] = {name: {preset: [] for preset in PRESETS} for name in settings}
    with Progress("strength", len(settings) * len(PRESETS) * words.seeds) as progress:
        for seed in range(words.seeds):
            for name, setting in settings.items():
                for preset in PRESETS:
                    say(f"{setting}, {preset}, seed {seed}")
                    protocol = Protocol(
                        out=words.out,
                        attacks=ATTACKS,
                        autoattack_limit=words.autoattack_images,
                        fold=True,
                        preset=preset,
                        epochs=2 if words.quick else None,
                    )
                    trained_and_evaluated(setting, seed, protocol)
                    runs[name][preset].append(folder_of(setting, seed, words.out, preset))
                    progress.advance(1)
    return runs


def compared(runs: Runs, attack: str) -> dict[str, Comparison]:
    """Return each method's comparison: strong less paper, seed by seed."""
    found = {}
    for name, of in runs.items():
        paper, strong = ([read_evaluated(folder) for folder in of[preset]] for preset in PRESETS)
        found[name] = compare(paper, strong, attack)
    return found


def table(runs: Runs, differences: Mapping[str, Comparison], attack: str) -> str:
    """Return a Markdown table with a line for each method and preset, and a line with what strong moves."""
    found = {
        (name, preset): [read_json(folder / "evaluation.json") for folder in folders]
        for name, of in runs.items()
        for preset, folders in of.items()
    }
    radius = common_radius(one for seeds in found.values() for one in seeds)
    rows: list[list[str]] = []
    for (name, preset), seeds in found.items():
        clean = [one["attacks"]["clean"]["average"] for one in seeds]
        under = {key: [one["attacks"][attack][key] for one in seeds] for key in ("average", "worst", "nsd")}
        shown = [mean_and_range(clean), *(mean_and_range(under[key]) for key in ("average", "worst"))]
        rows.append([f"{NAMES.get(name, name)}, {preset}", *shown, mean_and_range(under["nsd"], ".3f")])
        if preset == PRESETS[-1]:
            moved = [told(differences[name].summary[key]) for key in ("average", "worst", "nsd")]
            rows.append(["strong less paper, points and hundredths", "", *moved])
    return markdown([f"{TITLES[attack]}, eps {radius}", "clean", "average", "worst class", "NSD"], rows)


def write_results(runs: Runs, words: argparse.Namespace) -> None:
    """Write the tables, the figures with their intervals, and the records of `runs`."""
    results: Path = words.results
    results.mkdir(parents=True, exist_ok=True)
    folders = [folder for of in runs.values() for seeds in of.values() for folder in seeds]
    pack(folders, KEPT, results / RECORDS)
    content: dict[str, Any] = {"setting": words.data, "seeds": words.seeds, "presets": list(PRESETS), "attacks": {}}
    for attack in SHOWN:
        differences = compared(runs, attack)
        text = table(runs, differences, attack)
        print(f"{text}\n")
        write_atomically(results / f"{attack}.md", text.encode())
        content["attacks"][attack] = {name: finite(asdict(one)) for name, one in differences.items()}
    content["trained_at"] = commits(folders)
    write_summary(results / "strength.json", content, DEVICE)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line, or end with an error in one line."""
    parser = words_of(__doc__)
    parser.add_argument("--data", default="digits", help="the setting that all methods are trained under")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--autoattack-images", type=int, default=600)
    parser.add_argument("--quick", action="store_true", help="two epochs and 50 images: to try it out")
    parser.add_argument("--out", type=Path, help="default: runs/strength, with --quick runs/strength-quick")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}/DATA")
    words = parser.parse_args()
    require_methods(parser, words.data, words.methods)
    if words.seeds < 1:
        parser.error(f"--seeds {words.seeds}: at least one")
    if words.results is None and (words.quick or words.methods != METHODS):
        parser.error("--quick, --methods: name --results too, so that the whole comparison stays as it is")
    words.results = words.results or RESULTS / words.data
    words.out = words.out or Path("runs/strength-quick" if words.quick else "runs/strength")
    words.autoattack_images = min(words.autoattack_images, 50) if words.quick else words.autoattack_images
    return words


def main() -> None:
    words = arguments()
    torch.set_num_threads(1)  # the same bits on every machine
    known = settings_on(words.data)
    write_results(trained(words, {name: known[name] for name in words.methods.split(",")}), words)


if __name__ == "__main__":
    sys.exit(reported(main, goes_on=True))
