"""The figure of every class under one attack. Dimension key: K classes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from retemper.engine.class_report import Result
from retemper.engine.report.plot_style import BARS_UP_TO, INK, MUTED, Look, end_labels, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THIN = 0.065  # inches: upright bars below it lie down instead


def classwise(
    results: Mapping[str, Result], classes: Sequence[str], look: Mapping[str, Look], narrow: bool
) -> "Figure":
    """Every class under one attack: bars, upright or lying, or sorted steps for many. Each run's weakest is marked."""
    bars = len(classes) <= BARS_UP_TO
    pitch = 0.82 * (2.9 if narrow else 8.9) / (len(classes) * len(results))  # inches of an upright bar
    lying = bars and pitch < THIN
    columns = 2 if len(results) > 3 and not narrow else 1
    height = 0.8 + len(classes) * (0.12 * len(results) + 0.1) if lying else 3.6 if narrow else 3.9
    figure = new_figure(narrow, height + 0.2 * -(-len(results) // columns))
    axes = figure.add_subplot()
    averages = {name: 100 * result.report.average for name, result in results.items()}
    for name, average in averages.items():
        line = axes.axvline if lying else axes.axhline
        line(average, color=look[name].line, linestyle=look[name].dash, linewidth=1.2, zorder=3.5)
    handles = [
        _key(shorten(name, 12 if narrow else 16), result, classes, look[name], bars) for name, result in results.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=1.6, labelspacing=0.35)
    if lying:
        _rows(axes, results, classes, look)
        return figure
    (_bars if bars else _steps)(axes, results, classes, look, narrow)
    axes.set_ylabel("correct, %")
    axes.set_ylim(0, _ceiling(results))
    axes.yaxis.grid(True)
    labels = [(v, f"{'≤' * results[n].upper_bound}{v:.0f}", look[n].ink, True) for n, v in averages.items()]
    end_labels(figure, [(axes, labels)], 9.5)
    return figure


def _rows(axes: "Axes", results: Mapping[str, Result], classes: Sequence[str], look: Mapping[str, Look]) -> None:
    """Lying bars, a group a class from the top down: for when upright ones would be hairlines."""
    width = 0.86 / len(results)
    for i, (name, result) in enumerate(results.items()):
        style, k = look[name], result.report.worst_class
        at = np.arange(len(classes)) + (i - (len(results) - 1) / 2) * width
        length, ends_K2 = 100 * np.array(result.report.accuracy), 100 * np.array(result.interval["class"], dtype=float)
        axes.barh(at, length, width, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0.6)
        known = np.isfinite(length) & np.isfinite(ends_K2).all(axis=1)
        axes.hlines(at[known], *ends_K2[known].T, color=INK, linewidth=0.9, alpha=0.75, zorder=5)
        if k >= 0:
            axes.barh(at[k], length[k], width, fill=False, edgecolor=INK, linewidth=1.3, zorder=4)
            text = f"◀ {'≤' * result.upper_bound}{length[k]:.0f}"
            where = {"textcoords": "offset points", "va": "center", "zorder": 6, "fontsize": 8.5, "weight": "bold"}
            axes.annotate(text, (ends_K2[k, 1], at[k]), (3, 0), color=style.ink, **where)
    axes.set_yticks(range(len(classes)), [shorten(name, 14) for name in classes])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_xlim(0, 100 if _ceiling(results) > 90 else _ceiling(results) + 8)
    axes.set_xlabel("correct, %")
    axes.xaxis.grid(True)


def _bars(
    axes: "Axes", results: Mapping[str, Result], classes: Sequence[str], look: Mapping[str, Look], narrow: bool
) -> None:
    width = 0.82 / len(results)
    x = np.arange(len(classes))
    inches = width / len(classes) * (2.9 if narrow else 8.9)
    levels = math.ceil(0.27 / inches)  # a number is nearly that wide
    flagged: dict[int, int] = {}  # class -> flags above it so far
    shared = [result.report.worst_class for result in results.values()]
    for i, (name, result) in enumerate(results.items()):
        report, style = result.report, look[name]
        at = x + (i - (len(results) - 1) / 2) * width
        height = 100 * np.array(report.accuracy)
        axes.bar(at, height, width, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0.7)
        _whiskers(axes, at, height, 100 * np.array(result.interval["class"], dtype=float))
        k = report.worst_class
        if k < 0:
            continue
        axes.bar(at[k], height[k], width, fill=False, edgecolor=INK, linewidth=min(1.9, 16 * inches), zorder=4)
        top = 100 * max(r.interval["class"][k][1] for r in results.values() if r.report.worst_class == k)
        if min(levels, shared.count(k)) > 3:  # no room: the key has the numbers
            _flag(axes, at[k], top, "▼", style.ink, 0)
        else:
            number = f"{'≤' * result.upper_bound}{height[k]:.0f}"
            _flag(axes, at[k], top, f"{number}\n▼", style.ink, flagged.get(k, 0) % levels)
        flagged[k] = flagged.get(k, 0) + 1
    names = [shorten(name, 14) for name in classes]
    slanted = max(map(len, names)) * len(names) > (34 if narrow else 110)
    axes.set_xticks(x, names, rotation=90 if slanted else 0)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_xlim(-0.55, len(classes) - 0.45)


def _steps(
    axes: "Axes", results: Mapping[str, Result], classes: Sequence[str], look: Mapping[str, Look], narrow: bool
) -> None:
    n = len(classes)
    tenth = -(-n // 10)
    axes.axvspan(0, tenth, color="#eef0f3", zorder=0)
    axes.text(tenth + n / 100, 0.02, "worst tenth", transform=axes.get_xaxis_transform(), color=MUTED, fontsize=9)
    for name, result in results.items():
        order = np.argsort(np.nan_to_num(result.report.accuracy, nan=math.inf), kind="stable")
        height = 100 * np.array(result.report.accuracy)[order]
        low, high = 100 * np.array(result.interval["class"], dtype=float)[order].T
        style = look[name]
        axes.stairs(height, np.arange(n + 1), color=style.line, linestyle=style.dash, linewidth=2, baseline=None)
        if len(results) <= 3:
            low, high = np.append(low, low[-1]), np.append(high, high[-1])
            axes.fill_between(np.arange(n + 1), low, high, color=style.colour, alpha=0.13, linewidth=0, step="post")
        axes.plot(0.5, height[0], marker="v", color=style.line, markersize=7, clip_on=False, zorder=5)
    axes.set_xlim(0, n)
    axes.set_xlabel("classes, each run's own order" if narrow else "classes, from each run's weakest to its strongest")


def _whiskers(axes: "Axes", at: np.ndarray, height: np.ndarray, interval_K2: np.ndarray) -> None:
    known = np.isfinite(height) & np.isfinite(interval_K2).all(axis=1)
    axes.vlines(at[known], *interval_K2[known].T, color=INK, linewidth=0.9, alpha=0.75, zorder=5)


def _flag(axes: "Axes", x: float, top: float, text: str, ink: str, level: int) -> None:
    """What stands above the weakest bar; `level` lifts it over a neighbour's."""
    axes.annotate(
        text,
        (x, top),
        (0, 3 + 25 * level),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=ink,
        weight="bold",
        linespacing=1.0,
        zorder=6,
        bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.8},
    )


def _ceiling(results: Mapping[str, Result]) -> float:
    tops = [pair[1] for result in results.values() for pair in result.interval["class"]]
    return 100 * min(1.03, 1.08 * max([top for top in tops if math.isfinite(top)], default=1.0) + 0.01)


def _key(name: str, result: Result, classes: Sequence[str], style: Look, bars: bool) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    report, most = result.report, "≤ " * result.upper_bound
    label = f"{name}: average {most}{100 * report.average:.0f} %"
    if not bars:
        label += f"; worst tenth {most}{100 * report.worst_tenth:.0f} %"
    elif report.worst_class >= 0:
        label += f"; weakest {shorten(classes[report.worst_class], 12)} at {most}{100 * report.worst:.0f} %"
    if bars:
        return Patch(facecolor=style.colour, hatch=style.hatch, edgecolor="white", label=label)
    return Line2D([], [], color=style.line, linestyle=style.dash, label=label)
