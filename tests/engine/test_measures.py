"""The honest worst class against each halving, and in simulations with a known answer; the other measures."""

import json
import math
from itertools import combinations, product
from statistics import mean
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, kendalltau

from retemper.engine.class_report import MEASURES, by_class, class_measures, class_report, read_result
from retemper.engine.measures import confusion_norm, gini, honest_worst, kendall_tau


def by_halving(verdicts: list[list[int]]) -> float:
    """Return the honest worst class from the verdicts of each class, by going through all halvings."""
    found = []
    sizes = {tuple(len(own) // 2 for own in verdicts), tuple(len(own) - len(own) // 2 for own in verdicts)}
    for size in sizes:
        measured = []
        for halves in product(*(combinations(range(len(own)), n) for own, n in zip(verdicts, size, strict=True))):
            chosen = [mean(own[i] for i in half) for own, half in zip(verdicts, halves, strict=True)]
            tied = [k for k, accuracy in enumerate(chosen) if accuracy == min(chosen)]
            others = [[own for i, own in enumerate(verdicts[k]) if i not in halves[k]] for k in tied]
            measured.append(mean(map(mean, others)))
        found.append(mean(measured))
    return mean(found)


@pytest.mark.parametrize(
    "verdicts",
    [
        [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]],
        [[1, 1, 0, 0, 1], [1, 0, 0], [0, 1]],  # of unequal, odd sizes
        [[0, 0, 0, 1], [0, 0, 0, 0]],
        [[1, 1, 1], [1, 1, 1], [1, 0, 1]],
        [[1, 0, 0, 1, 1]],
    ],
)
def test_the_honest_worst_class_is_the_mean_over_all_halvings(verdicts: list[list[int]]) -> None:
    correct, count = [sum(own) for own in verdicts], [len(own) for own in verdicts]
    assert honest_worst(np.array([correct]), np.array(count))[0] == pytest.approx(by_halving(verdicts), abs=1e-12)


@pytest.mark.parametrize(("classes", "count"), [(10, 1000), (10, 60), (100, 50)])
def test_of_equal_classes_the_smallest_is_biased_and_the_honest_one_is_not(classes: int, count: int) -> None:
    p, trials = 0.3, 1500
    correct = np.random.default_rng(0).binomial(count, p, (trials, classes))
    below = binom.sf(np.arange(count), count, p) ** classes  # P(min > j): its sum is the mean of the smallest count
    smallest = correct.min(axis=1) / count
    error = 4 * math.sqrt(p * (1 - p) / count / trials)  # 4 standard errors of the mean, or more
    assert smallest.mean() == pytest.approx(below.sum() / count, abs=error) and below.sum() / count < p - 10 * error
    assert honest_worst(correct, np.full(classes, count)).mean() == pytest.approx(p, abs=error)


def test_where_one_class_is_far_below_the_rest_there_is_no_luck_to_correct() -> None:
    found = class_measures([100, 500, 600], [1000] * 3)
    assert found["honest_worst"] == pytest.approx(0.1, abs=1e-9) and found["worst_bias"] == pytest.approx(0, abs=1e-9)


def test_the_truth_lies_between_the_smallest_and_the_honest_one_on_average() -> None:
    correct = np.random.default_rng(0).binomial(200, [0.4, 0.41, 0.45, 0.6], (1000, 4))
    assert correct.min(axis=1).mean() / 200 < 0.4 < honest_worst(correct, np.full(4, 200)).mean() < 0.415


def test_classes_of_many_sizes_are_told_apart_well_enough() -> None:
    """SVHN's: the accuracies that count as equal move nothing that is shown."""
    count = np.array([1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595])
    correct = np.random.default_rng(0).binomial(count, 0.4)
    rng, drawn = np.random.default_rng(1), []
    for size in (count // 2, count - count // 2):
        taken = rng.hypergeometric(correct, count - correct, size, (40_000, 10))
        weakest = (taken / size).argmin(axis=1)[:, None]
        drawn.append(np.take_along_axis((correct - taken) / (count - size), weakest, axis=1).mean())
    assert honest_worst(correct[None], count)[0] == pytest.approx(mean(drawn), abs=2e-4)


def test_the_interval_of_the_honest_worst_class_holds_what_it_estimates() -> None:
    chance, count, held = np.array([0.5, 0.52, 0.55, 0.7]), [80] * 4, 0
    correct = np.random.default_rng(0).binomial(80, chance, (3000, 4))
    truth = honest_worst(correct, np.array(count)).mean()
    for own in correct[:150]:
        low, high = class_measures(own, count, draws=200)["interval"]["honest_worst"]
        held += low <= truth <= high
    assert held / 150 > 0.9


def test_gini_agrees_with_its_definition() -> None:
    accuracy = np.array([[0.2, 0.5, 0.9], [0.4, 0.4, 0.4], [0.0, 0.0, 0.6], [0, 0, 0]])
    pairs = np.abs(accuracy[:, :, None] - accuracy[:, None]).sum((1, 2))
    found = gini(accuracy)
    assert found[:3] == pytest.approx(pairs[:3] / (2 * 9 * accuracy[:3].mean(axis=1)), abs=1e-12)
    assert found[1] == 0 and found[2] == pytest.approx(1 - 1 / 3) and math.isnan(found[3])


def test_the_norm_is_of_the_shares_that_are_confused() -> None:
    confusion = np.array([[50, 30, 0], [0, 10, 0], [0, 0, 5]])
    assert confusion_norm(confusion, np.array([100, 10, 5])) == pytest.approx(0.3)  # 20 of the first were given none
    swapped = np.array([[0, 8, 0], [2, 2, 0], [0, 0, 5]])
    assert confusion_norm(swapped, np.array([8, 4, 5])) == pytest.approx(1.0)
    assert confusion_norm(np.diag([3.0, 0.0]), np.array([3, 0])) == 0


def test_tau_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(0, 6, (2, 10))
        truth, _ = kendalltau(first, second)
        assert kendall_tau(first, second) == pytest.approx(truth, abs=1e-12)
    assert kendall_tau(np.array([1, 2, math.nan, 4]), np.array([5, 6, 0, 9])) == 1
    assert math.isnan(kendall_tau(np.array([1, 1, 1]), np.array([1, 2, 3])))
    assert math.isnan(kendall_tau(np.array([1.0, math.nan]), np.array([1, 2])))


def test_measures_stand_in_an_evaluation_and_are_read_from_an_older_one() -> None:
    label = np.repeat([0, 1, 2], [40, 20, 4])
    predicted = np.where(np.arange(64) % 3 == 0, (label + 1) % 3, label)
    entry = json.loads(json.dumps(by_class(predicted, label, 3), allow_nan=False))
    found = entry["measures"]
    report = class_report([sum((predicted == label)[label == k]) for k in range(3)], [40, 20, 4])
    assert found["class_average"] == pytest.approx(mean(report.accuracy)) != report.average
    assert found["worst_bias"] == pytest.approx(report.worst - found["honest_worst"]) and found["confusion_norm"] > 0
    for name, (low, high) in found["interval"].items():
        assert low <= found[name] <= high
    del entry["measures"]
    assert read_result(entry).measures == class_measures(
        np.array(report.accuracy) * report.count, report.count, np.array(entry["confusion"])
    )


@pytest.mark.parametrize(
    ("correct", "count", "unknown"),
    [
        ([0, 0], [0, 0], MEASURES),
        ([1, 3, 0], [1, 4, 0], ("honest_worst", "worst_bias", "confusion_norm")),
        ([0, 0], [4, 4], ("gini", "confusion_norm")),
    ],
)
def test_what_is_not_known_is_nan(correct: list[int], count: list[int], unknown: Any) -> None:
    found = class_measures(correct, count)
    assert {name for name in MEASURES if math.isnan(found[name])} == set(unknown)
