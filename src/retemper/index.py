"""The index of the recipes: what the help, `retemper ls` and completion say of them, without importing PyTorch.

`index.json` holds it. `python -m retemper.index` writes it from the recipe files, and a test holds it to them. Where a
source is another than the one it was made from, the recipe files are asked, which takes as long as importing PyTorch.
"""

import hashlib
import importlib
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from retemper.errors import UsageError, nearest
from retemper.files import write_json
from retemper.options import Option, shown_value

PACKAGE = Path(__file__).parent
FILE = PACKAGE / "index.json"
SOURCES = (  # what the index is made of, besides the recipe files
    *("engine/catalogue.py", "engine/recipe.py", "engine/groups.py", "engine/data_options.py"),
    "engine/speed/execution.py",
    *("engine/models/__init__.py", "loaders/datasets.py", "options.py", "index.py"),
)
KINDS = {
    _word: _kind
    for _kind in (bool, int, float, str, int | None, float | None, str | None, tuple[int, ...], tuple[float, ...])
    for _word in (_kind.__name__ if isinstance(_kind, type) else str(_kind),)
}


@dataclass(frozen=True)
class Listed:
    """A setting of a method.

    Attributes:
        name: METHOD:SETTING.
        paper: where the method was published.
        note, status: as in `Setting`.
        options: each option with its group, by flat name.
        values: of the options, as one types them.
    """

    name: str
    paper: str
    note: str
    status: str
    is_trained: bool
    options: Mapping[str, tuple[str, Option]]
    values: Mapping[str, str]


@dataclass(frozen=True)
class Index:
    """The recipes, by method and by setting, and the names of the networks and the data sets."""

    models: tuple[str, ...]
    datasets: tuple[str, ...]
    methods: Mapping[str, Mapping[str, Listed]]

    def find(self, name: str) -> Listed:
        """Return the setting that METHOD:SETTING means. Raises UsageError as `split_name`."""
        method, setting = split_name(name, self.methods)
        return self.methods[method][setting]


def split_name(name: str, methods: Mapping[str, Collection[str]]) -> tuple[str, str]:
    """Return the method and the setting that METHOD:SETTING means.

    Raises:
        UsageError: it is unknown; the message names the nearest.
    """
    method, _, setting = name.partition(":")
    if method not in methods:
        raise UsageError(f"there is no method {method!r}{nearest(method, methods)}; see retemper ls")
    settings = methods[method]
    if setting in settings:
        return method, setting
    what = f"has no setting {setting!r}{nearest(setting, settings)}"
    what = what if setting else f"needs a setting, as in {method}:{next(iter(settings))}"
    raise UsageError(f"{method} {what}; it has {', '.join(settings)}")


def read_index() -> Index:
    """Return the index, from its file where that is of these sources, else from the recipes."""
    return _read_index(sources_digest())


@cache
def _read_index(sources: str) -> Index:
    try:
        content = json.loads(FILE.read_text())
        if content["sources"] == sources:
            return from_json(content)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):  # absent, or no index
        pass
    return from_json(make_index())


def make_index() -> dict[str, Any]:
    """Return the index as JSON has it, from the recipes: PyTorch is imported."""
    # by its name: the index lies below the engine, and no module imports from above it
    return {"sources": sources_digest(), **importlib.import_module("retemper.engine.catalogue").described()}


def sources_digest() -> str:
    """Return the SHA-256 of the sources, 64 hexadecimal digits."""
    folders = importlib.import_module("retemper.recipes").__path__  # as `make_index` imports what lies above
    paths = [PACKAGE / name for name in SOURCES]
    paths += sorted(path for folder in folders for path in Path(folder).glob("*.py"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    lines = [f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def option_json(group: str, one: Option) -> dict[str, Any]:
    """Return an option of a group as the index shows it, with its default as one types it."""
    kind = one.kind.__name__ if isinstance(one.kind, type) else str(one.kind)
    default = None if one.default is MISSING else shown_value(one.default)
    return {**asdict(one), "group": group, "kind": kind if kind in KINDS else "str", "default": default}


def from_json(content: Mapping[str, Any]) -> Index:
    """Return the index that the JSON shows."""
    methods = {}
    for method, of in content["methods"].items():
        methods[method] = {}
        for name, found in of["settings"].items():
            shown = [one for group in found.pop("groups") for one in content["groups"][group]]
            found["options"] = {one["name"]: (one["group"], _option(one)) for one in shown}
            found["values"] = {one["name"]: one["default"] for one in shown} | found["values"]
            methods[method][name] = Listed(name=f"{method}:{name}", paper=of["paper"], **found)
    return Index(tuple(content["models"]), tuple(content["datasets"]), methods)


def _option(shown: Mapping[str, Any]) -> Option:
    choices = None if shown["choices"] is None else tuple(shown["choices"])
    known = {name: value for name, value in shown.items() if name != "group"}
    return Option(**{**known, "kind": KINDS[shown["kind"]], "choices": choices})


if __name__ == "__main__":
    write_json(FILE, make_index())
