"""Options of a run: each is a field of a small frozen value, and its meaning is said once, where the field is defined.

The command line, its help and `config.json` know an option by one flat name, such as `attack_steps`, whichever value it
is a field of. A field whose own name is shorter (`TrainingAttack.steps`) says its flat name.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from retemper.errors import UsageError, nearest

MOST_EPOCHS = 2**16 - 1  # an epoch's number has 16 bits in the seed of its noise
FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<factory>\w+)")  # of the user's own file
TIMM = re.compile(r"timm:[\w.]+")  # a network of the package timm


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    name: str | None = None,
    choices: Sequence[str | None] | str | None = None,
    positive: bool = False,
    at_most: float | None = None,
    or_file: bool = False,
    or_timm: bool = False,
) -> Any:
    """Return a dataclass field that is an option.

    Args:
        default: its value where the user and the recipe give none; without one the recipe must.
        help: one line for the command line: what it is, with the unit.
        name: its flat name, where the field's own is another.
        choices: the values that it may have, or the name of the class attribute that holds them. A `Literal` says
            its own.
        positive: whether a number must be above 0. Numbers must be finite and not negative in any case.
        at_most: the largest number that can be meant. It bounds each value of a tuple, as `positive` does.
        or_file: whether a function of the user's own, as net.py:build, may stand in place of a choice.
        or_timm: whether a network of timm may, as timm:NAME.
    """
    about = {"help": help, "name": name, "choices": choices, "positive": positive, "at_most": at_most}
    return field(default=default, metadata=about | {"or_file": or_file, "or_timm": or_timm})


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
    at_most: float | None
    or_file: bool = False
    or_timm: bool = False

    def check(self, value: Any) -> None:
        """Raise ValueError where `value` is none that the option may have."""
        if (self.or_file and FUNCTION.fullmatch(str(value))) or (self.or_timm and TIMM.fullmatch(str(value))):
            return
        timm = ", timm:NAME" * self.or_timm
        if self.or_file and value not in (self.choices or ()):
            known = [choice for choice in self.choices or () if choice]
            own = f"it must be one of {', '.join(known)}{timm}, or your own as net.py:build"
            raise ValueError(f"--{self.name.replace('_', '-')} {value}{nearest(str(value), known)}: {own}")
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{self.name} = {value!r}: it must be one of {', '.join(map(str, self.choices))}{timm}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                self._check_number(number)

    def _check_number(self, number: float) -> None:
        if isinstance(number, float) and not math.isfinite(number):
            wrong = "it must be a finite number"
        elif self.positive and number <= 0:
            wrong = "it must be above 0"
        elif number < 0:
            wrong = "it must not be negative"
        elif self.at_most is not None and number > self.at_most:
            wrong = f"it must lie {'above 0, at most' if self.positive else 'between 0 and'} {self.at_most:g}"
        else:
            return
        raise ValueError(f"{self.name} = {str(number)[:30]}: {wrong} ({self.help})")


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


def read_options(options: Mapping[str, Option], texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of options that the user wrote, by flat name.

    Raises:
        UsageError: there is no such option (the message names the nearest), or it may not have such a value.
    """
    values = {}
    for name, text in texts.items():
        if name not in options:
            known = ", ".join(sorted(options))
            raise UsageError(f"the recipe has no field {name!r}{nearest(name, options)}; it has {known}")
        try:
            values[name] = parse_value(options[name].kind, text)
        except ValueError as error:
            raise UsageError(f"--{name.replace('_', '-')} {text}: {error}") from None
        try:
            options[name].check(values[name])
        except ValueError as error:
            raise UsageError(str(error)) from None
        if options[name].or_file and (own := FUNCTION.fullmatch(text)):
            if not Path(own["file"]).is_file():
                raise UsageError(f"--{name.replace('_', '-')} {text}: there is no file {own['file']}")
            values[name] = os.path.abspath(text)  # so that the run is known in any folder
    return values


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
        parts = [] if text.lower() == "none" else text.split(",")
        return tuple(parse_value(options[0], part) for part in parts if part.strip())
    return kind(text)


def shown_value(value: Any) -> str:
    """Return an option's value as one types it: 8/255, true, 215,260, none."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(shown_value, value)) or "none"
    if isinstance(value, float):
        if float(f"{value:g}") != value:  # no short decimal: a pixel value or a third of one, or a weight such as 5/6
            for bottom in (255, 6, 765):
                if value == round(value * bottom) / bottom:
                    return f"{round(value * bottom)}/{bottom}"
        return f"{value:g}"
    return str(value)


def require_order(group: Options, lower: str, upper: str) -> None:
    """Raise ValueError where the option `lower` of a group is above its option `upper`."""
    least, most = getattr(group, lower), getattr(group, upper)
    if least > most:
        raise ValueError(f"{lower} = {least}: it must be at most {upper} = {most}")
