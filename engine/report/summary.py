"""The section of the averages, weakest classes and spreads: a table, and a figure of strength against fairness."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from retemper.engine.class_report import Result
from retemper.engine.report.figures import INK, Look, as_plot, limits, new_figure
from retemper.engine.report.page import Cell, Table
from retemper.engine.report.read import attack_title
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.words import at_most, ball, called, columns
from retemper.text import shorten


def summary_blocks(runs: RunSet) -> list[Any]:
    """Return the table of all attacks, that of the headline first, and its figure if there is more than one run."""
    if not runs.attacks:
        return []
    titles = {name: column.title for name, column in columns(len(runs.classes)).items()}
    groups = [(_heading(runs.results(attack), attack), _rows(runs, runs.results(attack))) for attack in runs.in_order]
    groups += _elsewhere(runs)
    blocks: list[Any] = [Table(_caption(runs), ["run", *titles.values()], groups)]
    results = runs.results(runs.reference)
    if len(results) > 1:
        caption = f"Under {attack_title(runs.reference)}: right is stronger, up is fairer. Lines: 95 % intervals."
        blocks.append(as_plot("summary", caption, runs.said(runs.reference), partial(scatter, results, runs.look)))
    return blocks


def _caption(runs: RunSet) -> str:
    within = "" if runs.eps is None else f" under attacks within eps {ball(runs.eps, runs.norm)}"
    caption = (
        f"Correct, %,{within} with 95 % intervals. NSD: spread of the class accuracies over their mean, 0 is fair."
    )
    if "worst_tenth" in columns(len(runs.classes)):
        caption += " Worst tenth: mean of the weakest tenth of the classes, steadier than the weakest alone."
    if len(runs.comparable) > 1 and not runs.differing:
        caption += " Bold: best of its column."
    if "autoattack" not in runs.attacks:
        caption += " Without AutoAttack, read robust accuracies as upper bounds."
    if any(result.upper_bound for run in runs.comparable for result in run.results.values()):
        caption += " ≤: an upper bound, from a part of AutoAttack's standard suite or from a weaker protocol."
    return caption


def _elsewhere(runs: RunSet) -> list[tuple[str, list[list[Cell]]]]:
    """Return the lines of runs that were evaluated at other radii: a group for each radius, norm and attack."""
    found: dict[tuple[str, str], dict[str, Result]] = {}
    for run in runs.elsewhere:
        for attack, result in run.results.items():
            found.setdefault((ball(run.protocol.get("eps"), run.norm), attack), {})[run.label] = result
    return [
        (f"eps {eps}: {_heading(results, attack)}", _rows(runs, results)) for (eps, attack), results in found.items()
    ]


def _heading(results: Mapping[str, Result], attack: str) -> str:
    images = sorted({sum(r.report.count) for r in results.values()})
    return f"{attack_title(attack)}, {' or '.join(f'{n:,}' for n in images)} images"


def _rows(runs: RunSet, results: Mapping[str, Result]) -> list[list[Cell]]:
    rows = [[Cell(run, runs.undrawn.get(run, ""), colour=runs.look[run].colour)] for run in results]
    for name, column in columns(len(runs.classes)).items():
        column = column._replace(digits=min(2, column.digits))
        values = [getattr(r.report, name) for r in results.values()]
        best = math.nan
        if len(results) > 1 and not runs.differing:
            best = (min if name == "nsd" else max)(filter(math.isfinite, values), default=math.nan)
        for row, result, value in zip(rows, results.values(), values, strict=True):
            note = called(runs.weakest(result)) if name == "worst" else ""
            text, ends = at_most(result, name) + column.text(value), column.between(result.interval[name])
            row.append(Cell(text, note, ends, strong=value == best))
    return rows


def scatter(results: Mapping[str, Result], look: Mapping[str, Look], narrow: bool) -> Figure:
    """Draw the average against the weakest class, with 95 % lines: right is stronger, up is fairer."""
    columns = 1 if narrow else 2
    figure = new_figure(narrow, 3.8 + 0.2 * -(-len(results) // columns), 4.0 if narrow else 6.8)
    axes = figure.add_subplot()
    keys, ends = [], {"average": [], "worst": []}
    for name, result in results.items():
        style, x, y = look[name], 100 * result.report.average, 100 * result.report.worst
        across, up = (100 * np.array(result.interval[of]) for of in ends)
        axes.plot(across, [y, y], color=style.line, linewidth=1.4)
        axes.plot([x, x], up, color=style.line, linewidth=1.4)
        mark: dict[str, Any] = {"marker": style.marker, "markeredgecolor": INK, "markersize": 10}
        axes.plot(x, y, color=style.colour, **mark, zorder=3, clip_on=False)
        label = shorten(style.name, 30) + ", an upper bound" * result.upper_bound
        keys.append(Line2D([], [], color=style.colour, linestyle="", **mark, label=label))
        for values, new in zip(ends.values(), (across, up), strict=True):
            values += new.tolist()
    figure.legend(handles=keys, loc="outside upper left", ncols=columns, labelspacing=0.35)
    axes.set_xlim(*limits(ends["average"], 4))
    axes.set_ylim(*limits(ends["worst"], 4))
    axes.set_xlabel("average over all images, %")
    axes.set_ylabel("weakest class, %")
    axes.grid(True)
    return figure
