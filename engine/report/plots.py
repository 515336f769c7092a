"""The figures of a report. Each function takes plain values, opens no file, touches no global state of matplotlib.

Dimension key: K classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from retemper.engine.class_report import Result
from retemper.engine.report.plot_style import (
    ALERT,
    BARS_UP_TO,
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


LABEL = np.array((0.16, 0.07))  # about a label's width and height, in parts of the axes


@dataclass(frozen=True)
class StatePanel:
    """values: (epochs, K); weakest: classes to stand out, weakest first."""

    run: str
    key: str
    epoch: list[int]
    values: np.ndarray
    weakest: list[int]


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
    points = {name: (100 * r.report.average, 100 * r.report.worst) for name, r in results.items()}
    for name, (x, y) in points.items():
        style, result = look[name], results[name]
        for across, pair in ((True, "average"), (False, "worst")):
            ends = [100 * v for v in result.interval[pair]]
            axes.plot(*((ends, [y, y]) if across else ([x, x], ends)), color=style.line, linewidth=1.4)
        axes.plot(x, y, style.marker, color=style.colour, markeredgecolor=INK, markersize=10, zorder=3)
    axes.autoscale_view()  # settles the limits that are asked for here
    at_N2 = axes.transLimits.transform(list(points.values()))
    for name, corner in zip(points, _free_corners(at_N2), strict=True):
        axes.annotate(
            shorten(name, 18) + " ≤" * results[name].upper_bound,
            points[name],
            (9 * corner[0], 10 * corner[1]),
            textcoords="offset points",
            ha="left" if corner[0] > 0 else "right",
            va="center",
            color=look[name].ink,
            weight="bold",
            bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.8},
            zorder=4,
        )
    axes.set_xlabel("average over all images, %")
    axes.set_ylabel("weakest class, %")
    axes.grid(True)
    return figure


def _free_corners(at_N2: np.ndarray) -> list[tuple[int, int]]:
    """For each point, in parts of the axes, the corner where a label is clear of the points and the labels so far."""
    labels, corners = [], []
    for i, point in enumerate(at_N2):
        taken = np.array([*np.delete(at_N2, i, axis=0), *labels, point + 9])  # the last: far away, never the nearest
        room = {}
        for corner in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            apart = np.abs(taken - point - np.array(corner) * LABEL / 2) / LABEL
            room[corner] = min(1.0, float(apart.max(axis=1).min()))  # 1: as far as a label is wide or high
        corners.append(max(room, key=room.__getitem__))
        labels.append(point + np.array(corners[-1]) * LABEL / 2)
    return corners


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
