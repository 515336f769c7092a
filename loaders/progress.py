"""How long work is shown: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY_S = 10.0


def progress(items: Iterable[T], total: int, label: str, *, show: bool = True) -> Iterator[T]:
    """Yield `items`, telling stderr how far it is: `label: 1,200 of 50,000`.

    Args:
        total: how many items there are.
        show: False yields in silence.
    """
    if not show:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, leave=False)
    else:
        yield from _lines(items, total, label)


def _lines(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    said = time.monotonic()
    print(f"{label}: {total:,} to do", file=sys.stderr, flush=True)
    for done, item in enumerate(items):
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            print(f"{label}: {done:,} of {total:,}", file=sys.stderr, flush=True)
        yield item
