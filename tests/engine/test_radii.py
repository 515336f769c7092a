"""Curves over the radius, L2 and L1, and the cross-checks: held to a linear model whose answer is known."""

import csv
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retemper.cli import run
from retemper.engine.evaluation import autoattack, cross_check, curve, minimal_norm
from retemper.engine.evaluation.autoattack import SuiteRequest, run_suite, suite_attacks
from retemper.engine.evaluation.consistency import consistency
from retemper.engine.evaluation.cross_check import ProbabilityMargin, cross_checks, schedule
from retemper.engine.evaluation.curve_file import CurveFile, read_curve
from retemper.engine.evaluation.curve_summary import curve_summary
from retemper.engine.evaluation.evaluate import _with_kept
from retemper.engine.evaluation.evaluation_file import Outcome
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.library import library_attacks
from retemper.engine.evaluation.minimal_norm import MinimalNorm
from retemper.engine.evaluation.norms import NORMS, ORDER, is_inside, length
from retemper.engine.predict import Attack, as_float, predictions
from retemper.engine.report import write_report
from retemper.engine.report.figures import LOOKS
from retemper.engine.report.radii import radius_figure
from retemper.engine.report.words import pixels
from retemper.loaders import Split
from retemper.loaders.split import split_of_arrays

CPU = torch.device("cpu")
DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}
CLASSES, PIXELS = 4, 36


class Linear(nn.Module):
    """z = W (x - 1/2)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, PIXELS, generator=torch.Generator().manual_seed(0)))

    def forward(self, image: Tensor) -> Tensor:
        return (image - 0.5).flatten(1) @ self.weight.T


def linear(classes: int) -> tuple[Linear, Split, Tensor, Tensor]:
    """The model, grey images far from black and white, labelled as it classifies them, and both as tensors."""
    model, names = Linear(classes).eval().requires_grad_(False), tuple("abcd"[:classes])
    images = np.random.default_rng(0).integers(110, 146, (24, 6, 6, 1), dtype=np.uint8)
    split = split_of_arrays("digits", "test", images, np.zeros(24, dtype=np.int64), names, "made")
    clean = as_float(split, torch.arange(24), CPU).contiguous()
    label_N = model(clean).argmax(1)
    return model, split_of_arrays("digits", "test", images, label_N.numpy(), names, "made"), clean, label_N


def true_distances(model: Linear, clean: Tensor, label_N: Tensor, norm: str) -> Tensor:
    """(z_y - z_k) / ||w_y - w_k||_*, the dual norm, to each other class: the box is too far away to matter."""
    logits_NK, weight = model(clean), model.weight
    margin_NK = logits_NK.gather(1, label_N[:, None]) - logits_NK
    slope_NK = (weight[label_N][:, None] - weight[None]).norm(DUAL[norm], dim=2)
    return (margin_NK / slope_NK).masked_fill(slope_NK == 0, torch.inf)


@pytest.mark.parametrize("norm", NORMS)
def test_attacks_find_the_distances_that_are_known_in_closed_form(
    norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, split, clean, label_N = linear(CLASSES)
    true_NK = true_distances(model, clean, label_N, norm)
    true_N = true_NK.amin(1)
    assert true_N.max() < 0.4  # no pixel reaches black or white
    whole = autoattack.library_attacks

    def shortened(*words: Any) -> dict[str, Any]:
        attacks = whole(*words)
        attacks["square"].n_queries, attacks["fab-t"].n_iter = 20, 10
        attacks["apgd-t"].n_iter = 50
        return attacks

    monkeypatch.setattr(autoattack, "library_attacks", shortened)
    eps = float(true_N.median()) * 1.001
    facts = {"eps": eps, "seed": 0, "norm": norm}
    ledger = Ledger.begin(tmp_path / "autoattack.csv", facts, np.arange(24), split.labels)
    assert run_suite(model, split, SuiteRequest(eps=eps, device=CPU, norm=norm), ledger)
    holds = torch.from_numpy(ledger.holds(suite_attacks("standard", CLASSES)))
    assert ledger.notes["perturbation"] <= eps * (1 + 1e-5)
    # no attack breaks what no perturbation breaks; and it breaks all that is not at the very edge
    assert holds[true_N > eps * (1 + 1e-5)].all() and not holds[true_N < 0.99 * eps].any()

    pytest.importorskip("foolbox")
    adv = MinimalNorm(model, norm).perturb(clean, label_N)
    found_N = length(adv - clean, norm)
    found_K = model(adv).argmax(1)
    assert (found_K != label_N).all() and (found_N >= true_N * (1 - 1e-5)).all()
    # it goes to the boundary of one class, the nearest for most images but not for all
    assert (found_N <= true_NK.gather(1, found_K[:, None]).squeeze(1) * 1.03 + 1e-4).all()
    assert (found_N <= true_N * 1.03 + 1e-4).float().mean() > 0.8


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("shape", [(12, 12), (14, 14), (19, 24), (8, 8), (32, 32)])
def test_square_begins_on_images_of_any_size(norm: str, shape: tuple[int, int]) -> None:
    pytest.importorskip("pyautoattack")
    last_layer = nn.Linear(shape[0] * shape[1], CLASSES)
    classify = nn.Sequential(nn.Flatten(), last_layer)
    image_B, label_B = torch.full((3, 1, *shape), 0.5), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():  # the first class by far: no image is broken, the start is seen as it is
        last_layer.bias[0] = 100.0
    square = library_attacks(classify, CLASSES, 0.5, 0, CPU, norm=norm)["square"]
    square.n_queries = 2
    seen: list[Tensor] = []
    judge = square.margin_and_loss
    square.margin_and_loss = lambda x, y: seen.append(x.clone()) or judge(x, y)
    adv_B = square.perturb(image_B, label_B)
    moved = (seen[1] - image_B).abs() > 0
    side, covered = shape[0] // 5, moved.any(0).any(0)
    margin = (shape[0] - 5 * side) // 2
    last = [margin + side * (n // side) for n in shape]
    assert covered[margin : last[0], margin : last[1]].float().mean() > 0.8
    assert (length(adv_B - image_B, norm) <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_our_own_attacks_reach_the_known_distance(norm: str) -> None:
    model, split, clean, label_N = linear(2)  # on two classes their losses all point along one line
    true_N = true_distances(model, clean, label_N, norm).amin(1)
    eps = float(true_N.median()) * 1.001
    options: dict[str, Any] = dict(eps=eps, device=CPU, norm=norm)
    holds = predictions(model, split, Attack(steps=40), **options) == label_N
    adv = ProbabilityMargin(model, eps=eps, seed=0, norm=norm).perturb(clean, label_N)
    assert (length(adv - clean, norm) <= eps * (1 + 1e-5)).all() and adv.min() >= 0 and adv.max() <= 1
    for holding in (holds, model(adv).argmax(1) == label_N):
        assert holding[true_N > eps * (1 + 1e-5)].all() and not holding[true_N < 0.95 * eps].any()


def test_pma_ascends_one_term_and_then_the_margin() -> None:
    first, second = ([stage.loss for stage in schedule(run, 6)] for run in (0, 1))
    assert first == ["own"] * 3 + ["margin"] * 3 and second == ["own", "other", "other"] + ["margin"] * 3
    sizes = [stage.size for stage in schedule(0, 6)]
    assert sizes[0] == sizes[3] == 2 and sizes[1] > sizes[2] > 0 and cross_checks("l1") == ("mt-apgd", "fmn")


@pytest.mark.parametrize(("inner", "outer"), [("l2", "linf"), ("l1", "l2"), ("linf", "l2"), ("linf", "l1")])
def test_a_ball_lies_inside_another_where_no_vector_leaves_it(inner: str, outer: str) -> None:
    pixels = PIXELS
    corner = torch.ones(1, pixels) if inner == "linf" else torch.eye(pixels)[:1]
    corner = corner / corner.norm(ORDER[inner], dim=1)
    radius = float(length(corner, outer))  # of the vector that goes farthest
    assert is_inside((inner, 1.0), (outer, radius * 1.0001), pixels)
    assert not is_inside((inner, 1.0), (outer, radius * 0.999), pixels)


RADII = "0.02,0.06,0.12"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack and the cross-checks of a second."""
    whole = autoattack.library_attacks

    monkeypatch.setattr(minimal_norm, "STEPS", 20)
    monkeypatch.setattr(cross_check, "TARGETS", 2)
    monkeypatch.setattr(cross_check, "schedule", lambda run: schedule(run, 6))

    def shortened(*words: Any) -> dict[str, Any]:
        attacks = whole(*words)
        for name in ("apgd-ce", "apgd-t"):
            attacks[name].n_iter = 5
            attacks[name].n_target_classes = 2
        attacks["fab-t"].n_iter, attacks["fab-t"].n_target_classes, attacks["square"].n_queries = 3, 2, 20
        return attacks

    monkeypatch.setattr(autoattack, "library_attacks", shortened)


def verdicts(path: Path) -> dict[str, dict[int, float]]:
    return {name: {image: at for image, (_, at) in one.items()} for name, one in read_curve(path).broken.items()}


def test_a_curve_falls_image_by_image_and_goes_on_where_it_was_killed(
    teacher: Path, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("foolbox")
    words = ["evaluate", str(teacher), "--eps", RADII, "--limit", "12", "--attacks", "fmn,autoattack"]
    words += ["--cross-check", "--out"]
    assert run([*words, str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    assert "cross-checks at eps 0.02" in said and "theory" not in said  # of one curve alone there is nothing to say

    write, writes = Ledger.write, []

    def killed(ledger: Ledger) -> None:
        write(ledger)
        writes.append(ledger)
        if len(writes) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "write", killed)
    assert run([*words, str(tmp_path / "killed")]) != 0 and len(writes) == 9
    assert run([*words, str(tmp_path / "killed")]) == 0
    whole, gone_on = (verdicts(tmp_path / name / "curve.json") for name in ("whole", "killed"))
    assert whole == gone_on
    content = json.loads((tmp_path / "whole" / "curve.json").read_text())
    assert content["protocol"]["eps"] == [0.02, 0.06, 0.12]
    for name, attack in content["attacks"].items():
        accuracies = np.array([entry["accuracy"] for entry in attack["radii"]])
        assert accuracies.shape == (3, 10) and (np.diff(accuracies, axis=0) <= 0).all()
        assert {"interval", "confusion", "eps", "attacked"} <= attack["radii"][0].keys()
        for number, eps in enumerate((0.02, 0.06, 0.12)):
            right = sum(at > eps for at in whole[name].values()) / 12
            assert attack["radii"][number]["average"] == pytest.approx(right)
    attacked = [entry["attacked"] for entry in content["attacks"]["autoattack"]["radii"]]
    assert attacked[0] == 12 and attacked[1] == sum(at > 0.02 for at in whole["autoattack"].values())
    beaten = list(csv.DictReader((tmp_path / "whole" / "curve-cross-check.csv").read_text().splitlines()))
    told = sum(
        one["images"]
        for entry in content["attacks"]["cross-check"]["radii"]
        for one in entry["beats_autoattack"].values()
    )
    assert len(beaten) == told

    assert run([*words[:2], "--attacks", "clean", "--limit", "12", "--out", str(tmp_path / "whole")]) == 0
    page = write_report([tmp_path / "whole"], tmp_path / "page").read_text()
    assert "Over the radius" in page and (tmp_path / "page" / "radii_linf.png").exists()


def test_a_review_asks_all_that_there_is_and_goes_on_where_it_was_killed(
    teacher: Path, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("foolbox")
    words = ["evaluate", str(teacher), "--review", "--limit", "4", "--out", str(tmp_path)]
    write = CurveFile.write

    def killed(file: CurveFile) -> None:
        if file.path.name == "curve-l2.json":
            raise KeyboardInterrupt
        write(file)

    with monkeypatch.context() as patch:
        patch.setattr(CurveFile, "write", killed)
        assert run(words) == 75 and "the same command goes on" in capsys.readouterr().err
    first = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(first["attacks"]) == {"clean", "fgsm", "pgd20", "cw", "autoattack", "cross-check"}
    assert first["checks"] and first["corruptions"]["complete"] and first["protocol"]["eps"] == 0.15
    assert not (tmp_path / "curve-l2.json").exists()

    assert run(words) == 0
    told = capsys.readouterr()
    assert all(f"{name}: done, left as it is" in told.err for name in ("clean", "fgsm", "pgd20", "cw"))
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert all(again["attacks"][name] == first["attacks"][name] for name in ("fgsm", "pgd20", "cw"))
    usual = {"": 0.15, "-l2": 0.6, "-l1": 1.0}
    for norm, eps in usual.items():
        content = json.loads((tmp_path / f"curve{norm}.json").read_text())
        assert content["protocol"]["eps"] == pytest.approx([0.25 * eps, 0.5 * eps, eps, 1.5 * eps])
        assert set(content["attacks"]) == {"clean", "autoattack", "cross-check"} | (
            {"pgd20"} if norm != "-l1" else set()
        )
        assert str(tmp_path / f"curve{norm}.json") in told.out
    assert "theory" in told.out and "0 violations" in told.out
    page = write_report([tmp_path], tmp_path / "page").read_text()
    assert all(text in page for text in ("Over the radius", "L2", "L1", "orruption"))


def test_one_radius_of_a_curve_is_the_single_evaluation(teacher: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(teacher), "--limit", "40", "--attacks", "pgd20", "--out", str(tmp_path)]
    assert run([*words, "--eps", "0.1,0.2"]) == 0 and run([*words, "--eps", "0.1"]) == 0
    curve = json.loads((tmp_path / "curve.json").read_text())["attacks"]["pgd20"]["radii"][0]
    single = json.loads((tmp_path / "evaluation.json").read_text())["attacks"]["pgd20"]
    assert all(curve[name] == single[name] for name in ("accuracy", "count", "confusion", "interval"))


def test_norms_have_files_of_their_own_and_are_compared(teacher: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(teacher), "--limit", "40", "--attacks", "pgd20", "--out", str(tmp_path)]
    assert run([*words, "--norm", "l2", "--eps", "0.1,0.6"]) == 0 and run([*words, "--norm", "l2"]) == 0
    assert run([*words, "--eps", "0.1"]) == 0
    assert json.loads((tmp_path / "evaluation-l2.json").read_text())["protocol"]["norm"] == "l2"
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["consistency"]["pairs"] > 0
    # an image said to be broken in the small ball and to hold in the large one is a violation
    curve = tmp_path / "curve-l2.csv"
    rows = list(csv.reader(curve.read_text().splitlines()))
    right = next(row for row in rows[1:] if row[2] == "")
    right[2] = "0.1"
    curve.write_text("\n".join(",".join(row) for row in rows) + "\n")
    found = consistency(tmp_path, content["protocol"], 64)
    assert found["violations"] and int(right[0]) in found["violations"][0]["first"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--eps", "8"], "8/255 not 8"),
        (["--eps", "0.2,0.1"], "the smallest first"),
        (["--eps", "0.1,trained"], "--eps"),
        (["--norm", "l1"], "no L1 version"),
        (["--norm", "l2", "--eps", "trained"], "L-inf"),
        (["--norm", "l2", "--protocol", "rslad"], "--protocol"),
        (["--eps", "0.1,0.2", "--check"], "--check"),
        (["--cross-check"], "AutoAttack"),
        (["--attacks", "autoattack", "--cross-check", "--suite", "fast"], "--suite"),
        (["--attacks", "autoattack", "--shard", "1/2", "--eps", "0.1,0.2"], "--shard"),
        (["--review", "--norm", "l2"], "leave out --norm"),
        (["--review", "--budget", "3"], "leave out --budget"),
        (["--review", "--attacks", "fgsm"], "leave out --attacks"),
        (["--norm", "l1", "--eps", "curve"], "no L1 version"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    teacher: Path, tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(teacher), "--out", str(tmp_path / "out"), *words]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_widest_interval_of_a_curve_leaves_room_for_the_class() -> None:
    ends = {"average": [0.874, 1.0], "worst": [0.874, 1.0]}
    entry: dict[str, Any] = {
        "eps": 0.1,
        "average": 1.0,
        "worst": 1.0,
        "worst_class": 0,
        "interval": ends,
        "upper_bound": True,
    }
    entry["count"] = [9]
    protocol = {"classes": ["plane"], "images": 9, "split": "test", "norm": "l2"}
    head, line, *_ = curve_summary({"protocol": protocol, "attacks": {"pgd20": {"radii": [entry]}}}).splitlines()
    assert head.index("class") == line.index("plane") and "100.0%]  plane" in line


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize(
    "radii", [(0.0, 0.0375, 0.075, 0.15, 0.225), (0.0, 2 / 255, 4 / 255, 8 / 255, 12 / 255), (0.5,)]
)
def test_the_radii_that_an_axis_names_do_not_overlap(radii: tuple[float, ...], narrow: bool) -> None:
    report: Any = SimpleNamespace(average=0.5, worst=0.25)
    result: Any = SimpleNamespace(report=report, interval={"average": [0.4, 0.6], "worst": [0.2, 0.3]})
    line: Any = dict.fromkeys(radii, result)
    figure = radius_figure({"run": line}, {"run": LOOKS[0]}, narrow)
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        assert len(axes.get_xticks()) == len(radii) and labels[-1].get_text() == pixels(radii[-1])
        for before, after in pairwise([label.get_window_extent() for label in labels]):
            assert before.x1 < after.x0


def test_the_images_that_a_cross_check_broke_at_another_radius_are_still_told(tmp_path: Path) -> None:
    ledgers = []
    for place, (name, eps, weights) in enumerate((("", 0.05, "w"), (".1", 0.2, "w"), (".2", 0.1, "others"))):
        facts = {"eps": eps, "seed": 0, "weights_sha256": weights}
        one = Ledger(tmp_path / f"autoattack{name}.csv", facts, np.arange(3), np.zeros(3, dtype=np.int64))
        one.broken_by[place] = "pma"
        one.write()
        ledgers.append(one)
    cross_check.write_beaten(tmp_path / "cross-check.csv", _with_kept(ledgers[0].path, ledgers[0]))
    rows = list(csv.DictReader((tmp_path / "cross-check.csv").read_text().splitlines()))
    assert [(row["eps"], row["image"]) for row in rows] == [("0.05", "0"), ("0.2", "1")]


def test_rows_hold_below_the_radius_that_stands_there() -> None:
    """Under a protocol that judges attacked images alone, one that is wrong without an attack may hold at first."""
    split: Any = SimpleNamespace(labels=np.array([0, 1]), classes=("a", "b"))
    first = Outcome("fgsm", {}, np.array([0, 1]), np.array([0, 0]))
    one = curve._Growing.begin(split, first, 0.1)
    one.add(first, 0.1, frozenset({0, 1}), 0.0)
    one.add(Outcome("fgsm", {}, np.array([0]), np.array([1])), 0.2, frozenset({0, 1}), 0.0)
    assert one.broken == {0: (0, 0.2), 1: (1, 0.0)}
    assert [entry["average"] for entry in one.entries] == [0.5, 0.0]


def test_a_curve_that_is_done_is_kept_while_it_is_looked_at_again(tmp_path: Path) -> None:
    file = CurveFile.empty(tmp_path / "curve.json", {"eps": [0.1, 0.2]})
    file.set("autoattack", {}, [{"eps": 0.1}], {0: (0, 0.1)})
    file.set("autoattack", {}, [{"eps": 0.1}, {"eps": 0.2}], {0: (0, 0.2)})
    file.set("autoattack", {}, [{"eps": 0.1}], {0: (0, 0.1)})
    assert file.is_done("autoattack") and file.broken["autoattack"] == {0: (0, 0.2)}


def test_a_curve_whose_images_are_lost_is_begun_anew(teacher: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(teacher), "--limit", "20", "--attacks", "fgsm", "--eps", "0.1,0.2", "--out", str(tmp_path)]
    assert run(words) == 0
    whole, was = (tmp_path / "curve.csv").read_text(), (tmp_path / "curve.json").read_bytes()
    (tmp_path / "curve.csv").write_text("image,label\n")
    assert run(words) == 0
    assert (tmp_path / "curve.csv").read_text() == whole
    assert (tmp_path / "curve.1.json").read_bytes() == was
