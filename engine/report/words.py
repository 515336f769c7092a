"""Numbers, protocols and runs in words, for a report."""

import math
import re
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from retemper.engine.class_report import Result
from retemper.engine.report.read import Run, as_dict, attack_title, finite


def slug(attack: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", attack.lower()).strip("_") or "attack"


def number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "none"


def percent(value: float) -> str:
    return f"{number(100 * value, 0)} %" if math.isfinite(value) else "none"


def bound(result: Result) -> str:
    """What stands before an accuracy that is only an upper bound."""
    return "≤ " if result.upper_bound else ""


def between(pair: Sequence[float], scale: float, digits: int) -> str:
    low, high = (scale * v for v in pair)
    return f"{low:.{digits}f} to {high:.{digits}f}" if math.isfinite(low + high) else "no interval"


def ends(value_K: np.ndarray) -> str:
    known = value_K[np.isfinite(value_K)]
    return f"{known.min():.2f}..{known.max():.2f}" if len(known) else "nothing"


def wilson_width(count: int) -> float:
    z = 1.96
    return z / math.sqrt(count + z * z)


def pixels(value: Any) -> str:
    """8/255 as such: a distance in pixel units is written in 255ths where it is a whole or half number of them."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return plain(value)
    halves = 2 * 255 * value
    return f"{round(halves) / 2:g}/255" if value and abs(halves - round(halves)) < 1e-3 else f"{value:g}"


def plain(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(v)}" for name, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{40,}", text) else text  # a digest or commit: its beginning will do


def nsd_sentence(subjects: Sequence[tuple[str, Result]]) -> str:
    values = [(name, f"{r.report.nsd:.2f}", r.report.nsd) for name, r in subjects if math.isfinite(r.report.nsd)]
    if len(values) == 2:
        (_, before, a), (_, after, b) = values
        if before == after:
            return f"NSD stays at {before}."
        return f"NSD {'falls' if b < a else 'rises'} from {before} to {after}."
    if not values:
        return ""
    low, high = (pick(values, key=lambda v: v[2]) for pick in (min, max))
    if len(values) == 1:
        return f"NSD is {low[1]}."
    return f"NSD is lowest for {low[0]} ({low[1]}), highest for {high[0]} ({high[1]})."


def protocol_facts(run: Run) -> dict[str, str]:
    """The protocol in words, one line a field; an attack is a field, under its title."""
    facts = {"classes": str(len(run.classes))}
    for name, value in run.protocol.items():
        if name not in ("attacks", "classes", "data_root"):
            facts[name.replace("_", " ")] = pixels(value) if name == "eps" else plain(value)
    settings = as_dict(run.protocol.get("attacks"))
    return facts | {attack_title(a): _attack_settings(as_dict(settings[a])) for a in run.results if a in settings}


def _attack_settings(settings: dict[str, Any]) -> str:
    """In words; a step is in pixel units, as eps."""
    if settings.get("steps") == 0:
        return "no attack"
    return ", ".join(f"{name} {pixels(value) if name == 'step' else plain(value)}" for name, value in settings.items())


def run_facts(run: Run) -> dict[str, str]:
    if run.is_foreign:
        return {"role": "from elsewhere", "network": plain(run.protocol.get("weights"))}
    config, recipe, teacher = run.config, run.recipe, as_dict(run.config.get("teacher"))
    if teacher:
        role = f"taught by {teacher.get('model')} from {teacher.get('path')}"
    else:
        role = f"teacher of {', '.join(run.taught)}" if run.taught else "trained without a teacher"
    seconds = [v for v in (finite(row.get("seconds")) for row in run.metrics) if math.isfinite(v)]
    speed = [v for v in (finite(row.get("images_per_second")) for row in run.metrics) if math.isfinite(v)]
    return {
        "recipe": f"{config.get('method')}:{config.get('setting')}",
        "role": role,
        "variant": plain(recipe.get("variant")),
        "student": plain(recipe.get("student")),
        "epochs": f"{len(run.metrics)} of {recipe.get('epochs', 'unknown')}",
        "training eps": pixels(recipe.get("eps")),
        "seed": plain(config.get("seed")),
        "training time": f"{sum(seconds):,.0f} s" if seconds else "not recorded",
        "images per second": f"{median(speed):,.0f}" if speed else "not recorded",
        "device": plain(config.get("device")),
        "commit": plain(config.get("commit")),
        "versions": plain(config.get("versions")),
        "started": plain(config.get("started")),
        "teacher's digest": plain(teacher.get("sha256")) if teacher else "none",
    }
