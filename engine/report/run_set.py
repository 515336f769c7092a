"""The runs of one report, and what holds for them together."""

from collections.abc import Sequence
from pathlib import Path

from retemper.engine.class_report import Result
from retemper.engine.evaluation.norms import NORMS
from retemper.engine.evaluation.verdicts import STRONGEST
from retemper.engine.report.facts import protocol_facts
from retemper.engine.report.figures import looks
from retemper.engine.report.fonts import find_fonts
from retemper.engine.report.read import ATTACKS, RunRecord, as_dict, attack_title
from retemper.engine.report.words import at_most, isolated, percent
from retemper.loaders import usual_eps
from retemper.text import shorten, shorten_all

CLASS, SAID, RUN = 60, 40, 40  # columns of a class's name in a table, and in a sentence; of a run's
COMPARED = ("dataset", "split", "images", "subset", "eps", "norm", "precision", "seed", "classes")  # of a protocol


class RunSet:
    """The runs of one report, side by side.

    Attributes:
        look: the colours, hatches and marks of each run, by its label.
        names: of the classes, as tables show them: on one line, no two the same.
        drawn: what figures call the classes.
        fonts: of the figures, the first that has a letter first.
        evaluated: the runs that have results.
        eps, norm: the radius of the report: the data set's usual one where a run was evaluated at it, else the first
            run's; and the norm of it.
        comparable: the evaluated runs at that radius with the classes of the first; tables and figures are of these.
        elsewhere: those with the same classes at another radius, or in another norm; they have lines of their own in
            the summary.
        attacks: all that a comparable run was evaluated under, the known ones first.
        reference: the strongest attack that all comparable runs share, or else that any has; the headline is about it.
        differing: the protocol's fields that differ between comparable runs, with their values.
    """

    def __init__(self, runs: Sequence[RunRecord]) -> None:
        self.runs = list(runs)
        _find_teachers(self.runs)
        _tell_apart(self.runs)
        self.evaluated = [run for run in self.runs if run.results]
        self.classes = (self.evaluated or self.runs)[0].classes
        self.names = shorten_all(self.classes, CLASS)
        labels = [run.label for run in self.runs]
        self.fonts, lacking = find_fonts([*labels, *self.names])
        self.drawn, called = _drawn("class", 0, self.names, lacking), _drawn("run", 1, labels, lacking)
        self.look = dict(zip(labels, looks(called, [run.is_teacher for run in self.runs]), strict=True))
        alike = [run for run in self.evaluated if run.classes == self.classes]
        self.eps, self.norm = _common_radius(alike)
        at = ((None, self.norm), (self.eps, self.norm))
        self.comparable = [run for run in alike if (run.protocol.get("eps"), run.norm) in at]
        self.elsewhere = [run for run in alike if run not in self.comparable]
        found = {attack for run in self.comparable for attack in run.results}
        self.attacks = [a for a in ATTACKS if a in found] + sorted(found - set(ATTACKS))
        shared = [a for a in self.attacks if len(self.results(a)) == len(self.comparable)]
        candidates = [a for of in (shared, self.attacks) for a in STRONGEST if a in of] + self.attacks
        self.reference = (candidates or ["pgd20"])[0]
        self.differing = self._differing(shared)

    def results(self, attack: str) -> dict[str, Result]:
        """Return the results under `attack`, by the label of the run."""
        return {run.label: run.results[attack] for run in self.comparable if attack in run.results}

    @property
    def in_order(self) -> list[str]:
        """Return the attacks, the reference attack first."""
        return sorted(self.attacks, key=lambda attack: attack != self.reference)

    def class_name(self, k: int) -> str:
        """Return the name of a class for a sentence, "none" for -1."""
        return isolated(shorten(self.names[k], SAID)) if k >= 0 else "none"

    def weakest(self, result: Result) -> str:
        """Return the name of the weakest class, and how many others are as weak."""
        others = sum(accuracy == result.report.worst for accuracy in result.report.accuracy) - 1
        return self.class_name(result.report.worst_class) + (f" and {others} more" if others > 0 else "")

    @property
    def undrawn(self) -> dict[str, str]:
        """Return what figures call the runs and classes whose names they cannot draw, by their names."""
        pairs = [*((label, look.name) for label, look in self.look.items()), *zip(self.names, self.drawn, strict=True)]
        return {name: drawn for name, drawn in pairs if name != drawn}

    def said(self, attack: str) -> list[str]:
        """Return the average and the weakest class of each run in words."""
        return [
            f"{name}: average {at_most(r)}{percent(r.report.average)}, "
            f"weakest class {self.weakest(r)} at {at_most(r)}{percent(r.report.worst)}"
            for name, r in self.results(attack).items()
        ]

    def _differing(self, shared: Sequence[str]) -> dict[str, list[str]]:
        facts = [protocol_facts(run) for run in self.comparable]
        names = [*COMPARED, *map(attack_title, shared)]
        values = {name: list(dict.fromkeys(fact.get(name, "?") for fact in facts)) for name in names}
        return {name: found for name, found in values.items() if len(found) > 1}


def _common_radius(runs: Sequence[RunRecord]) -> tuple[float | None, str]:
    """Return the usual radius of the data set where a run was evaluated at it, else the first run's, and its norm.

    The radius is None where none is known.
    """
    known = [run for run in runs if isinstance(run.protocol.get("eps"), float | int) and run.norm in NORMS]
    usual = [run for run in known if run.protocol["eps"] == usual_eps(str(run.protocol.get("dataset")), run.norm)]
    return next(((run.protocol["eps"], run.norm) for run in usual + known), (None, "linf"))


def _drawn(kind: str, first: int, names: Sequence[str], lacking: frozenset[str]) -> list[str]:
    """Return the names, those with a letter that no font has replaced by a number."""
    return [f"{kind} {i}" if lacking & set(name) else name for i, name in enumerate(names, first)]


def _find_teachers(runs: Sequence[RunRecord]) -> None:
    """Note in each run which others learned from it. A config names the teacher's folder, which may have moved."""
    for student in runs:
        path = as_dict(student.config.get("teacher")).get("path")
        homes = {Path(path).name, Path(path).parent.name} if isinstance(path, str) else set()
        for run in runs:
            if run is not student and run.name in homes:
                run.taught.append(shorten(student.name, RUN))


def _tell_apart(runs: Sequence[RunRecord]) -> None:
    """Put the name of the folder above before names that several runs have, and a number behind those still equal."""
    for run in runs:
        run.name = shorten(run.name, RUN)
    for number in (False, True):
        labels = [run.label for run in runs]
        for i, run in enumerate(runs):
            if labels.count(labels[i]) > 1:
                above = shorten(run.folder.resolve().parent.name, RUN // 2)
                run.name = f"{run.name} ({i + 1})" if number else f"{above}/{run.name}"
