"""evaluation.json, and evaluation.csv with the verdicts image by image beside it, while attacks are added to them."""

from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from retemper.console import say
from retemper.engine.class_report import by_class
from retemper.engine.evaluation.content import read_evaluation
from retemper.engine.evaluation.verdicts import Evaluated, Verdicts, write_verdicts
from retemper.errors import DataError
from retemper.files import write_json
from retemper.loaders import Split


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
    """The two files of one evaluation.

    Attributes:
        path: of evaluation.json; evaluation.csv lies beside it.
        content: what evaluation.json holds.
        verdicts: what evaluation.csv holds.
    """

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"protocol": protocol | {"attacks": {}}, "attacks": {}}
        self.verdicts: Verdicts = {}

    @classmethod
    def begin(cls, path: Path, protocol: dict[str, Any]) -> "EvaluationFile":
        """Return the evaluation at `path` if it was made under `protocol`, else an empty one.

        An evaluation under another protocol is kept under a name of its own.
        """
        file = cls(path, protocol)
        if not path.exists():
            return file
        found = _made_under(path, protocol)
        if found is None:
            file._keep_the_other()
        else:
            file.content, file.verdicts = found, _known_verdicts(path, found)
        return file

    def add(self, outcome: Outcome, split: Split, seconds: float) -> None:
        """Add the outcome of one attack on images of `split`, or replace it; it took `seconds`."""
        name, image_N = outcome.name, outcome.image_N
        label_N = split.labels[image_N]
        counts = by_class(outcome.predicted_N, label_N, len(split.classes))
        self.content["attacks"][name] = counts | {"seconds": seconds} | outcome.more
        self.content["protocol"]["attacks"][name] = outcome.described
        answers = zip(label_N.tolist(), (outcome.predicted_N == label_N).tolist(), strict=True)
        self.verdicts[name] = dict(zip(image_N.tolist(), answers, strict=True))

    def write(self) -> None:
        """Write both files, each atomically."""
        write_verdicts(self.path.with_suffix(".csv"), self.verdicts)
        write_json(self.path, self.content)

    def _keep_the_other(self) -> None:
        """Rename the evaluation at the path, and its verdicts, to a name that is free."""
        path = self.path
        kept = next(other for n in count(1) if not (other := path.with_name(f"{path.stem}.{n}.json")).exists())
        path.replace(kept)
        if path.with_suffix(".csv").exists():
            path.with_suffix(".csv").replace(kept.with_suffix(".csv"))
        say(f"{path} was made under another protocol and is now {kept}")


def _made_under(path: Path, protocol: dict[str, Any]) -> dict[str, Any] | None:
    """Return the evaluation at `path`; None if it is damaged or was made under another protocol."""
    try:
        content = read_evaluation(path)
    except DataError:
        return None
    return content if {name: content["protocol"].get(name) for name in protocol} == protocol else None


def _known_verdicts(path: Path, content: dict[str, Any]) -> Verdicts:
    """Return the verdicts of the attacks that `content` holds; those that are lost are left out."""
    if not content["attacks"]:
        return {}
    try:
        known = Evaluated(path, path.stem, content).verdicts
    except DataError as error:
        say(f"the verdicts of {', '.join(content['attacks'])} are lost for comparisons: {error}")
        return {}
    return {name: of_image for name, of_image in known.items() if name in content["attacks"]}
