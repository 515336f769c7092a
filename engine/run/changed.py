"""What differs between the recipes of two runs, as their config.json have them."""

from collections.abc import Mapping
from typing import Any

from retemper.engine.recipe import GROUPS, Method
from retemper.engine.speed.execution import EXACTNESS
from retemper.options import options_of


def flat_options(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a config.json by flat name, whether it shows groups or, as earlier versions, none."""
    flat: dict[str, Any] = {}
    for name, value in shown.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the options by which `new` leads to another run than `old`, both as `flat_options` returns them.

    An option that `old` is too old to have counts as its default, which is what was done before there was a choice.
    """
    defaults = {one.name: one.default for kind in (Method, *GROUPS.values()) for one in options_of(kind).values()}
    before = {name: old.get(name, defaults.get(name)) for name in new}
    return [name for name in new if before[name] != new[name] and EXACTNESS.get(name) != "bitwise"]
