"""The section of what `retemper evaluate --check` found: whether the numbers can be trusted."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from retemper.engine.report.figures import Look, as_plot, end_labels, new_figure
from retemper.engine.report.page import Cell, Plot, Table, Text
from retemper.engine.report.read import RunRecord, as_dict, as_number
from retemper.engine.report.words import pixels
from retemper.text import shorten

Curve = list[tuple[float, float]]  # radius in pixel units, accuracy


def check_warnings(run: RunRecord) -> list[Text]:
    """Return the warnings of the attacks themselves, and the verdict of the checks if it is against the numbers."""
    out = [Text(f"{run.label}: {flag}") for flag in run.flags]
    if run.checks and run.checks.get("verdict") != "ok":
        raised = " ".join(str(flag.get("text")) for flag in _flags(run).values() if flag.get("raised"))
        said = "gradients are masked or misleading, its robust accuracies are not to be trusted."
        out.append(Text(f"{run.label} is suspect: {said} {raised}"))
    return out


def check_blocks(runs: Sequence[RunRecord], look: Mapping[str, Look]) -> list[Any]:
    """Return the table of the checks, the accuracy as the radius grows, and the command where checks were not run."""
    checked = [run for run in runs if _flags(run)]
    table = [_flag_table(checked)] if checked else []
    unchecked = [run for run in runs if run not in checked and run.norm == "linf"]  # --check knows no other norm
    missing = [Text(f"{r.label}: the checks were not run. To run them:", f"{r.evaluate} --check") for r in unchecked]
    return [*table, *_radius_plot(checked, look), *missing]


def _flags(run: RunRecord) -> dict[str, dict[str, Any]]:
    """Return the checks by name; each says whether it raised a flag."""
    flags = run.checks.get("flags")
    named = [flag for flag in flags if isinstance(flag, dict) and "name" in flag] if isinstance(flags, list) else []
    return {str(flag["name"]): flag for flag in named}


def _flag_table(runs: Sequence[RunRecord]) -> Table:
    of_run = [_flags(run) for run in runs]
    verdicts = [str(run.checks.get("verdict")) for run in runs]
    rows = [[Cell("verdict"), *(Cell(verdict, strong=verdict != "ok") for verdict in verdicts)]]
    names = dict.fromkeys(name for flags in of_run for name in flags)
    for name in sorted(names, key=lambda name: not any(flags.get(name, {}).get("raised") for flags in of_run)):
        rows.append([Cell(name.replace("_", " ")), *(_flag_cell(flags.get(name)) for flags in of_run)])
    images = sorted({str(run.checks["images"]) for run in runs if "images" in run.checks})
    caption = "Signs of masked gradients and of a broken evaluation; what is raised comes first."
    caption += f" Looked for on {' or '.join(images)} images." if images else ""
    return Table(caption, ["check", *(run.label for run in runs)], [("", rows)])


def _flag_cell(flag: Mapping[str, Any] | None) -> Cell:
    if flag is None:
        return Cell("not run")
    value = as_number(flag.get("value"))
    measured = f"{value:.3g}" if math.isfinite(value) else ""
    return Cell("raised", measured, str(flag.get("text", "")), True) if flag.get("raised") else Cell("ok", measured)


def _radius_plot(runs: Sequence[RunRecord], look: Mapping[str, Look]) -> list[Plot]:
    curves: dict[str, Curve] = {}
    for run in runs:
        rungs = as_dict(run.checks.get("ladder")).get("radius")
        rungs = map(as_dict, rungs) if isinstance(rungs, list) else []
        points = [(as_number(rung.get("eps")), as_number(rung.get("accuracy"))) for rung in rungs]
        points = sorted(point for point in points if all(map(math.isfinite, point)) and point[0] >= 0)
        if len(points) > 1:
            curves[run.label] = points
    said = [
        f"{name}: from {100 * first:.0f} % at {pixels(low)} to {100 * last:.0f} % at {pixels(high)}"
        for name, ((low, first), *_, (high, last)) in curves.items()
    ]
    caption = "PGD-20 as the radius grows: it must fall, and end at 0 %, for at eps 1 every image can become any other."
    return [as_plot("ladder", caption, said, partial(radius_curves, curves, look))] if curves else []


def radius_curves(curves: Mapping[str, Curve], look: Mapping[str, Look], narrow: bool) -> Figure:
    """Draw accuracy over the radius. The axis is linear in the root of the radius, to spread the small ones."""
    figure = new_figure(narrow, 3.2, 4.0 if narrow else 6.8)
    axes = figure.add_subplot()
    labels = []
    for name, points in curves.items():
        style = look[name]
        at, height = [math.sqrt(eps) for eps, _ in points], [100 * accuracy for _, accuracy in points]
        axes.plot(at, height, color=style.line, linestyle=style.dash, marker=style.marker, clip_on=False)
        labels.append((height[-1], shorten(style.name, 18), style.ink, True))
    last = max(points[-1][0] for points in curves.values())
    ticks = [eps for eps in (0, 0.03, 0.1, 0.3, 0.6, 1) if eps <= last]
    axes.set_xticks([math.sqrt(eps) for eps in ticks], [f"{eps:g}" for eps in ticks])
    axes.set_xlabel("eps, of pixels in [0, 1]")
    axes.set_ylabel("correct, %")
    axes.set_ylim(bottom=0)
    axes.yaxis.grid(True)
    end_labels(figure, [(axes, labels)], 9)
    return figure
