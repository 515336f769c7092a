"""Commands that messages, reports and cards tell the user to type."""

import shlex
from pathlib import Path


def command(*words: str | Path, **options: object) -> str:
    """Return a line for the shell: each word quoted where it must be.

    Args:
        words: the program and its arguments, in their order.
        options: data_root="my data" becomes --data-root 'my data'; one that is None is left out, one that is True
            is given without a value.
    """
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items() if value is not None}
    given = [(name,) if value is True else (name, str(value)) for name, value in named.items()]
    return shlex.join([*map(str, words), *(word for pair in given for word in pair)])
