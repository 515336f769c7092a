"""Paired comparison of runs: exact tests against tables and hand counts, intervals against their promise, refusals."""

import json
import math
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retemper.cli import run as command
from retemper.engine.class_report import class_report, summaries
from retemper.engine.evaluation.compare import Comparison, as_text, compare, differences, mcnemar
from retemper.engine.evaluation.verdicts import read_evaluated
from retemper.engine.measures import honest_worst
from retemper.errors import DataError, UsageError
from retemper.text import text_width

CLASSES = ["cat", "dog", "eel"]
PER_CLASS = 40


def write_run(folder: Path, correct_N: Any, classes: list[str] = CLASSES, **protocol: Any) -> Path:
    """A run evaluated under clean (always right) and pgd20, on images whose labels go round the classes."""
    folder.mkdir(parents=True)
    correct_N = np.asarray(correct_N)
    label_N = np.arange(len(correct_N)) % len(classes)
    content = {
        "protocol": {
            "dataset": "pets",
            "split": "test",
            "eps": 8 / 255,
            "norm": "linf",
            "precision": "fp32",
            "classes": classes,
            "attacks": {"clean": {"steps": 0}, "pgd20": {"steps": 20}},
        }
        | protocol,
        "attacks": {"clean": {}, "pgd20": {}},
    }
    (folder / "evaluation.json").write_text(json.dumps(content))
    lines = [f"{7 + i},{label},1,{int(ok)}" for i, (label, ok) in enumerate(zip(label_N, correct_N, strict=True))]
    (folder / "evaluation.csv").write_text("\n".join(["image,label,clean,pgd20", *lines[::-1]]) + "\n")
    return folder


def verdicts(*accuracy: float, seed: int = 0) -> np.ndarray:
    """Return verdicts on PER_CLASS images of each class in turn, this part of each correct."""
    rng = np.random.default_rng(seed)
    columns = [rng.permutation(PER_CLASS) < round(a * PER_CLASS) for a in accuracy]
    return np.array(columns).T.ravel()


def against(a: Path, b: Path, **options: Any) -> Comparison:
    return compare([read_evaluated(a)], [read_evaluated(b)], **options)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    for a, b in ((0, 0), (0, 1), (3, 12), (12, 3), (10, 10), (1, 40), (0, 5)):
        tail = sum(comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b)
        assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail), rel=1e-12), (a, b)
    assert [mcnemar(0, 5), mcnemar(3, 12)] == pytest.approx([0.0625, 0.03515625])  # 2/32; 2 * 576/32768


def test_differences_are_those_of_the_reports(tmp_path: Path) -> None:
    a, b = verdicts(0.5, 0.8, 0.9), verdicts(0.7, 0.75, 0.9, seed=1)
    found = against(write_run(tmp_path / "a", a), write_run(tmp_path / "b", b), attack="pgd20")
    reports = [class_report([v[k::3].sum() for k in range(3)], [PER_CLASS] * 3) for v in (a, b)]
    for name in ("average", "worst", "worst_tenth", "nsd"):
        was, now = (getattr(report, name) for report in reports)
        of = found.summary[name]
        assert (of.a, of.b, of.difference) == pytest.approx((was, now, now - was))
        assert of.images[0] < of.difference < of.images[1] and of.seeds is None
    assert [d.difference for d in found.by_class] == pytest.approx([0.2, -0.05, 0.0])
    assert found.summary["average"].discordant == ((int((a & ~b).sum()), int((b & ~a).sum())),)
    assert found.summary["average"].p == mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))
    for k, of in enumerate(found.by_class):
        assert of.p == mcnemar(int((a & ~b)[k::3].sum()), int((b & ~a)[k::3].sum()))
    assert found.images == 120 and found.classes == CLASSES and not found.upper_bound


def test_the_honest_worst_class_is_paired_too(tmp_path: Path) -> None:
    a, b = verdicts(0.5, 0.52, 0.6), verdicts(0.6, 0.62, 0.6, seed=1)
    runs = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    of = against(*runs).summary["honest_worst"]
    honest = [honest_worst(np.array([[v[k::3].sum() for k in range(3)]]), np.full(3, PER_CLASS))[0] for v in (a, b)]
    assert (of.a, of.b, of.difference) == pytest.approx((*honest, honest[1] - honest[0]))
    assert of.images[0] < of.difference < of.images[1] and of.p is None
    assert against(runs[0], runs[0]).summary["honest_worst"].images == (0.0, 0.0)
    better = a.copy()
    better[np.flatnonzero(~a)[:6]] = True
    paired = against(runs[0], write_run(tmp_path / "c", better)).summary["honest_worst"].images
    assert paired[1] - paired[0] < 0.7 * (of.images[1] - of.images[0])
    assert "worst, honest, %" in as_text(against(*runs))


def test_shared_luck_of_the_images_is_not_counted_twice(tmp_path: Path) -> None:
    a = verdicts(0.5, 0.5, 0.5)
    b = a.copy()
    b[np.flatnonzero(~a)[:6]] = True
    paired = against(write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)).summary["average"]
    apart = against(tmp_path / "a", write_run(tmp_path / "c", verdicts(0.55, 0.55, 0.55, seed=9))).summary["average"]
    assert paired.difference == pytest.approx(apart.difference) == pytest.approx(0.05)
    assert paired.images[1] - paired.images[0] < 0.5 * (apart.images[1] - apart.images[0])
    assert paired.p == mcnemar(0, 6) and paired.images[0] > 0
    same = against(tmp_path / "a", tmp_path / "a").summary["average"]
    assert (same.difference, same.images, same.p) == (0.0, (0.0, 0.0), 1.0)


def test_classes_get_holms_correction(tmp_path: Path) -> None:
    a, b = verdicts(0.5, 0.5, 0.5), verdicts(0.5, 0.5, 0.5)
    for k, n in enumerate((6, 8, 1)):  # p: 2/64, 2/256, 1
        b[np.flatnonzero(~a & (np.arange(len(a)) % 3 == k))[:n]] = True
    found = against(write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)).by_class
    assert [of.p for of in found] == pytest.approx([2 / 64, 2 / 256, 1])
    assert [of.p_holm for of in found] == pytest.approx([2 * 2 / 64, 3 * 2 / 256, 1])


def test_seeds_are_paired_in_order_and_have_an_interval_of_their_own(tmp_path: Path) -> None:
    gains = (0.05, 0.10, 0.15)
    a = [write_run(tmp_path / f"a{i}", verdicts(0.5, 0.6, 0.7, seed=i)) for i in range(3)]
    b = [write_run(tmp_path / f"b{i}", verdicts(0.5 + g, 0.6 + g, 0.7 + g, seed=i)) for i, g in enumerate(gains)]
    found = compare([read_evaluated(path) for path in a], [read_evaluated(path) for path in b])
    average = found.summary["average"]
    assert average.difference == pytest.approx(0.1)
    half = 4.302653 * 0.05 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %, from a table
    assert average.seeds == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)
    assert average.b_range == pytest.approx((0.65, 0.75))
    assert average.discordant == ((0, 6), (0, 12), (0, 18))
    assert average.p == mcnemar(0, 6)  # the largest
    one = against(a[1], b[1]).summary["average"]
    assert average.images[1] - average.images[0] < one.images[1] - one.images[0]


def test_seeds_that_disagree_have_no_small_p(tmp_path: Path) -> None:
    low, high = verdicts(0.4, 0.4, 0.4), verdicts(0.8, 0.8, 0.8)
    a, b = (read_evaluated(write_run(tmp_path / n, v)) for n, v in (("a", low), ("b", high)))
    assert compare([a, b], [b, a]).summary["average"].p == 1.0
    assert (compare([a, a], [b, b]).summary["average"].p or 1.0) < 1e-9


UNEVEN, EVEN = [0.95, 0.50, 0.75, 0.40, 0.85, 0.70], [0.78, 0.72, 0.75, 0.70, 0.76, 0.72]


@pytest.mark.parametrize(
    ("seeds", "sides"), [(1, (UNEVEN, UNEVEN[::-1])), (2, (UNEVEN, EVEN))], ids=["1 seed", "2 seeds"]
)
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, sides: tuple[list[float], list[float]]) -> None:
    chance = np.array(sides)
    label_N = np.repeat(np.arange(6), 60)
    truth = {name: value[1] - value[0] for name, value in summaries(chance, np.full(6, 60)).items()}
    held, trials, rng = dict.fromkeys([*truth, "class"], 0.0), 150, np.random.default_rng(0)
    for _ in range(trials):
        hard_N = rng.random(len(label_N))  # half of the verdicts hang on the image alone
        luck_RN = np.where(rng.random(len(label_N)) < 0.5, hard_N, rng.random((2 * seeds, len(label_N))))
        correct_RN = luck_RN < np.repeat(chance, seeds, axis=0)[:, label_N]
        found, by_class = differences(correct_RN, label_N, 6, level=0.95, draws=300, seed=0)
        for name in truth:
            held[name] += found[name].images[0] - 1e-12 <= truth[name] <= found[name].images[1] + 1e-12
        for k, of in enumerate(by_class):
            held["class"] += (of.images[0] <= chance[1, k] - chance[0, k] <= of.images[1]) / 6
    for name, times in held.items():
        assert times / trials > 0.95 - 0.07, f"{name}: {times} of {trials}"


def test_classes_without_images_are_left_out() -> None:
    correct_RN = np.array([[True, False, True, True], [True, True, True, False]])
    found, by_class = differences(correct_RN, np.array([0, 0, 2, 2]), 3, level=0.95, draws=50, seed=0)
    assert found["worst"].difference == 0 and by_class[1].p is None and math.isnan(by_class[1].difference)
    assert by_class[0].p_holm == 1.0


def test_an_attack_on_a_part_of_the_images_is_compared_there(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / n, verdicts(0.5, 0.6, 0.7, seed=s)) for n, s in (("a", 0), ("b", 1))]
    for folder in runs:
        lines = (folder / "evaluation.csv").read_text().splitlines()
        lines = [f"{line},{'autoattack' if i == 0 else '1' if i < 31 else ''}" for i, line in enumerate(lines)]
        (folder / "evaluation.csv").write_text("\n".join(lines))
        content = json.loads((folder / "evaluation.json").read_text())
        content["attacks"]["autoattack"] = {"upper_bound": True}
        (folder / "evaluation.json").write_text(json.dumps(content))
    found = against(*runs)
    assert (found.attack, found.images, found.upper_bound) == ("autoattack", 30, True)
    assert "an upper bound" in as_text(found)
    assert against(*runs, attack="clean").images == 120


def test_the_table_aligns_names_of_any_script_within_80_columns(tmp_path: Path) -> None:
    names = ["猫", "a class whose name goes on and on and on, 1", "a class whose name goes on and on and on, 2"]
    runs = [
        write_run(tmp_path / n, verdicts(*a, seed=s), names)
        for n, a, s in (("a", (1, 0, 0.5), 0), ("b", (0, 1, 0.5), 1))
    ]
    lines = as_text(against(*runs)).splitlines()
    assert max(map(text_width, (line for line in lines if str(tmp_path) not in line))) <= 80
    head = next(i for i, line in enumerate(lines) if line.endswith("p"))
    ends = {text_width(line[: line.index("  ", 30)]) for line in lines[head + 1 : head + 8]}
    assert len(ends) == 1, "the column A does not end at one place"
    assert "…d on, 1" in lines[head + 6] and "…d on, 2" in lines[head + 7]
    assert "the intervals have no such correction" in lines[-1]
    assert "honest: the worst class of one half" in lines[-4]


def test_what_has_no_value_is_called_none(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, verdicts(*[accuracy] * 3), [*CLASSES, "fox"])
        for name, accuracy in (("a", 0), ("b", 1))
    ]
    label_N = [i % 3 for i in range(3 * PER_CLASS)]  # no image is of the last class
    for folder in runs:
        rows = (folder / "evaluation.csv").read_text().splitlines()[1:]
        rows = [f"{i},{label},1,{row[-1]}" for i, (label, row) in enumerate(zip(label_N, rows, strict=True))]
        (folder / "evaluation.csv").write_text("\n".join(["image,label,clean,pgd20", *rows]) + "\n")
    text = as_text(against(*runs))
    assert "nan" not in text and "and 1 class without images" in text
    assert text.split("NSD")[1].split()[:4] == ["none", "0.000", "none", "-"]
    same = as_text(against(runs[1], runs[1]))
    assert "+0.0" not in same and "-0.0" not in same


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "cars"}, "dataset is cars, not pets"),
        ({"attacks": {"clean": {"steps": 0}, "pgd20": {"steps": 10}}}, "pgd20's steps is 10, not 20"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    a, b = write_run(tmp_path / "a", verdicts(1, 1, 1)), write_run(tmp_path / "b", verdicts(1, 1, 1), **change)
    with pytest.raises(UsageError, match=said) as error:
        against(a, b, attack="pgd20")
    assert "b cannot be compared with a" in str(error.value) and "\n" not in str(error.value)


def test_two_radii_are_refused_with_what_helps(tmp_path: Path) -> None:
    usual = write_run(tmp_path / "usual", verdicts(1, 1, 1))
    other = write_run(tmp_path / "other", verdicts(1, 1, 1), eps=0.031)
    for a, b in ((usual, other), (other, usual)):  # it is always the other one that has to change
        with pytest.raises(
            UsageError, match=r"at eps (8/255 and 0.031|0.031 and 8/255): run `retemper evaluate "
        ) as error:
            against(a, b)
        assert str(error.value).endswith(f"--out {other}`") and "--eps" not in str(error.value)
    (other / "evaluation.1.json").write_bytes((usual / "evaluation.json").read_bytes())
    with pytest.raises(UsageError, match=rf"name {other}/evaluation\.1\.json in place of other"):
        against(usual, other)
    with pytest.raises(UsageError, match=r"--eps 0\.05"):
        against(write_run(tmp_path / "one", verdicts(1, 1, 1), eps=0.05), other)


def test_two_norms_are_refused_and_one_that_is_not_l_inf_is_named(tmp_path: Path) -> None:
    linf = write_run(tmp_path / "linf", verdicts(1, 1, 1))
    a, b = (write_run(tmp_path / name, verdicts(1, 1, 1), eps=0.6, norm="l2") for name in ("a", "b"))
    with pytest.raises(UsageError, match="they were evaluated in L2 and L-inf: name two files of one norm"):
        against(linf, a)
    assert "eps 0.6 in L2, 120 images" in as_text(against(a, b))


def test_other_images_are_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", verdicts(1, 1, 1))
    b = write_run(tmp_path / "b", verdicts(1, 1, 1)[:-3])
    with pytest.raises(UsageError, match=r"other images \(120 and 117\): image 124 is only in a"):
        against(a, b)
    text = (a / "evaluation.csv").read_text().replace("\n7,0,", "\n7,1,")
    (b / "evaluation.csv").write_text(text)
    with pytest.raises(UsageError, match="other labels for image 7"):
        against(a, b)


def test_what_is_missing_or_unfinished_is_refused(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, verdicts(1, 1, 1)) for name in "ab")
    with pytest.raises(UsageError, match=r"b has no verdicts under autoattack|a has no verdicts under autoattack"):
        against(a, b, attack="autoattack")
    with pytest.raises(UsageError, match=r"a has no verdicts under pgd20-fair-ard: .* pgd20 --protocol fair-ard"):
        against(a, b, attack="pgd20-fair-ard")
    with pytest.raises(UsageError, match=r"there is no attack 'pgd-20' \(did you mean 'pgd20'\?\): a has .*pgd20"):
        against(a, b, attack="pgd-20")
    with pytest.raises(UsageError, match="as many seeds"):
        compare([read_evaluated(a)], [])
    content = json.loads((b / "evaluation.json").read_text())
    content["attacks"]["pgd20"] = {"complete": False, "upper_bound": True}
    (b / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="pgd20 of b was interrupted"):
        against(a, b)
    (b / "evaluation.csv").unlink()
    with pytest.raises(DataError, match=r"evaluation\.csv does not exist: run `retemper evaluate .* --out .*b`"):
        against(a, b)
    with pytest.raises(DataError, match="holds no evaluation, and is no run's folder"):
        read_evaluated(tmp_path)
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_evaluated(tmp_path / "nowhere")
    (a / "evaluation.json").rename(a / "evaluation-last.json")
    with pytest.raises(DataError, match=r"name one of evaluation-last\.json"):
        read_evaluated(a)


def test_verdicts_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, verdicts(1, 1, accuracy)) for name, accuracy in (("a", 1), ("b", 0.5)))
    content = json.loads((a / "evaluation.json").read_text())
    content["attacks"]["pgd20"] = {"accuracy": [1.0] * 3, "count": [len(read_evaluated(a).verdicts["pgd20"]) // 3] * 3}
    (a / "evaluation.json").write_text(json.dumps(content))
    against(a, a)
    (b / "evaluation.csv").replace(a / "evaluation.csv")
    with pytest.raises(DataError, match=r"does not belong to evaluation\.json"):
        against(a, a)


def test_other_pixels_of_the_same_name_are_refused(tmp_path: Path) -> None:
    a, b, old = (
        write_run(tmp_path / name, verdicts(1, 1, 1), CLASSES, **digest)
        for name, digest in (("a", {"images_sha256": "x"}), ("b", {"images_sha256": "y"}), ("old", {}))
    )
    with pytest.raises(UsageError, match="the digest of the images"):
        against(a, b)
    against(a, old)


@pytest.mark.parametrize("line", ["3,0,1,2", "x,0,1,1", "7,0,1,1", "3,0,1", "-1,0,1,1"])
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, line: str) -> None:
    a = write_run(tmp_path / "a", verdicts(1, 1, 1))
    with open(a / "evaluation.csv", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"evaluation\.csv is damaged"):
        against(a, a)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    names = [f"class {k:02}" for k in range(30)]
    for name in ("a1", "a2", "b1", "b2"):
        write_run(tmp_path / name, rng.random(30 * 20) < 0.4 + 0.2 * (name[0] == "b"), names)
    sides = [",".join(str(tmp_path / f"{side}{i}") for i in (1, 2)) for side in "ab"]
    assert command(["compare", *sides, "--attack", "pgd20", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "pgd20, eps 0.03137, 600 images" in printed and "10 classes in which A is stronger" in printed
    assert all(title in printed for title in ("average, %", "worst class, %", "worst tenth, %", "NSD", "class 0"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["by_class"]) == 30 and found["summary"]["nsd"]["seeds"][0] < found["summary"]["nsd"]["difference"]
    assert command(["compare", sides[0], sides[1].split(",")[0]]) == 2
    assert "as many seeds" in capsys.readouterr().err
