"""The section of what attacked images are taken for: heat maps, or a table for many classes.

Dimension key: K classes. `share_KK` holds a row for each true class: the parts of its images taken for each class, NaN
where it has none.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from retemper.engine.report.figures import BARS_UP_TO, INK, MUTED, as_plot, new_figure, panels
from retemper.engine.report.page import Cell, Table
from retemper.engine.report.read import attack_title, weakest_first
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.words import percent
from retemper.text import shorten, shorten_all, text_width

NUMBERS_UP_TO = 10  # classes; beyond it a cell is too small for its number
MOST_ROWS, MOST_NAMES = 15, 3  # of the table: classes, and what each is taken for


def confusion_blocks(runs: RunSet) -> list[Any]:
    """Return the block of all runs whose evaluation counted confusions. Images whose logits are NaN count nowhere."""
    share = {}
    for run, result in runs.results(runs.reference).items():
        counts_KK = result.confusion
        if counts_KK is not None and counts_KK.any():
            total_K1 = counts_KK.sum(axis=1, keepdims=True)
            share[run] = np.divide(counts_KK, total_K1, out=np.full_like(counts_KK, np.nan), where=total_K1 > 0)
    if not share:
        return []
    title = attack_title(runs.reference)
    if len(runs.classes) > BARS_UP_TO:
        return [_table(share, runs, title)]
    caption = f"{title}: a row a class, a column what its images are taken for, % of the row. Deeper blue is worse."
    caption += " In the boxes on the diagonal: what stays right."
    said = [f"{name}: most often {_worst_pair(share_KK, runs)}" for name, share_KK in share.items()]
    named = {runs.look[run].name: share_KK for run, share_KK in share.items()}
    return [as_plot("confusion", caption, said, partial(heat_maps, named, runs.drawn))]


def _mistakes(share_KK: np.ndarray) -> np.ndarray:
    return share_KK - np.diag(share_KK.diagonal())


def heat_maps(share: Mapping[str, np.ndarray], classes: Sequence[str], narrow: bool) -> Figure:
    """Draw a heat map of the confusions for each run, all on one scale."""
    names = shorten_all(classes, 10)
    longest = max(map(text_width, names))
    columns = 1 if narrow else min(len(share), 2 if len(classes) > NUMBERS_UP_TO or longest > 4 else 3)
    width = (3.6 if narrow else 9.6) / columns
    figure = new_figure(narrow, -(-len(share) // columns) * (min(width, 5.2) + 0.35 + 0.05 * longest))
    top = max(float(np.nanmax(_mistakes(share_KK))) for share_KK in share.values()) or 1.0
    for axes, (name, share_KK) in zip(panels(figure, len(share), columns), share.items(), strict=True):
        _heat_map(axes, share_KK, names, top, 7 if width < 3.5 else 8.5)
        axes.set_title(shorten(name, 24))
    return figure


def _heat_map(axes: Axes, share_KK: np.ndarray, names: Sequence[str], top: float, size: float) -> None:
    # The map Blues runs from white to dark in even steps of lightness: it reads the same in grey.
    axes.imshow(_mistakes(share_KK), cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
    for k, share_K in enumerate(share_KK):
        axes.add_patch(Rectangle((k - 0.5, k - 0.5), 1, 1, fill=False, edgecolor=MUTED, linewidth=0.8))
        for predicted, value in enumerate(share_K) if len(names) <= NUMBERS_UP_TO else ():
            if value >= 0.045 or (predicted == k and np.isfinite(value)):
                dark = predicted != k and value > 0.55 * top
                style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size}
                style |= {"color": "white" if dark else INK, "weight": "bold" if predicted == k else "normal"}
                cell = axes.text(predicted, k, f"{100 * value:.0f}", **style)
                cell.set_in_layout(False)  # hundreds of numbers, none of which reaches out of the axes
    upright = max(map(text_width, names)) * len(names) > 34
    axes.set_xticks(range(len(names)), names, rotation=90 if upright else 0)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.set_xlabel("taken for", fontsize=8.5)
    axes.spines[:].set_visible(False)


def _worst_pair(share_KK: np.ndarray, runs: RunSet) -> str:
    mistakes_KK = _mistakes(share_KK)
    k, predicted = divmod(int(np.nanargmax(mistakes_KK)), len(mistakes_KK))
    return f"{runs.class_name(k)} is taken for {runs.class_name(predicted)}, {percent(mistakes_KK[k, predicted])}"


def _table(share: Mapping[str, np.ndarray], runs: RunSet, title: str) -> Table:
    right_K = np.mean([share_KK.diagonal() for share_KK in share.values()], axis=0)
    rows = []
    for k in weakest_first(right_K.tolist())[: min(MOST_ROWS, int(np.isfinite(right_K).sum()))]:
        cells = [Cell(runs.names[k])]
        for share_KK in share.values():
            mistakes_K = _mistakes(share_KK)[k]
            most = [int(p) for p in np.argsort(-mistakes_K, kind="stable")[:MOST_NAMES] if mistakes_K[p] > 0]
            names = ", ".join(f"{runs.class_name(p)} ({percent(mistakes_K[p])})" for p in most)
            cells.append(Cell(names or "none", detail=f"right: {percent(share_KK[k, k])}"))
        rows.append(cells)
    which = f"the {len(rows)} classes that are right least often, and what they are taken for."
    return Table(f"{title}: {which}", ["class", *share], [("", rows)])
