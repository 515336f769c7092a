"""Numbers and recorded values in words, the same way in every section of a report."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from retemper.engine.class_report import Result
from retemper.engine.evaluation.norms import TITLES
from retemper.text import number


class Column(NamedTuple):
    """The title and number format of one summary: the value times `scale`, with `digits` digits after the point."""

    title: str
    short: str
    scale: int = 100
    digits: int = 1

    def text(self, value: float, sign: str = "") -> str:
        return number(self.scale * value, self.digits, sign)

    def between(self, ends: Sequence[float]) -> str:
        return f"{self.text(ends[0])} to {self.text(ends[1])}" if all(map(math.isfinite, ends)) else "no interval"


PERCENT = Column("average", "avg.")
COLUMNS = {
    "average": PERCENT,
    "worst": Column("weakest class", "worst"),
    "worst_tenth": Column("worst tenth", "tenth"),
    "nsd": Column("NSD", "NSD", scale=1, digits=3),
}


def columns(num_classes: int) -> dict[str, Column]:
    """Return the summaries to show, by name. Up to ten classes the worst tenth is the weakest class and left out."""
    return {name: column for name, column in COLUMNS.items() if name != "worst_tenth" or num_classes > 10}


def isolated(name: str) -> str:
    """Return the name for a sentence; one that runs from right to left must not turn the words and numbers after it."""
    turns = any(unicodedata.bidirectional(char) in ("R", "AL") for char in name)
    return f"\u2068{name}\u2069" if turns else name


def called(name: str) -> str:
    """Return a class's name for a place where nothing else says that it is one: a number alone would be another."""
    return name if name.lower().startswith("class") else f"class {name}"


def ball(eps: Any, norm: Any) -> str:
    """Return a radius in words, with its norm where that is not L-inf."""
    return pixels(eps) + ("" if norm in (None, "linf") else f" in {TITLES.get(norm, norm)}")


def percent(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else "none"


def at_most(result: Result, name: str = "average") -> str:
    """Return "≤ " for a summary that is only an upper bound, else "". The bound does not hold for an NSD."""
    return "≤ " if result.upper_bound and name != "nsd" else ""


def pixels(value: Any) -> str:
    """Return a distance in pixel units as text, in 255ths where that is shorter: of a whole or half number of them."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return plain(value)
    halves, text = 2 * 255 * value, f"{value:g}"
    return f"{round(halves) / 2:g}/255" if len(text) > 5 and abs(halves - round(halves)) < 1e-3 else text


def plain(value: Any) -> str:
    """Return a value of a config or protocol in words."""
    if value is None:
        return "not recorded"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(v)}" for name, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{40,}", text) else text  # the beginning of a digest or commit
