"""Which method leaves the worst class best protected? One teacher, one protocol, AutoAttack included.

    python benchmarks/fairness.py --data fashion_mnist_small --seeds 3
    python benchmarks/fairness.py --data cifar10_small --data-root DIR --seeds 3
    python benchmarks/fairness.py --data digits --seeds 3 --autoattack-images 600 --methods rslad,dafa --results runs/x
    python benchmarks/fairness.py --data digits --from-records --results runs/x     the tables anew, from kept records

Trains what is not trained yet under --out and evaluates it: clean and PGD-20 on all test images, AutoAttack on a
class-balanced subset, through the folded network (--suite fast: its first two attacks), and for masked gradients where
the method is ours. On two cores, or on two GPUs with another CUDA_VISIBLE_DEVICES each, start the same command twice:
each process takes the runs that no other is at. Writes to --results the tables (ATTACK.md, and ATTACK-ours.md with the
paired differences of ours from each), the plot fairness.png, all figures with their intervals as fairness.json, and
the runs' config.json, metrics.jsonl, evaluation.json and evaluation.csv as records.json.xz.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from records import RECORDS, pack, unpack
from runs import DEVICE, Protocol, commits, folder_of, require_methods, settings_on, share_out, trained_and_evaluated
from summary import common_radius, markdown, mean_and_range, told, words_of, write_summary

from retemper.cli import reported
from retemper.engine.evaluation.compare import Comparison, compare
from retemper.engine.evaluation.verdicts import read_evaluated
from retemper.files import finite, read_json, write_atomically

METHODS = "sat,trades,rslad,absld,fair_rslad,cfa,dafa,label_trust"
BASELINE, OURS = "rslad", "label_trust"
ATTACKS = ("clean", "pgd20", "autoattack")
SUITES = {"standard": "autoattack", "fast": "autoattack-fast"}  # as evaluation.json names them
KEPT = ("config.json", "metrics.jsonl", "evaluation.json", "evaluation.csv")
TEACHER = "teacher"
NAMES = {
    "sat": "SAT",
    "trades": "TRADES",
    "rslad": "RSLAD",
    "absld": "ABSLD",
    "fair_rslad": "Fair-RSLAD",
    "cfa": "CFA",
    "dafa": "DAFA",
    "label_trust": "label trust (ours)",
    TEACHER: "their teacher (SAT, twice as wide)",
}
TITLES = {"pgd20": "PGD-20", "autoattack": "AutoAttack", "autoattack-fast": "APGD-CE, APGD-T (upper bounds)"}
IMAGES = {"cifar10_small": 1_000}  # that AutoAttack is given; of the others 500
RESULTS = Path("benchmarks/results/fairness")

Runs = dict[str, list[Path]]  # of each method, the folders of its seeds; of the teacher, one
Evaluations = dict[str, list[dict[str, Any]]]  # their evaluation.json


def compared(runs: Runs, attack: str) -> tuple[dict[str, Comparison], dict[str, Comparison]]:
    """Compare every method with the baseline, and ours with every method, seed by seed."""
    sides = {name: [read_evaluated(folder) for folder in folders] for name, folders in runs.items()}
    from_baseline = {name: compare(sides[BASELINE], side, attack) for name, side in sides.items() if name != BASELINE}
    ours = sides.get(OURS)
    from_each = {} if ours is None else {name: compare(sides[name], ours, attack) for name in sides if name != OURS}
    return from_baseline, from_each


def table(found: Evaluations, differences: dict[str, Comparison], attack: str, data: str) -> str:
    """Return a Markdown table with a line a method, the best worst class first.

    It has means and ranges over the seeds, and the difference from RSLAD.
    """
    radius = common_radius(one for seeds in found.values() for one in seeds)
    settings = settings_on(data) | {TEACHER: f"sat:{data}"}
    columns = "clean|average|worst class|NSD|worst class less RSLAD's, points|command".split("|")
    rows = [
        [
            NAMES.get(name, name),
            f"{_mean(found[name], 'clean', 'average'):.1%}",
            mean_and_range(_values(found[name], attack, "average")),
            mean_and_range(_values(found[name], attack, "worst")),
            mean_and_range(_values(found[name], attack, "nsd"), ".3f"),
            told(differences[name].summary["worst"]) if name in differences else "",
            f"`retemper train {settings[name]}`",
        ]
        for name in sorted(found, key=lambda name: -_mean(found[name], attack, "worst"))
    ]
    return markdown([f"{TITLES[attack]}, eps {radius}", *columns], rows)


def ours_table(differences: dict[str, Comparison], attack: str) -> str:
    """Return a Markdown table with a line for each other method: the differences, ours less that method."""
    head = [f"{NAMES[OURS]} less, {TITLES[attack]}", "average, points", "worst class, points", "NSD, hundredths"]
    keys = ("average", "worst", "nsd")
    return markdown(
        head, [[NAMES.get(name, name), *(told(of.summary[key]) for key in keys)] for name, of in differences.items()]
    )


def _values(found: list[dict[str, Any]], attack: str, key: str) -> list[float]:
    """Return the number `key` under `attack` of each seed's evaluation."""
    return [one["attacks"][attack][key] for one in found]


def _mean(found: list[dict[str, Any]], attack: str, key: str) -> float:
    """Return the mean over the seeds of the number `key` under `attack`."""
    return statistics.mean(_values(found, attack, key))


def draw(found: Evaluations, attacks: Sequence[str], path: Path) -> None:
    """Plot average and worst class of every method under each attack, a mark a seed."""
    from matplotlib.figure import Figure

    names = sorted(found, key=lambda name: _mean(found[name], "pgd20", "worst"))
    figure = Figure(figsize=(9, 0.5 * len(names) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(attacks), sharey=True)
    for axes, attack in zip(panels, attacks, strict=True):
        for place, name in enumerate(names):
            ends = [100 * _mean(found[name], attack, key) for key in ("average", "worst")]
            axes.plot(ends, [place, place], color="#c3c9d0", lw=3, zorder=1)
            for mean, key, marker, colour in zip(ends, ("average", "worst"), "oD", ("#5b6470", "#b0330f"), strict=True):
                seeds = [100 * value for value in _values(found[name], attack, key)]
                axes.plot(seeds, [place] * len(seeds), marker, color=colour, ms=4, alpha=0.45, zorder=2)
                label = {"average": "average of the classes", "worst": "worst class"}[key] if place == 0 else None
                axes.plot([mean], [place], marker, color=colour, ms=8, zorder=3, label=label)
        axes.set_title(TITLES[attack], loc="left", fontweight="bold")
        axes.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
        axes.set_xlim(left=0)
        axes.set_xlabel("robust accuracy, %")
        axes.grid(axis="x", color="#e6e9ed")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def trained(words: argparse.Namespace, chosen: dict[str, str]) -> Runs:
    """Return the runs of the chosen methods and of their teacher, trained and evaluated where that is not done."""
    protocol = Protocol(
        out=words.out,
        attacks=ATTACKS,
        autoattack_limit=words.autoattack_images,
        fold=True,
        suite=words.suite,
        data_root=words.data_root,
    )
    teacher = f"sat:{words.data}"
    share_out("teacher", {f"{teacher}, seed 0": partial(trained_and_evaluated, teacher, 0, protocol)}, words.out)
    students = {
        f"{setting}, seed {seed}": partial(trained_and_evaluated, setting, seed, replace(protocol, check=name == OURS))
        for seed in range(words.seeds)
        for name, setting in chosen.items()
    }
    share_out("students", students, words.out)
    folders = {
        name: [folder_of(setting, seed, words.out) for seed in range(words.seeds)] for name, setting in chosen.items()
    }
    return folders | {TEACHER: [folder_of(teacher, 0, words.out)]}


def recorded(data: str, to: Path) -> Runs:
    """Return the runs of the kept records, unpacked to folders below `to`."""
    folders = unpack(RESULTS / data / RECORDS, to)
    known = settings_on(data)
    names = {name: known[name] for name in METHODS.split(",")}
    seeds = range(read_json(RESULTS / data / "fairness.json")["seeds"])
    found = {name: [folder_of(setting, seed, to) for seed in seeds] for name, setting in names.items()}
    runs = {name: paths for name, paths in found.items() if all(path.name in folders for path in paths)}
    return runs | {TEACHER: [folder_of(f"sat:{data}", 0, to)]}


def write_results(runs: Runs, data: str, suite: str, results: Path) -> None:
    """Write the tables, the figures with their intervals, the plot and the records of `runs`."""
    results.mkdir(parents=True, exist_ok=True)
    pack((folder for folders in runs.values() for folder in folders), KEPT, results / RECORDS)
    found = {name: [read_json(folder / "evaluation.json") for folder in folders] for name, folders in runs.items()}
    students = {name: folders for name, folders in runs.items() if name != TEACHER}
    content: dict[str, Any] = {"setting": data, "seeds": len(runs[BASELINE]), "baseline": BASELINE, "attacks": {}}
    shown = ("pgd20", SUITES[suite])
    for attack in shown:
        differences, of_ours = compared(students, attack)
        texts = {f"{attack}.md": table(found, differences, attack, data)}
        texts |= {f"{attack}-ours.md": ours_table(of_ours, attack)} if of_ours else {}
        for name, text in texts.items():
            print(f"{text}\n")
            write_atomically(results / name, text.encode())
        content["attacks"][attack] = {
            "images": sum(found[BASELINE][0]["attacks"][attack]["count"]),
            "against": {name: finite(asdict(one)) for name, one in differences.items()},
            "ours": {name: finite(asdict(one)) for name, one in of_ours.items()},
        }
    checks = {name: [run["checks"]["verdict"] for run in found[name] if "checks" in run] for name in students}
    content["checks"] = {name: verdicts for name, verdicts in checks.items() if verdicts}
    print(f"masked gradients: {content['checks']}")
    content["trained_at"] = commits(folder for folders in students.values() for folder in folders)
    write_summary(results / "fairness.json", content, DEVICE)
    draw(found, shown, results / "fairness.png")


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line, or end with an error in one line."""
    parser = words_of(__doc__)
    parser.add_argument("--data", default="fashion_mnist_small", help="the setting that all methods are trained under")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--suite", choices=tuple(SUITES), default="standard")
    parser.add_argument("--autoattack-images", type=int, help="default: 1,000 on cifar10_small, 500 on others")
    parser.add_argument("--data-root", type=Path, help="where the data set lies")
    parser.add_argument("--from-records", action="store_true", help=f"of {RESULTS}/DATA; train and evaluate nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/fairness"))
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}/DATA")
    words = parser.parse_args()
    names = require_methods(parser, words.data, words.methods)
    if words.seeds < 1:
        parser.error(f"--seeds {words.seeds}: at least one")
    if words.results is None and words.methods != METHODS:
        parser.error("--methods: name --results too, so that the whole comparison stays as it is")
    if BASELINE not in names:
        parser.error(f"--methods {words.methods}: {BASELINE} must be among them, the others are compared with it")
    words.results = words.results or RESULTS / words.data
    words.autoattack_images = words.autoattack_images or IMAGES.get(words.data, 500)
    return words


def main() -> None:
    words = arguments()
    torch.set_num_threads(1)  # the same bits on every machine
    if words.from_records:
        with TemporaryDirectory() as folder:
            write_results(recorded(words.data, Path(folder)), words.data, words.suite, words.results)
        return
    known = settings_on(words.data)
    runs = trained(words, {name: known[name] for name in words.methods.split(",")})
    write_results(runs, words.data, words.suite, words.results)


if __name__ == "__main__":
    sys.exit(reported(main, goes_on=True))
