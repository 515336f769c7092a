"""Whether the numbers can be trusted: what `retemper evaluate --check` found, and what the attacks complained about."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from retemper.engine.report.page import Cell, Table, Text
from retemper.engine.report.plot_style import Look, as_plot, end_labels, new_figure, shorten
from retemper.engine.report.read import Run, as_dict, finite
from retemper.engine.report.words import pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_warnings(run: Run) -> list[Text]:
    """What stands at the head of the page: a verdict against the numbers, and the attacks' own flags."""
    out = [Text(f"{run.label}: {flag}") for flag in run.flags]
    if run.checks and run.checks.get("verdict") != "ok":
        raised = " ".join(str(flag.get("text")) for flag in _flags(run) if flag.get("raised"))
        said = "gradients are masked or misleading, its robust accuracies are not to be trusted."
        out.append(Text(f"{run.label} is suspect: {said} {raised}"))
    return out


def check_blocks(runs: Sequence[Run], look: Mapping[str, Look]) -> list[Any]:
    """A row a check, a column a run; the accuracy as the radius grows; the command where the checks were not run."""
    checked = [run for run in runs if _flags(run)]
    missing = [
        Text(
            f"{run.label}: the checks were not run. To run them:",
            f"retemper evaluate {run.target} --check",
        )
        for run in runs
        if run not in checked
    ]
    return [*([_flag_table(checked)] if checked else []), *_ladder(checked, look), *missing]


def _flags(run: Run) -> list[dict[str, Any]]:
    flags = run.checks.get("flags")
    return [flag for flag in flags if isinstance(flag, dict) and "name" in flag] if isinstance(flags, list) else []


def _flag_table(runs: Sequence[Run]) -> Table:
    of_run = [{str(flag["name"]): flag for flag in _flags(run)} for run in runs]
    rows = [
        [
            Cell("verdict"),
            *(Cell(str(run.checks.get("verdict")), strong=run.checks.get("verdict") != "ok") for run in runs),
        ]
    ]
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
    value = finite(flag.get("value"))
    measured = f"{value:.3g}" if math.isfinite(value) else ""
    return Cell("raised", measured, str(flag.get("text", "")), True) if flag.get("raised") else Cell("ok", measured)


def _ladder(runs: Sequence[Run], look: Mapping[str, Look]) -> list[Any]:
    lines = {}
    for run in runs:
        rungs = as_dict(run.checks.get("ladder")).get("radius")
        rungs = [as_dict(rung) for rung in rungs] if isinstance(rungs, list) else []
        points = [(finite(rung.get("eps")), finite(rung.get("accuracy"))) for rung in rungs]
        points = sorted(point for point in points if all(map(math.isfinite, point)) and point[0] >= 0)
        if len(points) > 1:
            lines[run.label] = points
    if not lines:
        return []
    said = [
        f"{name}: from {100 * p[0][1]:.0f} % at {pixels(p[0][0])} to {100 * p[-1][1]:.0f} % at {pixels(p[-1][0])}"
        for name, p in lines.items()
    ]
    caption = "PGD-20 as the radius grows: it must fall, and end at 0 %, for at eps 1 every image can become any other."
    return [as_plot("ladder", caption, said, partial(radius_curves, lines, look))]


def radius_curves(lines: Mapping[str, list[tuple[float, float]]], look: Mapping[str, Look], narrow: bool) -> "Figure":
    """Accuracy over the radius, which is drawn at its square root: the small radii are the interesting ones."""
    figure = new_figure(narrow, 3.2, 4.0 if narrow else 6.8)
    axes = figure.add_subplot()
    labels = []
    for name, points in lines.items():
        style = look[name]
        at, height = [math.sqrt(eps) for eps, _ in points], [100 * accuracy for _, accuracy in points]
        axes.plot(at, height, color=style.line, linestyle=style.dash, marker=style.marker)
        labels.append((height[-1], shorten(name, 18), style.ink, True))
    last = max(points[-1][0] for points in lines.values())
    ticks = [eps for eps in (0, 0.03, 0.1, 0.3, 0.6, 1) if eps <= last]
    axes.set_xticks([math.sqrt(eps) for eps in ticks], [f"{eps:g}" for eps in ticks])
    axes.set_xlabel("eps, of pixels in [0, 1]")
    axes.set_ylabel("correct, %")
    axes.set_ylim(bottom=0)
    axes.yaxis.grid(True)
    end_labels(figure, [(axes, labels)], 9)
    return figure
