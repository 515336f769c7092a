"""The style of all figures, the look of each run, axes and labels that figures share, and the files of a figure.

A figure is drawn wide (10 inches, for a page) and narrow (4 inches, for a phone), in fonts to be read at that size.
A run looks the same in all figures. The colours are those of Okabe and Ito, which the colour-blind can tell apart, in
an order whose steps of lightness survive a grey printer; from the third on they are hatched. Teachers are light grey.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from scipy.optimize import isotonic_regression

from retemper.engine.report.page import Plot
from retemper.text import shorten_all

INK, MUTED, FAINT, ALERT = "#1b1f24", "#5b6470", "#c3c9d0", "#b0330f"
BARS_UP_TO = 20  # classes; beyond it bars, and names, are too many to read
LABEL = 46  # columns of text that fit into the key of a narrow figure
LINE_HEIGHT = 1.25  # of a label, in font sizes
SOLID, DASH, DOT = "-", (0, (5, 2)), (0, (1.2, 1.4))
HALO = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.8}  # behind a label that lies on lines
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "lines.solid_capstyle": "butt",
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "hatch.linewidth": 0.9,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "retemper",  # with no date in the file: the same numbers, the same bytes
}
EndLabel = tuple[float, str, str, bool]  # value, text, colour, bold


@dataclass(frozen=True)
class Look:
    """The look of a run: `colour` fills areas, `line` is strong enough for a line, `ink` for text on white.

    name: what figures call the run, in letters that they can draw.
    """

    colour: str
    line: str
    ink: str
    hatch: str
    dash: Any
    marker: str
    name: str = ""


LOOKS = [
    Look("#0072B2", "#0072B2", "#005a8c", "", SOLID, "o"),
    Look("#E69F00", "#E69F00", "#8f6200", "", DASH, "s"),
    Look("#009E73", "#009E73", "#00694c", "////", DOT, "^"),
    Look("#CC79A7", "#CC79A7", "#8e3f6c", "....", SOLID, "D"),
    Look("#56B4E9", "#56B4E9", "#1c6a99", "\\\\\\\\", DASH, "v"),
    Look("#D55E00", "#D55E00", "#9c4500", "xxxx", DOT, "P"),
    Look("#F0E442", "#c7b600", "#6f6800", "----", SOLID, "X"),
    Look("#3b3f45", "#3b3f45", "#1b1f24", "++++", DASH, "*"),
]
TEACHER = Look("#c9ced4", "#8a929c", "#5b6470", "", DOT, "h")


def looks(names: Sequence[str], teachers: Sequence[bool]) -> list[Look]:
    """Return the look of each run, in order; True stands for a teacher."""
    students = iter(range(len(teachers)))
    found = (TEACHER if teacher else LOOKS[next(students) % len(LOOKS)] for teacher in teachers)
    return [replace(look, name=name) for look, name in zip(found, names, strict=True)]


def as_plot(stem: str, caption: str, said: Iterable[str], draw: Callable[[bool], Figure]) -> Plot:
    """Return the block of a figure, which `draw` makes wide or narrow; `said` is what it shows, in words."""
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands in for it
        wide, narrow = draw(False), draw(True)
        for figure in (wide, narrow):
            figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
            figure.set_layout_engine("none")  # or each file would have it done again
        files = _saved(wide, "svg"), _saved(narrow, "svg"), _saved(wide, "png")
    return Plot(stem, caption, ". ".join(said) + ".", *files)


def new_figure(narrow: bool, height: float, width: float | None = None) -> Figure:
    """Return an empty figure of this height and width in inches; the usual width if None."""
    figure = Figure(figsize=(width or (4.0 if narrow else 10.0), height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.04)  # type: ignore[union-attr]
    return figure


def panels(figure: Figure, number: int, columns: int) -> list[Axes]:
    """Return `number` new axes of the figure, row by row."""
    grid = list(figure.subplots(-(-number // columns), columns, squeeze=False).flat)
    for axes in grid[number:]:
        axes.set_axis_off()
    return grid[:number]


def class_rows(axes: Axes, classes: Sequence[str]) -> None:
    """Name the classes along the vertical axis, from the top down."""
    axes.set_yticks(range(len(classes)), shorten_all(classes, 14))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.xaxis.grid(True)


def epoch_axis(axes: Axes, epoch: Sequence[int]) -> None:
    """Label the horizontal axis with epochs, from the first to the last."""
    first, last = min(epoch, default=0), max(epoch, default=1)
    axes.set_xlim(first - (first == last), last + (first == last))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True) if first < last else FixedLocator([first]))
    axes.set_xlabel("epoch")


def limits(values: Iterable[float], least: float, bounds: tuple[float, float] = (0, 100)) -> tuple[float, float]:
    """Return the ends of an axis: a little beyond all values that are numbers, but within the bounds.

    Args:
        least: the length of the axis, at least; one that shows equal values would have ticks that mean nothing.
        bounds: what the values cannot leave; percentages, if nothing else is said.
    """
    known = [value for value in values if math.isfinite(value)] or list(bounds)
    low, high = min(known), max(known)
    pad = max(0.05 * (high - low), (least - high + low) / 2)
    shift = max(0.0, bounds[0] - low + pad) - max(0.0, high + pad - bounds[1])
    return max(bounds[0], low - pad + shift), min(bounds[1], high + pad + shift)


def end_labels(figure: Figure, panels: Sequence[tuple[Axes, list[EndLabel]]], size: float) -> None:
    """Write names at the right end of the lines of finished panels, moved apart where they would overlap."""
    for axes, _ in panels:
        axes.set_ylim(*axes.get_ylim())
    figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]  # so that heights are known
    leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 1, "relpos": (0, 0.5)}
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    for axes, labels in panels:
        labels = sorted((label for label in labels if math.isfinite(label[0])), key=lambda label: label[0])
        at = [72 / figure.dpi * axes.transData.transform((0, value))[1] for value, *_ in labels]
        for (value, text, colour, bold), here, there in zip(labels, at, _spread(at, LINE_HEIGHT * size), strict=True):
            style = {"fontsize": size, "color": colour, "weight": "bold" if bold else "normal"}
            arrow = leader if abs(there - here) > 2 else None
            offset = (8, there - here)
            axes.annotate(text, (1, value), offset, **where, **style, arrowprops=arrow, annotation_clip=False)


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _spread(at: Sequence[float], gap: float) -> list[float]:
    """Return the positions nearest to the sorted `at` that are at least `gap` apart."""
    steps = gap * np.arange(len(at))
    return (isotonic_regression(np.array(at) - steps).x + steps).tolist() if len(at) else []
