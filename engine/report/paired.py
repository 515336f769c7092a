"""The section of the differences between every run and the first student, on the same test images."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from retemper.engine.evaluation.compare import Comparison, Difference, compare
from retemper.engine.evaluation.verdicts import read_evaluated
from retemper.engine.report.figures import BARS_UP_TO, INK, Look, as_plot, class_rows, limits, new_figure
from retemper.engine.report.page import Cell, Plot, Table, Text
from retemper.engine.report.read import attack_title
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.words import PERCENT, columns
from retemper.errors import DataError, UsageError
from retemper.text import shorten

SURE = 0.05  # a smaller p is taken for a difference


def paired_blocks(runs: RunSet) -> list[Any]:
    """Return the blocks of the section: a table, a figure by class, and a line for each run that cannot be compared."""
    attack = runs.reference
    compared = [run for run in runs.comparable if attack in run.results]
    first = next((run for run in compared if not run.is_teacher), compared[0] if compared else None)
    found: dict[str, Comparison] = {}
    notes = []
    for run in compared:
        if first is None or run is first:
            continue
        try:
            a, b = (read_evaluated(one.evaluation, one.label) for one in (first, run))
            of = compare([a], [b], attack)
            if len(of.classes) != len(runs.classes):
                raise DataError(f"its protocol names {len(of.classes)} classes, its results have {len(runs.classes)}")
            found[run.label] = of
        except (DataError, UsageError) as error:
            notes.append(Text(f"{run.label} is not compared: {error}"))
    if first is None or not found:
        return notes
    title, versus = attack_title(attack), f"run minus {first.label}"
    return [_table(found, runs, title, versus), *_by_class(found, runs, title, versus), *notes]


def _table(found: Mapping[str, Comparison], runs: RunSet, title: str, versus: str) -> Table:
    shown = columns(len(runs.classes))
    rows = []
    for run, of in found.items():
        cells = [Cell(run)]
        for name, column in shown.items():
            difference, (low, high) = of.summary[name].difference, of.summary[name].images
            text, ends = column.text(difference, "+"), column.between((low, high))
            honest = f"honest {PERCENT.text(of.summary['honest_worst'].difference, '+')}" if name == "worst" else ""
            cells.append(Cell(text, honest, ends, strong=low > 0 or high < 0))
        cells += [_sure_cell(of, runs, sign) for sign in (1, -1)]
        rows.append([*cells, Cell(f"{of.summary['average'].p:.2g}")])
    caption = (
        f"{title}, {versus}, in points (NSD: less is fairer), with 95 % intervals of the paired bootstrap; bold: 0 is "
        "outside. Honest: as in the section on that. p: McNemar's exact test on all images. Better and worse: classes "
        f"with p below {SURE} after Holm's correction. All for the choice of images; other seeds may differ."
    )
    head = ["run", *(column.title for column in shown.values()), "better in", "worse in", "p"]
    return Table(caption, head, [("", rows)])


def _sure_cell(of: Comparison, runs: RunSet, sign: int) -> Cell:
    number = len(_sure_classes(of, sign))
    return Cell(f"{number} class{'es' * (number != 1)}", detail=_said(of, runs, sign)) if number else Cell("none")


def _sure_classes(of: Comparison, sign: int) -> list[int]:
    """Return the classes that are surely better (`sign` 1) or worse (-1), the largest difference first."""
    gain_K = [sign * d.difference if _sure(d) else 0.0 for d in of.by_class]
    return [k for k in sorted(range(len(gain_K)), key=lambda k: -gain_K[k]) if gain_K[k] > 0]


def _said(of: Comparison, runs: RunSet, sign: int) -> str:
    """Return the names of those classes, or the first of many."""
    names = [runs.class_name(k) for k in _sure_classes(of, sign)]
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[:3] if more else names) + more or "none"


def _sure(of: Difference) -> bool:
    return of.p_holm is not None and of.p_holm < SURE


def _by_class(found: Mapping[str, Comparison], runs: RunSet, title: str, versus: str) -> list[Plot]:
    if len(runs.classes) > BARS_UP_TO:
        return []
    versus_first = versus.removeprefix("run ")
    said = [
        f"{name} {versus_first}: better in {_said(of, runs, 1)}, worse in {_said(of, runs, -1)}"
        for name, of in found.items()
    ]
    caption = (
        f"{title} by class: {versus}; right is better. Lines: 95 % intervals of the paired bootstrap. Filled marks: p "
        f"below {SURE} after Holm's correction for the number of classes; the lines have none, so that one beside a "
        "hollow mark may leave out 0 by luck."
    )
    return [as_plot("paired", caption, said, partial(dots, found, runs.drawn, runs.look))]


def dots(found: Mapping[str, Comparison], classes: Sequence[str], look: Mapping[str, Look], narrow: bool) -> Figure:
    """Draw the differences by class: a row for each class, in it a mark for each run."""
    pitch = 0.16 if len(found) > 1 else 0.3  # inches between two marks
    in_row = 1 if narrow else min(3, len(found))
    height = len(classes) * (pitch * len(found) + 0.16) + 0.7 + 0.2 * -(-len(found) // in_row)
    figure = new_figure(narrow, height)
    axes = figure.add_subplot()
    keys = []
    for i, (name, of) in enumerate(found.items()):
        style, at = look[name], np.arange(len(classes)) + 0.76 * ((i + 0.5) / len(found) - 0.5)
        line: dict[str, Any] = {"color": style.line, "linestyle": style.dash}
        keys.append(
            Line2D([], [], **line, marker=style.marker, markeredgecolor=style.ink, label=shorten(style.name, 24))
        )
        for y, difference in zip(at, of.by_class, strict=True):
            axes.plot([100 * end for end in difference.images], [y, y], **line, linewidth=1.4)
            fill = style.colour if _sure(difference) else "white"
            axes.plot(100 * difference.difference, y, style.marker, color=fill, markeredgecolor=style.ink, markersize=6)
    figure.legend(handles=keys, loc="outside upper left", ncols=in_row, handlelength=2.6)
    axes.axvline(0, color=INK, linewidth=1)
    for k in range(1, len(classes)):
        axes.axhline(k - 0.5, color="#e6e9ed", linewidth=0.8, zorder=0)
    class_rows(axes, classes)
    ends = [100 * end for of in found.values() for difference in of.by_class for end in difference.images]
    axes.set_xlim(*limits([0, *ends], 4, (-100, 100)))
    axes.set_xlabel("points")
    return figure
