"""A run's folder read for a report: what is there and makes sense, and a note with a command for what is missing.

A folder that holds an evaluation alone, as networks from elsewhere have, is read too.

Dimension key: K classes.
"""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from retemper.engine.class_report import Result, read_result
from retemper.engine.report.plot_style import shorten
from retemper.engine.report.plots import StatePanel
from retemper.errors import DataError
from retemper.files import read_json

ATTACKS = {
    "clean": "Clean",
    "fgsm": "FGSM",
    "pgd20": "PGD-20",
    "cw": "CW",
    "autoattack-fast": "AutoAttack, fast suite",
    "autoattack": "AutoAttack",
}
LR_DROP = 0.6  # a rate below this part of the epoch before is a drop, not a smooth decay


@dataclass
class Run:
    """One run's folder as far as it could be read; `notes` say what is missing and how to make it."""

    folder: Path
    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    protocol: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)  # of the evaluation; empty where they were not run
    flags: list[str] = field(default_factory=list)  # what the attacks themselves complained about
    classes: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)  # what is missing, the command for it
    taught: list[str] = field(default_factory=list)  # runs of this report that it was the teacher of

    @property
    def is_foreign(self) -> bool:
        """Whether the network was not trained by us: all that is known of it is its evaluation."""
        return not self.config

    @property
    def target(self) -> str:
        """What `retemper evaluate` is told to evaluate it again, as a shell takes it."""
        if not self.is_foreign:
            return shlex.quote(str(self.folder))
        return f"{shlex.quote(str(self.protocol.get('weights', 'NETWORK')))} --out {shlex.quote(str(self.folder))}"

    @property
    def recipe(self) -> dict[str, Any]:
        return as_dict(self.config.get("recipe"))

    @property
    def is_teacher(self) -> bool:
        return not self.config.get("teacher") and (bool(self.taught) or "teacher" in self.name.lower())

    @property
    def label(self) -> str:
        return self.name if not self.is_teacher or "teacher" in self.name.lower() else f"{self.name} (teacher)"


def read_run(folder: Path) -> Run:
    """Read config.json, and of metrics.jsonl and evaluation.json what is there and makes sense.

    Raises:
        DataError: neither a run nor an evaluation is in `folder`.
    """
    trained, evaluated = ((folder / name).is_file() for name in ("config.json", "evaluation.json"))
    if not trained and not evaluated:
        raise DataError(f"{folder}: neither a run's folder nor an evaluation's (no config.json, no evaluation.json)")
    config = read_json(folder / "config.json") if trained else {}
    run = Run(folder, folder.resolve().name, config, [])
    if trained:
        train = f"retemper train {config.get('method')}:{config.get('setting')} --out {shlex.quote(str(folder))}"
        run.metrics, broken = _read_metrics(folder / "metrics.jsonl")
        if broken:
            run.notes.append((f"{broken} unreadable lines of metrics.jsonl were left out.", ""))
        if not run.metrics:
            run.notes.append(("No epoch has been recorded yet. To train:", train))
    evaluation = {}
    if evaluated:
        try:
            evaluation = read_json(folder / "evaluation.json")
        except DataError:
            pass  # told below
    run.protocol, run.checks = as_dict(evaluation.get("protocol")), as_dict(evaluation.get("checks"))
    evaluate = f"retemper evaluate {run.target}"
    if not evaluated:
        run.notes.append(("Not evaluated yet. To evaluate:", evaluate))
    elif not as_dict(evaluation.get("attacks")):
        run.notes.append(("evaluation.json is damaged. To evaluate again:", evaluate))
    for attack, entry in as_dict(evaluation.get("attacks")).items():
        try:
            run.results[attack] = read_result(as_dict(entry))
            flags = as_dict(entry).get("flags")
            run.flags += [f"{attack_title(attack)}: {flag}" for flag in flags] if isinstance(flags, list) else []
            if as_dict(entry).get("complete") is False:
                finish = f"{evaluate} --attacks {shlex.quote(attack)}"
                run.notes.append((f"{attack_title(attack)} was interrupted: upper bounds (≤). To finish it:", finish))
        except (ValueError, OverflowError) as error:
            run.notes.append((f"{attack_title(attack)} was left out ({error}). To evaluate again:", evaluate))
    _name_classes(run)
    return run


def _name_classes(run: Run) -> None:
    names = run.protocol.get("classes") or run.config.get("classes")
    names = [str(name) for name in names] if isinstance(names, list) else []
    sizes = {len(result.report.count) for result in run.results.values()} or {len(names)}
    run.classes = names if sizes == {len(names)} else [str(k) for k in range(max(sizes))]
    for attack, result in list(run.results.items()):
        if len(result.report.count) != len(run.classes):
            del run.results[attack]
            run.notes.append((f"{attack_title(attack)} was left out: it has another number of classes.", ""))


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The epochs in order, the last line of each where a resumed run wrote it twice; and the unreadable lines."""
    epochs, broken = {}, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            epochs[int(row["epoch"])] = row
        except (ValueError, KeyError, TypeError, OverflowError):
            broken += bool(line.strip())
    return [epochs[epoch] for epoch in sorted(epochs)], broken


def find_teachers(runs: Sequence[Run]) -> None:
    """A run whose folder another run's teacher came from taught that run; a moved folder is known by its name."""
    for student in runs:
        path = as_dict(student.config.get("teacher")).get("path")
        if not isinstance(path, str):
            continue
        homes = {Path(path).name, Path(path).parent.name}
        for run in runs:
            if run is not student and run.name in homes:
                run.taught.append(student.name)


def tell_apart(runs: Sequence[Run]) -> None:
    for rename in (
        lambda run, i: f"{run.folder.resolve().parent.name}/{run.name}",
        lambda run, i: f"{run.name} ({i + 1})",
    ):
        labels = [run.label for run in runs]
        for i, run in enumerate(runs):
            if labels.count(labels[i]) > 1:
                run.name = rename(run, i)


def state_panels(run: Run, attack: str) -> list[StatePanel]:
    """The lists of K numbers in a run's metrics that are neither its losses nor its accuracies."""
    size = len(run.classes)
    keys = dict.fromkeys(
        key
        for row in run.metrics
        for key, value in row.items()
        if not key.startswith(("class_loss", "class_accuracy")) and isinstance(value, list) and len(value) == size
    )
    weakest = []
    if attack in run.results:
        order = np.argsort(np.nan_to_num(run.results[attack].report.accuracy, nan=math.inf), kind="stable")
        weakest = [int(k) for k in order[: min(3, -(-size // 3))]]
    panels = []
    for key in keys:
        rows = [row for row in run.metrics if isinstance(row.get(key), list) and len(row[key]) == size]
        values = np.array([[finite(v) for v in row[key]] for row in rows])
        if np.isfinite(values).any():
            panels.append(StatePanel(run.label, key, [int(row["epoch"]) for row in rows], values, weakest))
    return panels


def curves_of(metrics: list[dict[str, Any]], held_out: bool) -> dict[str, Any]:
    """(epochs, values) of the three curves, and the epochs that begin at a lower rate."""
    points: dict[str, list[tuple[int, float]]] = {"loss": [], "average": [], "worst": []}
    for row in metrics:
        scores = as_dict(row.get("holdout"))
        if not held_out and isinstance(row.get("class_accuracy"), list):
            known = [v for v in map(finite, row["class_accuracy"]) if math.isfinite(v)]
            scores = {"average": sum(known) / len(known), "worst": min(known)} if known else {}
        for name in points:
            value = finite((row if name == "loss" else scores).get(name))
            if math.isfinite(value):
                points[name].append((int(row["epoch"]), value))
    rates = [(int(row["epoch"]), finite(row.get("lr"))) for row in metrics]
    drops = [e for (_, before), (e, after) in pairwise(rates) if after < LR_DROP * before]
    return {name: tuple(map(list, zip(*p, strict=True))) or ([], []) for name, p in points.items()} | {"drops": drops}


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def finite(value: Any) -> float:
    """The number, or NaN for whatever is none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def attack_title(attack: str) -> str:
    return ATTACKS.get(attack, shorten(attack, 40))
