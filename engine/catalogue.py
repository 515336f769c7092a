"""Finds recipes: a module of `retemper.recipes` with `SETTINGS` is a method, and they are what it can be run on."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import fields, replace
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from retemper.engine.recipe import Recipe, Setting
from retemper.errors import UsageError


def methods() -> list[str]:
    """The names of all methods, sorted."""
    package = importlib.import_module("retemper.recipes")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"retemper.recipes.{name}"), "SETTINGS")]


def method_module(method: str) -> ModuleType:
    """The recipe file of `method`.

    Raises:
        UsageError: there is none; it names the nearest.
    """
    if method not in methods():
        raise UsageError(f"there is no method {method!r}{nearest(method, methods())}; see retemper ls")
    return importlib.import_module(f"retemper.recipes.{method}")


def find_setting(name: str) -> tuple[str, str, Setting]:
    """The method, the setting's name and the setting that METHOD:SETTING means.

    Raises:
        UsageError: unknown; it names the nearest.
    """
    method, _, setting = name.partition(":")
    settings: dict[str, Setting] = method_module(method).SETTINGS
    if not setting:
        raise UsageError(
            f"{method} needs a setting, as in {method}:{next(iter(settings))}; it has {', '.join(settings)}"
        )
    if setting not in settings:
        raise UsageError(
            f"{method} has no setting {setting!r}{nearest(setting, settings)}; it has {', '.join(settings)}"
        )
    return method, setting, settings[setting]


def override(recipe: Recipe, texts: dict[str, str]) -> Recipe:
    """The recipe with fields replaced by what the user wrote.

    Raises:
        UsageError: no such field (it names the nearest), or the text is no value of the field's type.
    """
    types = get_type_hints(type(recipe))
    names = [field.name for field in fields(recipe)]
    values = {}
    for name, text in texts.items():
        if name not in names:
            raise UsageError(
                f"the recipe has no field {name!r}{nearest(name, names)}; it has {', '.join(sorted(names))}"
            )
        try:
            values[name] = parse_value(types[name], text)
        except ValueError as error:
            raise UsageError(f"--{name.replace('_', '-')} {text}: {error}") from None
    try:
        if "variant" in values:  # first, so that what else the user wrote holds
            recipe = recipe.as_variant(values["variant"])
        return replace(recipe, **values)
    except ValueError as error:
        raise UsageError(str(error)) from None


def parse_value(kind: Any, text: str) -> Any:
    """`text` as a value of the annotated type: int, float (also "8/255"), bool, str, tuple[int, ...] or X | None."""
    options = get_args(kind)
    if type(None) in options:
        return None if text.lower() == "none" else parse_value(options[0], text)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("say true or false")
        return text.lower() == "true"
    if kind is float:
        top, slash, bottom = text.partition("/")
        return float(top) / float(bottom) if slash and float(bottom) else float(text)
    if get_origin(kind) is Literal:
        return text  # the recipe checks its choices
    if options:  # tuple[int, ...]
        return tuple(parse_value(options[0], part) for part in text.split(",") if part.strip())
    return kind(text)


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" when something known is like `word`, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
