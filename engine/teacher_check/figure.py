"""The figure of a teacher's check: each class's accuracy, and how far attacks on students reach the teacher."""

import math
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from retemper.engine.report.figures import BARS_UP_TO, LOOKS, TEACHER, as_plot, class_rows, new_figure
from retemper.engine.report.fonts import find_fonts
from retemper.engine.report.page import Plot
from retemper.text import shorten, shorten_all


def class_plot(content: dict[str, Any]) -> Plot:
    """Return the figure: a dot for clean and attacked accuracy in the row of each class, and one for each student."""
    chosen, names = _shown(content, BARS_UP_TO)
    series = [
        ("clean", TEACHER, content["clean"]["accuracy"]),
        ("under attack", LOOKS[0], content["robust"]["accuracy"]),
    ]
    looks = zip(content["students"], [*LOOKS[1:], *LOOKS], strict=False)
    series += [(f"fooled with {shorten(one['network'], 24)}", look, one["transfer_by_class"]) for one, look in looks]

    def draw(narrow: bool) -> Figure:
        figure = new_figure(narrow, height=1.2 + 0.27 * len(chosen))
        axes = figure.subplots()
        class_rows(axes, names)
        for label, look, value_K in series:
            points = [(100 * value_K[k], row) for row, k in enumerate(chosen) if value_K[k] is not None]
            style: dict[str, Any] = dict(linestyle="none", marker=look.marker, color=look.line, label=label)
            axes.plot([x for x, _ in points], [y for _, y in points], markersize=7, clip_on=False, **style)
        axes.set_xlim(0, 100)
        axes.set_xlabel("per cent")
        figure.legend(loc="outside upper left", ncols=1 if narrow else 3)
        return figure

    robust = content["robust"]["accuracy"]
    said = [
        f"{name} {100 * robust[k]:.0f} % under attack" for k, name in zip(chosen, names, strict=True) if _is(robust[k])
    ]
    fewer = f" The {BARS_UP_TO} weakest classes." if len(chosen) < len(content["classes"]) else ""
    fooled = "; of the images that fool a student, the share that fool the teacher too" * bool(content["students"])
    caption = f"Accuracy of each class{fooled}.{fewer}"
    fonts, _ = find_fonts([*names, *(label for label, _, _ in series)])
    with rc_context({"font.family": fonts}):
        return as_plot("teacher_classes", caption, said, draw)


def _is(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shown(content: dict[str, Any], most: int) -> tuple[list[int], list[str]]:
    """Return the classes that a figure has room for, the least robust ones in their order, and their names."""
    robust = [math.inf if value is None else value for value in content["robust"]["accuracy"]]
    chosen = sorted(sorted(range(len(robust)), key=lambda k: robust[k])[:most])
    return chosen, shorten_all([content["classes"][k] for k in chosen], 14)
