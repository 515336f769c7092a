"""How a run ends badly: each error is one clear line for the user, and the exit code that scripts act on."""

from retemper.loaders.errors import DataError, UsageError


class Diverged(Exception):
    """Training left the finite numbers."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; the message says what was saved."""


EXIT_CODES: dict[type[BaseException], int] = {UsageError: 2, DataError: 3, Diverged: 4}
PREEMPTED = 75  # EX_TEMPFAIL: run the same command again
