"""The shape of what is read back: whether JSON holds what its reader relies on, by the types that its writer declares.

A shape is a `TypedDict`, a dataclass, or a type of plain values: `list[float | None]`, `dict[str, int]`. Fields that a
shape does not declare may hold anything, as files of other versions do.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

DEEPEST = 40  # brackets within brackets; what we write has 6
LARGEST = 2**63  # whole numbers from here on do not fit into an array
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


class PathText(str):
    """The shape of a text that names a file: one that a file system takes."""


def parse_json(data: bytes) -> Any:
    """Return the value that UTF-8 JSON holds.

    Raises:
        ValueError: it is no such JSON, or holds what could not be written again or counted with: NaN, a number out of
            range, brackets too deep.
    """
    try:
        value = json.loads(data.decode())
    except RecursionError:
        raise ValueError(f"brackets are nested more than {DEEPEST} deep") from None
    _require_plain(value, 0)
    return value


def misfit(value: Any, kind: Any, partial: bool = False, at: str = "") -> str | None:
    """Return in words where `value` does not have the shape `kind`, or None where it has.

    Args:
        partial: whether a field that is missing is none that does not fit.
        at: the name of the value, which the words begin with.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if origin in (Union, UnionType):
        found = [misfit(value, one, partial, at) for one in inner]
        return None if None in found else found[0]
    if is_typeddict(kind) or is_dataclass(kind):
        return _misfit_of_object(value, kind, partial, at)
    if origin is dict or kind is dict:
        each = (
            ((name, item, (*inner, Any, Any)[1]) for name, item in value.items()) if isinstance(value, dict) else None
        )
        return _not(value, "an object", at) if each is None else _first(each, partial, f"{at}." if at else "")
    if origin in (list, tuple) or kind is list:
        return _misfit_of_list(value, origin, inner, partial, at)
    if kind is PathText:
        return misfit(value, str, partial, at) or (None if _names_a_file(value) else _not(value, "a path", at))
    kinds = (int, float) if kind is float else kind
    fits = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    return None if fits else _not(value, WORDS[kind], at)


def _misfit_of_object(value: Any, kind: Any, partial: bool, at: str) -> str | None:
    if not isinstance(value, dict):
        return _not(value, "an object", at)
    required = {one.name for one in fields(kind)} if is_dataclass(kind) else kind.__required_keys__
    before = f"{at}." if at else ""
    for name in sorted(required - value.keys()):
        if not partial:
            return f"it has no {before}{name}"
    hints = get_type_hints(kind)
    return _first(((name, value[name], one) for name, one in hints.items() if name in value), partial, before)


def _misfit_of_list(value: Any, origin: Any, inner: tuple[Any, ...], partial: bool, at: str) -> str | None:
    if not isinstance(value, list | tuple):
        return _not(value, "a list", at)
    fixed = origin is tuple and Ellipsis not in inner
    if fixed and len(value) != len(inner):
        return f"{at or 'it'} holds {len(value)} values, not {len(inner)}"
    kinds = inner if fixed else (*inner, Any)[:1] * len(value)
    each = ((f"[{number}]", item, one) for number, (item, one) in enumerate(zip(value, kinds, strict=True)))
    return _first(each, partial, at)


def _first(each: Iterable[tuple[str, Any, Any]], partial: bool, before: str) -> str | None:
    """Return the first misfit of named values, or None."""
    found = (misfit(item, kind, partial, f"{before}{name}") for name, item, kind in each)
    return next((words for words in found if words is not None), None)


def _not(value: Any, words: str, at: str) -> str:
    shown = {dict: "an object", list: "a list"}.get(type(value)) or (json.dumps(value, default=str))
    return f"{at or 'it'} is {shown if len(shown) < 40 else shown[:40] + '...'}, not {words}"


def _require_plain(value: Any, depth: int) -> None:
    """Raise ValueError as `parse_json` does."""
    if depth > DEEPEST:
        raise ValueError(f"brackets are nested more than {DEEPEST} deep")
    if (isinstance(value, int) and abs(value) >= LARGEST) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("a number is out of range")
    if isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _require_plain(item, depth + 1)


def _names_a_file(text: str) -> bool:
    """Say whether a file system could have a file of that name."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
