"""The command line: `retemper VERB`. A user's mistake is one line on stderr and an exit code (`retemper.errors`)."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from retemper import interrupts
from retemper.arguments import OPTIONS, command_line, named_recipe
from retemper.console import is_first, speaker
from retemper.errors import EXIT_CODES, PREEMPTED, DataError, UsageError, nearest
from retemper.index import read_index

GOES_ON = "; the same command goes on from there"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and leave with its exit code: the console script."""
    if "_ARGCOMPLETE" in os.environ:  # the shell's completion calls the program so
        complete(os.environ.get("COMP_LINE", ""))
    interrupts.install()
    code = run(sys.argv[1:] if argv is None else list(argv))
    if code == PREEMPTED:
        interrupts.leave(code)
    sys.exit(code)


def complete(line: str) -> None:
    """Tell the shell what may stand at the cursor of `line`, by argcomplete's protocol, and leave."""
    import argcomplete

    with suppress(UsageError):  # of no recipe there are no options yet
        argcomplete.autocomplete(command_line(named_recipe(line.split()[1:]))[0])
    argcomplete.autocomplete(command_line()[0])


def run_as_script(file: str) -> None:
    """Train the method that the recipe `file` is named after: `python recipes/absld.py SETTING ...`."""
    method, words = Path(file).stem, sys.argv[1:]
    setting = words.pop(0) if words and not words[0].startswith("-") else ""
    main(["train", f"{method}:{setting}", *words])


def run(argv: list[str]) -> int:
    """Run one verb; return its exit code. Without any word it prints the help."""

    def act() -> None:
        if argv[:1] == ["help"]:
            argv[0] = "--help"
        if argv and not argv[0].startswith("-") and argv[0] not in OPTIONS:
            raise UsageError(f"there is no verb {argv[0]!r}{nearest(argv[0], OPTIONS)}; see retemper --help")
        top, verbs = command_line(named_recipe(argv))
        arguments, unknown = top.parse_known_args(argv or ["--help"])
        if unknown:
            if arguments.verb == "train":
                read_index().find(arguments.METHOD_SETTING)  # of no recipe every option is unknown: that is said first
            known = re.findall(r"--[a-z][\w-]*", verbs[arguments.verb].format_help())
            raise UsageError(f"{arguments.verb} has no option {unknown[0]!r}{nearest(unknown[0], known)}")
        arguments.act(arguments)

    return reported(act, goes_on=argv[:1] in (["train"], ["demo"], ["even"]) or "--review" in argv)


def reported(act: Callable[[], None], goes_on: bool) -> int:
    """Call `act`; return the exit code, after one line on stderr where it failed.

    Args:
        goes_on: whether the same command goes on where it was interrupted.
    """
    try:
        act()
        return 0
    except KeyboardInterrupt as interrupt:
        saved = str(interrupt) or "what was saved before is whole"
        if is_first():
            print(f"retemper: interrupted{f'; {saved}{GOES_ON}' if goes_on else ''}", file=sys.stderr)
        return PREEMPTED
    except BrokenPipeError:
        return 0
    except tuple(EXIT_CODES) as error:
        print(f"retemper: error: {speaker()}{error}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except OSError as error:
        print(f"retemper: error: {speaker()}{error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return EXIT_CODES[DataError]
    except (MemoryError, RuntimeError) as error:
        from retemper.engine.device import is_out_of_memory  # here: it imports PyTorch

        if not is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or ["no more is said"])[0]
        print(f"retemper: error: {speaker()}out of memory ({first[:200]})", file=sys.stderr)
        return EXIT_CODES[UsageError]
