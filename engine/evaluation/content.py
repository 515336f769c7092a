"""The content of evaluation.json, and how it is read back."""

from pathlib import Path
from typing import Any, TypedDict

from retemper.errors import DataError
from retemper.files import read_json

AGAIN = "run `retemper evaluate` again"
Ends = tuple[float | None, float | None] | None


class Interval(TypedDict, total=False):
    """The intervals of one attack's summaries, as `retemper.engine.class_report.intervals` returns them."""

    average: Ends
    worst: Ends
    worst_tenth: Ends
    nsd: Ends


class MeasuresInterval(TypedDict, total=False):
    """The intervals of those measures that have one."""

    class_average: Ends
    honest_worst: Ends
    gini: Ends


class Measures(TypedDict, total=False):
    """What `retemper.engine.class_report.class_measures` returns; earlier versions wrote none."""

    class_average: float | None
    honest_worst: float | None
    worst_bias: float | None
    gini: float | None
    confusion_norm: float | None
    interval: MeasuresInterval


class Counted(TypedDict):
    """What is known of every attack: the report by class (`retemper.engine.class_report.ClassReport`)."""

    accuracy: list[float | None]
    count: list[int]
    average: float | None
    worst: float | None
    worst_class: int
    worst_tenth: float | None
    nsd: float | None


class Beaten(TypedDict):
    """How many images an attack broke where AutoAttack had not, in all and of each class."""

    images: int
    by_class: list[int]


class AttackResult(Counted, total=False):
    """The entry of one attack; `complete` to `ledger` are AutoAttack's, `eps` and `attacked` a curve's."""

    interval: Interval
    measures: Measures
    confusion: list[list[float]]
    seconds: float
    complete: bool
    upper_bound: bool
    broken_by: dict[str, int]
    flags: list[str]
    ledger: str
    beats_autoattack: dict[str, Beaten]
    median_distance: list[float | None]
    eps: float
    attacked: int


class Evaluated(TypedDict):
    """The part of the protocol that every evaluation has."""

    dataset: str
    split: str
    images: int
    subset: str
    eps: float
    classes: list[str]
    attacks: dict[str, dict[str, Any]]


class Protocol(Evaluated, total=False):
    """What the numbers depend on beside the attacks."""

    image_size: int | None
    norm: str
    precision: str
    seed: int
    batch_size: int
    weights: str
    weights_sha256: str
    versions: dict[str, str | None]
    data_root: str | None


class CheckFlag(TypedDict):
    """One of the checks for masked gradients (`retemper.engine.sanity.flags.Flag`)."""

    name: str
    raised: bool
    value: float | None
    threshold: float | None
    text: str


class Rung(TypedDict):
    """The accuracy at one radius."""

    eps: float
    accuracy: float


class Rungs(TypedDict, total=False):
    """The accuracies under ever stronger attacks."""

    radius: list[Rung]


class Violation(TypedDict):
    """The images that an attack broke in a ball (a norm, a radius), and left standing in one that contains it."""

    attack: str
    inner: list[Any]
    outer: list[Any]
    images: int
    of: int
    first: list[int]


class Consistency(TypedDict):
    """What theory says of every two results, and what contradicts it."""

    pairs: int
    images: int
    violations: list[Violation]


class _Found(TypedDict):
    verdict: str
    images: int
    flags: list[CheckFlag]


class Checks(_Found, total=False):
    """What `retemper evaluate --check` found."""

    ladder: Rungs


class Corrupted(TypedDict):
    """What `retemper evaluate --corruptions` found (`retemper.engine.evaluation.corrupted.summed_up`)."""

    constants: str
    seed: int
    severities: list[int]
    count: list[int]
    accuracy: dict[str, list[list[float | None]]]
    average: float | None
    worst: float | None
    worst_class: int
    complete: bool


class _Numbers(TypedDict):
    protocol: Protocol
    attacks: dict[str, AttackResult]


class Evaluation(_Numbers, total=False):
    """The whole file."""

    checks: Checks
    corruptions: Corrupted
    consistency: Consistency


def read_evaluation(path: Path, partial: bool = False) -> dict[str, Any]:
    """Return the content of an evaluation.json.

    Args:
        partial: whether fields may be missing.
    Raises:
        DataError: it does not exist or is damaged; the message names the field.
    """
    content = read_json(path, Evaluation, AGAIN, partial)
    classes = len(content.get("protocol", {}).get("classes", ()))
    for attack, result in {} if partial else content["attacks"].items():
        sizes = {classes, len(result["accuracy"]), len(result["count"])}
        if len(sizes) > 1 or not -1 <= result["worst_class"] < classes:
            raise DataError(f"{path} is damaged (attacks.{attack} is not of {classes} classes): {AGAIN}")
    return content
