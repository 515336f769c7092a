"""The recipes that there are: a module of `retemper.recipes` with `SETTINGS` is a method, and they are its settings."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from retemper.engine.recipe import Recipe, Setting
from retemper.errors import UsageError, nearest


def methods() -> list[str]:
    """Return the names of all methods, sorted."""
    package = importlib.import_module("retemper.recipes")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"retemper.recipes.{name}"), "SETTINGS")]


def method_module(method: str) -> ModuleType:
    """Return the recipe file of `method`.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if method not in methods():
        raise UsageError(f"there is no method {method!r}{nearest(method, methods())}; see retemper ls")
    return importlib.import_module(f"retemper.recipes.{method}")


def source_of(method: str) -> str:
    """Return the paper that the recipe file of `method` names in its first line, as "Zhao et al., NeurIPS 2024"."""
    return (method_module(method).__doc__ or "").partition("\n")[0].rpartition("(")[2].rstrip(").")


def find_setting(name: str) -> tuple[str, str, Setting]:
    """Return the method's name, the setting's name and the setting that METHOD:SETTING means.

    Raises:
        UsageError: it is unknown; the message names the nearest.
    """
    method, _, setting = name.partition(":")
    settings: dict[str, Setting] = method_module(method).SETTINGS
    if setting in settings:
        return method, setting, settings[setting]
    what = f"has no setting {setting!r}{nearest(setting, settings)}"
    what = what if setting else f"needs a setting, as in {method}:{next(iter(settings))}"
    raise UsageError(f"{method} {what}; it has {', '.join(settings)}")


def override(recipe: Recipe, texts: dict[str, str]) -> Recipe:
    """Return the recipe with options replaced by what the user wrote, by flat name.

    Raises:
        UsageError: there is no such option (the message names the nearest), or it may not have such a value.
    """
    options, values = recipe.options(), {}
    for name, text in texts.items():
        if name not in options:
            known = ", ".join(sorted(options))
            raise UsageError(f"the recipe has no field {name!r}{nearest(name, options)}; it has {known}")
        try:
            values[name] = parse_value(options[name][1].kind, text)
        except ValueError as error:
            raise UsageError(f"--{name.replace('_', '-')} {text}: {error}") from None
    try:
        if "variant" in values:  # first, so that what else the user wrote holds
            recipe = recipe.as_variant(values["variant"])
        return recipe.replace(**values)
    except ValueError as error:
        raise UsageError(str(error)) from None


def parse_value(kind: Any, text: str) -> Any:
    """Return `text` as a value of the annotated type.

    Args:
        kind: int, float (also "8/255"), bool, str, a Literal, tuple[int, ...] ("215,260"), or one of these or None.
    Raises:
        ValueError: `text` is no such value.
    """
    options = get_args(kind)
    if type(None) in options:
        return None if text.lower() == "none" else parse_value(options[0], text)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("say true or false")
        return text.lower() == "true"
    if kind is float:
        top, slash, bottom = text.partition("/")
        try:
            return float(top) / float(bottom) if slash else float(text)
        except (ValueError, ZeroDivisionError):
            raise ValueError("it must be a number or a fraction, as 0.03 or 8/255") from None
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError("it must be a whole number") from None
    if get_origin(kind) is Literal:
        return text  # the recipe checks its choices
    if options:  # tuple[int, ...]
        return tuple(parse_value(options[0], part) for part in text.split(",") if part.strip())
    return kind(text)
