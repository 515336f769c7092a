"""Lines for the user on stderr, and the progress of long work: a bar on a terminal, elsewhere a line now and then."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
LINE_EVERY_S = 20.0
_quiet = False
_once: set[str] = set()


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
    """A count up to `total`, shown on stderr with the time that is left. Use it as a context manager.

    Args:
        done: how many were done before, in a time that is not known.
        whole: returns the seconds that are left of the run that this is a part of, None where it is not known.
    """

    def __init__(
        self, what: str, total: int, *, done: int = 0, whole: Callable[[], float | None] = lambda: None
    ) -> None:
        self.what, self.total, self.done, self.before, self.whole, self.note = what, total, done, done, whole, ""
        self.started = self.said = time.monotonic()
        tqdm = _tqdm() if sys.stderr.isatty() and not _quiet else None
        self.bar = tqdm(total=total, initial=done, desc=what, leave=False, dynamic_ncols=True) if tqdm else None

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
            self.bar.set_postfix_str(f"{self._of_the_run()}  {self.note}".strip(" ,"), refresh=False)
            self.bar.update(units)
            return
        now = time.monotonic()
        if now - self.said >= LINE_EVERY_S:
            self.said = now
            left_s = (self.total - self.done) * (now - self.started) / max(1, self.done - self.before)
            left = f"{duration(left_s)} left{self._of_the_run()}"
            say(f"{self.what}: {self.done:,} of {self.total:,}, {left}  {self.note}".rstrip())

    def _of_the_run(self) -> str:
        """Return how long the whole run still takes, in words that stand behind others; nothing where none knows."""
        left_s = self.whole()
        return "" if left_s is None else f", {duration(left_s)} of the whole run"


def duration(seconds: float) -> str:
    """Return a time as one reads it: 42 s, 12 min 05 s, 1 h 05 min, 2 d 03 h."""
    whole = round(seconds)
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02d} {part_unit}"
    return f"{whole} s"


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


def say_once(line: str) -> None:
    """Print a line for the user on stderr, unless this process has printed it before."""
    if line not in _once:
        _once.add(line)
        say(line)


def _tqdm() -> Any:
    """Return the class, or None where it is not installed, as on a machine for benchmarks alone."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
