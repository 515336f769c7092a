"""Which method leaves the worst class best protected? One teacher, one protocol, AutoAttack included.

    python benchmarks/fairness.py --data fashion_mnist_small --seeds 3
    python benchmarks/fairness.py --data digits --seeds 3 --autoattack-images 600 --methods rslad,dafa --results runs/x

Trains what is not trained yet under --out, evaluates it (clean and PGD-20 on all test images, AutoAttack on a
class-balanced subset, through the folded twin; --suite fast: its first two attacks; our own students are checked for
masked gradients too), and writes to --results: of every run its config.json, metrics.jsonl, evaluation.json and
evaluation.csv, and of all the tables, the plot, and the paired differences, of each from RSLAD and of ours from each.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from runs import Protocol, commits, contestants, copy_records, folder_of, trained_and_evaluated

from retemper.console import Progress, say
from retemper.engine.cli import reported
from retemper.engine.device import device_name
from retemper.engine.evaluation.compare import Comparison, Difference, compare
from retemper.engine.evaluation.verdicts import read_evaluated
from retemper.files import finite, write_atomically, write_json
from retemper.provenance import commit, versions

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


def write_records(runs: dict[str, list[Path]], results: Path) -> None:
    """Copy what a reader needs to check the figures, without the folders of the machine."""
    for folder in {folder for folders in runs.values() for folder in folders}:
        copy_records(folder, results / folder.name, KEPT)


def compared(runs: dict[str, list[Path]], attack: str) -> tuple[dict[str, Comparison], dict[str, Comparison]]:
    """Every method against the baseline, and ours against every method, seed by seed."""
    sides = {name: [read_evaluated(folder) for folder in folders] for name, folders in runs.items()}
    from_baseline = {name: compare(sides[BASELINE], side, attack) for name, side in sides.items() if name != BASELINE}
    ours = sides.get(OURS)
    from_each = {} if ours is None else {name: compare(sides[name], ours, attack) for name in sides if name != OURS}
    return from_baseline, from_each


def table(rows: dict[str, list[dict[str, Any]]], differences: dict[str, Comparison], attack: str, data: str) -> str:
    """A line a method, the best worst class first: means and ranges over the seeds, and the difference from RSLAD."""
    settings = contestants(data) | {TEACHER: f"sat:{data}"}
    lines = [
        f"| {TITLES[attack]} | clean | average | worst class | NSD | worst class less RSLAD's, points | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(rows, key=lambda name: -_mean(rows[name], attack, "worst")):
        cells = [
            NAMES.get(name, name),
            f"{_mean(rows[name], 'clean', 'average'):.1%}",
            _spread(rows[name], attack, "average", ".1%"),
            _spread(rows[name], attack, "worst", ".1%"),
            _spread(rows[name], attack, "nsd", ".3f"),
            _told(differences[name].summary["worst"]) if name in differences else "",
            f"`retemper train {settings[name]}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ours_table(differences: dict[str, Comparison], attack: str) -> str:
    """A line a method: what ours has more than it."""
    head = f"{NAMES[OURS]} less, {TITLES[attack]}"
    lines = [f"| {head} | average, points | worst class, points | NSD, hundredths |", "|---|---|---|---|"]
    for name, found in differences.items():
        cells = [_told(found.summary[key]) for key in ("average", "worst", "nsd")]
        lines.append(f"| {NAMES.get(name, name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(runs: list[dict[str, Any]], attack: str, key: str, form: str) -> str:
    values = [run["attacks"][attack][key] for run in runs]
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def _told(of: Difference) -> str:
    """The difference in hundredths with its two intervals."""

    def points(ends: Sequence[float]) -> str:
        return " to ".join(f"{100 * end:+.1f}" for end in ends)

    seeds = "" if of.seeds is None else f"; seeds {points(of.seeds)}"
    return f"{100 * of.difference:+.1f} (images {points(of.images)}{seeds})"


def _mean(runs: list[dict[str, Any]], attack: str, key: str) -> float:
    return statistics.mean(run["attacks"][attack][key] for run in runs)


def draw(rows: dict[str, list[dict[str, Any]]], attacks: Sequence[str], path: Path) -> None:
    """Average and worst class of every method under each attack, a mark a seed."""
    from matplotlib.figure import Figure

    names = sorted(rows, key=lambda name: _mean(rows[name], "pgd20", "worst"))
    figure = Figure(figsize=(9, 0.5 * len(names) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(attacks), sharey=True)
    for axes, attack in zip(panels, attacks, strict=True):
        for place, name in enumerate(names):
            average, worst = _mean(rows[name], attack, "average"), _mean(rows[name], attack, "worst")
            axes.plot([100 * worst, 100 * average], [place, place], color="#c3c9d0", lw=3, zorder=1)
            for key, marker, colour in (("average", "o", "#5b6470"), ("worst", "D", "#b0330f")):
                seeds = [100 * run["attacks"][attack][key] for run in rows[name]]
                axes.plot(seeds, [place] * len(seeds), marker, color=colour, ms=4, alpha=0.45, zorder=2)
                label = {"average": "average of the classes", "worst": "worst class"}[key] if place == 0 else None
                mean = 100 * _mean(rows[name], attack, key)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist_small", help="the setting that all methods are trained under")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--suite", choices=tuple(SUITES), default="standard")
    parser.add_argument("--autoattack-images", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/fairness"))
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/fairness/DATA")
    words = parser.parse_args()
    results = words.results or Path("benchmarks/results/fairness") / words.data
    torch.set_num_threads(1)  # the same bits on every machine
    protocol = Protocol(
        out=words.out, attacks=ATTACKS, autoattack_limit=words.autoattack_images, fold=True, suite=words.suite
    )
    known, names = contestants(words.data), words.methods.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--methods {','.join(unknown)}: on {words.data} there are {', '.join(known) or 'none'}")
    if words.seeds < 1:
        parser.error(f"--seeds {words.seeds}: at least one")
    if words.results is None and words.methods != METHODS:
        parser.error("--methods: name --results too, so that the whole comparison stays as it is")
    if BASELINE not in names:
        parser.error(f"--methods {words.methods}: {BASELINE} must be among them, the others are compared with it")
    chosen = {name: known[name] for name in names}
    teacher = f"sat:{words.data}"
    rows: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, list[Path]] = {}
    with Progress("fairness", len(chosen) * words.seeds) as progress:
        for seed in range(words.seeds):
            for name, setting in chosen.items():
                say(f"{setting}, seed {seed}")
                one = replace(protocol, check=name == OURS)
                rows.setdefault(name, []).append(trained_and_evaluated(setting, seed, one))
                runs.setdefault(name, []).append(folder_of(setting, seed, words.out))
                progress.advance(1)
    taught_by = {TEACHER: [trained_and_evaluated(teacher, 0, protocol)]}
    write_records(runs | {TEACHER: [folder_of(teacher, 0, words.out)]}, results)
    content: dict[str, Any] = {"setting": words.data, "seeds": words.seeds, "baseline": BASELINE, "attacks": {}}
    shown = ("pgd20", SUITES[words.suite])
    for attack in shown:
        differences, of_ours = compared(runs, attack)
        tables = [table(rows | taught_by, differences, attack, words.data)]
        tables += [ours_table(of_ours, attack)] if of_ours else []
        for name, text in zip((f"{attack}.md", f"{attack}-ours.md"), tables, strict=False):
            print(f"{text}\n")
            write_atomically(results / name, text.encode())
        content["attacks"][attack] = {
            "images": sum(rows[BASELINE][0]["attacks"][attack]["count"]),
            "against": {name: finite(asdict(found)) for name, found in differences.items()},
            "ours": {name: finite(asdict(found)) for name, found in of_ours.items()},
        }
    checks = {name: [run["checks"]["verdict"] for run in found if "checks" in run] for name, found in rows.items()}
    content["checks"] = {name: verdicts for name, verdicts in checks.items() if verdicts}
    print(f"masked gradients: {content['checks']}")
    every = [folder for folders in runs.values() for folder in folders]
    content |= {"versions": versions(), "commit": commit(), "trained_at": commits(every)}
    content |= {"device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}
    write_json(results / "fairness.json", content)
    draw(rows | taught_by, shown, results / "fairness.png")


if __name__ == "__main__":
    sys.exit(reported(main, goes_on=True))
