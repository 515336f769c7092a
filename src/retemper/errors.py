"""The errors that end a command with one line for the user, and the exit codes that scripts act on."""


class DataError(Exception):
    """Data is missing, damaged or not what it should be. The message names the path and the fix."""


class UsageError(Exception):
    """The command asks for what cannot be done: a wrong option, or a backend that is not installed."""


class Diverged(Exception):
    """Training reached a loss or a weight that is not finite."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. The message says what was saved."""


EXIT_CODES: dict[type[BaseException], int] = {UsageError: 2, DataError: 3, Diverged: 4}
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
