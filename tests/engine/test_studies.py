"""What the two long benchmarks would print, before hours are spent on them."""

import importlib.util
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from retemper.engine.catalogue import find_setting

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_runs.py"))))  # the tests are no package
RSLAD, ABSLD = made.RSLAD, made.ABSLD
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return script("label_trust_study")


@pytest.fixture(scope="module")
def fairness() -> ModuleType:
    return script("fairness")


def test_every_row_of_the_study_is_a_recipe(study: ModuleType) -> None:
    names = [row.name for row in study.ROWS]
    assert len({row.folder for row in study.ROWS}) == len(names)
    for row in study.ROWS:
        for data in row.on:
            replace(find_setting(f"{row.method}:{data}")[2].recipe, **study.HELD_OUT[data], **row.fields)
        assert row.teacher is None or row.teacher in names


def test_the_study_puts_the_best_worst_class_first_and_gives_ranges(study: ModuleType) -> None:
    def seed(worst: float) -> dict[str, dict[str, Any]]:
        return {attack: {"average": 0.75, "worst": worst, "nsd": 0.125} for attack in ("apgd", "pgd20")}

    lines = list(study.table({"a": [seed(0.25), seed(0.5)], "b": [seed(0.5)]}))[2:]
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
