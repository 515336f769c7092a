"""The figure of the comparison: average against worst class, a mark a method, with lines over its seeds."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from retemper.engine.report.figures import INK, Look, as_plot, limits, new_figure
from retemper.engine.report.methods.rows import METHOD, PUBLISHED, TEACHER, Group, Key, Row
from retemper.engine.report.methods.tables import TITLES
from retemper.engine.report.page import Plot
from retemper.engine.report.words import percent
from retemper.text import shorten


def figure_blocks(group: Group, look: Mapping[Key, Look], stem: str) -> list[Plot]:
    """Return the figure under the strongest attack that two methods or more have, or nothing."""
    for attack in ("autoattack", "pgd20", "clean"):
        shown = [row for row in group.rows if {"average", "worst"} <= row.numbers.get(attack, {}).keys()]
        if sum(row.kind == METHOD for row in shown) >= 2:
            caption = (
                f"{TITLES[attack]}: right is stronger, up is fairer. Lines: from the lowest seed to the highest. "
                "Hollow: the teacher, and numbers published by others. The key has the numbers beside the marks."
            )
            return [as_plot(stem, caption, _said(shown, attack), partial(draw, shown, attack, look))]
    return []


def _said(rows: Sequence[Row], attack: str) -> list[str]:
    return [
        f"{row.name}: average {percent(of['average'].mean)}, worst class {percent(of['worst'].mean)}"
        for row in rows
        for of in (row.numbers[attack],)
    ]


def draw(rows: Sequence[Row], attack: str, look: Mapping[Key, Look], narrow: bool) -> Figure:
    """Draw the average against the worst class of each row under an attack."""
    columns = 1 if narrow else 2
    figure = new_figure(narrow, 3.8 + 0.2 * -(-len(rows) // columns), 4.0 if narrow else 6.8)
    axes = figure.add_subplot()
    keys, ends = [], {"average": [], "worst": []}
    for place, row in enumerate(rows, 1):
        of, style = row.numbers[attack], look[row.key]
        x, y = 100 * of["average"].mean, 100 * of["worst"].mean
        across, up = ([100 * of[name].low, 100 * of[name].high] for name in ends)
        axes.plot(across, [y, y], color=style.line, linewidth=1.4)
        axes.plot([x, x], up, color=style.line, linewidth=1.4)
        colour = style.colour if row.kind == METHOD else "white"
        mark: dict[str, Any] = {"marker": style.marker, "markeredgecolor": INK, "markersize": 9}
        axes.plot(x, y, color=colour, **mark, zorder=3, clip_on=False)
        axes.annotate(str(place), (x, y), (6, 5), textcoords="offset points", fontsize=9, color=style.ink)
        about = {METHOD: "", TEACHER: ", teacher", PUBLISHED: ", published"}[row.kind]
        keys.append(
            Line2D([], [], color=colour, linestyle="", **mark, label=f"{place}  {shorten(style.name, 30)}{about}")
        )
        for values, new in zip(ends.values(), (across, up), strict=True):
            values += new
    figure.legend(handles=keys, loc="outside upper left", ncols=columns, labelspacing=0.35)
    axes.set_xlim(*limits(ends["average"], 4))
    axes.set_ylim(*limits(ends["worst"], 4))
    axes.set_xlabel("average over all images, %")
    axes.set_ylabel("worst class, %")
    axes.grid(True)
    return figure
