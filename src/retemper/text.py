"""Names and numbers for a terminal and for a page: as wide as they look, of bounded length, safe to print."""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

JOINERS = "\u200c\u200d"  # they hold letters, and the parts of an emoji, together or apart


def text_width(text: str) -> int:
    """Return how many columns of a terminal the text takes: Chinese, Japanese and Korean letters and emoji take two."""
    return sum(_columns(char) for char in text)


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):  # drawn over the letter before it, or not at all
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def shorten(text: str, length: int) -> str:
    """Return the text as one line, at most `length` columns wide; "?" stands for what is no letter of any script.

    A control character damages an SVG, commands a terminal, or turns the direction of the text that follows.
    """
    text = "".join(c if c.isprintable() or c in JOINERS else "?" for c in " ".join(text.split())) or "(no name)"
    if text_width(text) <= length:
        return text
    tail = (length - 1) // 3  # names often differ at their end
    return f"{_head(text, length - 1 - tail)}…{_head(text[::-1], tail)[::-1]}"


def _head(text: str, length: int) -> str:
    """Return the longest beginning of the text that is at most `length` columns wide."""
    taken = 0
    for i, char in enumerate(text):
        taken += _columns(char)
        if taken > length:
            return text[:i]
    return text


def shorten_all(names: Sequence[str], length: int) -> list[str]:
    """Return all names shortened; those that would look the same begin with their place in the list, from 0."""
    short = [shorten(name, length) for name in names]
    times = Counter(short)
    return [s if times[s] == 1 else f"{k}: {shorten(names[k], length - len(f'{k}: '))}" for k, s in enumerate(short)]


def pad(text: str, columns: int) -> str:
    """Return the text with spaces behind it, `columns` wide on a terminal."""
    return text + " " * (columns - text_width(text))


def number(value: float, digits: int, sign: str = "") -> str:
    """Return a number with so many digits after the point, "none" if it is not finite; zero never has a sign.

    Args:
        sign: "+" to write the sign of positive numbers too.
    """
    if not math.isfinite(value):
        return "none"
    text = f"{value:{sign}.{digits}f}"
    return text if float(text) else text.lstrip("+-")
