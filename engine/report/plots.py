"""The figures of a report. Each function takes plain values, opens no file, touches no global state of matplotlib.

Dimension key: K classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from retemper.engine.evaluation.class_statistics import Result
from retemper.engine.report.plot_style import (
    ALERT,
    DASH,
    DOT,
    FAINT,
    INK,
    MUTED,
    SOLID,
    EndLabel,
    Look,
    end_labels,
    epoch_axis,
    new_figure,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS_UP_TO = 20  # classes; beyond it bars are too thin to read and the classes are drawn sorted


@dataclass(frozen=True)
class StatePanel:
    """values: (epochs, K); weakest: classes to stand out, weakest first."""

    run: str
    key: str
    epoch: list[int]
    values: np.ndarray
    weakest: list[int]


def classwise(
    results: Mapping[str, Result], classes: Sequence[str], look: Mapping[str, Look], narrow: bool
) -> "Figure":
    """Every class under one attack: bars, or sorted steps for many classes. The weakest class of each run is marked."""
    bars = len(classes) <= BARS_UP_TO
    columns = 2 if len(results) > 3 and not narrow else 1
    figure = new_figure(narrow, (3.6 if narrow else 3.9) + 0.2 * -(-len(results) // columns))
    axes = figure.add_subplot()
    (_bars if bars else _steps)(axes, results, classes, look, narrow)
    averages = {name: 100 * result.report.average for name, result in results.items()}
    for name, average in averages.items():
        axes.axhline(average, color=look[name].line, linestyle=look[name].dash, linewidth=1.2, zorder=3.5)
    axes.set_ylabel("correct, %")
    axes.set_ylim(0, _ceiling(results))
    axes.yaxis.grid(True)
    handles = [_key(name, result, classes, look[name], bars) for name, result in results.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=1.6, labelspacing=0.35)
    end_labels(figure, [(axes, [(v, f"{v:.0f}", look[n].ink, True) for n, v in averages.items()])], 9.5)
    return figure


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
            _flag(axes, at[k], top, f"{height[k]:.0f}\n▼", style.ink, flagged.get(k, 0) % levels)
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


def class_state(panels: Sequence[StatePanel], classes: Sequence[str], narrow: bool) -> "Figure":
    """What a method holds for each class, epoch by epoch: one panel a run and name, the weakest classes on top."""
    columns = 1 if narrow or len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure = new_figure(narrow, rows * (2.9 if len(classes) <= 12 else 3.6))
    grid = figure.subplots(rows, columns, squeeze=False)
    limits = {key: _padded([p.values for p in panels if p.key == key]) for key in {p.key for p in panels}}
    labels = []
    for axes, panel in zip(grid.flat, panels, strict=False):
        labels.append((axes, _state_panel(axes, panel, classes)))
        axes.set_ylim(*limits[panel.key])
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    end_labels(figure, labels, 8.5)
    return figure


def _state_panel(axes: "Axes", panel: StatePanel, classes: Sequence[str]) -> list[EndLabel]:
    labels = []
    for k in [k for k in range(len(classes)) if k not in panel.weakest] + panel.weakest[::-1]:
        rank = panel.weakest.index(k) if k in panel.weakest else -1
        colour, width = (ALERT, 2.6) if rank == 0 else (INK, 1.7) if rank > 0 else (FAINT, 1.1)
        dash = (SOLID, DASH, DOT)[rank % 3] if rank >= 0 else SOLID
        mark = "o" if len(panel.epoch) == 1 else ""
        axes.plot(panel.epoch, panel.values[:, k], color=colour, linewidth=width, linestyle=dash, marker=mark)
        if rank >= 0 or len(classes) <= BARS_UP_TO:
            labels.append((panel.values[-1, k], shorten(classes[k], 12), colour if rank >= 0 else MUTED, rank >= 0))
    axes.set_title(f"{shorten(panel.run, 20)}: {panel.key.replace('_', ' ')}")
    epoch_axis(axes, panel.epoch)
    axes.yaxis.grid(True)
    return labels


def curves(series: Mapping[str, Mapping[str, Any]], look: Mapping[str, Look], where: str, narrow: bool) -> "Figure":
    """Loss, and average and weakest-class robust accuracy, per epoch.

    Args:
        series: run -> {"loss", "average", "worst": (epochs, values), "drops": epochs that begin at a lower rate}.
        where: which images the accuracies are from.
    """
    names = {"loss": "Loss", "average": f"Average, {where}", "worst": f"Weakest class, {where}"}
    names = {key: title for key, title in names.items() if any(len(s[key][0]) for s in series.values())}
    shape = (len(names), 1) if narrow else (1, len(names))
    figure = new_figure(narrow, 2.5 * len(names) if narrow else 3.3)
    labels = []
    for axes, (key, title) in zip(figure.subplots(*shape, squeeze=False).flat, names.items(), strict=True):
        epochs = sorted({epoch for values in series.values() for epoch in values[key][0]})
        scale = 1 if key == "loss" else 100
        lines = {run: (values[key][0], [scale * v for v in values[key][1]]) for run, values in series.items()}
        labels.append((axes, [_curve(axes, run, line, look[run], epochs) for run, line in lines.items()]))
        axes.set_title(title)
        axes.set_ylabel("" if key == "loss" else "correct, %")
        axes.yaxis.grid(True)
        epoch_axis(axes, epochs)
        _mark_rate_drops(axes, {run: values["drops"] for run, values in series.items()}, look, named=key == "loss")
    end_labels(figure, labels, 9)
    return figure


def _curve(axes: "Axes", run: str, line: tuple[list[int], list[float]], style: Look, epochs: Sequence[int]) -> EndLabel:
    epoch, value = line
    if not epoch:
        return math.nan, "", "", False
    mark = style.marker if len(epochs) < 16 else ""
    dash, width = (style.dash, 2) if len(epochs) < 60 else (SOLID, 1.3)  # on a jagged line dashes are noise
    axes.plot(epoch, value, color=style.line, linestyle=dash, linewidth=width, marker=mark, clip_on=False)
    if epoch[-1] < epochs[-1]:  # a shorter run: a thread to its name
        axes.plot([epoch[-1], epochs[-1]], [value[-1]] * 2, color=FAINT, linewidth=0.9, zorder=1)
    return value[-1], shorten(run, 14), style.ink, True


def summary(results: Mapping[str, Result], look: Mapping[str, Look], narrow: bool) -> "Figure":
    """Average against weakest class, with 95 % lines: right is stronger, up is fairer."""
    figure = new_figure(narrow, 4.0 if narrow else 4.6, 4.0 if narrow else 6.8)
    axes = figure.add_subplot()
    for name, result in results.items():
        style, report = look[name], result.report
        x, y = 100 * report.average, 100 * report.worst
        for across, pair in ((True, "average"), (False, "worst")):
            ends = [100 * v for v in result.interval[pair]]
            axes.plot(*((ends, [y, y]) if across else ([x, x], ends)), color=style.line, linewidth=1.4)
        axes.plot(x, y, style.marker, color=style.colour, markeredgecolor=INK, markersize=10, zorder=3)
        axes.annotate(
            shorten(name, 18),
            (x, y),
            (9, 7),
            textcoords="offset points",
            color=style.ink,
            weight="bold",
            bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.8},
            zorder=4,
        )
    axes.set_xlabel("average over all images, %")
    axes.set_ylabel("weakest class, %")
    axes.grid(True)
    return figure


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

    report = result.report
    label = f"{shorten(name, 16)}: average {100 * report.average:.0f} %"
    if not bars:
        label += f"; worst tenth {100 * report.worst_tenth:.0f} %"
    elif report.worst_class >= 0:
        label += f"; weakest {shorten(classes[report.worst_class], 12)} at {100 * report.worst:.0f} %"
    if bars:
        return Patch(facecolor=style.colour, hatch=style.hatch, edgecolor="white", label=label)
    return Line2D([], [], color=style.line, linestyle=style.dash, label=label)


def _padded(values: Sequence[np.ndarray]) -> tuple[float, float]:
    known = np.concatenate([array[np.isfinite(array)] for array in values])
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    return float(low - pad), float(high + pad)


def _mark_rate_drops(axes: "Axes", drops: Mapping[str, Sequence[int]], look: Mapping[str, Look], named: bool) -> None:
    """A dotted line where an epoch begins at a lower rate: in the run's colour, or grey if it is so in several."""
    for epoch in sorted({epoch for of_run in drops.values() for epoch in of_run}):
        runs = [run for run, of_run in drops.items() if epoch in of_run]
        colour = look[runs[0]].line if len(runs) == 1 else MUTED
        axes.axvline(epoch, color=colour, linewidth=1, linestyle=DOT, zorder=0)
    first = min((min(of_run) for of_run in drops.values() if of_run), default=None)
    if first is not None and named:
        style = {"transform": axes.get_xaxis_transform(), "color": MUTED, "fontsize": 8.5}
        axes.text(first, 1.0, "lr drops ", ha="right", va="top", **style)
