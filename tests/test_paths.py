"""Every public function that takes a path takes a text too."""

import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import pytest

PACKAGES = ("bench", "engine", "engine.report", "kernels", "loaders")


def path_parameters() -> Iterator[Any]:
    """Yield every parameter of a public function that takes a path, with its name and its type."""
    for package in PACKAGES:
        module = importlib.import_module(f"retemper.{package}")
        for name in module.__all__:
            function: Callable[..., Any] = getattr(module, name)
            if not inspect.isfunction(function):
                continue
            for parameter, kind in get_type_hints(function).items():
                if parameter != "return" and "Path" in str(kind):
                    yield pytest.param(kind, id=f"{package}.{name}({parameter})")


def admits_text(kind: Any) -> bool:
    """Say whether a type that names a path, or a sequence of them, names text beside it."""
    if isinstance(kind, types.UnionType):
        return str in get_args(kind)
    return any(admits_text(part) for part in get_args(kind))


@pytest.mark.parametrize("kind", [*path_parameters()])
def test_a_path_may_be_text(kind: Any) -> None:
    assert admits_text(kind)
