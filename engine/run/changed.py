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


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any], method: type[Method] = Method) -> list[str]:
    """Return the options by which `new` leads to another run than `old`, both as `flat_options` returns them.

    An option that `old` is too old to have counts as its default, which is what was done before there was a choice.

    Args:
        method: that of `new`, whose own options have defaults too.
    """
    defaults = {one.name: one.default for kind in (method, *GROUPS.values()) for one in options_of(kind).values()}
    before = {name: old.get(name, defaults.get(name)) for name in new}
    changed = [name for name in new if _plain(before[name]) != _plain(new[name])]
    return [name for name in changed if EXACTNESS.get(name) != "bitwise"]


def _plain(value: Any) -> Any:
    """Return an option's value as a config.json has it."""
    return [*value] if isinstance(value, tuple) else value
