"""What does evening a trained student afterwards do to its classes? Before and after, under AutoAttack.

    python benchmarks/even.py --data digits
    python benchmarks/even.py --data fashion_mnist_small --from runs/fairness --seeds 3
    python benchmarks/even.py --data digits --from-records --results runs/x     the tables anew, from kept records

Takes the students of each method and seed from --from, where benchmarks/fairness.py has left them, or trains them, and
evens each by the ways of `retemper even`, all under --out. Each is evaluated as in fairness.py: clean, PGD-20, and
AutoAttack on a class-balanced subset through the folded network. What is finished is not repeated, and the same
command in a second process takes the students that the first is not at. Writes to --results the table (ATTACK.md), all
figures with their intervals as even.json, and the runs' records. `picked` is the way without training that has the
best average + worst class on the images that choose, and `csr less plain` what CSR has beyond two more epochs.
Intervals are of differences on the same images; Kendall's tau is of the order of the classes before and after.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fairness import KEPT, NAMES, SUITES, TITLES, told
from records import RECORDS, pack, unpack
from runs import (
    DEVICE,
    Protocol,
    commits,
    evaluated,
    folder_of,
    require_methods,
    settings_on,
    share_out,
    trained_and_evaluated,
)
from scipy.stats import kendalltau
from summary import common_radius, markdown, mean_and_range, words_of, write_summary

from retemper.cli import reported
from retemper.console import say
from retemper.engine.catalogue import find_setting
from retemper.engine.checkpoints.header import Facts, read_header
from retemper.engine.evaluation.compare import Comparison, compare
from retemper.engine.evaluation.verdicts import read_evaluated
from retemper.engine.even.even import even
from retemper.engine.even.subject import FINE_TUNES, FREE, EvenRequest
from retemper.errors import DataError
from retemper.files import finite, read_json, write_atomically

METHODS = "rslad,absld,dafa,label_trust"
ATTACKS = ("clean", "pgd20", "autoattack")
IMAGES = {"digits": 600, "fashion_mnist_small": 500}  # that AutoAttack is given
WAYS = (*FREE, *FINE_TUNES)
BEFORE, PICKED, CONTROLLED = "before", "picked", "csr less plain"
RESULTS = Path("benchmarks/results/even")

Runs = dict[str, dict[str, list[Path]]]  # of each method, by BEFORE and the way, the folders of its seeds


@dataclass(frozen=True)
class Row:
    """One way of evening one method's students, compared with what it is measured by, seed by seed.

    Attributes:
        found: the evaluations of the seeds.
        difference: from the students before, or of CSR from its control.
        tau: of each seed, Kendall's tau-b between the classes' accuracies on either side.
    """

    found: list[dict[str, Any]]
    difference: Comparison | None
    tau: list[float]


def base_of(setting: str, seed: int, source: Path, out: Path, protocol: Protocol) -> Path:
    """Return the evaluated run of METHOD:SETTING below `out`: copied from `source` where it is finished there."""
    folder, there = (folder_of(setting, seed, place) for place in (out, source))
    epochs = str(find_setting(setting)[2].recipe.optim.epochs)
    if not folder.exists() and read_header(there / "last.safetensors").get("epoch") == epochs:
        copy = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(there, copy, ignore=shutil.ignore_patterns(".*", "*.state"))
        copy.rename(folder)
    if (folder / "best.safetensors").exists() and not (folder / "last.state").exists():
        evaluated(folder, protocol)
    else:
        trained_and_evaluated(setting, seed, protocol)
    return folder


def evened(base: Path, by: str, protocol: Protocol) -> Path | None:
    """Return the run that `base` is evened into, evaluated; None where a class was never learned."""
    folder = base.with_name(f"{base.name}-even-{by}")
    last = read_header(folder / "last.safetensors").get("epoch")
    if last is None or (by in FINE_TUNES and last != "2"):
        try:
            even(EvenRequest(target=base, by=by, out=folder, device=DEVICE, facts=Facts()))
        except DataError as error:
            if "never learned" not in str(error):
                raise
            say(f"{base.name}, {by}: {error}")
            return None
    evaluated(folder, protocol)
    return folder


def trained(words: argparse.Namespace, chosen: Mapping[str, str]) -> Runs:
    """Return all runs, made where they are not there. A way is left out of a method where it is refused for a seed."""
    protocol = Protocol(
        out=words.out, attacks=ATTACKS, autoattack_limit=words.autoattack_images, fold=True, suite=words.suite
    )
    ways = words.by.split(",")
    made: dict[tuple[str, str, int], Path | None] = {}

    def make(name: str, seed: int) -> None:
        made[name, BEFORE, seed] = base = base_of(chosen[name], seed, words.source, words.out, protocol)
        made.update({(name, by, seed): evened(base, by, protocol) for by in ways})

    students = {
        f"{setting}, seed {seed}": partial(make, name, seed)
        for seed in range(words.seeds)
        for name, setting in chosen.items()
    }
    share_out("even", students, words.out)
    runs: Runs = {name: {} for name in chosen}
    for name in chosen:
        for by in (BEFORE, *ways):
            folders = [folder for seed in range(words.seeds) if (folder := made[name, by, seed])]
            runs[name] |= {by: folders} if len(folders) == words.seeds else {}
    return runs


def with_picked(of: Mapping[str, list[Path]]) -> dict[str, list[Path]]:
    """Return the runs of a method with those that would be picked among the ways without training, seed by seed."""
    free = [by for by in FREE if by in of]
    if len(free) < len(FREE):
        return dict(of)
    picked = [max(folders, key=score_of) for folders in zip(*(of[by] for by in free), strict=True)]
    return {BEFORE: of[BEFORE], **{by: of[by] for by in free}, PICKED: picked, **{by: of[by] for by in of}}


def score_of(folder: Path) -> float:
    """Return the average + worst class that an evened network reached on the images that choose."""
    told_there = read_json(folder / "config.json")["evened"]
    reached = told_there["tried"][told_there["by"]]
    return reached["average"] + reached["worst"]


def rows_of(of: Mapping[str, list[Path]], attack: str) -> dict[str, Row]:
    """Return the rows of one method by their titles."""
    sides = {by: [read_evaluated(folder) for folder in folders] for by, folders in of.items()}
    found = {by: [read_json(folder / "evaluation.json") for folder in folders] for by, folders in of.items()}
    rows = {
        by: Row(
            found[by],
            compare(sides[BEFORE], side, attack) if by != BEFORE else None,
            taus(found[BEFORE], found[by], attack),
        )
        for by, side in sides.items()
    }
    if set(FINE_TUNES) <= of.keys():
        csr, plain = FINE_TUNES
        control = compare(sides[plain], sides[csr], attack)
        rows[CONTROLLED] = Row([], control, taus(found[plain], found[csr], attack))
    return rows


def taus(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], attack: str) -> list[float]:
    """Return of each seed Kendall's tau-b between the accuracies of the classes on both sides."""
    found: list[Any] = [
        kendalltau(*(one["attacks"][attack]["accuracy"] for one in pair)) for pair in zip(before, after, strict=True)
    ]
    return [float(one.statistic) for one in found]


def table(methods: Mapping[str, Mapping[str, Row]], attack: str) -> str:
    """Return a Markdown table with a line for each method and way: means and ranges over the seeds, and differences."""
    evaluations = [one for rows in methods.values() for row in rows.values() for one in row.found]
    head = [f"{TITLES[attack]}, eps {common_radius(evaluations)}", "clean", "average", "worst class", "NSD"]
    head += ["average, points more", "worst class, points more", "NSD, hundredths more", "order of the classes, tau"]
    lines = []
    for name, rows in methods.items():
        for by, row in rows.items():
            cells = ["", "", "", ""]
            if row.found:
                clean = statistics.mean(one["attacks"]["clean"]["average"] for one in row.found)
                numbers = {
                    key: [one["attacks"][attack][key] for one in row.found] for key in ("average", "worst", "nsd")
                }
                cells = [f"{clean:.1%}", *(mean_and_range(numbers[key]) for key in ("average", "worst"))]
                cells += [mean_and_range(numbers["nsd"], ".3f")]
            differences = ["", "", ""]
            if row.difference is not None:
                differences = [told(row.difference.summary[key]) for key in ("average", "worst", "nsd")]
            tau = mean_and_range(row.tau, ".2f") if by != BEFORE else ""
            tau = "refused: a seed never learned a class" if len(rows) == 1 else tau
            lines.append([f"{NAMES.get(name, name)}, {by}", *cells, *differences, tau])
    return markdown(head, lines)


def write_results(runs: Runs, data: str, suite: str, results: Path) -> None:
    """Write the table, the figures with their intervals, and the records of `runs`."""
    results.mkdir(parents=True, exist_ok=True)
    folders = [folder for of in runs.values() for seeds in of.values() for folder in seeds]
    pack(folders, KEPT, results / RECORDS)
    seeds = len(next(iter(runs.values()))[BEFORE])
    content: dict[str, Any] = {"setting": data, "seeds": seeds, "attacks": {}}
    for attack in ("pgd20", SUITES[suite]):
        methods = {name: rows_of(with_picked(of), attack) for name, of in runs.items()}
        text = table(methods, attack)
        print(f"{text}\n")
        write_atomically(results / f"{attack}.md", text.encode())
        content["attacks"][attack] = {
            name: {
                by: {"tau": row.tau, "more": row.difference and finite(asdict(row.difference))}
                for by, row in of.items()
            }
            for name, of in methods.items()
        }
    content["refused"] = {
        name: missing for name, of in runs.items() if (missing := [by for by in WAYS if by not in of])
    }
    content["trained_at"] = commits(folders)
    write_summary(results / "even.json", content, DEVICE)


def recorded(data: str, to: Path) -> Runs:
    """Return the runs of the kept records, unpacked to folders below `to`."""
    folders = unpack(RESULTS / data / RECORDS, to)
    seeds, known = range(read_json(RESULTS / data / "even.json")["seeds"]), settings_on(data)
    runs: Runs = {}
    for name in METHODS.split(","):
        bases = [folder_of(known[name], seed, to) for seed in seeds]
        each = {by: [base.with_name(f"{base.name}-even-{by}") for base in bases] for by in WAYS} | {BEFORE: bases}
        there = {by: paths for by, paths in each.items() if all(path.name in folders for path in paths)}
        runs |= {name: {by: there[by] for by in (BEFORE, *WAYS) if by in there}} if BEFORE in there else {}
    return runs


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line, or end with an error in one line."""
    parser = words_of(__doc__)
    parser.add_argument("--data", default="digits", choices=tuple(IMAGES))
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--by", default=",".join(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--suite", choices=tuple(SUITES), default="standard")
    parser.add_argument("--autoattack-images", type=int, help="default: 600 digits, 500 of Fashion-MNIST")
    parser.add_argument("--from", type=Path, default=Path("runs/fairness"), dest="source", help="where students lie")
    parser.add_argument("--from-records", action="store_true", help=f"of {RESULTS}/DATA; train and evaluate nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/even"))
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}/DATA")
    words = parser.parse_args()
    require_methods(parser, words.data, words.methods)
    if unknown := [by for by in words.by.split(",") if by not in WAYS]:
        parser.error(f"--by {','.join(unknown)}: there are {', '.join(WAYS)}")
    if words.seeds < 1:
        parser.error(f"--seeds {words.seeds}: at least one")
    if words.results is None and (words.methods, words.by) != (METHODS, ",".join(WAYS)):
        parser.error("--methods, --by: name --results too, so that the whole comparison stays as it is")
    words.results = words.results or RESULTS / words.data
    words.autoattack_images = words.autoattack_images or IMAGES[words.data]
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
