"""The kinds of values that the command line reads, each with the advice for a word that is none."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retemper.options import parse_value


def kind_of(read: Callable[[str], Any], fits: Callable[[Any], bool], advice: str) -> Callable[[str], Any]:
    """Return the type of an option: it reads a word, and answers one that does not fit with advice."""

    def kind(text: str) -> Any:
        try:
            value = read(text)
        except (ValueError, TypeError):
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"{text or repr(text)}: {advice}")
        return value

    return kind


def _path(text: str) -> Path | None:
    """Read the name of a file or folder; none is empty, which would mean the folder that one is in."""
    return Path(text) if text else None


def _pair(text: str) -> tuple[int, int] | None:
    """Read 2/4, the second of four."""
    found = re.fullmatch("([0-9]+)/([0-9]+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _radii(text: str) -> float | str | tuple[float, ...]:
    """Read `trained`, `curve`, one radius, or several behind commas."""
    if text in NAMED:
        return text
    radii = tuple(parse_value(float, word.strip()) for word in text.split(","))
    return radii[0] if len(radii) == 1 else radii


NAMED = ("trained", "curve")  # radii by name
SEED = kind_of(int, lambda seed: 0 <= seed < 2**23, "a seed lies in 0 .. 2^23 - 1")
COUNT = kind_of(int, lambda number: number >= 1, "it must be at least 1")
BATCH = kind_of(int, lambda size: 1 <= size <= 2**20, "a batch has 1 .. 2^20 images")
PIXELS = kind_of(int, lambda size: 1 <= size <= 4096, "an image has 1 .. 4096 pixels a side")
ROUNDS = kind_of(int, lambda number: 1 <= number <= 10_000, "so many rounds are 1 .. 10000")
QUALITY = kind_of(int, lambda quality: 1 <= quality <= 100, "a quality lies in 1 .. 100; 90 is usual")
YEAR_S = 365 * 24 * 3600
PATH = kind_of(_path, lambda _: True, "name a file or a folder (. is the one that you are in)")
PERIOD = kind_of(float, lambda seconds: 0 <= seconds <= YEAR_S, "write it in seconds, from 0 to a year")
RADIUS = kind_of(
    lambda text: text if text == "trained" else parse_value(float, text),
    lambda eps: eps == "trained" or 0 <= eps <= 1,
    "write it in [0, 1] pixels, 8/255 not 8",
)
RADII = kind_of(
    _radii,
    lambda eps: eps in NAMED or all(0 <= one < 1e4 for one in (eps if isinstance(eps, tuple) else (eps,))),
    "write it in [0, 1] pixels, 8/255 not 8; several as 2/255,4/255,8/255; or trained, or curve",
)
SHARD = kind_of(_pair, lambda pair: 1 <= pair[0] <= pair[1], "write it as 1/4 to 4/4")
MINUTES = kind_of(float, lambda minutes: 0 < minutes <= YEAR_S / 60, "write it in minutes, above 0 and up to a year")
