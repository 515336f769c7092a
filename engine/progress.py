"""Progress on long work: a bar on a terminal, a plain line now and then elsewhere (a log file stays readable)."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


class Progress:
    """Counts `total` units of `what`. Use as a context manager."""

    def __init__(self, what: str, total: int, unit: str = "img") -> None:
        self.what, self.total, self.done, self.note = what, total, 0, ""
        self.started = self.spoken = time.monotonic()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=what, unit=unit, leave=False, dynamic_ncols=True) if terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, units: int, note: str | None = None) -> None:
        """Count `units` more; `note` stands behind the count until the next one."""
        self.done += units
        self.note = self.note if note is None else note
        if self.bar is not None:
            if note is not None:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(units)
        elif time.monotonic() - self.spoken > SECONDS_BETWEEN_LINES:
            self.spoken = time.monotonic()
            rate = self.done / (self.spoken - self.started)
            left = (self.total - self.done) / rate
            say(f"{self.what}: {self.done}/{self.total}, {rate:.0f}/s, {left:.0f} s left {self.note}".rstrip())


def say(line: str) -> None:
    """One line for the user, on stderr: stdout is for results."""
    tqdm.write(line, file=sys.stderr)
