"""One evaluation, and the verdicts image by image beside it, while attacks are added to them."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retemper.console import say
from retemper.engine.class_report import by_class
from retemper.engine.evaluation.places import beside, content_of, free_name, fuller, fullness, same_question
from retemper.engine.evaluation.verdicts import Evaluated, Verdicts, write_verdicts
from retemper.errors import DataError
from retemper.files import locked, write_json
from retemper.loaders import Split, usual_eps
from retemper.options import shown_value

NAMES = ("network", "data_root")  # of a protocol: what the numbers do not depend on
LATER = ("images_sha256",)  # what evaluations of earlier versions do not say


@dataclass(frozen=True)
class Outcome:
    """The outcome of one attack.

    Attributes:
        name, described: the attack, as evaluation.json names and describes it.
        image_N: (N,) int64, which images of the split were attacked.
        predicted_N: (N,) int64, the classes given; -1 for none.
        more: what evaluation.json says of it beside the accuracies.
    """

    name: str
    described: dict[str, Any]
    image_N: np.ndarray
    predicted_N: np.ndarray
    more: dict[str, Any] = field(default_factory=dict)


class EvaluationFile:
    """The two files of one evaluation. Several processes may add attacks to the same files.

    Attributes:
        main: where the network's evaluation goes in the end.
        path: where this one is while it is made: `main`, or a numbered neighbour of an evaluation that is there.
        content: what the evaluation holds.
        verdicts: what the CSV file beside it holds.
        added: the attacks that this process has run itself.
    """

    def __init__(self, main: Path, protocol: dict[str, Any]) -> None:
        self.main = self.path = main
        self.content: dict[str, Any] = {"protocol": protocol | {"attacks": {}}, "attacks": {}}
        self.verdicts: Verdicts = {}
        self.added: set[str] = set()

    @classmethod
    def begin(cls, main: Path, protocol: dict[str, Any]) -> "EvaluationFile":
        """Return the evaluation that was made under `protocol`, at `main` or beside it, else an empty one.

        What is there under another protocol stays as it is.
        """
        file = cls(main, protocol)
        file._find()
        known = content_of(file.path)
        if known is not None and known["attacks"]:
            file.content, file.verdicts = known, _known_verdicts(file.path, known)
        return file

    def is_done(self, name: str) -> bool:
        """Say whether an attack is done, and its verdicts are there."""
        return name in self.verdicts and self.content["attacks"][name].get("complete") is not False

    def add(self, outcome: Outcome, split: Split, seconds: float) -> None:
        """Add the outcome of one attack on images of `split`, or replace it; it took `seconds`.

        One that is finished, on as many images or more, is not replaced by one that is not.
        """
        name, image_N = outcome.name, outcome.image_N
        label_N = split.labels[image_N]
        entry = by_class(outcome.predicted_N, label_N, len(split.classes)) | {"seconds": seconds} | outcome.more
        if _says_less(entry, self.content["attacks"].get(name)):
            say(f"{name}: {self.path} keeps the finished result that it holds, on as many images or more")
            return
        self.added.add(name)
        self.content["attacks"][name] = entry
        self.content["protocol"]["attacks"][name] = outcome.described
        answers = zip(label_N.tolist(), (outcome.predicted_N == label_N).tolist(), strict=True)
        self.verdicts[name] = dict(zip(image_N.tolist(), answers, strict=True))

    def write(self) -> None:
        """Write both files, each atomically, with what other processes have added to them meanwhile."""
        with self._locked():
            self._find()
            self._take_others()
            write_verdicts(self.path.with_suffix(".csv"), self.verdicts)
            write_json(self.path, self.content)

    def finish(self) -> None:
        """Give the evaluation, now complete, the place at `main`, unless what is there says more."""
        with self._locked():
            if self.path == self.main or not self.path.exists():
                return
            there = content_of(self.main)
            if there is not None and (why := _stays(there, self.content)):
                say(f"{self.main} stays: it was made {why}; this one is {self.path}")
                return
            aside = free_name(self.main)
            _rename(self.main, aside)
            _rename(self.path, self.main)
            _rename(aside, self.path)
            what = _changed(there, self.content)
            say(f"{self.main} was made under another protocol{what} and is now {self.path}")
            self.path = self.main

    def _locked(self) -> AbstractContextManager[None]:
        """Hold the network's evaluations for this process; wait for another that does."""
        return locked(self.main.with_name(f".{self.main.name}.lock"))

    def _find(self) -> None:
        """Set the path: of the evaluation under this protocol, or of one that does not exist yet."""
        protocol = {name: value for name, value in self.content["protocol"].items() if name != "attacks"}
        there = [one for one in (self.main, *beside(self.main)) if _made_under(one, protocol)]
        self.path = (there or [free_name(self.main) if self.main.exists() else self.main])[0]

    def _take_others(self) -> None:
        """Take over from the files what this process has not made itself."""
        there = content_of(self.path)
        if there is None:
            return
        for name in there["attacks"].keys() - self.added:
            self.content["attacks"][name] = there["attacks"][name]
            self.content["protocol"]["attacks"][name] = there["protocol"]["attacks"].get(name, {})
            self.verdicts |= _known_verdicts(self.path, there, [name])
        if "checks" in there:
            self.content.setdefault("checks", there["checks"])
        self.content |= fuller(self.content, there)


def _rename(path: Path, new: Path) -> None:
    """Rename an evaluation, and its verdicts if it has some. An interruption between the two leaves both readable."""
    path.replace(new)
    if path.with_suffix(".csv").exists():
        path.with_suffix(".csv").replace(new.with_suffix(".csv"))


def _made_under(path: Path, protocol: dict[str, Any]) -> bool:
    """Say whether there is an evaluation at `path`, made under `protocol`."""
    content = content_of(path)
    if content is None or "attacks" not in content["protocol"]:
        return False
    was = content["protocol"]
    asked = {name: value for name, value in protocol.items() if name not in NAMES}
    return all(was.get(name, value if name in LATER else None) == value for name, value in asked.items())


def _says_less(entry: dict[str, Any], held: dict[str, Any] | None) -> bool:
    """Say whether an attack's entry says less than the finished one that is held."""
    if held is None or held.get("complete") is False:
        return False
    fewer = sum(entry["count"]) < sum(n for n in held.get("count", []) if isinstance(n, int))
    return fewer or entry.get("complete") is False


def _stays(there: dict[str, Any], new: dict[str, Any]) -> str:
    """Return why the evaluation that is there keeps its place, in words; "" where it does not.

    It does where it is of these weights, and alone of the data set's usual radius, or on more images or attacks.
    """
    was, now = there["protocol"], new["protocol"]
    if was.get("weights_sha256") != now["weights_sha256"]:
        return ""
    usual = usual_eps(now["dataset"], now["norm"])
    if was.get("eps") == usual != now["eps"]:
        return f"at {now['dataset']}'s usual radius, {shown_value(usual)}"
    (images, attacks), (new_images, new_attacks) = fullness(there), fullness(new)
    more = images > new_images or (same_question(was, now) and images == new_images and attacks > new_attacks)
    return "on more images or with more attacks" if more else ""


def _changed(there: dict[str, Any] | None, new: dict[str, Any]) -> str:
    """Return in words at which radius an evaluation was made, where the new one is at another; else ""."""
    eps = None if there is None else there["protocol"].get("eps")
    return f" (eps {shown_value(eps)})" if isinstance(eps, float) and eps != new["protocol"]["eps"] else ""


def _known_verdicts(path: Path, content: dict[str, Any], names: Iterable[str] | None = None) -> Verdicts:
    """Return the verdicts of an evaluation's attacks, or of those in `names`; those that are lost are left out."""
    names = list(content["attacks"] if names is None else names)
    try:
        known = Evaluated(path, path.stem, content).verdicts
    except DataError as error:
        say(f"the verdicts of {', '.join(names)} are lost for comparisons: {error}")
        return {}
    return {name: known[name] for name in names if name in known}
