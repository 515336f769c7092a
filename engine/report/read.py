"""The folder of one run, read for a report: what is there and makes sense, and what is missing with the command for it.

A folder that holds only an evaluation, as networks trained elsewhere have, is read too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retemper.engine.checkpoints.header import read_header
from retemper.engine.class_report import Result, read_result
from retemper.engine.evaluation.content import read_evaluation
from retemper.engine.evaluation.curve_summary import beaten_text
from retemper.engine.evaluation.places import content_of, fullest, is_stale
from retemper.engine.evaluation.protocols import STANDARD, attack_options, protocol_of
from retemper.engine.report.page import Text
from retemper.engine.run.commands import evaluate_again, train_again
from retemper.engine.run.content import EpochLine
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError
from retemper.files import read_json_lines
from retemper.text import shorten

ATTACKS = {
    "clean": "Clean",
    "fgsm": "FGSM",
    "pgd20": "PGD-20",
    "cw": "CW",
    "pgd-sat": "PGD-SAT",
    "pgd-trades": "PGD-TRADES",
    "autoattack-fast": "AutoAttack, fast suite",
    "autoattack": "AutoAttack",
    "cross-check": "AutoAttack and cross-checks",
    "fmn": "FMN",
}


@dataclass
class RunRecord:
    """The content of one run's folder, as far as a report uses it."""

    folder: Path
    name: str
    evaluation: Path = Path("evaluation.json")  # the file that the results are of
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)  # how evaluation.json names the network
    results: dict[str, Result] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)  # of the evaluation; empty where they were not run
    corruptions: dict[str, Any] = field(default_factory=dict)  # of the evaluation; empty where they were not run
    flags: list[str] = field(default_factory=list)  # warnings of the attacks themselves
    classes: list[str] = field(default_factory=list)
    notes: list[Text] = field(default_factory=list)  # what is missing, and the command that makes it
    taught: list[str] = field(default_factory=list)  # runs of this report that it was the teacher of

    @property
    def is_foreign(self) -> bool:
        """Say whether the network was trained elsewhere: then only its evaluation is known."""
        return not self.config

    @property
    def evaluate(self) -> str:
        """Return the shell command that evaluates the network again."""
        return evaluate_again(self.folder, {"protocol": self.protocol, "asked": self.asked})

    def evaluate_by(self, attack: str) -> str:
        """Return the shell command that runs one attack again, as evaluation.json names it."""
        content = {"protocol": self.protocol, "asked": self.asked}
        return evaluate_again(self.folder, content, **attack_options(attack, self.protocol))

    @property
    def norm(self) -> str:
        """Return the norm of the radius; evaluations of earlier versions are all in L-inf."""
        return self.protocol.get("norm") or "linf"

    def evaluate_at(self, eps: float | None, norm: str) -> str:
        """Return the shell command that evaluates the network at another radius, in the norm of that."""
        protocol = self.protocol | {"eps": eps, "norm": norm}
        return evaluate_again(self.folder, {"protocol": protocol, "asked": self.asked})

    @property
    def recipe(self) -> dict[str, Any]:
        return as_dict(self.config.get("recipe"))

    @property
    def is_teacher(self) -> bool:
        return not self.config.get("teacher") and (bool(self.taught) or "teacher" in self.name.lower())

    @property
    def label(self) -> str:
        return self.name if not self.is_teacher or "teacher" in self.name.lower() else f"{self.name} (teacher)"


def read_run(target: str | Path) -> RunRecord:
    """Read config.json, metrics.jsonl and an evaluation, as far as they are there and make sense.

    Args:
        target: the folder of a run or of an evaluation, of which the fullest is taken; or the file of one.
    Raises:
        DataError: `target` is neither a run nor an evaluation, or its config.json is damaged.
    """
    target = Path(target)
    is_file = target.is_file()
    folder = target.parent if is_file else target
    evaluation = target if is_file else fullest(folder / "evaluation.json")
    name = folder.resolve().name + (f" ({target.stem})" if is_file and target.stem != "evaluation" else "")
    run = RunRecord(folder, name, evaluation)
    trained, evaluated = (folder / "config.json").is_file(), evaluation.is_file()
    if not target.exists():
        raise DataError(f"{target} does not exist: name a run's folder, or an evaluation's")
    if is_file and content_of(target) is None:
        raise DataError(f"{target} is no evaluation: name a run's folder, or an evaluation.json")
    if not trained and not evaluated:
        raise DataError(f"{folder}: neither a run's folder nor an evaluation's (no config.json, no evaluation.json)")
    if trained:
        run.config = RunFolder(folder).read_config()
        _read_metrics(run)
    if evaluated:
        _read_evaluation(run)
    else:
        run.notes.append(Text("Not evaluated yet. To evaluate:", run.evaluate))
    cut = run.protocol.get("training_cut") or read_header(folder / "last.safetensors").get("cut")
    if cut:
        run.notes.append(Text(f"Its training was cut {cut}: these are no numbers of a full run."))
    _name_classes(run)
    return run


def _read_metrics(run: RunRecord) -> None:
    """Read the epochs in order; of an epoch that a resumed run wrote twice, the later line counts."""
    rows, unreadable = read_json_lines(run.folder / "metrics.jsonl", EpochLine)
    epochs = {row["epoch"]: row for row in rows}
    run.metrics = [epochs[epoch] for epoch in sorted(epochs)]
    for row in run.metrics:
        guard = as_dict(row.get("guard"))
        if guard.get("next") != guard.get("attack"):
            own, ten = (f"{as_number(guard.get(name)):.0%}" for name in ("own", "pgd10"))
            seen = f"right on {own} under {guard.get('attack')}, on {ten} under ten steps"
            run.notes.append(Text(f"After epoch {row['epoch']}, {seen}: it was trained on with {guard.get('next')}."))
    if unreadable:
        run.notes.append(Text(f"{unreadable} unreadable lines of metrics.jsonl were left out."))
    if not run.metrics:
        run.notes.append(Text("No epoch has been recorded yet. To train:", train_again(run.config, run.folder)))


def _read_evaluation(run: RunRecord) -> None:
    try:
        evaluation = read_evaluation(run.evaluation, partial=True)
    except DataError:
        evaluation = {}
    run.protocol, run.checks = as_dict(evaluation.get("protocol")), as_dict(evaluation.get("checks"))
    run.asked, run.corruptions = as_dict(evaluation.get("asked")), as_dict(evaluation.get("corruptions"))
    attacks = as_dict(evaluation.get("attacks"))
    if is_stale(run.evaluation, run.protocol):
        weights, run.protocol, run.checks, run.corruptions = run.protocol["weights"], {}, {}, {}
        run.notes.append(
            Text(f"{run.evaluation.name} is of other weights than {weights} has now. To evaluate again:", run.evaluate)
        )
        return
    if not attacks:
        run.notes.append(Text(f"{run.evaluation.name} is damaged. To evaluate again:", run.evaluate))
    for attack, entry in attacks.items():
        title, entry = attack_title(attack), as_dict(entry)
        try:
            run.results[attack] = read_result(entry)
        except (ValueError, OverflowError) as error:
            run.notes.append(Text(f"{title} was left out ({error}). To evaluate again:", run.evaluate))
            continue
        flags = entry.get("flags")
        run.flags += [f"{title}: {flag}" for flag in flags] if isinstance(flags, list) else []
        beats = as_dict(entry.get("beats_autoattack")).items() if len(run.protocol.get("classes") or ()) else ()
        run.flags += [text for name, one in beats if (text := beaten_text(name, one, run.protocol["classes"]))]
        if entry.get("complete") is False:
            finish = run.evaluate_by(attack)
            run.notes.append(Text(f"{title} was interrupted: upper bounds (≤). To finish it:", finish))


def _name_classes(run: RunRecord) -> None:
    """Name the classes, by numbers where no list of names fits, and drop results of another number of classes."""
    names = run.protocol.get("classes") or run.config.get("classes")
    names = [str(name) for name in names] if isinstance(names, list) else []
    sizes = {len(result.report.count) for result in run.results.values()} or {len(names)}
    run.classes = names if sizes == {len(names)} else [str(k) for k in range(max(sizes))]
    for attack, result in list(run.results.items()):
        if len(result.report.count) != len(run.classes):
            del run.results[attack]
            run.notes.append(Text(f"{attack_title(attack)} was left out: it has another number of classes."))


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_number(value: Any) -> float:
    """Return the number as a float, and NaN for anything that is not a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def attack_title(attack: str) -> str:
    name, protocol = protocol_of(attack)
    title = ATTACKS.get(name, shorten(name, 40))
    return title if protocol == STANDARD else f"{title} ({protocol}, weaker)"


def weakest_first(accuracy_K: Sequence[float]) -> list[int]:
    """Return the classes sorted by accuracy; those without images come last."""
    return np.argsort(np.nan_to_num(accuracy_K, nan=math.inf), kind="stable").tolist()
