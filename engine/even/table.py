"""The table of an evening: each class under attack before and after, on the images that choose."""

from collections.abc import Mapping
from typing import Any

from retemper.engine.even.subject import Subject
from retemper.options import shown_value
from retemper.text import number, pad, shorten_all, text_width

MOST_CLASSES, NAME = 20, 24  # in a table; columns of a class's name


def as_text(one: Subject, after: Mapping[str, Mapping[str, Any]], chosen: str) -> str:
    """Return a table for the terminal: the summaries and the classes, of many those that were weakest before.

    Args:
        after: by the way of evening, the report on the images that choose.
        chosen: the way that was written.
    """
    columns = {"before": one.before, **after}
    classes = one.split.classes
    weakest = sorted(range(len(classes)), key=lambda k: one.before["accuracy"][k])[:MOST_CLASSES]
    names = shorten_all(list(classes), NAME)
    rows = [["", *(f"{name}*" if name == chosen and len(after) > 1 else name for name in columns)]]
    rows += [["average, %", *(number(100 * report["average"], 1) for report in columns.values())]]
    rows += [["worst class, %", *(number(100 * report["worst"], 1) for report in columns.values())]]
    rows += [["NSD", *("-" if report["nsd"] is None else number(report["nsd"], 3) for report in columns.values())]]
    rows += [
        [names[k], *(number(100 * report["accuracy"][k], 1) for report in columns.values())] for k in sorted(weakest)
    ]
    widths = [max(map(text_width, column)) for column in zip(*rows, strict=True)]
    selection, eps = one.found.recipe.selection, shown_value(one.found.recipe.attack.eps)
    head = f"PGD-{selection.select_steps}, eps {eps}, {selection.holdout_per_class} training images of each class"
    lines = [head + ("" if one.found.is_apart else ", which the network may have learned from")]
    for title, *cells in rows:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([pad(title, widths[0]), *padded]).rstrip())
    if len(weakest) < len(classes):
        lines.append(f"and {len(classes) - len(weakest)} classes in which the network was stronger")
    if len(after) > 1:
        lines.append("*: the largest average + worst class, which is written")
    return "\n".join(lines)
