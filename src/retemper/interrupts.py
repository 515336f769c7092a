"""Signals that ask a run to leave: SIGTERM and SIGUSR2, as clusters send them before they take a machine, and Ctrl-C.

The first raises KeyboardInterrupt wherever the program is; nothing is lost by that, as files are written atomically.
What must not be cut in two, a training step or a save, stands in `undisturbed()`, and the signal waits for its end. A
second Ctrl-C leaves at once; SIGTERM and SIGUSR2 may be sent again and again.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
AT_ONCE = 130  # the exit code after a second Ctrl-C, as a shell has it


class _Watch:
    """The signals heard so far, and how many `undisturbed` blocks the main thread is in."""

    asked, depth = False, 0

    def hear(self, number: int, _: object) -> None:
        if self.asked:
            if number == signal.SIGINT:
                os.write(2, b"\nretemper: left at once; what was saved is whole\n")
                os._exit(AT_ONCE)
            return
        self.asked = True
        if not self.depth:
            raise KeyboardInterrupt


_watch = _Watch()


def install() -> None:
    """Take the signals over, for this process."""
    _watch.asked, _watch.depth = False, 0
    for number in SIGNALS:
        signal.signal(number, _watch.hear)


def asked() -> bool:
    """Say whether a signal has asked to leave: several processes ask one another before they do so together."""
    return _watch.asked


def leave(code: int) -> None:
    """End the process. Python would tidy up first, half a second of it: a machine may be gone by then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No signal interrupts the block.

    Raises:
        KeyboardInterrupt: behind its end, if one came.
    """
    _watch.depth += 1
    try:
        yield
    finally:
        _watch.depth -= 1
    if _watch.asked and not _watch.depth:
        raise KeyboardInterrupt
