"""Accuracy class by class, the few numbers that sum it up, and how sure they are.

    a_k = correct_k / count_k          average = sum_k correct_k / sum_k count_k
    worst_tenth = mean of the ceil(K / 10) smallest a_k
    nsd = (population standard deviation of a_k) / (mean of a_k); 0 is perfectly fair

Dimension key: K classes, D bootstrap draws. The interval of one class is Wilson's score interval (JASA 1927).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from retemper.engine.measures import confusion_norm, gini, honest_worst
from retemper.files import finite

SUMMARIES = ("average", "worst", "worst_tenth", "nsd")
MEASURES = ("class_average", "honest_worst", "worst_bias", "gini", "confusion_norm")
Pair = tuple[float, float]


@dataclass(frozen=True)
class ClassReport:
    """The accuracy of each class, and the summaries of the module's head.

    Accuracies are fractions. A class without images has the accuracy NaN and is left out of every summary.
    """

    accuracy: list[float]
    count: list[int]
    average: float
    worst: float
    worst_class: int
    worst_tenth: float
    nsd: float


def class_report(correct_K: Any, count_K: Any) -> ClassReport:
    """Sum up how many images of each class were classified correctly.

    Args:
        correct_K, count_K: (K,) whole numbers; a tensor on any device, an array or a list.
    Returns:
        The report. Its worst class is the first of several, and -1 where no class has an image. `nsd` is NaN when all
        accuracies are 0.
    Raises:
        ValueError: shapes differ or are not (K,); a number is negative, not whole, or above its count.
    """
    correct_K, count_K = _checked(correct_K, count_K)
    accuracy_K = np.divide(correct_K, count_K, out=np.full(len(count_K), math.nan), where=count_K > 0)
    seen = accuracy_K[count_K > 0]
    summary = dict.fromkeys(SUMMARIES, math.nan)
    if len(seen):
        summary = {name: float(value[0]) for name, value in summaries(seen[None], count_K[count_K > 0]).items()}
    return ClassReport(
        accuracy=accuracy_K.tolist(),
        count=count_K.astype(int).tolist(),
        worst_class=int(np.nanargmin(accuracy_K)) if len(seen) else -1,
        **summary,
    )


def intervals(correct_K: Any, count_K: Any, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Return how far chance in the choice of test images may have moved each number; chance in training is not in it.

    "class" holds K Wilson score intervals (low, high). The summaries get bootstrap intervals: every draw resamples the
    images of each class, which is a draw from Binomial(count, accuracy). An accuracy of 0 or 1 is first moved inwards
    by half an image, or it could not vary.

    Noise lowers a minimum and widens a spread, and resampling does it a second time, so that percentiles alone would
    miss the truth. So `worst` and `worst_tenth` join the percentiles to their mirror image about the estimate, and
    `nsd` mirrors on its square, where noise adds. Among many equally weak classes `worst` stays too narrow: read
    `worst_tenth` there.

    Args:
        correct_K, count_K: as in `class_report`.
        level: how often an interval should hold the truth.
        draws, seed: of the bootstrap.
    Returns:
        (low, high) by the name of a summary, and a list of K such pairs under "class".
    Raises:
        ValueError: as `class_report`, or `level` outside (0, 1), or no draws.
    """
    correct_K, count_K = _checked(correct_K, count_K, level, draws)
    out: dict[str, Any] = {"class": _wilson(correct_K, count_K, level)}
    seen = count_K > 0
    if not seen.any():
        return out | dict.fromkeys(SUMMARIES, (math.nan, math.nan))
    n = count_K[seen].astype(np.int64)
    drawn = summaries(_drawn(correct_K[seen], n, draws, seed) / n, n)
    estimate = summaries(correct_K[seen][None] / n, n)
    return out | {name: _ends(name, drawn[name], float(estimate[name][0]), level) for name in SUMMARIES}


def class_measures(
    correct_K: Any,
    count_K: Any,
    confusion_KK: np.ndarray | None = None,
    *,
    level: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Return what a reader of `class_report` may ask next: the weakest class without its bad luck, and unevenness.

    `retemper.engine.measures` has the formulas. The smallest accuracy lies below that of the class which is truly the
    weakest on average, and `honest_worst` not: "worst_bias" is their difference. It estimates the bias of the smallest
    accuracy where the weakest classes are alike, and exceeds it where they differ. Intervals are of the bootstrap of
    `intervals`: percentiles, of Gini's coefficient mirrored on its square.

    Args:
        correct_K, count_K: as in `class_report`.
        confusion_KK: (K, K) counts, a row a true class, a column the class given; None where they are not known.
        level, draws, seed: as in `intervals`.
    Returns:
        The numbers by the names of `MEASURES`, and "interval": (low, high) of the class average, the honest worst
        class and Gini's coefficient. "class_average" is the mean of the class accuracies, which differs from the
        average over the images where classes differ in size. Unknown numbers are NaN: without a class; the honest
        worst class and the bias where a class has a single image; Gini's coefficient where no image is right.
    Raises:
        ValueError: as `intervals`.
    """
    correct_K, count_K = _checked(correct_K, count_K, level, draws)
    seen = count_K > 0
    n, found = count_K[seen].astype(np.int64), dict.fromkeys(MEASURES, math.nan)
    if not seen.any():
        return found | {"interval": dict.fromkeys(("class_average", "honest_worst", "gini"), (math.nan, math.nan))}
    one, many = (_measured(of_DK, n) for of_DK in (correct_K[seen][None], _drawn(correct_K[seen], n, draws, seed)))
    found |= {name: float(value[0]) for name, value in one.items()}
    found["worst_bias"] = float((correct_K[seen] / n).min()) - found["honest_worst"]
    if confusion_KK is not None:
        found["confusion_norm"] = confusion_norm(confusion_KK, count_K)
    return found | {"interval": {name: _ends(name, many[name], found[name], level) for name in one}}


def _measured(correct_DK: np.ndarray, count_K: np.ndarray) -> dict[str, np.ndarray]:
    """Return the measures that have intervals, each (D,); every class has images."""
    accuracy_DK = correct_DK / count_K
    honest_D = honest_worst(correct_DK, count_K)
    return {"class_average": accuracy_DK.mean(axis=1), "honest_worst": honest_D, "gini": gini(accuracy_DK)}


def _drawn(correct_K: np.ndarray, count_K: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Return how many images are right in each draw of the bootstrap, (D, K) int64; every class has images."""
    inwards_K = 0.5 / (count_K + 1)
    chance_K = (correct_K / count_K).clip(inwards_K, 1 - inwards_K)
    return np.random.default_rng(seed).binomial(count_K, chance_K, size=(draws, len(count_K)))


def percentiles(drawn_D: np.ndarray, level: float) -> Pair:
    """Return the ends of the middle part of the (D,) draws that are numbers; NaN where none is."""
    known = drawn_D[np.isfinite(drawn_D)]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (math.nan, math.nan)
    return float(low), float(high)


def both_ways(drawn_D: np.ndarray, estimate: float, level: float) -> Pair:
    """Return the percentiles joined to their mirror image about the estimate, for draws that are biased either way."""
    low, high = percentiles(drawn_D, level)
    return min(low, 2 * estimate - high), max(high, 2 * estimate - low)


def _ends(name: str, drawn_D: np.ndarray, estimate: float, level: float) -> Pair:
    """Return one summary's interval, as `intervals` says; it always holds the estimate."""
    if math.isnan(estimate):
        return math.nan, math.nan
    if name in ("nsd", "gini"):
        low, high = (math.sqrt(max(0.0, 2 * estimate**2 - end)) for end in percentiles(drawn_D**2, level)[::-1])
    elif name in ("average", "class_average", "honest_worst"):
        low, high = percentiles(drawn_D, level)
    else:
        low, high = both_ways(drawn_D, estimate, level)
    return max(0.0, min(low, estimate)), max(min(high, 1.0), estimate)


@dataclass(frozen=True)
class Result:
    """One attack's entry of an evaluation.json, made whole.

    Attributes:
        upper_bound: the attack was weakened or broken off: the true accuracies are at most these.
        confusion: (K, K) counts, a row a true class, a column the class given; None where they are not known.
    """

    report: ClassReport
    interval: dict[str, Any]
    upper_bound: bool = False
    confusion: np.ndarray | None = None

    @cached_property
    def measures(self) -> dict[str, Any]:
        """The result of `class_measures`."""
        accuracy_K, count_K = np.nan_to_num(self.report.accuracy), np.array(self.report.count)
        return class_measures(np.rint(accuracy_K * count_K), count_K, self.confusion)


def read_result(entry: Mapping[str, Any]) -> Result:
    """Read an entry back; missing or null accuracies count as classes without images.

    The summaries and the intervals are computed anew, so that entries of different age can be compared.

    Raises:
        ValueError: there is no list of accuracies, or no list of counts as long.
    """
    accuracy_K, count_K = entry.get("accuracy"), entry.get("count")
    if not isinstance(accuracy_K, list) or not isinstance(count_K, list) or len(accuracy_K) != len(count_K):
        raise ValueError("accuracy and count must be lists of one length")
    if not all(isinstance(n, int) for n in count_K) or not all(isinstance(a, int | float | None) for a in accuracy_K):
        raise ValueError("accuracy must hold numbers or null, count whole numbers")
    known = [a is not None and math.isfinite(a) for a in accuracy_K]
    count_K = [n if ok else 0 for n, ok in zip(count_K, known, strict=True)]
    correct_K = [round(a * n) if n else 0 for a, n in zip(accuracy_K, count_K, strict=True)]
    confusion = _confusion(entry.get("confusion"), len(count_K))
    upper_bound = entry.get("upper_bound") is True or entry.get("complete") is False
    return Result(class_report(correct_K, count_K), intervals(correct_K, count_K), upper_bound, confusion)


def _confusion(rows: Any, classes: int) -> np.ndarray | None:
    """Return the (K, K) counts, or None for what is no such table."""
    try:
        counts_KK = np.array(rows, dtype=np.float64)
    except (ValueError, TypeError):
        return None
    whole = counts_KK.shape == (classes, classes) and bool((counts_KK >= 0).all())
    return counts_KK if whole and math.isfinite(counts_KK.sum()) else None


def _checked(correct_K: Any, count_K: Any, level: float = 0.5, draws: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return both counts as (K,) float64. Raises ValueError as `intervals`."""
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"need 0 < level < 1 and draws >= 1, got level={level} and draws={draws}")
    arrays = [np.asarray(x.cpu() if hasattr(x, "cpu") else x, dtype=np.float64) for x in (correct_K, count_K)]
    shapes = [array.shape for array in arrays]
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or shapes[0] == (0,):
        raise ValueError(f"correct and count must both be (K,), K >= 1, got {shapes[0]} and {shapes[1]}")
    correct, count = arrays
    for name, array in (("correct", correct), ("count", count)):
        if not (np.isfinite(array) & (array >= 0) & (array == np.floor(array))).all():
            raise ValueError(f"{name} must hold whole numbers >= 0, got {array.tolist()}")
    for k in np.flatnonzero(correct > count):
        raise ValueError(f"class {k} has {correct[k]:.0f} correct of only {count[k]:.0f}")
    return correct, count


def summaries(accuracy_DK: np.ndarray, count_K: np.ndarray) -> dict[str, np.ndarray]:
    """Return each summary for every draw, each (D,).

    Args:
        accuracy_DK: (D, K) fractions.
        count_K: (K,) images of each class, above 0.
    """
    tenth = -(-accuracy_DK.shape[1] // 10)
    mean_D, std_D = accuracy_DK.mean(axis=1), accuracy_DK.std(axis=1)
    return {
        "average": accuracy_DK @ count_K / count_K.sum(),
        "worst": accuracy_DK.min(axis=1),
        "worst_tenth": np.partition(accuracy_DK, tenth - 1, axis=1)[:, :tenth].mean(axis=1),
        "nsd": np.divide(std_D, mean_D, out=np.full(len(mean_D), math.nan), where=mean_D > 0),
    }


def _wilson(correct_K: np.ndarray, count_K: np.ndarray, level: float) -> list[Pair]:
    """Return Wilson's score interval of every class; NaN for a class without images."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    n = np.where(count_K > 0, count_K, math.nan)
    p, shrink = correct_K / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = np.where(p == 0, 0.0, centre - half), np.where(p == 1, 1.0, centre + half)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def by_class(
    predicted_N: np.ndarray, label_N: np.ndarray, num_classes: int, *, report_alone: bool = False
) -> dict[str, Any]:
    """Return the report of one attack, as evaluation.json holds it.

    Args:
        predicted_N: (N,) int64, the classes given; -1 for none.
        label_N: (N,) int64.
        report_alone: leave out all but the fields of `ClassReport`, for what is asked often.
    Returns:
        The fields of `ClassReport`, "interval", "measures" as `class_measures` returns them, and "confusion": (K, K)
        counts, a row a true class, a column a class given; images that are given none are in no column. Numbers that
        are not finite are null.
    """
    count = np.bincount(label_N, minlength=num_classes)
    given = predicted_N >= 0
    cell = label_N[given] * num_classes + predicted_N[given]
    confusion = np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)
    correct = confusion.diagonal()
    report = asdict(class_report(correct, count))
    if report_alone:
        return finite(report)
    more = {"interval": intervals(correct, count), "measures": class_measures(correct, count, confusion)}
    return finite(report | more | {"confusion": confusion.tolist()})
