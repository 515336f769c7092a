"""Every run against the first that is no teacher, image by image, where both were evaluated on the same images."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from retemper.engine.evaluation.compare import Comparison, Difference, compare
from retemper.engine.evaluation.verdicts import read_evaluated
from retemper.engine.report.page import Cell, Table, Text
from retemper.engine.report.plot_style import BARS_UP_TO, INK, Look, as_plot, new_figure, shorten
from retemper.engine.report.read import Run, attack_title
from retemper.engine.report.words import between
from retemper.errors import DataError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SURE = 0.05  # p below which a difference is called one


def paired_blocks(runs: Sequence[Run], attack: str, look: Mapping[str, Look]) -> list[Any]:
    """The table, the differences by class, and a line for each run that cannot be compared."""
    runs = [run for run in runs if attack in run.results]
    found: dict[str, Comparison] = {}
    notes = []
    first = next((run for run in runs if not run.is_teacher), runs[0] if runs else None)
    for run in runs:
        if first is None or run is first:
            continue
        try:
            pair = [read_evaluated(one.folder, one.label) for one in (first, run)]
            found[run.label] = compare(pair[:1], pair[1:], attack)
        except (DataError, UsageError) as error:
            notes.append(Text(f"{run.label} is not compared: {error}"))
    if first is None or not found:
        return notes
    return [_summary_table(found, first.label, attack), *_by_class(found, first.label, attack, look), *notes]


def _summary_table(found: Mapping[str, Comparison], first: str, attack: str) -> Table:
    tenth = len(next(iter(found.values())).classes) > 10
    names = ["average", "worst"] + ["worst_tenth"] * tenth + ["nsd"]
    head = ["run", "average", "weakest class"] + ["worst tenth"] * tenth + ["NSD", "better in", "worse in", "p"]
    rows = []
    for run, of in found.items():
        cells = [Cell(run)]
        for name in names:
            scale, digits = (1, 3) if name == "nsd" else (100, 1)
            difference = of.summary[name]
            low, high = difference.images
            text = f"{scale * difference.difference:+.{digits}f}"
            cells.append(Cell(text, detail=between(difference.images, scale, digits), strong=low > 0 or high < 0))
        cells += [Cell(_sure_classes(of, sign)) for sign in (1, -1)]
        cells.append(Cell(f"{of.summary['average'].p:.2g}"))
        rows.append(cells)
    caption = (
        f"{attack_title(attack)}, run minus {first}, in points (NSD: less is fairer), with 95 % intervals of the paired"
    )
    caption += " bootstrap; bold: 0 is outside. p: McNemar's exact test on all images. Better and worse: classes with p"
    caption += (
        f" below {SURE} after Holm's correction. All for the choice of images; other seeds may come out otherwise."
    )
    return Table(caption, head, [("", rows)])


def _sure_classes(of: Comparison, sign: int) -> str:
    sure = [
        (sign * d.difference, shorten(name, 14))
        for name, d in zip(of.classes, of.by_class, strict=True)
        if _sure(d) and sign * d.difference > 0
    ]
    names = [name for _, name in sorted(sure, key=lambda pair: -pair[0])]
    more = f" and {len(names) - 5} more" if len(names) > 6 else ""
    return ", ".join(names[:5] if more else names) + more or "none"


def _sure(of: Difference) -> bool:
    return of.p_holm is not None and of.p_holm < SURE


def _by_class(found: Mapping[str, Comparison], first: str, attack: str, look: Mapping[str, Look]) -> list[Any]:
    if len(next(iter(found.values())).classes) > BARS_UP_TO:
        return []
    said = [
        f"{name} minus {first}: better in {_sure_classes(of, 1)}, worse in {_sure_classes(of, -1)}"
        for name, of in found.items()
    ]
    caption = (
        f"{attack_title(attack)} by class: run minus {first}; right is better. Lines: 95 % intervals of the paired"
    )
    caption += f" bootstrap. Filled marks: p below {SURE}."
    return [as_plot("paired", caption, said, partial(dots, found, look))]


def dots(found: Mapping[str, Comparison], look: Mapping[str, Look], narrow: bool) -> "Figure":
    """The differences by class, a row a class, a mark a run."""
    from matplotlib.lines import Line2D

    classes = next(iter(found.values())).classes
    pitch = 0.16 if len(found) > 1 else 0.3  # inches between two marks
    columns = 1 if narrow else min(3, len(found))
    height = len(classes) * (pitch * len(found) + 0.16) + 0.7 + 0.2 * -(-len(found) // columns)
    figure = new_figure(narrow, height)
    axes = figure.add_subplot()
    for i, (name, of) in enumerate(found.items()):
        style, at = look[name], np.arange(len(classes)) + 0.76 * ((i + 0.5) / len(found) - 0.5)
        for y, difference in zip(at, of.by_class, strict=True):
            ends = [100 * end for end in difference.images]
            axes.plot(ends, [y, y], color=style.line, linewidth=1.4, linestyle=style.dash)
            fill = style.colour if _sure(difference) else "white"
            axes.plot(
                *(100 * difference.difference, y), style.marker, color=fill, markeredgecolor=style.ink, markersize=6
            )
    handles = [
        Line2D([], [], color=s.line, linestyle=s.dash, marker=s.marker, markeredgecolor=s.ink, label=shorten(name, 24))
        for name, s in ((name, look[name]) for name in found)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.6)
    axes.axvline(0, color=INK, linewidth=1)
    for k in range(1, len(classes)):
        axes.axhline(k - 0.5, color="#e6e9ed", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(classes)), [shorten(name, 14) for name in classes])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_xlabel("points")
    axes.xaxis.grid(True)
    return figure
