"""What the two long benchmarks would print, before hours are spent on them, and what they keep of their runs."""

import json
import runpy
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from retemper.engine import save_weights
from retemper.engine.catalogue import find_setting
from retemper.engine.evaluation.autoattack import SuiteRequest
from retemper.engine.evaluation.evaluate import EvaluationRequest
from retemper.engine.evaluation.ledger import Ledger
from retemper.errors import Busy, DataError, UsageError
from retemper.files import locked
from retemper.loaders import Split, holdout_split, load_split

made = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "engine/made_runs.py"))
)  # the tests are no package
RSLAD, ABSLD = made.RSLAD, made.ABSLD
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


def script(name: str) -> ModuleType:
    """A script of benchmarks/, which finds those beside it as it does when it is run."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return script("label_trust_study")


@pytest.fixture(scope="module")
def fairness() -> ModuleType:
    return script("fairness")


@pytest.fixture(scope="module")
def evening() -> ModuleType:
    return script("even")


@pytest.fixture(scope="module")
def records() -> ModuleType:
    return script("records")


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    return script("runs")


def test_every_row_of_the_study_is_a_recipe(study: ModuleType) -> None:
    names = [row.name for row in study.ROWS]
    assert len({row.folder for row in study.ROWS}) == len(names)
    for row in study.ROWS:
        for data in row.on:
            find_setting(f"{row.method}:{data}")[2].recipe.replace(**study.HELD_OUT[data], **row.fields)
        assert row.teacher is None or row.teacher in names


def test_the_kept_epoch_is_the_best_of_those_that_may_be_kept(study: ModuleType, tmp_path: Path) -> None:
    run = made.make_run(tmp_path / "run", RSLAD)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"recipe": config["recipe"] | {"select_from": 2}}))
    scores = [(1, 0.9, 0.9), (2, 0.5, 0.25), (3, 0.5, 0.375), (4, 0.75, 0.0)]
    lines = [{"epoch": epoch, "holdout": {"average": average, "worst": worst}} for epoch, average, worst in scores]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"epoch": 5}]))
    assert study.chosen(run) == {"average": 0.5, "worst": 0.375}


def test_the_study_attacks_what_was_kept_on_images_that_no_student_saw(
    study: ModuleType, teacher: Path, train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert train("rslad:digits", run, "--holdout-per-class", "30") == 0
    (run / "last.safetensors").unlink()  # in so short a run the kept epoch is the last one
    given: dict[str, Any] = {}

    def suite(model: nn.Module, split: Split, order: np.ndarray, request: SuiteRequest, **known: Any) -> Ledger:
        given.update(model=model, order=order, request=request)
        ledger = Ledger(known["path"], {}, order, split.labels[order])
        ledger.clean_N[:] = split.labels[order] > 0  # the first class has fallen
        return ledger

    monkeypatch.setattr(study, "evaluate_suite", suite)
    report = study.by_class(study.attacked(run, "digits"))
    assert report["accuracy"] == [0.0] + [1.0] * 9 and report["count"] == [30] * 10
    trained_on, _ = holdout_split(load_split("digits", "train").labels, 30)
    assert not set(given["order"]) & set(trained_on)
    assert given["request"].eps == 0.15 and given["request"].fold
    best = load_file(run / "best.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in given["model"].state_dict().items())


def test_the_study_puts_the_best_worst_class_first_and_gives_ranges(study: ModuleType) -> None:
    def seed(worst: float) -> dict[str, dict[str, Any]]:
        return {attack: {"average": 0.75, "worst": worst, "nsd": 0.125} for attack in ("apgd", "pgd20")}

    lines = study.table({"a": [seed(0.25), seed(0.5)], "b": [seed(0.5)]}).splitlines()[2:]
    assert lines == [
        "| b | 75.0% | 50.0% | 0.125 | 75.0% | 50.0% | 0.125 |",
        "| a | 75.0% (75.0% to 75.0%) | 37.5% (25.0% to 50.0%) | 0.125 "
        "| 75.0% (75.0% to 75.0%) | 37.5% (25.0% to 50.0%) | 0.125 |",
    ]


def test_the_comparison_pairs_ours_with_each_and_each_with_the_baseline(fairness: ModuleType, tmp_path: Path) -> None:
    better = [a + 0.1 for a in RSLAD]
    accuracy = {"rslad": RSLAD, "absld": ABSLD, "label_trust": better}
    runs = {
        name: [made.make_run(tmp_path / f"{name}{seed}", one, verdicts=True, seed=seed) for seed in range(2)]
        for name, one in accuracy.items()
    }
    from_baseline, from_each = fairness.compared(runs, "pgd20")
    assert from_baseline.keys() == {"absld", "label_trust"} and from_each.keys() == {"rslad", "absld"}
    assert from_baseline["absld"].summary["worst"].difference == pytest.approx(min(ABSLD) - min(RSLAD))
    assert from_each["absld"].summary["worst"].difference == pytest.approx(min(better) - min(ABSLD))
    text = fairness.ours_table(from_each, "pgd20")
    assert "| RSLAD | +10.0 (" in text and text.count("\n") == 4


def test_processes_share_the_runs_out_and_wait_for_what_another_has_begun(
    runs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, done, slept = ExitStack(), [], []
    other.enter_context(locked(tmp_path / ".rslad-digits-seed-0.lock"))

    def absld() -> None:
        with pytest.raises(Busy), locked(tmp_path / ".absld-digits-seed-0.lock", "held while it is worked at"):
            pass
        done.append("absld")

    def finished(seconds: float) -> None:
        slept.append(seconds)
        other.close()

    monkeypatch.setattr(runs.time, "sleep", finished)
    units = {"rslad:digits, seed 0": lambda: done.append("rslad"), "absld:digits, seed 0": absld}
    runs.share_out("students", units, tmp_path)
    assert done == ["absld", "rslad"] and len(slept) == 1

    def failing() -> None:
        raise DataError("no images")

    with pytest.raises(DataError, match="no images"):  # no other error is waited out
        runs.share_out("students", {"a": failing}, tmp_path)


def test_the_comparison_of_presets_says_what_strong_moves(tmp_path: Path) -> None:
    strength = script("strength")
    better = [accuracy + 0.1 for accuracy in ABSLD]
    runs = {
        "absld": {
            preset: [made.make_run(tmp_path / f"{preset}{seed}", one, verdicts=True, seed=seed) for seed in range(2)]
            for preset, one in (("paper", ABSLD), ("strong", better))
        }
    }
    found = strength.compared(runs, "pgd20")
    assert found["absld"].summary["worst"].difference == pytest.approx(0.1)
    lines = strength.table(runs, found, "pgd20").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| ABSLD, paper",
        "| ABSLD, strong",
        "| strong less paper, points and hundredths",
    ]
    assert "+10.0 (" in lines[4].split(" | ")[3]


def test_a_preset_has_folders_of_its_own_and_leaves_the_teacher_as_it_is(
    runs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def stop(job: Any) -> None:
        asked.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "with_teacher", stop)
    for preset in ("paper", "strong"):
        with pytest.raises(KeyboardInterrupt):
            runs.trained_and_evaluated("rslad:digits", 1, runs.Protocol(out=tmp_path, attacks=(), preset=preset))
    assert [job.out.name for job in asked] == ["rslad-digits-seed1", "rslad-digits-strong-seed1"]
    assert [job.recipe.optim.preset for job in asked] == ["paper", "strong"]
    assert [job.recipe.optim.lr_schedule for job in asked] == ["steps", "onecycle"]


def test_an_evening_is_compared_with_what_it_was_made_of_and_csr_with_its_control(
    evening: ModuleType, tmp_path: Path
) -> None:
    def reached(by: str, score: float) -> dict[str, Any]:
        return {"evened": {"by": by, "tried": {by: {"average": score, "worst": 0.0}}}}

    ways = ("before", "norm", "half", "bias", "csr", "plain")
    of: dict[str, list[Path]] = {}
    for number, by in enumerate(ways):
        accuracy = [a + 0.01 * number for a in RSLAD] if by != "csr" else RSLAD[::-1]
        of[by] = [made.make_run(tmp_path / f"{by}{seed}", accuracy, verdicts=True, seed=seed) for seed in range(2)]
    for by, scores in (("norm", (0.5, 0.9)), ("half", (0.6, 0.8)), ("bias", (0.4, 0.7))):
        for folder, score in zip(of[by], scores, strict=True):
            config = json.loads((folder / "config.json").read_text()) | reached(by, score)
            (folder / "config.json").write_text(json.dumps(config))
    whole = evening.with_picked(of)
    assert [*whole] == ["before", "norm", "half", "bias", "picked", "csr", "plain"]
    assert whole["picked"] == [of["half"][0], of["norm"][1]]
    assert "picked" not in evening.with_picked({by: of[by] for by in ("before", "norm", "half")})
    rows = evening.rows_of(whole, "pgd20")
    assert rows["before"].difference is None and rows["bias"].tau == pytest.approx([1.0, 1.0])
    assert rows["bias"].difference.summary["worst"].difference == pytest.approx(0.03)
    control = rows["csr less plain"]
    assert control.difference.summary["average"].difference == pytest.approx(-0.05, abs=0.006) and control.found == []
    assert control.tau[0] < 1
    lines = evening.table({"rslad": rows}, "pgd20").splitlines()
    assert len(lines) == 2 + 8 and lines[5].startswith("| RSLAD, bias |") and "| +3.0 (" in lines[5]
    alone = evening.table({"rslad": {"before": rows["before"]}}, "pgd20").splitlines()
    assert len(alone) == 3 and "refused: a seed never learned a class" in alone[2] and "refused" not in lines[2]


def test_students_are_copied_from_where_they_are_finished(
    evening: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not finished there is trained below --out, and nothing is written there."""
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    done: list[str] = []
    monkeypatch.setattr(evening, "evaluated", lambda folder, protocol: done.append(f"evaluated {folder.name}"))
    monkeypatch.setattr(evening, "trained_and_evaluated", lambda name, seed, protocol: done.append(f"trained {seed}"))
    for seed, epoch in enumerate(("20", "4")):
        folder = evening.folder_of("rslad:digits", seed, source)
        folder.mkdir(parents=True)
        for name in ("best", "last"):
            save_weights(folder / f"{name}.safetensors", nn.Linear(2, 2), {"epoch": epoch})
        (folder / "last.state").write_text("large")
    there = sorted(source.rglob("*"))
    copied = evening.base_of("rslad:digits", 0, source, out, None)
    evening.base_of("rslad:digits", 1, source, out, None)
    assert done == ["evaluated rslad-digits-seed0", "trained 1"] and sorted(source.rglob("*")) == there
    assert sorted(path.name for path in copied.iterdir()) == ["best.safetensors", "last.safetensors"]


def test_a_table_is_of_one_radius_and_names_it(fairness: ModuleType) -> None:
    def evaluated(eps: float, network: str) -> dict[str, Any]:
        numbers = {"average": 0.5, "worst": 0.25, "nsd": 0.1}
        return {"protocol": {"eps": eps, "network": network}, **{name: numbers for name in ("clean", "pgd20")},
                "attacks": {name: numbers for name in ("clean", "pgd20")}, "seconds": 1.0}  # fmt: skip

    alike = {"rslad": [evaluated(0.15, "a"), evaluated(0.15, "b")], "absld": [evaluated(0.15, "c")]}
    mixed = alike | {"absld": [evaluated(0.031, "c")]}
    methods = script("methods").table
    for make, head in (
        (lambda found: fairness.table(found, {}, "pgd20", "digits"), "| PGD-20, eps 0.15 | clean |"),
        (methods, "| PGD-20 average, eps 0.15 |"),
    ):
        assert head in make(alike).splitlines()[0]
        with pytest.raises(UsageError, match=r"these are of 2 \(eps 0.15: a, b; eps 0.031: c\)"):
            make(mixed)


@pytest.mark.parametrize("out", ["/home/someone/runs/a-run", "runs/deep/a-run"])
def test_records_lose_the_machines_folders_alone(records: ModuleType, out: str, tmp_path: Path) -> None:
    text = (
        f'{{"out": "{out}", "teacher": {{"path": "{out}"}}, "classes": ["T-shirt/top"], '
        '"loader": "ffcv from /var/cache/x.beton (as asked)"}'
    )
    run = tmp_path / "a-run"
    run.mkdir()
    (run / "config.json").write_text(text)
    records.pack([run], ["config.json"], tmp_path / "packed")
    assert json.loads((records.unpack(tmp_path / "packed", tmp_path / "to")["a-run"] / "config.json").read_text()) == {
        "out": "a-run",
        "teacher": {"path": "a-run"},
        "classes": ["T-shirt/top"],
        "loader": "ffcv from x.beton (as asked)",
    }


def test_records_come_back_to_the_byte_and_are_the_same_in_any_order(records: ModuleType, tmp_path: Path) -> None:
    texts = {
        "b": {"config.json": "{}\n", "ledger.csv": '# {"sha256": "\u00e9"}\r\n1,0\n'},
        "a": {"config.json": '{"a": 1}', "ledger.csv": ""},
    }
    for run, files in texts.items():
        (tmp_path / run).mkdir()
        for name, text in files.items():
            (tmp_path / run / name).write_bytes(text.encode())
    names, folders = ("ledger.csv", "config.json"), [tmp_path / run for run in texts]
    records.pack((folder for folder in folders), names, tmp_path / "one")
    records.pack(folders[::-1], names[::-1], tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    back = records.unpack(tmp_path / "one", tmp_path / "to")
    assert {
        run: {path.name: path.read_bytes().decode() for path in folder.iterdir()} for run, folder in back.items()
    } == texts


def test_damaged_records_are_told_in_one_line(records: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes((RESULTS / "fairness/digits" / records.RECORDS).read_bytes()[:-100])
    for name in ("cut", "absent"):
        with pytest.raises(DataError, match=name):
            records.unpack(tmp_path / name, tmp_path)


def test_the_tables_of_the_comparison_are_made_again_from_its_records(
    fairness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables, figures and records are the same; the plot is drawn by whatever version of matplotlib there is."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["fairness.py", "--data", "digits", "--from-records", "--results", str(tmp_path)])
    fairness.main()
    kept = RESULTS / "fairness/digits"
    tables = ("autoattack.md", "autoattack-ours.md", "pgd20.md", "pgd20-ours.md")
    assert [(tmp_path / name).read_text() for name in tables] == [(kept / name).read_text() for name in tables]
    assert (kept / "autoattack.md").read_text() in capsys.readouterr().out
    new, old = (json.loads((folder / "fairness.json").read_text()) for folder in (tmp_path, kept))
    assert new["trained_at"] == old["trained_at"] and new["checks"] == old["checks"]
    assert new["seeds"] == old["seeds"] and new["attacks"].keys() == old["attacks"].keys()


@pytest.mark.parametrize("data", ["digits", "fashion_mnist_small"])
def test_the_table_of_the_study_is_made_again_from_its_records(
    study: ModuleType, records: ModuleType, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = study.from_records(data, tmp_path)
    assert text == (RESULTS / "label_trust" / data / "study.md").read_text()
    new, old = (
        json.loads((folder / "study.json").read_text()) for folder in (tmp_path, RESULTS / "label_trust" / data)
    )
    assert {key: new[key] for key in ("rows", "held_out", "trained_at")} == {
        key: old[key] for key in ("rows", "held_out", "trained_at")
    }
    packed = (tmp_path / records.RECORDS, RESULTS / "label_trust" / data / records.RECORDS)
    one, two = (records.unpack(path, tmp_path / str(n)) for n, path in enumerate(packed))
    assert one.keys() == two.keys()
    assert all((one[run] / "config.json").read_bytes() == (two[run] / "config.json").read_bytes() for run in one)


def test_what_was_evaluated_under_other_versions_is_evaluated_again(
    runs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made.make_run(runs.folder_of("rslad:digits", 0, tmp_path), RSLAD)  # clean, pgd20 and the check are there
    asked: list[tuple[tuple[str, ...], bool]] = []

    def evaluate(request: EvaluationRequest) -> tuple[Path, dict[str, Any]]:
        asked.append((request.attacks, request.check))
        if len(asked) == 1:  # the first puts what was there aside
            return run, {"attacks": {name: {} for name in request.attacks}}
        return run, {"attacks": {name: {} for name in ("clean", "pgd20", "autoattack")}, "checks": {}}

    monkeypatch.setattr(runs, "train", lambda job: None)
    monkeypatch.setattr(runs, "with_teacher", lambda job: job)
    monkeypatch.setattr(runs, "evaluate_target", evaluate)
    protocol = runs.Protocol(out=tmp_path, attacks=("clean", "pgd20", "autoattack"), check=True)
    content = runs.trained_and_evaluated("rslad:digits", 0, protocol)
    assert asked == [(("autoattack",), False), (("clean", "pgd20"), True)]
    assert content["attacks"].keys() == {"clean", "pgd20", "autoattack"}


def test_what_was_evaluated_at_another_radius_is_evaluated_again(
    runs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made.make_run(runs.folder_of("rslad:digits", 0, tmp_path), RSLAD, protocol={"eps": 0.031})
    asked: list[tuple[str, ...]] = []

    def evaluate(request: EvaluationRequest) -> tuple[Path, dict[str, Any]]:
        asked.append(request.attacks)
        return run, {"attacks": {name: {} for name in request.attacks}}

    monkeypatch.setattr(runs, "train", lambda job: None)
    monkeypatch.setattr(runs, "with_teacher", lambda job: job)
    monkeypatch.setattr(runs, "evaluate_target", evaluate)
    runs.trained_and_evaluated("rslad:digits", 0, runs.Protocol(out=tmp_path, attacks=("clean", "pgd20")))
    assert asked == [("clean", "pgd20")]
