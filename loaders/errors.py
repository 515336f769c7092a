"""The two mistakes a user can make here; the command line turns each into one line and an exit code."""


class DataError(Exception):
    """The data is missing, damaged or not what it should be; the message names the path and the fix."""


class UsageError(Exception):
    """What was asked for cannot be: a wrong option, or a backend that is not installed."""
