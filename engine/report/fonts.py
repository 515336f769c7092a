"""The fonts of the figures: which letters can be drawn, from which fonts, and what stands for a name that cannot.

DejaVu Sans comes with matplotlib, so that figures are the same everywhere. For letters that it lacks, Chinese ones for
example, the fonts installed on the machine are looked through.
"""

import unicodedata
from collections.abc import Iterable
from functools import cache

import matplotlib
from matplotlib.font_manager import FontEntry, findfont, fontManager, get_font

from retemper.text import JOINERS

FONT = "DejaVu Sans"
NO_LETTERS = ("last resort", "lastresort", "color")  # fonts of boxes, and of coloured pictures, which are not drawn
SHAPES = matplotlib.__version_info__ >= (3, 11)  # joins Arabic letters, and writes from right to left


def find_fonts(texts: Iterable[str]) -> tuple[list[str], frozenset[str]]:
    """Return the font families to draw the texts with, the first that has a letter first, and the letters of none."""
    lacking = {char for text in texts for char in text if not char.isspace() and char not in JOINERS}
    beyond = {char for char in lacking if not SHAPES and _needs_shaping(char)}
    lacking = {char for char in lacking - beyond if ord(char) not in _letters(findfont(FONT))}
    families = [FONT]
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name, font.fname)) if lacking else ():
        found = {char for char in lacking if ord(char) in _letters(font.fname)} if _is_plain(font) else set()
        if found:
            families.append(font.name)
            lacking -= found
    return families, frozenset(lacking | beyond)


def _is_plain(font: FontEntry) -> bool:
    """Say whether the font is an upright one of normal weight, whose letters are outlines."""
    upright = font.style == "normal" and font.weight in (400, "normal", "regular", "book")
    return upright and not any(word in font.name.lower() for word in NO_LETTERS)


def _needs_shaping(char: str) -> bool:
    return unicodedata.bidirectional(char) in ("R", "AL") or unicodedata.category(char) in ("Mn", "Mc")


@cache
def _letters(path: str) -> frozenset[int]:
    """Return the characters of the font in that file; none where it cannot be read or has no outlines."""
    try:
        font = get_font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()
