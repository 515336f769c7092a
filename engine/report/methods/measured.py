"""One number of a method, from all its seeds: the mean, and intervals over seeds and over images.

Dimension key: N images, K classes, S seeds, D bootstrap draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retemper.engine.class_report import Pair, Result, both_ways, percentiles, summaries
from retemper.engine.evaluation.compare import drawn_accuracies, over_seeds
from retemper.engine.evaluation.verdicts import read_evaluated
from retemper.engine.report.read import RunRecord
from retemper.errors import DataError

MEASURES = ("average", "worst", "nsd")
FURTHER = ("honest_worst", "gini")  # where an evaluation has them: in the CSV file alone
LEVEL, DRAWS = 0.95, 2_000


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One number of a method. Accuracies are fractions.

    Attributes:
        mean: over the seeds.
        low, high: the lowest and the highest seed.
        std: the sample standard deviation over the seeds; NaN for one seed.
        seeds: Student's interval of the mean over the seeds; None for one seed.
        images: the bootstrap's interval over the test images, for these very networks; None where it is not known.
        upper_bound: the attack was weaker than its name says, or broken off.
        note: what this number was measured on that the others of its column were not.
    """

    mean: float
    low: float
    high: float
    std: float = math.nan
    seeds: Pair | None = None
    images: Pair | None = None
    upper_bound: bool = False
    note: str = ""


def measured(runs: Sequence[RunRecord], attack: str) -> dict[str, Measured]:
    """Return each of `MEASURES`, and of `FURTHER`, under an attack; none unless every run was evaluated under it.

    Args:
        runs: the seeds of one method, evaluated under one protocol.
    """
    results = [run.results[attack] for run in runs if attack in run.results]
    if not runs or len(results) < len(runs):
        return {}
    images = over_images(runs, attack) if len(runs) > 1 else results[0].interval
    found = {}
    for name in (*MEASURES, *FURTHER):
        value_S = np.array([_value(result, name) for result in results])
        if np.isfinite(value_S).all():
            found[name] = Measured(
                mean=float(value_S.mean()),
                low=float(value_S.min()),
                high=float(value_S.max()),
                std=float(value_S.std(ddof=1)) if len(value_S) > 1 else math.nan,
                seeds=_within(over_seeds(value_S, LEVEL), name),
                images=_within(images.get(name), name),
                upper_bound=name != "nsd" and any(result.upper_bound for result in results),
            )
    return found


def _value(result: Result, name: str) -> float:
    """Return one number of one seed; NaN where it is not known."""
    if name in MEASURES:
        return getattr(result.report, name)
    value = getattr(result, "measures", {}).get(name)
    return math.nan if value is None else float(value)


def over_images(runs: Sequence[RunRecord], attack: str) -> dict[str, Pair]:
    """Return the intervals of the seeds' means over the choice of images, all seeds on the same drawn ones.

    There are none where the verdicts image by image are lost, or the seeds saw other images.
    """
    try:
        verdicts = [read_evaluated(run.evaluation, run.name).verdicts[attack] for run in runs]
    except (DataError, KeyError):
        return {}
    images = sorted(verdicts[0])
    label_N = np.array([verdicts[0][image][0] for image in images], dtype=np.int64)
    if not images or any(one.keys() != verdicts[0].keys() for one in verdicts):
        return {}
    correct_SN = np.array([[one[image][1] for image in images] for one in verdicts])
    classes = int(label_N.max()) + 1
    count_K = np.bincount(label_N, minlength=classes)
    seen = count_K > 0
    drawn_DSK = drawn_accuracies(correct_SN, label_N, classes, DRAWS, np.random.default_rng(0))[:, :, seen]
    accuracy_SK = np.array([np.bincount(label_N[row], minlength=classes)[seen] for row in correct_SN]) / count_K[seen]
    drawn, here = summaries(drawn_DSK.reshape(-1, seen.sum()), count_K[seen]), summaries(accuracy_SK, count_K[seen])
    found = {}
    for name in MEASURES:
        drawn_D = drawn[name].reshape(DRAWS, len(runs)).mean(axis=1)
        low, high = percentiles(drawn_D, LEVEL)
        if name != "average":  # the draws are biased
            low, high = both_ways(drawn_D, float(here[name].mean()), LEVEL)
        found[name] = low, high
    return found


def _within(ends: Pair | None, name: str) -> Pair | None:
    """Return an interval within what the number can be; None where it is not known."""
    if ends is None or not all(map(math.isfinite, ends)):
        return None
    return max(0.0, ends[0]), ends[1] if name == "nsd" else min(1.0, ends[1])
