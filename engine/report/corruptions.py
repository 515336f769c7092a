"""The section of corrupted images: a table of the means, and a heat map of corruptions by classes for each run.

Dimension key: K classes, S severities, N corruptions.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from retemper.engine.report.confusion import NUMBERS_UP_TO
from retemper.engine.report.figures import BARS_UP_TO, INK, as_plot, new_figure, panels
from retemper.engine.report.page import Cell, Table
from retemper.engine.report.read import RunRecord
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.words import PERCENT, called, percent
from retemper.text import shorten, shorten_all, text_width


def corruption_blocks(runs: RunSet) -> list[Any]:
    """Return the blocks of the runs whose evaluation holds accuracies on corrupted images."""
    found = {run.label: share for run in runs.comparable if (share := mean_by_class(run))}
    if not found:
        return []
    partly = [name for name, share in found.items() if set(share) != set(_names(found))]
    caption = (
        "Correct on corrupted images, %, the mean over classes and severities. No attack. The constants are those of "
        "CIFAR-10-C, lengths in pixels scaled with the image."
    )
    caption += f" Not finished: {', '.join(partly)}." if partly else ""
    head = ["corruption", *found]
    table = Table(caption, head, [("", _rows(found, runs))])
    if len(runs.classes) > BARS_UP_TO:
        return [table]
    named = {runs.look[run].name: share for run, share in found.items()}
    text = "A row a corruption, a column a class: correct, %, the mean over the severities. Deeper blue is worse."
    return [table, as_plot("corruptions", text, _said(found, runs), partial(heat_maps, named, runs.drawn))]


def mean_by_class(run: RunRecord) -> dict[str, np.ndarray]:
    """Return the accuracies of each corruption by class, (K,), the mean over the severities; what is damaged is not."""
    found: dict[str, np.ndarray] = {}
    for name, rows in (run.corruptions.get("accuracy") or {}).items():
        if rows and all(len(row) == len(run.classes) for row in rows):
            found[name] = np.array(rows, dtype=float).mean(axis=0)
    return found


def _names(found: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    return list(dict.fromkeys(name for share in found.values() for name in share))


def _rows(found: Mapping[str, Mapping[str, np.ndarray]], runs: RunSet) -> list[list[Cell]]:
    """Return a row a corruption, after one with the means over all: the average over the classes, and the worst one."""
    whole = {run: np.mean(list(share.values()), axis=0) for run, share in found.items()}
    lines = {"mean": whole, **{name: {run: share.get(name) for run, share in found.items()} for name in _names(found)}}
    return [
        [Cell(_title(name)), *(_cell(of_run.get(run), runs, strong=name == "mean") for run in found)]
        for name, of_run in lines.items()
    ]


def _cell(share_K: np.ndarray | None, runs: RunSet, strong: bool) -> Cell:
    if share_K is None or not np.isfinite(share_K).any():
        return Cell("none")
    worst = int(np.nanargmin(share_K))
    detail = f"worst {percent(share_K[worst])}, {called(runs.class_name(worst))}"
    return Cell(PERCENT.text(float(np.nanmean(share_K))), detail=detail, strong=strong)


def _said(found: Mapping[str, Mapping[str, np.ndarray]], runs: RunSet) -> list[str]:
    lowest = {run: min(share, key=lambda name: float(np.nanmean(share[name]))) for run, share in found.items()}
    return [
        f"{run}: hurt most by {_title(name)}, {percent(float(np.nanmean(found[run][name])))}"
        for run, name in lowest.items()
    ]


def _title(name: str) -> str:
    return shorten(name.replace("_", " "), 30)


def heat_maps(found: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[str], narrow: bool) -> Figure:
    """Draw for each run how much is lost, corruptions by classes, all on one scale."""
    names, titles = _names(found), shorten_all(classes, 10)
    longest = max(map(text_width, titles))
    columns = 1 if narrow else min(2, len(found))
    size = 7 if narrow else 8
    figure = new_figure(narrow, -(-len(found) // columns) * (0.24 * len(names) + 0.8 + 0.05 * longest))
    for axes, (run, share) in zip(panels(figure, len(found), columns), found.items(), strict=True):
        share_NK = np.array([share.get(name, np.full(len(classes), np.nan)) for name in names])
        axes.imshow(1 - share_NK, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        for n, share_K in enumerate(share_NK):
            for k, value in enumerate(share_K) if len(classes) <= NUMBERS_UP_TO else ():
                if np.isfinite(value):
                    colour = "white" if value < 0.45 else INK
                    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "color": colour}
                    axes.text(k, n, f"{100 * value:.0f}", **style).set_in_layout(False)
        upright = longest * len(classes) > (26 if narrow else 34)
        axes.set_xticks(range(len(classes)), titles, rotation=90 if upright else 0)
        axes.set_yticks(range(len(names)), [_title(name) for name in names])
        axes.tick_params(length=0, labelsize=8, labelcolor=INK)
        axes.spines[:].set_visible(False)
        axes.set_title(shorten(run, 24))
    return figure
