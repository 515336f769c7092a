"""Which part of label trust helps, at which rates, for which student and teacher? Judged on held-out training images.

    python benchmarks/label_trust_study.py --data digits --seeds 3
    python benchmarks/label_trust_study.py --data fashion_mnist_small --seeds 1
    python benchmarks/label_trust_study.py --data digits --from-records --results runs/x    the table anew, from records

The test images are not looked at: 30 (digits) or 400 images a class of the training set are held out, from the teacher
too. PGD-20 on all of them chooses the epoch that is kept; AutoAttack's first two attacks on 30 or 100 of each class
(upper bounds of the whole suite) order the table. Fashion-MNIST takes minutes a run, and gets the rows that decide.
Trains and attacks what is not done yet under --out; writes to --results/DATA the table study.md, all figures as
study.json, and of every run its config.json, metrics.jsonl and ledger as records.json.xz.

The committed table of the digits has three rows more, of options that label trust has no longer; --from-records keeps
them, a study trained anew leaves them out.
"""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from records import RECORDS, pack, unpack
from runs import DEVICE, commits
from summary import markdown, mean_and_range, words_of, write_summary

from retemper.cli import reported
from retemper.console import Progress, say
from retemper.engine.catalogue import find_setting
from retemper.engine.checkpoints.external import state_digest
from retemper.engine.checkpoints.weights import load_checkpoint
from retemper.engine.class_report import class_report
from retemper.engine.evaluation.autoattack import SUITES, SuiteRequest
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.shards import evaluate_suite
from retemper.engine.models import create_model
from retemper.engine.predict import balanced_order
from retemper.engine.run.job import Job, default_cache
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.train import train
from retemper.files import read_json, write_atomically
from retemper.loaders import holdout_split, load_split

HELD_OUT: dict[str, dict[str, Any]] = {
    "digits": dict(holdout_per_class=30),
    "fashion_mnist_small": dict(holdout_per_class=400, select_every=10, select_from=8),
}
ATTACKED = {"digits": 300, "fashion_mnist_small": 1_000}  # held-out images under AutoAttack's first two attacks
LEDGER = "autoattack-held-out.csv"
KEPT = ("config.json", "metrics.jsonl", LEDGER)
BOTH = ("digits", "fashion_mnist_small")
JOINT, APART = dict(joint=True), dict(joint=False)
AVERAGED, NOT_AVERAGED = dict(average="ema", ema_decay=0.99), dict(average="none")
LABELS = dict(trust_start=1.0, trust_upper=1.0, trust_rate=0.0)
WIDE = dict(student="tiny_resnet_wide")
TEACHER, FAIRER = "teacher (SAT, twice as wide)", "fairer teacher"
RESULTS = Path("benchmarks/results/label_trust")

Scores = dict[str, dict[str, Any]]  # under "apgd" and "pgd20"


@dataclass(frozen=True)
class Row:
    """A student of the study.

    Attributes:
        fields: of the recipe, that differ from the setting's own.
        teacher: the row that taught it, where its method has a teacher.
        on: the data sets on which it is trained.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    method: str = "label_trust"
    teacher: str = TEACHER
    on: tuple[str, ...] = ("digits",)

    def folder(self, data: str, seed: int) -> str:
        """Return the name of the folder of one of its runs."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{name}-{data}-seed{seed}"


ROWS = (
    Row(TEACHER, method="sat", on=BOTH),
    Row("RSLAD", method="rslad", on=BOTH),
    Row("RSLAD, joint", JOINT, method="rslad"),
    Row("RSLAD, joint, averaged", JOINT | AVERAGED, method="rslad", on=BOTH),
    Row("DAFA", method="dafa", on=("fashion_mnist_small",)),
    Row("label trust", on=BOTH),
    Row("label trust, not averaged", NOT_AVERAGED),
    Row("label trust, not averaged, apart", NOT_AVERAGED | APART),
    Row("trust alone", dict(weight_rate=0.0), on=BOTH),
    Row("weights alone", dict(trust_rate=0.0), on=BOTH),
    Row("labels instead of the teacher, weights", LABELS),
    Row("label trust, weight rate 0.2", dict(weight_rate=0.2)),
    Row("label trust, weight rate 0.8", dict(weight_rate=0.8)),
    Row("label trust, weights up to 2", dict(weight_upper=2.0)),
    Row("label trust, trust up to 0.5", dict(trust_upper=0.5)),
    Row("RSLAD, wide student", WIDE, method="rslad"),
    Row("label trust, wide student", WIDE),
    Row(FAIRER, WIDE | LABELS),
    Row("RSLAD, fairer teacher", method="rslad", teacher=FAIRER),
    Row("label trust, fairer teacher", teacher=FAIRER),
)


def trained(row: Row, data: str, seed: int, out: Path) -> Path:
    """Return the folder of `row`'s run, trained where that is not done."""
    method, setting, found = find_setting(f"{row.method}:{data}")
    folder = out / row.folder(data, seed)
    teacher = next(other for other in ROWS if other.name == row.teacher)
    job = Job(
        method=method,
        setting=setting,
        recipe=found.recipe.replace(**HELD_OUT[data], **row.fields),
        out=folder,
        seed=seed,
        teacher=trained(teacher, data, 0, out) if found.recipe.networks.teacher_model else None,
        cache=default_cache(),
        device=DEVICE,
    )
    train(job)
    return folder


def chosen(folder: Path) -> dict[str, Any]:
    """Return the scores of the kept epoch, the best in average + worst, on all held-out images under PGD-20."""
    lines = [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]
    first = RunFolder(folder).read_config()["recipe"]["select_from"]
    scores = [line["holdout"] for line in lines if "holdout" in line and line["epoch"] >= first]
    return max(scores, key=lambda score: score["average"] + score["worst"])


def attacked(folder: Path, data: str) -> Ledger:
    """Attack the first held-out images of every class with AutoAttack's first two attacks; return the ledger."""
    recipe = RunFolder(folder).read_config()["recipe"]
    split = load_split(recipe["dataset"], "train", None, recipe["image_size"])
    _, held_out = holdout_split(split.labels, recipe["holdout_per_class"])
    order = held_out[balanced_order(split.labels[held_out], ATTACKED[data])]
    model = create_model(recipe["student"], len(split.classes), channels=split.shape[2])
    load_checkpoint(folder / "best.safetensors", model)
    request = SuiteRequest(suite="fast", eps=recipe["eps"], device=torch.device("cpu"), fold=True)
    known = {"dataset": recipe["dataset"], "split": "train", "weights_sha256": state_digest(model)}
    ledger = evaluate_suite(model, split, order, request, known=known, path=folder / LEDGER)
    assert ledger is not None  # it is where there are shards
    return ledger


def by_class(ledger: Ledger) -> dict[str, Any]:
    """Return the report by class of the images that held."""
    count_K = np.bincount(ledger.label_N)
    correct_K = np.bincount(ledger.label_N[ledger.holds(SUITES["fast"])], minlength=len(count_K))
    return asdict(class_report(correct_K, count_K))


def table(found: dict[str, list[Scores]]) -> str:
    """Return a Markdown table with a line a row, the best worst class first: means over the seeds, and ranges."""

    def cells(name: str, attack: str) -> list[str]:
        average, worst, nsd = ([seed[attack][key] for seed in found[name]] for key in ("average", "worst", "nsd"))
        return [mean_and_range(average), mean_and_range(worst), f"{statistics.mean(nsd):.3f}"]

    head = ["student", "APGD average", "worst class", "NSD", "PGD-20 average", "worst class", "NSD"]
    order = sorted(found, key=lambda name: -statistics.mean(seed["apgd"]["worst"] for seed in found[name]))
    return markdown(head, [[name, *cells(name, "apgd"), *cells(name, "pgd20")] for name in order])


def write_results(
    data: str, rows: Sequence[Row], found: dict[str, list[Scores]], folders: list[Path], to: Path
) -> None:
    """Write the table, all figures and the records of the runs."""
    to.mkdir(parents=True, exist_ok=True)
    pack(folders, KEPT, to / RECORDS)
    write_atomically(to / "study.md", table(found).encode())
    content = {
        "data": data,
        "held_out": HELD_OUT[data] | {"attacked": ATTACKED[data]},
        "rows": [asdict(row) | {"seeds": found[row.name]} for row in rows],
        "trained_at": commits(folders),
    }
    write_summary(to / "study.json", content, DEVICE)


def from_records(data: str, results: Path) -> str:
    """Return the table made anew from the kept records, and write it to `results`; nothing is trained or attacked."""
    kept = read_json(RESULTS / data / "study.json")["rows"]
    rows = [Row(**{one.name: row[one.name] for one in fields(Row)}) for row in kept]
    with TemporaryDirectory() as to:
        runs = unpack(RESULTS / data / RECORDS, Path(to))
        found = {
            row.name: [
                {"apgd": by_class(Ledger.read(runs[folder] / LEDGER)), "pgd20": chosen(runs[folder])}
                for folder in (row.folder(data, seed) for seed in range(len(old["seeds"])))
            ]
            for row, old in zip(rows, kept, strict=True)
        }
        write_results(data, rows, found, list(runs.values()), results)
    return table(found)


def pattern(text: str) -> re.Pattern[str]:
    """Return the regular expression; a ValueError for a wrong one, which argparse tells in one line."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(error) from None


def main() -> None:
    parser = words_of(__doc__)
    parser.add_argument("--data", choices=tuple(HELD_OUT), default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", type=pattern, metavar="REGEX", help="the rows whose names match; nothing is written to --results"
    )
    parser.add_argument("--from-records", action="store_true", help=f"of {RESULTS}/DATA; train and attack nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/label_trust_study"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    words = parser.parse_args()
    torch.set_num_threads(1)  # the same bits on every machine
    if words.from_records:
        print(from_records(words.data, words.results / words.data))
        return
    rows = [row for row in ROWS if words.data in row.on and (not words.only or words.only.search(row.name))]
    if not rows or words.seeds < 1:
        parser.error(f"--only and --seeds {words.seeds} leave no run of: {'; '.join(row.name for row in ROWS)}")
    found: dict[str, list[Scores]] = {}
    folders: list[Path] = []
    with Progress("study", len(rows) * words.seeds) as progress:
        for row in rows:
            for seed in range(words.seeds):
                say(f"{row.name}, seed {seed}")
                folders.append(trained(row, words.data, seed, words.out))
                apgd = by_class(attacked(folders[-1], words.data))
                found.setdefault(row.name, []).append({"apgd": apgd, "pgd20": chosen(folders[-1])})
                progress.advance(1)
    print(table(found))
    if not words.only:  # with it the whole table stays
        write_results(words.data, rows, found, folders, words.results / words.data)


if __name__ == "__main__":
    sys.exit(reported(main, goes_on=True))
