"""The measuring protocol: turns, ratios within rounds, and no time for what is wrong."""

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from retemper.bench import result, timing
from retemper.bench.case import Case, Contender, Work, equal_to, near_to
from retemper.bench.machine import Rates, count_launches
from retemper.bench.timing import measure
from retemper.engine.device import in_precision

CPU = torch.device("cpu")


class Clock:
    """A clock that advances only when a contender works, ever more slowly or quickly as `pace` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pace: Callable[[int], float] = lambda call: 1.0) -> None:
        self.now, self.calls, self.pace = 0.0, [], pace
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(timing, "ROUND_S", 0)  # one call a turn

    def work(self, name: str, seconds: float, first: float = 0.0) -> Callable[[], str]:
        def call() -> str:
            self.now += self.pace(len(self.calls)) * seconds + (0 if name in self.calls else first)
            self.calls.append(name)
            return name

        return call


def rows_of(case: Case, rounds: int = 5) -> dict[str, dict]:
    return {row["name"]: row for row in measure(case, CPU, rounds, Rates(CPU, quick=True))}


def test_contenders_take_turns_and_drift_cancels_in_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, pace=lambda call: 2.0 ** (call // 2))  # twice as slow every round
    contenders = [Contender(name="a", call=clock.work("a", 1)), Contender(name="b", call=clock.work("b", 3))]
    rows = rows_of(Case(name="case", contenders=contenders, warm_up=2))
    assert clock.calls[:18] == ["a", "b"] * 9  # the start, a first turn and two more that do not count, five rounds
    assert rows["b"]["ratio"] == {"p10": 3, "median": 3, "p90": 3} and rows["b"]["ratio_to"] == "a"
    assert rows["a"]["ratio"]["median"] == 1 and rows["a"]["rounds"] == 5
    assert rows["a"]["ms"]["median"] == 1e3 * 2**6  # of the paces 2**4 to 2**8
    assert rows["a"]["ms"]["p10"] < rows["a"]["ms"]["median"] < rows["a"]["ms"]["p90"]


def test_the_start_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rows = rows_of(Case(name="case", contenders=[Contender(name="a", call=clock.work("a", 1, first=60))]))
    assert rows["a"]["start_up_s"] == 61
    assert rows["a"]["ms"] == {"p10": 1000, "median": 1000, "p90": 1000}


def test_a_call_may_stand_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    work = Work(images=10)
    rows = rows_of(
        Case(
            name="case",
            contenders=[
                Contender(name="one", call=clock.work("one", 1)),
                Contender(name="eight", call=clock.work("eight", 4), calls=8, work=Work(images=20)),
            ],
            work=work,
        )
    )
    assert rows["eight"]["ms"]["median"] == 500 and rows["eight"]["ratio"]["median"] == 0.5
    assert rows["one"]["images_per_s"] == 10 and rows["eight"]["images_per_s"] == 40


def test_no_round_begins_after_the_time_but_those_that_a_median_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for until, taken in ((0.0, timing.LEAST_ROUNDS), (10.5, 6)):
        clock = Clock(monkeypatch)
        case = Case(name="case", contenders=[Contender(name="a", call=clock.work("a", 1))])
        (row,) = measure(case, CPU, 20, Rates(CPU, quick=True), until)
        assert row["rounds"] == len(row["round_ms"]) == taken, "five turns come before those that count"


def test_short_calls_are_repeated_until_they_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(timing, "ROUND_S", 5.0)
    rows = rows_of(Case(name="case", contenders=[Contender(name="a", call=clock.work("a", 0.5))]), rounds=1)
    assert rows["a"]["calls_a_round"] == 10 and rows["a"]["ms"]["median"] == 500


def test_the_processors_own_time_leaves_out_what_a_thread_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = [Contender(name="a", call=lambda: time.sleep(0.02))]
    for threads, clock in ((1, "processor"), (2, "wall")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        row = rows_of(Case(name="case", contenders=contenders, own_time=True, warm_up=0), rounds=1)["a"]
        assert row["clock"] == clock and (row["ms"]["median"] < 20) == (threads == 1)


def test_what_disagrees_gets_its_reason_and_no_time() -> None:
    right, wrong = torch.arange(4.0), torch.tensor([0.0, 1.0, 2.0, 4.0])
    check = equal_to(right)
    contenders = [
        Contender(name="right", call=lambda: right, exactness="bitwise", check=check),
        Contender(name="wrong", call=lambda: wrong, check=check),
        Contender(name="absent", call=None, reason="needs a thing"),
        Contender(name="broken", call=lambda: 1 // 0, check=check),
    ]
    rows = rows_of(Case(name="case", contenders=contenders, work=Work(images=1, bytes=1)))
    assert rows["right"]["reason"] is None and rows["right"]["ms"] is not None
    reasons = {
        "wrong": "disagrees: 1 of 4 values differ",
        "absent": "needs a thing",
        "broken": "fails: ZeroDivisionError: integer division or modulo by zero",
    }
    table = result.as_table(list(rows.values()))
    for name, reason in reasons.items():
        assert rows[name]["reason"] == reason and f"no time: {reason}" in table
        for column in (
            "ms",
            "ratio",
            "start_up_s",
            "images_per_s",
            "gb_per_s",
            "share_of_bound",
            "launches",
            "round_ms",
        ):
            assert rows[name][column] is None, column
    assert all(set(row) == set(result.COLUMNS) for row in rows.values())


def test_without_a_baseline_there_is_no_ratio() -> None:
    contenders = [
        Contender(name="ours", call=lambda: torch.ones(1), check=equal_to(torch.zeros(1))),
        Contender(name="theirs", call=lambda: torch.zeros(1), check=equal_to(torch.zeros(1))),
    ]
    rows = rows_of(Case(name="case", contenders=contenders))
    assert rows["theirs"]["ms"] is not None and rows["theirs"]["ratio"] is None


def test_what_fails_later_gets_no_time_either() -> None:
    calls = iter([1, 2])
    rows = rows_of(Case(name="case", contenders=[Contender(name="a", call=lambda: next(calls))]))
    assert rows["a"]["ms"] is None and "StopIteration" in rows["a"]["reason"]


def test_what_works_in_place_is_checked_on_fresh_inputs() -> None:
    value = torch.zeros(1)
    contenders = [
        Contender(name=name, call=lambda: value.add_(1), check=equal_to(torch.ones(1)), prepare=lambda: value.zero_())
        for name in "ab"
    ]
    rows = rows_of(Case(name="case", contenders=contenders))
    assert all(row["reason"] is None for row in rows.values())


@pytest.mark.parametrize(
    "found, right", [([1.0, 2.0], True), ([1.0, 2.001], True), ([1.0, 2.1], False), ([1.0, float("nan")], False)]
)
def test_near_is_measured_by_the_largest_value(found: list[float], right: bool) -> None:
    wrong = near_to(torch.tensor([1.0, 2.0]), 1e-3)(torch.tensor(found))
    assert (wrong is None) == right, wrong


def test_another_shape_is_wrong() -> None:
    for check in (near_to(torch.ones(2), 1), equal_to(torch.ones(2))):
        assert "shape" in str(check(torch.ones(3)))


def test_the_bound_is_this_machines_own() -> None:
    rates = Rates(CPU, quick=True)
    assert rates.bound_ms(Work(images=3), "fp32") is None and rates.as_json()["copy_gb_per_s"] is None
    copied = rates.bound_ms(Work(bytes=1e9), "fp32")
    multiplied = rates.bound_ms(Work(flop=1e12), "fp32")
    assert copied is not None and multiplied is not None
    assert copied == pytest.approx(1e3 / rates.copy_gb_per_s())
    assert multiplied == pytest.approx(1e3 / rates.matmul_tflop_per_s("fp32"))
    assert rates.bound_ms(Work(bytes=1e9, flop=1e12), "fp32") == max(copied, multiplied)
    before = rates.as_json()
    rates.next_case()
    assert rates.copy_gb_per_s() >= before["copy_gb_per_s"] > 0, "the best so far counts"


def test_operations_are_counted_on_a_cpu() -> None:
    x = torch.ones(3)
    counted = count_launches(lambda: (x + 1).sum(), CPU)
    assert counted == {"launches": 2, "launches_kind": "dispatched operations", "kernel_ms": None}


def test_tf32_is_for_its_group_alone() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for precision in ("fp32", "tf32", "bf16"):
        with in_precision(precision):
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
