"""What the benchmark of one-step distillation makes of its runs, before hours are spent on them."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def study() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return import_module("one_step")
    finally:
        sys.path.pop(0)


def evaluation(robust: float, fell_back: list[Any]) -> dict[str, Any]:
    attacks = {name: {"average": robust, "worst": robust / 2, "nsd": 0.5} for name in ("clean", "pgd20", "autoattack")}
    protocol = {"eps": 0.15, "network": "x"}
    return {"attacks": attacks, "protocol": protocol, "seconds": 30.0, "fell_back": fell_back}


def test_a_table_has_a_line_a_method_and_attack(study: ModuleType) -> None:
    found = {
        ("rslad", "ten"): [evaluation(0.6, []), evaluation(0.7, [])],
        ("rslad", "nfgsm"): [evaluation(0.5, []), evaluation(0.4, [{"next": "pgd2"}])],
    }
    text = study.accuracy_table(found)
    assert "AutoAttack average, eps 0.15" in text
    assert "| rslad, ten | 65.0% (60.0% to 70.0%) | 65.0% (60.0% to 70.0%) | 32.5% (30.0% to 35.0%) |" in text
    assert text.splitlines()[-1].endswith("| 30 | 1 of 2 |")


def test_the_steps_of_all_attacks_are_timed_in_turn(study: ModuleType) -> None:
    found = study.timed("rslad:digits", ["nfgsm", "pgi"], rounds=2, steps=1)
    assert [*found] == ["ten", "nfgsm", "pgi"] and found["ten"]["times"] == [1.0, 1.0]
    for one in found.values():
        assert one["times"] == [ten / own for ten, own in zip(found["ten"]["seconds"], one["seconds"], strict=True)]
    assert study.seconds_table({"rslad": found}).count("rslad, ") == 3


def test_a_collapse_is_told_from_the_runs_metrics(study: ModuleType, tmp_path: Path) -> None:
    seen = [
        {"attack": "pgd", "own": 0.2, "pgd10": 0.15, "next": "pgd"},
        {"attack": "pgd", "own": 0.6, "pgd10": 0.1, "next": "pgd2"},
        {"attack": "pgd2", "own": 0.5, "pgd10": 0.4, "next": "pgd2"},
    ]
    rows = [{"epoch": number, "guard": one} for number, one in enumerate(seen, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    caught = study.fallbacks(tmp_path)
    assert [(one["epoch"], one["next"]) for one in caught] == [(2, "pgd2")]
    text = study.guard_table([{"with": "a guard", "seed": 0, "epochs": seen, "fallbacks": caught}])
    assert "after epoch 2: 60% under pgd, 10% under ten, so pgd2 | 50% under pgd2, 40% under ten steps" in text


def test_every_attack_is_one_that_a_recipe_takes(study: ModuleType) -> None:
    for name, options in study.ATTACKS.items():
        for method in ("rslad", "absld", "fair_rslad", "label_trust", "sat", "trades"):
            recipe = study.find_setting(study.settings_on("digits")[method])[2].recipe.replace(**options)
            assert recipe.attack.kind == ("pgd" if name == "ten" else options["attack"])
