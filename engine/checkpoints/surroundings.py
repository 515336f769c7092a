"""The surroundings in which other people's code runs: its errors told in a line, its imports, what it may load."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from retemper.console import say
from retemper.engine.checkpoints.content import few, plain_facts_unread
from retemper.engine.device import is_out_of_memory
from retemper.errors import DataError

_neighbours: dict[str, str] = {}  # modules that users' files have imported from their own folder -> that folder


@contextmanager
def failing_as(problem: str, advice: Callable[[BaseException], str] = lambda _: "") -> Iterator[None]:
    """Turn whatever other people's code raises within the context into a DataError that begins with `problem`.

    Args:
        advice: returns what to add at the end.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # a script that reads its own command line leaves by the latter
        if is_out_of_memory(error):
            raise
        raise DataError(f"{problem} ({first_line(error)}){advice(error)}") from None


@contextmanager
def telling_partial_loads(whose: str) -> Iterator[None]:
    """Warn of tensors that `load_state_dict(strict=False)` within the context does not find: a prefix may hide all."""
    load = nn.Module.load_state_dict

    def told(self: nn.Module, *given: Any, **named: Any) -> Any:
        result = load(self, *given, **named)
        left = [name for name in result.missing_keys if not name.endswith("num_batches_tracked")]
        if left:
            all_of = len(self.state_dict())
            say(f"warning: {whose} loads a state_dict without {len(left)} of its {all_of} tensors ({few(left)})")
        return result

    nn.Module.load_state_dict = told
    try:
        yield
    finally:
        nn.Module.load_state_dict = load


def first_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@contextmanager
def weights_only() -> Iterator[None]:
    """Make every `torch.load` within the context read tensors or fail; it never runs the code of a pickle."""
    force, refuse = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, refuse)}
    os.environ[force] = "1"
    try:
        with plain_facts_unread():
            yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let code within the context import the modules of `folder`, as Python does for a file that it runs.

    What was imported so from another folder is forgotten: both may hold a models.py.
    """
    place = str(folder.resolve())
    for name in [name for name, whose in _neighbours.items() if whose != place]:
        sys.modules.pop(name, None)
        del _neighbours[name]
    sys.path.insert(0, place)
    known = set(sys.modules)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(place)
        files = {name: getattr(sys.modules[name], "__file__", None) or "" for name in set(sys.modules) - known}
        _neighbours.update({name: place for name, file in files.items() if _is_below(file, place)})


def _is_below(file: str, place: str) -> bool:
    """Say whether a module's file is the user's own below a folder: not of an environment that lies there too."""
    return file.startswith(place + os.sep) and "site-packages" not in file
