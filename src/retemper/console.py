"""Lines for the user on stderr, and the progress of long work: a bar on a terminal, elsewhere a line now and then."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
LINE_EVERY_S = 20.0
_quiet = False


def several() -> bool:
    """Say whether a launcher has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Say whether this process has rank 0 and prints for all of them; true for a process on its own."""
    return not several() or os.environ.get("RANK") == "0"


def speaker() -> str:
    """Return the beginning of an error message, which names this process; empty for a process on its own."""
    return f"process {os.environ.get('RANK', 'without RANK')} of {os.environ['WORLD_SIZE']}: " if several() else ""


def only_errors(quiet: bool) -> None:
    """Silence this process, because it is not the first of several; `quiet` False lets it speak again."""
    global _quiet
    _quiet = quiet


class Progress:
    """A count up to `total`, shown on stderr. Use it as a context manager."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.note = what, total, 0, ""
        self.started = self.said = time.monotonic()
        tqdm = _tqdm() if sys.stderr.isatty() and not _quiet else None
        self.bar = tqdm(total=total, desc=what, leave=False, dynamic_ncols=True) if tqdm else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, units: int, note: str | None = None) -> None:
        """Count `units` more, and show `note` behind the count until another replaces it."""
        self.done += units
        self.note = self.note if note is None else note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(units)
            return
        now = time.monotonic()
        if now - self.said >= LINE_EVERY_S:
            self.said = now
            left_s = (self.total - self.done) * (now - self.started) / max(1, self.done)
            say(f"{self.what}: {self.done:,} of {self.total:,}, {left_s:.0f} s left  {self.note}".rstrip())


def progress(items: Iterable[T], total: int, label: str, *, show: bool = True) -> Iterator[T]:
    """Yield `items` and show on stderr how many of them are done.

    Args:
        total: how many items there are.
        label: what is done with them.
        show: False yields in silence.
    """
    if not show:
        yield from items
        return
    with Progress(label, total) as shown:
        if shown.bar is None:
            say(f"{label}: {total:,} to do")
        for item in items:
            yield item
            shown.advance(1)


def say(line: str) -> None:
    """Print a line for the user on stderr; stdout is for results."""
    if _quiet:
        return
    tqdm = _tqdm()
    if tqdm:
        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)


def _tqdm() -> Any:
    """Return the class, or None where it is not installed, as on a machine for benchmarks alone."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
