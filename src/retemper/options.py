"""Options of a run: each is a field of a small frozen value, and its meaning is said once, where the field is defined.

The command line, its help and `config.json` know an option by one flat name, such as `attack_steps`, whichever value it
is a field of. A field whose own name is shorter (`TrainingAttack.steps`) says its flat name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    name: str | None = None,
    choices: Sequence[str | None] | str | None = None,
    positive: bool = False,
) -> Any:
    """Return a dataclass field that is an option.

    Args:
        default: its value where the user and the recipe give none; without one the recipe must.
        help: one line for the command line: what it is, with the unit.
        name: its flat name, where the field's own is another.
        choices: the values that it may have, or the name of the class attribute that holds them. A `Literal` says
            its own.
        positive: whether a number must be above 0. Numbers must be finite and not negative in any case.
    """
    return field(default=default, metadata={"help": help, "name": name, "choices": choices, "positive": positive})


@dataclass(frozen=True)
class Option:
    """One option: the words that `option` was given, and the name and the annotated type of its field.

    Attributes:
        name: its flat name.
        choices: None where any value of the type will do.
    """

    name: str
    attribute: str
    kind: Any
    default: Any
    help: str
    choices: tuple[str | None, ...] | None
    positive: bool

    def check(self, value: Any) -> None:
        """Raise ValueError where `value` is none that the option may have."""
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{self.name} = {value!r}: it must be one of {', '.join(map(str, self.choices))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{self.name} = {value}: it must be a finite number")
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{self.name} = {value}: it must not be negative")
        if self.positive and value is not None and value <= 0:
            raise ValueError(f"{self.name} = {value}: it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options. Making one checks each value.

    Raises:
        ValueError: a value is not of those that the option may have; the message begins with the flat name.
    """

    def __post_init__(self) -> None:
        for one in options_of(type(self)).values():
            one.check(getattr(self, one.attribute))


@cache
def options_of(group: type[Options]) -> Mapping[str, Option]:
    """Return the options of a group by flat name, in the order of the class."""
    kinds, found = get_type_hints(group), {}
    for one in fields(group):
        kind, given = kinds[one.name], dict(one.metadata)
        choices = given.pop("choices")
        if isinstance(choices, str):
            choices = getattr(group, choices)
        elif choices is None and get_origin(kind) is Literal:
            choices = get_args(kind)
        choices = None if choices is None else tuple(choices)
        name = given.pop("name") or one.name
        found[name] = Option(name, one.name, kind, one.default, choices=choices, **given)
    return found
