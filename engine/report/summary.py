"""The section of the averages, weakest classes and spreads: a table, and a figure of strength against fairness."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from retemper.engine.class_report import Result
from retemper.engine.report.figures import HALO, INK, Look, as_plot, new_figure
from retemper.engine.report.page import Cell, Table
from retemper.engine.report.read import attack_title
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.words import at_most, columns, shorten

LABEL_SIZE = np.array((0.16, 0.07))  # about a label's width and height, in parts of the axes


def summary_blocks(runs: RunSet) -> list[Any]:
    """Return the table of all attacks, and the figure of the reference attack if there is more than one run."""
    if not runs.attacks:
        return []
    titles = {name: column.title for name, column in columns(len(runs.classes)).items()}
    groups = [(_heading(runs, attack), _rows(runs, attack)) for attack in runs.attacks]
    blocks: list[Any] = [Table(_caption(runs), ["run", *titles.values()], groups)]
    results = runs.results(runs.reference)
    if len(results) > 1:
        caption = f"Under {attack_title(runs.reference)}: right is stronger, up is fairer. Lines: 95 % intervals."
        blocks.append(as_plot("summary", caption, runs.said(runs.reference), partial(scatter, results, runs.look)))
    return blocks


def _caption(runs: RunSet) -> str:
    caption = "Correct, %, with 95 % intervals. NSD: spread of the class accuracies over their mean, 0 is fair."
    if "worst_tenth" in columns(len(runs.classes)):
        caption += " Worst tenth: mean of the weakest tenth of the classes, steadier than the weakest alone."
    if len(runs.comparable) > 1 and not runs.differing:
        caption += " Bold: best of its column."
    if "autoattack" not in runs.attacks:
        caption += " Without AutoAttack, read robust accuracies as upper bounds."
    if any(result.upper_bound for run in runs.comparable for result in run.results.values()):
        caption += " ≤: an upper bound, from a part of AutoAttack's standard suite."
    return caption


def _heading(runs: RunSet, attack: str) -> str:
    images = sorted({sum(r.report.count) for r in runs.results(attack).values()})
    return f"{attack_title(attack)}, {' or '.join(f'{n:,}' for n in images)} images"


def _rows(runs: RunSet, attack: str) -> list[list[Cell]]:
    results = runs.results(attack)
    rows = [[Cell(run, colour=runs.look[run].colour)] for run in results]
    for name, column in columns(len(runs.classes)).items():
        column = column._replace(digits=min(2, column.digits))
        values = [getattr(r.report, name) for r in results.values()]
        best = math.nan
        if len(results) > 1 and not runs.differing:
            best = (min if name == "nsd" else max)(filter(math.isfinite, values), default=math.nan)
        for row, result, value in zip(rows, results.values(), values, strict=True):
            note = f"class {runs.class_name(result.report.worst_class)}" if name == "worst" else ""
            text, ends = at_most(result, name) + column.text(value), column.between(result.interval[name])
            row.append(Cell(text, note, ends, strong=value == best))
    return rows


def scatter(results: Mapping[str, Result], look: Mapping[str, Look], narrow: bool) -> Figure:
    """Draw the average against the weakest class, with 95 % lines: right is stronger, up is fairer."""
    figure = new_figure(narrow, 4.0 if narrow else 4.6, 4.0 if narrow else 6.8)
    axes = figure.add_subplot()
    points = {name: (100 * r.report.average, 100 * r.report.worst) for name, r in results.items()}
    for name, (x, y) in points.items():
        style, (across, up) = look[name], (100 * np.array(results[name].interval[of]) for of in ("average", "worst"))
        axes.plot(across, [y, y], color=style.line, linewidth=1.4)
        axes.plot([x, x], up, color=style.line, linewidth=1.4)
        axes.plot(x, y, style.marker, color=style.colour, markeredgecolor=INK, markersize=10, zorder=3)
    axes.autoscale_view()  # fixes the limits, which the next line needs
    at_N2 = axes.transLimits.transform(list(points.values()))
    for name, (right, up) in zip(points, _free_corners(at_N2), strict=True):
        text, where = shorten(name, 18) + " ≤" * results[name].upper_bound, (9 * right, 10 * up)
        side = "left" if right > 0 else "right"
        style = {"ha": side, "va": "center", "color": look[name].ink, "weight": "bold", "bbox": HALO, "zorder": 4}
        axes.annotate(text, points[name], where, textcoords="offset points", **style)
    axes.set_xlabel("average over all images, %")
    axes.set_ylabel("weakest class, %")
    axes.grid(True)
    return figure


def _free_corners(at_N2: np.ndarray) -> list[tuple[int, int]]:
    """Return for each point, in parts of the axes, the corner where a label is clear of points and earlier labels."""
    labels, corners = [], []
    for i, point in enumerate(at_N2):
        taken = np.array([*np.delete(at_N2, i, axis=0), *labels, point + 9])  # the last: far away, never the nearest
        room = {}
        for corner in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            apart = np.abs(taken - point - np.array(corner) * LABEL_SIZE / 2) / LABEL_SIZE
            room[corner] = min(1.0, float(apart.max(axis=1).min()))  # 1: as far as a label is wide or high
        corners.append(max(room, key=room.__getitem__))
        labels.append(point + np.array(corners[-1]) * LABEL_SIZE / 2)
    return corners
