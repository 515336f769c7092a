"""Class-wise summaries against golden and hand values; intervals against Wilson's formula and their promises."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from retemper.engine.class_report import by_class, class_report, intervals, read_result, summaries

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/class_report.json").read_text())
NAN = math.nan


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{len(case['count'])} classes")
def test_agrees_with_golden_values(case: dict[str, Any]) -> None:
    report = class_report(case["correct"], case["count"])
    assert report.worst_class == case["worst_class"] and report.count == case["count"]
    assert report.accuracy == pytest.approx(case["accuracy"], rel=0, abs=1e-12)
    for name in ("average", "worst", "worst_tenth", "nsd"):
        assert getattr(report, name) == pytest.approx(case[name], rel=0, abs=1e-12), name


def test_agrees_with_hand_values() -> None:
    report = class_report([8, 4], [10, 8])
    assert report.accuracy == [0.8, 0.5]
    assert (report.worst, report.worst_class, report.worst_tenth) == (0.5, 1, 0.5)
    assert report.average == pytest.approx(12 / 18)  # over images, not over classes
    assert report.nsd == pytest.approx(0.15 / 0.65)


def test_worst_tenth_is_the_mean_of_the_rounded_up_tenth() -> None:
    correct = list(range(21))  # a tenth of 21 classes: 3 of them
    assert class_report(correct[::-1], [100] * 21).worst_tenth == pytest.approx((0.00 + 0.01 + 0.02) / 3)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_takes_lists_arrays_and_tensors(kind: Any) -> None:
    assert class_report(kind([1, 3]), kind([4, 4])) == class_report([1, 3], [4, 4])


def test_a_class_without_images_is_left_out() -> None:
    report = class_report([3, 0, 2], [4, 0, 4])
    assert math.isnan(report.accuracy[1])
    assert (report.average, report.worst, report.worst_class) == (5 / 8, 0.5, 2)
    assert report.nsd == class_report([3, 2], [4, 4]).nsd


def test_says_nan_where_there_is_nothing_to_say() -> None:
    assert math.isnan(class_report([0, 0], [5, 5]).nsd)
    empty = class_report([0, 0], [0, 0])
    assert empty.worst_class == -1 and all(map(math.isnan, (empty.average, empty.worst, empty.worst_tenth, empty.nsd)))


def test_the_report_counts_by_class() -> None:
    label = np.array([0, 0, 0, 0, 1, 1])
    report = by_class(np.array([0, 0, 0, 2, -1, 1]), label, 3)  # -1: the logits were not finite
    assert report["accuracy"] == [0.75, 0.5, None]  # nobody has class 2: null, not a number
    assert (report["worst"], report["worst_class"], report["count"]) == (0.5, 1, [4, 2, 0])
    low, high = report["interval"]["class"][0]
    assert low < 0.75 < high
    assert report["confusion"] == [[3, 0, 1], [0, 1, 0], [0, 0, 0]]
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("correct", "count", "message"),
    [
        ([5], [4], "class 0 has 5 correct of only 4"),
        ([-1], [4], "correct must hold whole numbers"),
        ([1], [-4], "count must hold whole numbers"),
        ([0.5], [4], "correct must hold whole numbers"),
        ([NAN], [4], "correct must hold whole numbers"),
        ([1, 2], [4], "must both be"),
        ([[1]], [[4]], "must both be"),
        ([], [], "must both be"),
    ],
)
@pytest.mark.parametrize("function", [class_report, intervals])
def test_refuses_what_cannot_be_counted(function: Any, correct: list, count: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(correct, count)


def test_class_intervals_are_wilsons() -> None:
    pairs = intervals([8, 0, 10, 0], [10, 10, 10, 0], draws=10)["class"]
    assert pairs[0] == pytest.approx((0.490162, 0.943318), abs=1e-6)  # z = 1.959964; by hand, and in textbooks
    assert pairs[1] == pytest.approx((0.0, 0.277533), abs=1e-6) and pairs[1][0] == 0
    assert pairs[2] == pytest.approx((0.722467, 1.0), abs=1e-6) and pairs[2][1] == 1
    assert all(map(math.isnan, pairs[3]))
    for level, count in ((0.95, 1), (0.9, 60), (0.99, 1000)):
        correct = [0, count // 3, count]
        expected = [binomtest(k, count).proportion_ci(level, method="wilson") for k in correct]
        found = np.array(intervals(correct, [count] * 3, level=level, draws=10)["class"])
        assert found == pytest.approx(np.array(expected), rel=0, abs=1e-12)


def test_summary_intervals_hold_the_estimate_and_shrink_with_images_and_level() -> None:
    correct, count = np.array([30, 60, 90]), np.array([100, 100, 100])
    wide, narrow = intervals(correct, count), intervals(100 * correct, 100 * count)
    report = class_report(correct, count)
    for name in ("average", "worst", "worst_tenth", "nsd"):
        (low, high), (inner_low, inner_high) = wide[name], narrow[name]
        assert low < getattr(report, name) < high
        assert high - low == pytest.approx(10 * (inner_high - inner_low), rel=0.15)
    assert intervals(correct, count, level=0.5)["average"][0] > wide["average"][0]


def test_average_interval_agrees_with_the_normal_approximation() -> None:
    low, high = intervals([500] * 4, [1000] * 4)["average"]
    half = 1.96 * math.sqrt(0.25 / 4000)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-3)


SPREAD = [0.85, 0.62, 0.74, 0.60, 0.80, 0.71, 0.88, 0.75, 0.52, 0.66]


@pytest.mark.parametrize(
    ("chance", "count"),
    [
        (SPREAD, 60),
        ([0.75] * 10, 60),  # no class is the weakest
        ([0.05, *SPREAD], 1000),  # one is by far
        (np.random.default_rng(1).beta(2, 4, 100).tolist(), 100),
    ],
    ids=["spread", "equal", "one weak", "100 classes"],
)
def test_intervals_hold_the_truth_as_often_as_they_say(chance: list[float], count: int) -> None:
    classes, trials = len(chance), 200
    truth = {name: value[0] for name, value in summaries(np.array([chance]), np.full(classes, count)).items()}
    held = dict.fromkeys(truth, 0)
    for correct in np.random.default_rng(0).binomial(count, chance, size=(trials, classes)):
        found = intervals(correct, [count] * classes, draws=300)
        for name in truth:
            held[name] += found[name][0] - 1e-12 <= truth[name] <= found[name][1] + 1e-12
    for name in ("average", "worst_tenth", "nsd") + ("worst",) * (classes < 100):
        assert held[name] / trials > 0.95 - 0.08, f"{name}: {held[name]} of {trials}"


def test_intervals_hold_the_estimate() -> None:
    for correct in ([60] * 10, [59] * 10, [0, *[60] * 9], [1] * 10, [30, *[31] * 9]):
        report, found = class_report(correct, [60] * 10), intervals(correct, [60] * 10, draws=300)
        for name in ("average", "worst", "worst_tenth", "nsd"):
            assert found[name][0] <= getattr(report, name) <= found[name][1], (name, correct)


def test_a_class_that_is_never_right_is_not_certain() -> None:
    low, high = intervals([0, 50, 55], [60] * 3)["worst"]
    assert low == 0 and 0 < high < 0.08


def test_intervals_repeat_and_follow_the_seed() -> None:
    assert intervals([5, 9], [10, 10]) == intervals([5, 9], [10, 10])
    assert intervals([500, 900], [1003, 1001], seed=0)["nsd"] != intervals([500, 900], [1003, 1001], seed=1)["nsd"]


@pytest.mark.parametrize("change", [{"level": 1.0}, {"level": 0.0}, {"draws": 0}])
def test_intervals_refuse_impossible_settings(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="level"):
        intervals([1], [2], **change)


def test_intervals_of_nothing_are_nan() -> None:
    assert all(map(math.isnan, intervals([0], [0])["average"]))
    assert all(map(math.isnan, intervals([0], [3])["nsd"]))


def test_reads_an_entry_back() -> None:
    report, interval = class_report([3, 2], [4, 4]), intervals([3, 2], [4, 4])
    entry = json.loads(json.dumps(vars(report) | {"interval": interval}))
    result = read_result(entry)
    assert result.report == report
    assert [list(pair) for pair in result.interval["class"]] == entry["interval"]["class"]
    assert result.interval["nsd"] == interval["nsd"]


def test_computes_the_intervals_anew() -> None:
    entry = vars(class_report([3, 2], [4, 4])) | {"interval": {"nsd": [0, 0]}}  # as an older version found it
    assert read_result(entry).interval == intervals([3, 2], [4, 4])


def test_reads_an_entry_with_holes() -> None:
    result = read_result({"accuracy": [0.5, None, NAN], "count": [4, 0, 4], "interval": {"average": None}})
    assert result.report.count == [4, 0, 0] and result.report.average == 0.5
    assert result.interval["class"][0] == intervals([2], [4])["class"][0]


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"accuracy": [0.5]},
        {"accuracy": [0.5], "count": [4, 4]},
        {"accuracy": ["high"], "count": [4]},
        {"accuracy": [0.5], "count": [None]},
        {"accuracy": [1.5], "count": [4]},
    ],
)
def test_refuses_an_entry_that_is_none(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        read_result(entry)
