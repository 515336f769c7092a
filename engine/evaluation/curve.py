"""The curve of a network over the radius: each attack at every radius, from the smallest up, on what still holds.

A perturbation that breaks an image lies inside every larger ball of the same norm. So an image that is broken counts
as broken at the larger radii, which attack the others alone: the accuracy at a radius is that under the ensemble of the
same attack at all radii of the list up to it. It is an upper bound of the robust accuracy, as that of any attack is; it
never rises with the radius, image by image; and at the smallest radius it is that of a single evaluation. At a larger
one it may lie a little below, for the attack at a smaller radius is one attempt more, and a little off either way, for
the random draws follow the batches, which hold other images.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retemper.console import say
from retemper.engine.class_report import by_class
from retemper.engine.evaluation.attacked import Attacked
from retemper.engine.evaluation.cross_check import write_beaten
from retemper.engine.evaluation.curve_file import CurveFile
from retemper.engine.evaluation.evaluation_file import Outcome
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.protocols import result_name
from retemper.files import locked
from retemper.loaders import Split


def write_curve(attacked: Attacked, path: Path, protocol: dict[str, Any], more: dict[str, Any]) -> CurveFile:
    """Run the attacks of the request at its radii, and write curve.json and curve.csv after each radius.

    Attacks that are done are left as they are; AutoAttack goes on from its ledgers.

    Args:
        attacked: at the smallest radius, on all images.
        path: of curve.json.
        protocol: as evaluation.json has it.
        more: what else curve.json says.
    """
    ranks, radii = attacked.request.ranks, attacked.request.eps
    assert isinstance(radii, tuple)
    protocol = protocol | {"eps": list(radii)}
    file = CurveFile.begin(path, protocol) if ranks.is_first else CurveFile.empty(path, protocol)
    file.content |= more
    until = None if attacked.request.budget_s is None else time.monotonic() + attacked.request.budget_s
    wrong = attacked.misclassified()
    for name in attacked.request.attacks:
        called = result_name(name, attacked.request.protocol)
        if name != "autoattack" and ranks.any(file.is_done(called))[0]:
            say(f"{called}: done at every radius, left as it is")
            continue
        steps = _minimal_norm(attacked, radii) if name == "fmn" else _attack(name, attacked, path, radii, until, wrong)
        for grown in steps:
            for one in grown if ranks.is_first else ():
                file.set(one.name, one.described, one.entries, one.broken)
                file.write()
    return file


@dataclass
class _Growing:
    """The results of one attack at the radii so far.

    Attributes:
        image_N: (N,) int64, all images; label_N, predicted_N: their classes, and those given in the end; -1 for none.
        at_N: (N,) float64, the radius that broke each, inf while it holds.
        entries: as curve.json has them, one a radius.
    """

    split: Split
    name: str
    described: dict[str, Any]
    image_N: np.ndarray
    label_N: np.ndarray
    predicted_N: np.ndarray
    at_N: np.ndarray
    entries: list[dict[str, Any]]

    @classmethod
    def begin(cls, split: Split, found: Outcome, eps: float) -> "_Growing":
        """Return the results of no radius, on the images of the first outcome, which is at `eps`."""
        label_N = split.labels[found.image_N].astype(np.int64)
        at_N = np.full(len(label_N), np.inf)
        described = {name: value for name, value in found.described.items() if name not in ("eps", "step")}
        if "step" in found.described:
            described["step_of_eps"] = found.described["step"] / eps if eps else 0.0
        return cls(split, found.name, described, found.image_N, label_N, label_N.copy(), at_N, [])

    def add(self, found: Outcome, eps: float, wrong: frozenset[int], seconds: float) -> None:
        """Add the outcome at a larger radius, on the images that held. One that is broken stays so.

        One that is wrong without an attack is so at radius 0, unless a protocol that judges attacked images alone has
        seen it right at a smaller radius.
        """
        first = not self.entries
        held = dict(zip(found.image_N.tolist(), found.predicted_N.tolist(), strict=True))
        for row, image in enumerate(self.image_N.tolist()):
            if np.isinf(self.at_N[row]) and held.get(image, self.label_N[row]) != self.label_N[row]:
                self.predicted_N[row], self.at_N[row] = held[image], 0.0 if first and image in wrong else eps
        self.sum_up({"eps": eps, "attacked": len(found.image_N), "seconds": seconds} | found.more)

    def sum_up(self, more: dict[str, Any]) -> None:
        """Add the entry of one radius."""
        self.entries.append(by_class(self.predicted_N, self.label_N, len(self.split.classes)) | more)

    def repeat(self, eps: float) -> None:
        """Add a larger radius at which no image is left to attack."""
        self.sum_up({"eps": eps, "attacked": 0, "seconds": 0.0})

    @property
    def survivors(self) -> np.ndarray:
        """Return the images that hold, in order."""
        return self.image_N[np.isinf(self.at_N)]

    @property
    def broken(self) -> dict[int, tuple[int, float]]:
        """Return by image its label and the radius that broke it."""
        pairs = zip(self.label_N.tolist(), self.at_N.tolist(), strict=True)
        return dict(zip(self.image_N.tolist(), pairs, strict=True))


def _attack(
    name: str, attacked: Attacked, path: Path, radii: tuple[float, ...], until: float | None, wrong: frozenset[int]
) -> Iterator[list[_Growing]]:
    """Yield the results of one attack, and of its cross-checks, after each radius; it ends where its time is over."""
    grown: dict[str, _Growing] = {}
    ledgers: list[Ledger] = []
    for number, eps in enumerate(radii):
        started = time.monotonic()
        if grown and not len(next(iter(grown.values())).survivors):
            for one in grown.values():
                one.repeat(eps)
            yield list(grown.values())
            continue
        order = next(iter(grown.values())).survivors if grown else attacked.order
        here = attacked.at(eps, order, radii[:number], ledger_at(path, attacked.request.suite, eps))
        if until is not None:
            here = replace(here, request=replace(here.request, budget_s=max(until - started, 1e-9)))
        found = here.outcomes(name)
        if not found:  # of several processes, one ran out of time
            return
        for outcome in found:
            one = grown.setdefault(outcome.name, _Growing.begin(attacked.split, outcome, eps))
            one.add(outcome, eps, wrong, time.monotonic() - started)
        ledgers += here.ledgers
        if attacked.request.cross_check and name == "autoattack" and attacked.request.ranks.is_first:
            write_beaten(path.with_name(f"{path.stem}-cross-check.csv"), ledgers)
        yield list(grown.values())
        if any(outcome.more.get("complete") is False for outcome in found):
            return


def _minimal_norm(attacked: Attacked, radii: tuple[float, ...]) -> Iterator[list[_Growing]]:
    """Yield the results of FMN: one run tells every radius."""
    started = time.monotonic()
    found = attacked.distances()
    seconds = time.monotonic() - started
    outcomes = [replace(attacked, eps=eps).minimal_norm(found) for eps in radii]
    one = _Growing.begin(attacked.split, outcomes[0], radii[0])
    for eps, outcome in zip(radii, outcomes, strict=True):
        one.predicted_N = outcome.predicted_N
        one.sum_up({"eps": eps, "attacked": len(one.image_N), "seconds": seconds} | outcome.more)
    one.at_N = found.distance_N
    yield [one]


def ledger_at(path: Path, suite: str, eps: float) -> Path:
    """Return the path of AutoAttack's ledger at one radius of a curve; the fast suite begins the standard one's."""
    name = "autoattack" if suite in ("standard", "fast") else f"autoattack-{suite}"
    return path.with_name(f"{path.stem}-{name}-{eps:.6g}".replace(".", "_") + ".csv")


def locked_curve(path: Path) -> AbstractContextManager[None]:
    """Hold the curve at `path` for this process. Raises UsageError if another process writes it."""
    return locked(path.with_name(f".{path.name}.lock"), f"another process is writing {path}: wait for it")
