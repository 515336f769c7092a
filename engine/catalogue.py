"""The recipes that there are: a module of `retemper.recipes` with `SETTINGS` is a method, and they are its settings."""

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

from retemper.console import say
from retemper.engine.device import is_out_of_memory
from retemper.engine.models import MODELS
from retemper.engine.recipe import GROUPS, Recipe, Setting
from retemper.errors import UsageError, nearest
from retemper.index import option_json, split_name
from retemper.loaders import DATASETS
from retemper.options import options_of, read_options, shown_value


def methods() -> list[str]:
    """Return the names of all methods, sorted."""
    package = importlib.import_module("retemper.recipes")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if _has_settings(name)]


@cache
def _has_settings(name: str) -> bool:
    """Say whether a recipe file has settings; one that cannot be imported is told of, once, and left out."""
    try:
        return hasattr(importlib.import_module(f"retemper.recipes.{name}"), "SETTINGS")
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        say(f"warning: recipes/{name}.py is left out: {type(error).__name__}: {error}")
        return False


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
    settings = {method: method_module(method).SETTINGS for method in methods()}
    method, setting = split_name(name, settings)
    return method, setting, settings[method][setting]


def override(recipe: Recipe, texts: dict[str, str]) -> Recipe:
    """Return the recipe with options replaced by what the user wrote, by flat name.

    Raises:
        UsageError: there is no such option (the message names the nearest), it may not have such a value, or two
            options contradict each other.
    """
    values = read_options({name: one for name, (_, one) in recipe.options().items()}, texts)
    try:
        return recipe.named_in(values).replace(**values)  # in this order, so that what else the user wrote holds
    except ValueError as error:
        raise UsageError(str(error)) from None


def described() -> dict[str, Any]:
    """Return what the index (`retemper.index`) holds of the recipes, as JSON."""
    tables: dict[str, dict[str, Setting]] = {method: method_module(method).SETTINGS for method in methods()}
    settings = [setting for table in tables.values() for setting in table.values()]
    groups = {type(setting.recipe.method): "method" for setting in settings} | {of: name for name, of in GROUPS.items()}
    return {
        "models": list(MODELS),
        "datasets": list(DATASETS),
        "groups": {
            of.__name__: [option_json(name, one) for one in options_of(of).values()] for of, name in groups.items()
        },
        "methods": {
            method: {"paper": source_of(method), "settings": {name: _described(one) for name, one in table.items()}}
            for method, table in tables.items()
        },
    }


def _described(setting: Setting) -> dict[str, Any]:
    """Return a setting with the groups that its options are of, and the values that are not the defaults."""
    recipe = setting.recipe
    groups = [type(group).__name__ for group in vars(recipe).values()]
    values = {name: value for name, value in recipe.flat().items() if value != recipe.options()[name][1].default}
    return {
        "note": setting.note,
        "status": setting.status,
        "is_trained": setting.is_trained,
        "groups": groups,
        "values": {name: shown_value(value) for name, value in values.items()},
    }
