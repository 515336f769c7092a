"""Two runs, or the seeds of two recipes, compared image by image: the difference is always B - A.

    McNemar      exact: p = min(1, 2 P(X <= min(a, b))), X ~ Binomial(a + b, 1/2), where a images are right under A
                 alone and b under B alone (Psychometrika 1947). Classes also get Holm's correction for their number.
    images       paired bootstrap: every draw resamples the images of each class, the same ones for both sides and
                 all seeds; for worst, worst_tenth and nsd both ways round (class_report.py says why). It covers the
                 choice of test images for these very networks, not how others would come out. The honest worst class
                 (measures.py) is of all halvings of the same images on both sides; it has a tenth of the draws.
    seeds        mean difference of the seeds -+ Student's t with S - 1 degrees of freedom times the standard error. It
                 covers chance in training for these very images; the seeds are taken as a sample of all.

No interval here covers both at once. Seed i of A is paired with seed i of B. With several seeds p is the largest of
the seeds' own, and 1 where they disagree about the direction: small only if every seed says so by itself.

Dimension key: N images, K classes, S seeds, D bootstrap draws, P patterns of verdicts, R = 2 S runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from retemper.engine.class_report import SUMMARIES, Pair, both_ways, class_report, percentiles, summaries
from retemper.engine.evaluation.norms import TITLES as NORMS
from retemper.engine.evaluation.verdicts import Evaluated, require_attack, require_same, require_same_radius, strongest
from retemper.engine.measures import honest_worst
from retemper.errors import DataError, UsageError
from retemper.text import number, pad, shorten, shorten_all, text_width

TITLES = {
    "average": "average, %",
    "worst": "worst class, %",
    "honest_worst": "worst, honest, %",
    "worst_tenth": "worst tenth, %",
    "nsd": "NSD",
}
MOST_CLASSES = 20  # in a table
NAME = 24  # columns of a terminal that a class's name may take: with one seed a line then has less than 80


@dataclass(frozen=True)
class Difference:
    """The difference of one number between the sides.

    Attributes:
        a, b: the means over the seeds; `a_range` and `b_range` are the lowest and the highest of the seeds.
        images, seeds: the intervals of the module's head; no `seeds` with one seed.
        p, p_holm: McNemar's, and after Holm's correction; None where they do not apply.
        discordant: for every seed, how many images are right under A alone, and under B alone.
    """

    a: float
    a_range: Pair
    b: float
    b_range: Pair
    difference: float
    images: Pair
    seeds: Pair | None = None
    p: float | None = None
    p_holm: float | None = None
    discordant: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two sides compared under one attack.

    Accuracies and their differences are fractions. A class without images has NaNs and no p.

    Attributes:
        a, b: the names of the runs.
        images: how many were compared.
        eps: in pixel units; `norm` is its norm.
        upper_bound: the attack is a weaker stand-in: true accuracies are at most these.
        level: of the intervals.
    """

    attack: str
    a: list[str]
    b: list[str]
    classes: list[str]
    images: int
    eps: float
    upper_bound: bool
    level: float
    summary: dict[str, Difference]
    by_class: list[Difference]
    norm: str = "linf"


def compare(
    a: Sequence[Evaluated],
    b: Sequence[Evaluated],
    attack: str | None = None,
    *,
    level: float = 0.95,
    draws: int = 5_000,
    seed: int = 0,
) -> Comparison:
    """Compare B with A under one attack.

    Args:
        a, b: the seeds of either side; they are paired in order.
        attack: None for the strongest that all were evaluated with.
        level: of the intervals.
        draws, seed: of the bootstrap.
    Raises:
        UsageError: the sides have not as many seeds, or were evaluated on other images or under other settings.
        DataError: verdicts are missing or damaged.
    """
    if len(a) != len(b) or not a:
        raise UsageError(f"as many seeds on both sides are needed, to be paired in order, not {len(a)} and {len(b)}")
    runs = [*a, *b]
    for run in runs:
        require_same_radius(runs[0], run)
    attack = attack or strongest(runs)
    for run in runs:
        require_attack(run, attack)
        require_same(runs[0], run, attack)
    images = sorted(runs[0].verdicts[attack])
    classes = [str(name) for name in runs[0].protocol.get("classes") or ()]
    label_N = np.array([runs[0].verdicts[attack][i][0] for i in images])
    if len(classes) <= label_N.max():
        raise DataError(f"{runs[0].path} names {len(classes)} classes, its verdicts have more")
    correct_RN = np.array([[run.verdicts[attack][i][1] for i in images] for run in runs])
    summary, by_class = differences(correct_RN, label_N, len(classes), level=level, draws=draws, seed=seed)
    return Comparison(
        attack=attack,
        a=[run.name for run in a],
        b=[run.name for run in b],
        classes=classes,
        images=len(images),
        eps=runs[0].protocol["eps"],
        upper_bound=any(bool(run.content["attacks"][attack].get("upper_bound")) for run in runs),
        level=level,
        summary=summary,
        by_class=by_class,
        norm=runs[0].protocol.get("norm") or "linf",
    )


def differences(
    correct_RN: np.ndarray, label_N: np.ndarray, num_classes: int, *, level: float, draws: int, seed: int
) -> tuple[dict[str, Difference], list[Difference]]:
    """Return the differences of the summaries and of the honest worst class, by name, and of every class.

    Args:
        correct_RN: (R, N) bool, first the seeds of A, then those of B.
        label_N: (N,) whole numbers below `num_classes`.
    """
    count_K = np.bincount(label_N, minlength=num_classes)
    correct_RK = np.array([np.bincount(label_N[row], minlength=num_classes) for row in correct_RN])
    reports = [class_report(correct_K, count_K) for correct_K in correct_RK]
    alone_2SK = _alone(correct_RN, label_N, num_classes)
    drawn_DRK = drawn_accuracies(correct_RN, label_N, num_classes, draws, np.random.default_rng(seed))
    drawn = summaries(drawn_DRK[:, :, count_K > 0].reshape(draws * len(correct_RN), -1), count_K[count_K > 0])
    of_summary = {
        name: _difference(
            [getattr(report, name) for report in reports],
            drawn[name].reshape(draws, -1),
            level,
            alone_2SK.sum(axis=2) if name == "average" else None,
            biased=name != "average",
        )
        for name in SUMMARIES
    }
    of_summary["honest_worst"] = _honest(correct_RK, drawn_DRK[: max(1, draws // 10)], count_K, level)
    by_class = [
        _difference([r.accuracy[k] for r in reports], drawn_DRK[:, :, k], level, alone_2SK[:, :, k] if n else None)
        for k, n in enumerate(count_K)
    ]
    return of_summary, _holm(by_class)


def _honest(correct_RK: np.ndarray, drawn_DRK: np.ndarray, count_K: np.ndarray, level: float) -> Difference:
    """Return the difference of the honest worst class; the draws are as `_draw` returns them."""
    seen = count_K > 0
    n = count_K[seen]
    drawn_DRK = np.rint(drawn_DRK[:, :, seen] * n)
    drawn_N = honest_worst(drawn_DRK.reshape(-1, len(n)), n)
    return _difference(honest_worst(correct_RK[:, seen], n).tolist(), drawn_N.reshape(drawn_DRK.shape[:2]), level, None)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p of two counts; 1 where there is no image to tell the sides apart."""
    from scipy.stats import binomtest  # here, not above: it takes a second

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def drawn_accuracies(
    correct_RN: np.ndarray, label_N: np.ndarray, num_classes: int, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the accuracies of resampled images, (D, R, K).

    As many verdicts of each pattern are drawn as images with that pattern would be.
    """
    drawn_DRK = np.full((draws, len(correct_RN), num_classes), math.nan)
    for k in np.unique(label_N):
        pattern_RP, count_P = np.unique(correct_RN[:, label_N == k], axis=1, return_counts=True)
        n = count_P.sum()
        drawn_DRK[:, :, k] = rng.multinomial(n, count_P / n, size=draws) @ pattern_RP.T / n
    return drawn_DRK


def _alone(correct_RN: np.ndarray, label_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Return how many images of every seed and class only A has right, and only B: (2, S, K)."""
    a_SN, b_SN = np.split(correct_RN, 2)
    sides = (a_SN & ~b_SN, b_SN & ~a_SN)
    return np.array([[np.bincount(label_N[row], minlength=num_classes) for row in side] for side in sides])


def _difference(
    values: Sequence[float], drawn_DR: np.ndarray, level: float, alone_2S: np.ndarray | None, *, biased: bool = False
) -> Difference:
    """Return the difference of one number.

    Args:
        values: of the R runs.
        drawn_DR: (D, R), the same of every draw.
        alone_2S: (2, S), how many images only A has right, and only B; None where McNemar's test does not apply.
        biased: the draws are biased, so that their interval is taken both ways round.
    """
    a_S, b_S = np.split(np.array(values), 2)
    drawn_a_D, drawn_b_D = (half_DS.mean(axis=1) for half_DS in np.split(drawn_DR, 2, axis=1))
    difference, drawn_D = float((b_S - a_S).mean()), drawn_b_D - drawn_a_D
    p = None
    if alone_2S is not None:
        agreed = (alone_2S[0] >= alone_2S[1]).all() or (alone_2S[0] <= alone_2S[1]).all()
        p = max(mcnemar(a, b) for a, b in alone_2S.T.tolist()) if agreed else 1.0
    return Difference(
        a=float(a_S.mean()),
        a_range=(float(a_S.min()), float(a_S.max())),
        b=float(b_S.mean()),
        b_range=(float(b_S.min()), float(b_S.max())),
        difference=difference,
        images=both_ways(drawn_D, difference, level) if biased else percentiles(drawn_D, level),
        seeds=over_seeds(b_S - a_S, level),
        p=p,
        discordant=() if alone_2S is None else tuple((int(a), int(b)) for a, b in alone_2S.T),
    )


def over_seeds(difference_S: np.ndarray, level: float) -> Pair | None:
    """Return Student's interval of the mean of (S,) values over the seeds; None for one seed."""
    from scipy.stats import t

    n = len(difference_S)
    if n < 2:
        return None
    half = float(t.ppf((1 + level) / 2, n - 1)) * float(difference_S.std(ddof=1)) / math.sqrt(n)
    return float(difference_S.mean() - half), float(difference_S.mean() + half)


def _holm(of_class: list[Difference]) -> list[Difference]:
    """Return the classes with Holm's correction for looking at every one of them (Scand. J. Stat. 1979)."""
    order = sorted((k for k, d in enumerate(of_class) if d.p is not None), key=lambda k: of_class[k].p or 0.0)
    corrected, least = list(of_class), 0.0
    for rank, k in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * (of_class[k].p or 0.0)))
        corrected[k] = replace(of_class[k], p_holm=least)
    return corrected


def as_text(found: Comparison) -> str:
    """Return a table for the terminal: the summaries, and the classes (of many, A's weakest)."""
    several = len(found.a) > 1
    known = [k for k, of_class in enumerate(found.by_class) if of_class.p is not None]
    shown = sorted(sorted(known, key=lambda k: found.by_class[k].a)[:MOST_CLASSES])
    rows = [["", "A", "B", "B - A", "images"] + ["seeds"] * several + ["p"]]
    named = [name for name in TITLES if name != "worst_tenth" or len(found.classes) > 10]
    rows += [_row(TITLES[name], found.summary[name], several, name != "nsd") for name in named]
    names = shorten_all(found.classes, NAME)
    rows += [_row(names[k], found.by_class[k], several, True) for k in shown]
    widths = [max(map(text_width, column)) for column in zip(*rows, strict=True)]
    norm = "" if found.norm == "linf" else f" in {NORMS.get(found.norm, found.norm)}"
    lines = [
        f"{found.attack}{' (an upper bound)' * found.upper_bound}, eps {found.eps:.4g}{norm}, {found.images:,} images",
        f"A: {', '.join(shorten(name, 200) for name in found.a)}",
        f"B: {', '.join(shorten(name, 200) for name in found.b)}",
    ]
    for title, *cells in rows:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([pad(title, widths[0]), *padded]).rstrip())
    left_out = {
        "in which A is stronger; --json has them": len(known) - len(shown),
        "without images": len(found.classes) - len(known),
    }
    lines += [f"and {n} class{'es' * (n != 1)} {why}" for why, n in left_out.items() if n]
    interval = f"{found.level:.0%} intervals: images, for the choice of test images"
    p = "p: McNemar's exact test, for classes after Holm's correction for their number"
    if several:
        interval, p = f"{interval}; seeds, for chance in training", f"{p};\n   the largest of the seeds'"
    p += "\n   (the intervals have no such correction: one may leave out 0 where p is large)"
    return "\n".join([*lines, "honest: the worst class of one half of the images, on the other half", interval, p])


def _row(title: str, of: Difference, several: bool, percent: bool) -> list[str]:
    """Return the cells of one line; with `several` seeds they show ranges and an interval over the seeds too."""
    scale, digits = (100, 1) if percent else (1, 3)

    def pair(ends: Pair | None, sign: str = "") -> str:
        if ends is None or not all(map(math.isfinite, ends)):
            return "-"
        return " to ".join(number(scale * end, digits, sign) for end in ends)

    sides = [number(scale * value, digits) for value in (of.a, of.b)]
    if several:
        sides = [f"{side} ({pair(ends)})" for side, ends in zip(sides, (of.a_range, of.b_range), strict=True)]
    p = of.p if of.p_holm is None else of.p_holm
    cells = [title, *sides, number(scale * of.difference, digits, "+"), pair(of.images, "+")]
    return [*cells, *[pair(of.seeds, "+")] * several, "" if p is None else f"{p:.2g}"]
