"""The errors that end a command with one line for the user, and the exit codes that scripts act on."""

import difflib
from collections.abc import Iterable


class DataError(Exception):
    """Data is missing, damaged or not what it should be. The message names the path and the fix."""


class UsageError(Exception):
    """The user asks for what cannot be: a wrong option, or a backend that is not installed."""


class Busy(UsageError):
    """Another process holds the lock of what the command would write."""


class Diverged(Exception):
    """Training left the finite numbers."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; the message says what was saved."""


EXIT_CODES: dict[type[BaseException], int] = {UsageError: 2, DataError: 3, Diverged: 4}
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" where something known is like `word`, else nothing."""
    bare = {one.lstrip("-"): one for one in known}  # the dashes of options would make all of them alike
    close = difflib.get_close_matches(word.lstrip("-").lower(), bare, n=1, cutoff=0.5)
    return f" (did you mean {bare[close[0]]!r}?)" if close else ""
