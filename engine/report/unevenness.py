"""The section of the weakest class without its bad luck, and of other measures of unevenness: a table."""

import math
from typing import Any

import numpy as np

from retemper.engine.checkpoints.header import read_header
from retemper.engine.class_report import Result
from retemper.engine.measures import kendall_tau
from retemper.engine.report.page import Cell, Table
from retemper.engine.report.read import RunRecord, as_dict, as_number, attack_title
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.words import PERCENT, Column, at_most, called

PLAIN = Column("", "", scale=1, digits=3)
HEAD = ["run", "weakest class", "honest", "class average", "Gini", "confusion", "class order"]
CAPTION = (
    "correct, %, with 95 % intervals. The weakest of many classes was also unlucky in its test images, so that its "
    "accuracy is too low on average. Honest: the class that is the weakest on one half of the images, measured on the "
    "other half; the mean over all halvings. It is too high, if anything: the truth lies between the two on average. "
    "Luck: their difference in points. Class average: every class counts alike. Gini: 0 where all classes are alike. "
    "Confusion: the largest singular value of the shares of each class that are taken for another. Class order: "
    "Kendall's tau between training images, or those held out of training, and test; 1 is the same order, 0 none."
)


def unevenness_blocks(runs: RunSet) -> list[Any]:
    """Return the table for the reference attack, a row a run; none where no run was evaluated."""
    records = [run for run in runs.comparable if runs.reference in run.results]
    rows = [_row(runs, run, run.results[runs.reference]) for run in records]
    return [Table(f"{attack_title(runs.reference)}: {CAPTION}", HEAD, [("", rows)])] if rows else []


def _row(runs: RunSet, run: RunRecord, result: Result) -> list[Cell]:
    found, most, worst_ends = result.measures, at_most(result), PERCENT.between(result.interval["worst"])
    ends, (tau, of) = found["interval"], class_order(run, result)
    luck = f"luck {PERCENT.text(found['worst_bias'], '+')}"
    return [
        Cell(run.label, runs.undrawn.get(run.label, ""), colour=runs.look[run.label].colour),
        Cell(most + PERCENT.text(result.report.worst), called(runs.weakest(result)), worst_ends),
        Cell(PERCENT.text(found["honest_worst"]), luck, PERCENT.between(ends["honest_worst"])),
        Cell(most + PERCENT.text(found["class_average"]), detail=PERCENT.between(ends["class_average"])),
        Cell(PLAIN.text(found["gini"]), detail=PLAIN.between(ends["gini"])),
        Cell(PLAIN.text(found["confusion_norm"])),
        Cell(PLAIN.text(tau), detail=of),
    ]


def class_order(run: RunRecord, result: Result) -> tuple[float, str]:
    """Return Kendall's tau of the classes' order between training and test, and the images of the first in words.

    Training is the epoch of the weights that were evaluated, else the last: its training images under attack or, where
    their accuracies were not recorded, those held out. NaN and "" where neither is known.
    """
    epoch = read_header(run.folder / str(run.protocol.get("weights"))).get("epoch")
    row = next((row for row in run.metrics if str(row["epoch"]) == epoch), run.metrics[-1] if run.metrics else {})
    trained, held = row.get("class_accuracy"), as_dict(row.get("holdout")).get("accuracy")
    for accuracy_K, images in ((trained, "training"), (held, "held out")):
        if isinstance(accuracy_K, list) and len(accuracy_K) == len(result.report.accuracy):
            return kendall_tau(np.array([*map(as_number, accuracy_K)]), np.array(result.report.accuracy)), images
    return math.nan, ""
