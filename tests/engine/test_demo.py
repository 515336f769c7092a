"""The demo leaves what it promises, at a fraction of its length."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retemper.cli import run
from retemper.engine.catalogue import find_setting


def test_leaves_three_runs_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(name: str) -> Any:
        method, setting, found = find_setting(name)
        return method, setting, replace(found, recipe=found.recipe.replace(epochs=1, attack_steps=1, batch_size=256))

    monkeypatch.setattr("retemper.engine.demo.find_setting", short)
    assert run(["demo", "--out", str(tmp_path / "demo")]) == 0
    for name in ("teacher", "rslad", "absld"):
        attacks = json.loads((tmp_path / "demo" / name / "evaluation.json").read_text())["attacks"]
        for attack in ("clean", "pgd20"):
            assert len(attacks[attack]["accuracy"]) == 10
    page = tmp_path / "demo/report.html"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert "absld" in text and "rslad" in text and "PGD-20" in text
    taught = [
        json.loads((tmp_path / "demo" / name / "config.json").read_text())["teacher"] for name in ("rslad", "absld")
    ]
    assert taught[0] == taught[1]
