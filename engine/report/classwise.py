"""The section of every class under every attack: a figure and a table each. Dimension key: K classes."""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from retemper.engine.class_report import Result
from retemper.engine.report.figures import (
    BARS_UP_TO,
    HALO,
    INK,
    LABEL,
    MUTED,
    Look,
    as_plot,
    class_rows,
    end_labels,
    new_figure,
)
from retemper.engine.report.page import Cell, Table
from retemper.engine.report.read import attack_title, weakest_first
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.words import PERCENT, at_most, percent
from retemper.text import shorten, shorten_all, text_width

THIN = 0.065  # inches: upright bars below it lie down instead


def classwise_blocks(runs: RunSet) -> list[Any]:
    """Return a figure and a table for each attack, the reference attack first."""
    caption = "one bar a run, 95 % whiskers; outline and number mark each run's weakest class. Lines across: averages."
    if len(runs.classes) > BARS_UP_TO:
        caption = "classes sorted by accuracy, each run in its own order; bands are 95 % intervals. Flat: averages."
    blocks = []
    for attack in runs.in_order:
        stem = "classwise_" + (re.sub(r"[^a-z0-9]+", "_", attack.lower()).strip("_") or "attack")
        draw = partial(classwise, runs, attack)
        blocks.append(as_plot(stem, f"{attack_title(attack)}: {caption}", runs.said(attack), draw))
        blocks.append(_table(runs, attack))
    return blocks


def _table(runs: RunSet, attack: str) -> Table:
    """Return the table of one attack, a row for each class: in the data set's order, or the weakest first of many."""
    results, many, rows = runs.results(attack), len(runs.classes) > BARS_UP_TO, []
    mean_K = np.mean([np.nan_to_num(r.report.accuracy, nan=math.inf) for r in results.values()], axis=0)
    for k in weakest_first(mean_K) if many else range(len(runs.classes)):
        cells = [Cell(runs.names[k], runs.undrawn.get(runs.names[k], ""))]
        for result in results.values():
            value, weakest = result.report.accuracy[k], result.report.accuracy[k] == result.report.worst
            text, ends = at_most(result) + PERCENT.text(value), PERCENT.between(result.interval["class"][k])
            fill = value if math.isfinite(value) else 0.0
            cells.append(Cell(text + " ▼" * weakest, detail=ends, strong=weakest, fill=fill))
        counts = sorted({result.report.count[k] for result in results.values()})
        rows.append([*cells, Cell(" or ".join(map(str, counts)))])
    caption = "Correct, %, with 95 % intervals. ▼ weakest class of the run." + " Weakest first." * many
    head, title = ["class", *results, "images"], f"{attack_title(attack)} in numbers"
    return Table(caption, head, [("", rows)], title, attack == runs.reference)


def classwise(runs: RunSet, attack: str, narrow: bool) -> Figure:
    """Draw every class under one attack: bars, upright or lying, or steps where they are many; weakest are marked."""
    results, bars = runs.results(attack), len(runs.classes) <= BARS_UP_TO
    lying = bars and _inches(runs, 0.82 / len(results), narrow) < THIN
    columns = 2 if len(results) > 3 and not narrow else 1
    height = 0.8 + len(runs.classes) * (0.12 * len(results) + 0.1) if lying else 3.6 if narrow else 3.9
    keys = [_key(r, runs, runs.look[name], narrow) for name, r in results.items()]
    lines = sum(1 + str(key.get_label()).count("\n") for key in keys)
    figure = new_figure(narrow, height + 0.2 * -(-lines // columns))
    axes = figure.add_subplot()
    averages = {name: 100 * result.report.average for name, result in results.items()}
    for name, average in averages.items():
        line = axes.axvline if lying else axes.axhline
        line(average, color=runs.look[name].line, linestyle=runs.look[name].dash, linewidth=1.2, zorder=3.5)
    figure.legend(handles=keys, loc="outside upper left", ncols=columns, handlelength=1.6, labelspacing=0.35)
    if lying:
        _lying_bars(axes, runs, results)
        return figure
    (_bars if bars else _steps)(axes, runs, results, narrow)
    axes.set_ylabel("correct, %")
    axes.set_ylim(0, _ceiling(results))
    axes.yaxis.grid(True)
    labels = [(v, f"{'≤' * results[n].upper_bound}{v:.0f}", runs.look[n].ink, True) for n, v in averages.items()]
    end_labels(figure, [(axes, labels)], 9.5)
    return figure


def _inches(runs: RunSet, width: float, narrow: bool) -> float:
    """Return the width in inches of an upright bar, given in parts of the room for a class."""
    return width * (2.9 if narrow else 8.9) / len(runs.classes)


def _heights(result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (K,) accuracies and (K, 2) intervals in percent, and (K,) bool: where both are numbers."""
    height_K, ends_K2 = 100 * np.array(result.report.accuracy), 100 * np.array(result.interval["class"], dtype=float)
    return height_K, ends_K2, np.isfinite(height_K) & np.isfinite(ends_K2).all(axis=1)


def _lying_bars(axes: Axes, runs: RunSet, results: Mapping[str, Result]) -> None:
    """Draw a group of bars for each class, from the top down: for when upright ones would be hairlines."""
    width = 0.86 / len(results)
    for i, (name, result) in enumerate(results.items()):
        style, k = runs.look[name], result.report.worst_class
        at = np.arange(len(runs.classes)) + (i - (len(results) - 1) / 2) * width
        length, ends_K2, known = _heights(result)
        axes.barh(at, length, width, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0.6)
        axes.hlines(at[known], *ends_K2[known].T, color=INK, linewidth=0.9, alpha=0.75, zorder=5)
        if k >= 0:
            axes.barh(at[k], length[k], width, fill=False, edgecolor=INK, linewidth=1.3, zorder=4)
            text = f"◀ {'≤' * result.upper_bound}{length[k]:.0f}"
            where = {"textcoords": "offset points", "va": "center", "zorder": 6, "fontsize": 8.5, "weight": "bold"}
            axes.annotate(text, (ends_K2[k, 1], at[k]), (3, 0), color=style.ink, **where)
    class_rows(axes, runs.drawn)
    axes.set_xlim(0, 100 if _ceiling(results) > 90 else _ceiling(results) + 8)
    axes.set_xlabel("correct, %")


def _bars(axes: Axes, runs: RunSet, results: Mapping[str, Result], narrow: bool) -> None:
    width = 0.82 / len(results)
    x, inches = np.arange(len(runs.classes)), _inches(runs, width, narrow)
    levels = math.ceil(0.27 / inches)  # a number is nearly that wide
    shared = [result.report.worst_class for result in results.values()]
    for i, (name, result) in enumerate(results.items()):
        style, k = runs.look[name], result.report.worst_class
        at = x + (i - (len(results) - 1) / 2) * width
        height, ends_K2, known = _heights(result)
        axes.bar(at, height, width, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0.7)
        axes.vlines(at[known], *ends_K2[known].T, color=INK, linewidth=0.9, alpha=0.75, zorder=5)
        if k >= 0:
            axes.bar(at[k], height[k], width, fill=False, edgecolor=INK, linewidth=min(1.9, 16 * inches), zorder=4)
            near = results.values() if levels > 1 else [result]  # that its number could touch
            top = 100 * max(r.interval["class"][k][1] for r in near if r.report.worst_class == k)
            crowded = min(levels, shared.count(k)) > 3  # no room for numbers: the key has them
            text = "▼" if crowded else f"{'≤' * result.upper_bound}{height[k]:.0f}\n▼"
            above = 0 if crowded else shared[:i].count(k) % levels  # clear of a neighbour's number
            style = {"color": style.ink, "weight": "bold", "linespacing": 1.0, "zorder": 6, "bbox": HALO}
            where = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(text, (at[k], top), (0, 3 + 25 * above), **where, **style)
    names = shorten_all(runs.drawn, 14)
    slanted = max(map(text_width, names)) * len(names) > (34 if narrow else 110)
    axes.set_xticks(x, names, rotation=90 if slanted else 0)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_xlim(-0.55, len(runs.classes) - 0.45)


def _steps(axes: Axes, runs: RunSet, results: Mapping[str, Result], narrow: bool) -> None:
    """Draw a falling line of steps for each run, over its own order of the classes."""
    n = len(runs.classes)
    tenth = -(-n // 10)
    axes.axvspan(0, tenth, color="#eef0f3", zorder=0)
    axes.text(tenth + n / 100, 0.02, "worst tenth", transform=axes.get_xaxis_transform(), color=MUTED, fontsize=9)
    for name, result in results.items():
        style, order = runs.look[name], weakest_first(result.report.accuracy)
        height, ends_K2, _ = (of_K[order] for of_K in _heights(result))
        axes.stairs(height, np.arange(n + 1), color=style.line, linestyle=style.dash, linewidth=2, baseline=None)
        if len(results) <= 3:
            low, high = np.append(ends_K2, ends_K2[-1:], axis=0).T
            axes.fill_between(np.arange(n + 1), low, high, color=style.colour, alpha=0.13, linewidth=0, step="post")
        axes.plot(0.5, height[0], marker="v", color=style.line, markersize=7, clip_on=False, zorder=5)
    axes.set_xlim(0, n)
    axes.set_xlabel("classes, each run's own order" if narrow else "classes, from each run's weakest to its strongest")


def _ceiling(results: Mapping[str, Result]) -> float:
    """Return the end of the axis, above all intervals."""
    tops = [pair[1] for result in results.values() for pair in result.interval["class"]]
    return 100 * min(1.03, max(0.1, 1.08 * max([top for top in tops if math.isfinite(top)], default=1.0) + 0.01))


def _key(result: Result, runs: RunSet, style: Look, narrow: bool) -> Patch | Line2D:
    """Return the run's line of the legend, or two lines where one would be too wide."""
    report, most, many = result.report, at_most(result), len(runs.classes) > BARS_UP_TO
    parts = [f"{shorten(style.name, 12 if narrow else 16)}: average {most}{percent(report.average)}"]
    if many:
        parts.append(f"worst tenth {most}{percent(report.worst_tenth)}")
    elif report.worst_class >= 0:
        parts.append(f"weakest {shorten(runs.drawn[report.worst_class], 16)} at {most}{percent(report.worst)}")
    label = (";\n" if narrow and text_width("; ".join(parts)) > LABEL else "; ").join(parts)
    if many:
        return Line2D([], [], color=style.line, linestyle=style.dash, label=label)
    return Patch(facecolor=style.colour, hatch=style.hatch, edgecolor="white", label=label)
