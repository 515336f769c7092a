"""The commands that go on with a run or an evaluation, whole: with the options that it was made with.

Paths in config.json and evaluation.json are absolute, so that a command that names them works in any folder.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retemper.commands import command
from retemper.engine.catalogue import find_setting
from retemper.engine.checkpoints.header import is_run
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError, UsageError
from retemper.loaders import usual_eps

SOURCES = ("teacher", "clean_teacher", "start")  # the networks that config.json names
BATCH_SIZE = 256  # of an evaluation for which none is named


def absolute(path: str | Path | None) -> str | None:
    """Return a path as it is written to a file; also that of a network in net.py:build. None stays None."""
    return None if path is None else str(path) if str(path).startswith("robustbench:") else os.path.abspath(path)


def train_again(config: Mapping[str, Any], out: Path) -> str:
    """Return the command that goes on with a run, or makes it again where it was evened.

    Args:
        config: what `RunFolder.read_config` returns.
        out: the run's folder.
    """
    if evened := config.get("evened"):
        weights = None if evened.get("weights", "best") == "best" else evened["weights"]
        where = {"out": out, "data_root": config.get("data_root"), "weights": weights}
        return command("retemper", "even", config["start"]["path"], by=evened["by"], **where)
    name = f"{config['method']}:{config['setting']}"
    named = {what: (config.get(what) or {}).get("path") for what in (*SOURCES, "extra")}
    where = {"out": out, "seed": config["seed"] or None, "data_root": config.get("data_root")}
    return command("retemper", "train", name, **where, **named, **_overridden(name, config["recipe"]))


def _overridden(name: str, recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return the options of `recipe`, by flat name, that are not the setting's own, as one types them."""
    try:
        setting = find_setting(name)[2].recipe
        own = setting.named_in(recipe)
    except (UsageError, ValueError):  # a setting or a variant of an earlier version
        return {}
    untyped = {option: setting.flat()[option] for option in ("variant", "preset")}
    typed = {option: _typed(value) for option, value in (own.flat() | untyped).items()}
    now = {option: _typed(recipe[option]) for option in own.flat() if option in recipe}
    return {option: text for option, text in now.items() if text != typed[option]}


def _typed(value: Any) -> str:
    """Return an option's value so that the command line reads the very same one."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return _number(value)
    return ",".join(map(_typed, value)) if isinstance(value, tuple | list) else str(value)


def evaluate_again(folder: Path, content: Mapping[str, Any], **attack: object) -> str:
    """Return the command that evaluates a network again under the protocol that it was evaluated under.

    Args:
        folder: that of the run or, for a network from elsewhere, of its evaluation.
        content: of evaluation.json; empty where there is none yet.
        attack: the options of the one attack to run (`attack_options`); none for those that are run by default.
    """
    protocol = content.get("protocol") or {}
    before = {} if is_run(folder) else {"target": protocol.get("weights"), "dataset": protocol.get("dataset")}
    asked = content.get("asked") or before  # files of earlier versions do not hold it
    try:
        config = RunFolder(folder).read_config() if is_run(folder) else {}
    except DataError:
        config = {}
    root, eps, limited = protocol.get("data_root"), protocol.get("eps"), protocol.get("subset", "all") != "all"
    norm = protocol.get("norm") or "linf"
    options = {
        "norm": None if norm == "linf" else norm,
        "model": asked.get("model"),
        "dataset": asked.get("dataset"),
        "data_root": None if root == config.get("data_root") else root,
        "eps": None if eps in (None, usual_eps(str(protocol.get("dataset")), norm)) else _typed(eps),
        "limit": protocol.get("images") if limited else None,
        "seed": protocol.get("seed") or None,
        "batch_size": None if protocol.get("batch_size") == BATCH_SIZE else protocol.get("batch_size"),
        "weights": "last" if is_run(folder) and protocol.get("weights") == "last.safetensors" else None,
        "out": None if is_run(folder) else folder,
    }
    target = folder if is_run(folder) else asked.get("target") or "NETWORK"
    return command("retemper", "evaluate", target, **options, **attack)


def _number(value: float) -> str:
    """Return a number so that the command line reads the very same one: 0.15, 8/255."""
    pixels = round(255 * value)
    return f"{pixels}/255" if pixels / 255 == value and pixels % 255 else str(value)
