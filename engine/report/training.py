"""The sections of what was recorded while training: class state, and loss and accuracies, over the epochs.

Dimension key: K classes, E epochs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retemper.engine.report.figures import (
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
    as_plot,
    end_labels,
    epoch_axis,
    limits,
    new_figure,
    panels,
)
from retemper.engine.report.page import Plot
from retemper.engine.report.read import RunRecord, as_dict, as_number, attack_title, weakest_first
from retemper.engine.report.run_set import RunSet
from retemper.text import shorten, shorten_all

LOG_FROM = 300  # times the least loss: beyond it, all but the largest would lie on one line
LR_DROP = 0.6  # a rate below this part of the epoch before is a drop, not a smooth decay


@dataclass(frozen=True)
class ClassState:
    """The numbers that a method held for each class. values: (E, K); weakest: the run's weakest classes in order."""

    run: str
    key: str
    epochs: list[int]
    values: np.ndarray
    weakest: list[int]

    @property
    def title(self) -> str:
        return self.key.replace("_", " ")


def state_blocks(runs: RunSet) -> list[Plot]:
    """Return the figure of temperatures, class weights and whatever else methods hold for each class."""
    states = [s for run in runs.runs if run.classes == runs.classes for s in _class_states(run, runs.reference)]
    if not states:
        return []
    said = [
        f"{s.run}, {s.title}: first epoch {_range(s.values[0])}, last epoch {_range(s.values[-1])}"
        + "".join(f", weakest class {runs.class_name(k)} at {s.values[-1, k]:.2f}" for k in s.weakest[:1])
        for s in states
    ]
    caption = "One line a class."
    if any(state.weakest for state in states):
        caption += f" Thick and red: the run's weakest class under {attack_title(runs.reference)};"
        caption += " dashed and dotted: the next two."
    return [as_plot("class_state", caption, said, partial(class_state, states, runs.drawn, runs.look))]


def _class_states(run: RunRecord, attack: str) -> list[ClassState]:
    """Find the lists of K numbers in a run's metrics that are neither its losses nor its accuracies."""
    size, rows = len(run.classes), {}
    for row in run.metrics:
        for key, value in row.items():
            if not key.startswith(("class_loss", "class_accuracy")) and isinstance(value, list) and len(value) == size:
                rows.setdefault(key, []).append((int(row["epoch"]), [as_number(v) for v in value]))
    weakest = []
    if attack in run.results:
        weakest = weakest_first(run.results[attack].report.accuracy)[: min(3, -(-size // 3))]
    states = [
        ClassState(run.label, key, [epoch for epoch, _ in of_key], np.array([v for _, v in of_key]), weakest)
        for key, of_key in rows.items()
    ]
    return [state for state in states if np.isfinite(state.values).any()]


def _range(value_K: np.ndarray) -> str:
    known = value_K[np.isfinite(value_K)]
    return f"{known.min():.2f}..{known.max():.2f}" if len(known) else "nothing"


def class_state(states: Sequence[ClassState], classes: Sequence[str], look: Mapping[str, Look], narrow: bool) -> Figure:
    """Draw one panel for each run and name, a line for each class, the weakest classes on top."""
    columns = 1 if narrow or len(states) == 1 else 2
    rows = -(-len(states) // columns)
    figure = new_figure(narrow, rows * (2.9 if len(classes) <= 12 else 3.6))
    labels = []
    for axes, state in zip(panels(figure, len(states), columns), states, strict=True):
        labels.append((axes, _state_panel(axes, state, shorten_all(classes, 12))))
        axes.set_title(f"{shorten(look[state.run].name, 20)}: {shorten(state.title, 20)}")
        axes.set_ylim(*_limits([s.values for s in states if s.key == state.key]))
    end_labels(figure, labels, 8.5)
    return figure


def _state_panel(axes: Axes, state: ClassState, classes: Sequence[str]) -> list[EndLabel]:
    labels = []
    for k in [k for k in range(len(classes)) if k not in state.weakest] + state.weakest[::-1]:
        rank = state.weakest.index(k) if k in state.weakest else -1
        colour, width = (ALERT, 2.6) if rank == 0 else (INK, 1.7) if rank > 0 else (FAINT, 1.1)
        dash = (SOLID, DASH, DOT)[rank % 3] if rank >= 0 else SOLID
        mark = "o" if len(state.epochs) == 1 else ""
        axes.plot(state.epochs, state.values[:, k], color=colour, linewidth=width, linestyle=dash, marker=mark)
        if rank >= 0 or len(classes) <= BARS_UP_TO:
            labels.append((state.values[-1, k], classes[k], colour if rank >= 0 else MUTED, rank >= 0))
    epoch_axis(axes, state.epochs)
    axes.yaxis.grid(True)
    return labels


def _limits(values: Sequence[np.ndarray]) -> tuple[float, float]:
    known = np.concatenate([array[np.isfinite(array)] for array in values])
    low, high = known.min(), known.max()
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    return float(low - pad), float(high + pad)


Line = tuple[list[int], list[float]]  # epochs, values


def training_blocks(runs: RunSet) -> list[Plot]:
    """Return the figure of the losses, and of the robust accuracies that were measured while training."""
    trained = [run for run in runs.runs if run.metrics]
    held_out = any("holdout" in row for run in trained for row in run.metrics)
    curves = {run.label: _curves(run.metrics, held_out) for run in trained}
    if not any(of_run["loss"][0] or of_run["average"][0] for of_run in curves.values()):
        return []
    losses = {name: of_run["loss"][1] for name, of_run in curves.items() if of_run["loss"][1]}
    said = [f"{name}: loss {values[0]:.3g} to {values[-1]:.3g}" for name, values in losses.items()]
    on_test = [run.recipe.get("select_on") == "test" for run in runs.runs]
    which = "test" if all(on_test) else "held-out or test" if any(on_test) else "held-out training"
    which = f"{which} images, by which the best epoch is chosen" if held_out else "the training batches"
    caption = f"Losses of different methods have different scales. Robust accuracies are those of {which}."
    drops = {
        run.label: _rate_drops(run.metrics) for run in trained if run.recipe.get("lr_schedule", "steps") == "steps"
    }
    draw = partial(training, curves, drops, runs.look, "held out" if held_out else "training")
    return [as_plot("training", f"{caption} Dotted: the learning rate drops.", said, draw)]


def _curves(metrics: list[dict[str, Any]], held_out: bool) -> dict[str, Line]:
    """Return the loss, and the accuracies of held-out images or else of the training batches."""
    lines: dict[str, Line] = {"loss": ([], []), "average": ([], []), "worst": ([], [])}
    for row in metrics:
        scores = as_dict(row.get("holdout"))
        if not held_out and isinstance(row.get("class_accuracy"), list):
            known = [v for v in map(as_number, row["class_accuracy"]) if math.isfinite(v)]
            scores = {"average": sum(known) / len(known), "worst": min(known)} if known else {}
        for name, (epochs, values) in lines.items():
            value = as_number((row if name == "loss" else scores).get(name))
            if math.isfinite(value):
                epochs.append(int(row["epoch"]))
                values.append(value)
    return lines


def _rate_drops(metrics: list[dict[str, Any]]) -> list[int]:
    """Return the epochs that begin at a lower learning rate."""
    rates = [(int(row["epoch"]), as_number(row.get("lr"))) for row in metrics]
    return [epoch for (_, before), (epoch, after) in pairwise(rates) if after < LR_DROP * before]


def training(
    curves: Mapping[str, Mapping[str, Line]],
    drops: Mapping[str, Sequence[int]],
    look: Mapping[str, Look],
    where: str,
    narrow: bool,
) -> Figure:
    """Draw the loss, and the average and weakest-class robust accuracy on the images of `where`, for each epoch."""
    titles = {"loss": "Loss", "average": f"Average, {where}", "worst": f"Weakest class, {where}"}
    titles = {name: title for name, title in titles.items() if any(of_run[name][0] for of_run in curves.values())}
    figure = new_figure(narrow, 2.5 * len(titles) if narrow else 3.3)
    labels = []
    grid = panels(figure, len(titles), 1 if narrow else len(titles))
    for axes, (name, title) in zip(grid, titles.items(), strict=True):
        lines = {run: of_run[name] for run, of_run in curves.items() if of_run[name][0]}
        epochs = sorted({epoch for line in lines.values() for epoch in line[0]})
        scale = 1 if name == "loss" else 100
        labels.append((axes, [_curve(axes, line, scale, look[run], epochs) for run, line in lines.items()]))
        values = [scale * value for _, of_run in lines.values() for value in of_run]
        if name != "loss":
            axes.set_ylabel("correct, %")
            axes.set_ylim(*limits(values, 10))
        elif min(values) > 0 and max(values) > LOG_FROM * min(values):
            title += ", log scale"
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
        axes.set_title(title)
        axes.yaxis.grid(True)
        epoch_axis(axes, epochs)
        _mark_rate_drops(axes, drops, look, named=name == "loss")
    end_labels(figure, labels, 9)
    return figure


def _curve(axes: Axes, line: Line, scale: int, style: Look, epochs: Sequence[int]) -> EndLabel:
    epoch, value = line[0], [scale * v for v in line[1]]
    mark = style.marker if len(epochs) < 16 else ""
    dash, width = (style.dash, 2) if len(epochs) < 60 else (SOLID, 1.3)  # on a jagged line dashes are noise
    axes.plot(epoch, value, color=style.line, linestyle=dash, linewidth=width, marker=mark, clip_on=False)
    if epoch[-1] < epochs[-1]:  # a shorter run: a thread to its name
        axes.plot([epoch[-1], epochs[-1]], [value[-1]] * 2, color=FAINT, linewidth=0.9, zorder=1)
    return value[-1], shorten(style.name, 14), style.ink, True


def _mark_rate_drops(axes: Axes, drops: Mapping[str, Sequence[int]], look: Mapping[str, Look], named: bool) -> None:
    """Draw a dotted line where an epoch begins at a lower rate: in the run's colour, or grey if several runs do."""
    found = sorted({epoch for of_run in drops.values() for epoch in of_run})
    for epoch in found:
        runs = [run for run, of_run in drops.items() if epoch in of_run]
        axes.axvline(epoch, color=look[runs[0]].line if len(runs) == 1 else MUTED, linewidth=1, linestyle=DOT, zorder=0)
    if found and named:
        style = {"transform": axes.get_xaxis_transform(), "color": MUTED, "fontsize": 8.5}
        axes.text(found[0], 1.0, "lr drops ", ha="right", va="top", **style)
