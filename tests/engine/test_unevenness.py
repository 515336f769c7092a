"""What is shown of the honest worst class: in the terminal, and in the report's table, which has more."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retemper.engine.checkpoints.weights import save_weights
from retemper.engine.class_report import by_class
from retemper.engine.evaluation.summary import summary
from retemper.engine.report.page import Table
from retemper.engine.report.read import RunRecord, read_run
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.unevenness import HEAD, class_order, unevenness_blocks

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_runs.py"))))  # the tests are no package


def order(run: RunRecord) -> tuple[float, str]:
    return class_order(run, run.results["pgd20"])


@pytest.mark.parametrize("classes", [10, 100])
def test_the_terminal_shows_it_in_a_line_of_80_columns(classes: int) -> None:
    label = np.repeat(np.arange(classes), 20)
    given = np.where(np.random.default_rng(0).random(len(label)) < 0.6, label, -1)
    new, old = by_class(given, label, classes), by_class(given, label, classes)
    new["upper_bound"] = True
    del old["measures"]
    names = [f"class {k}" for k in range(classes)]
    protocol = {"classes": names, "images": len(label), "split": "test", "eps": 0.1, "attacks": {}}
    text = summary({"protocol": protocol, "attacks": {"autoattack-fast": new, "pgd20": old}})
    head, first, second = (line.split() for line in text.splitlines()[:3])
    assert all(len(line) <= 80 for line in text.splitlines()[:3])
    assert head[:3] == ["average", "worst", "honest"] and ("tenth" in head) == (classes > 10)
    assert first[5] == f"{new['measures']['honest_worst']:.1%}" and second[3] == "-"


def test_the_table_tells_of_each_run_what_an_older_evaluation_does_not_hold(tmp_path: Path) -> None:
    runs = RunSet([read_run(folder) for folder in made.three_runs(tmp_path, epochs=2)])
    (table,) = unevenness_blocks(runs)
    assert isinstance(table, Table) and table.head == HEAD and table.caption.startswith("PGD-20: correct, %")
    rows = table.groups[0][1]
    assert [row[0].text for row in rows] == [run.label for run in runs.comparable]
    for row, run in zip(rows, runs.comparable, strict=True):
        found, result = run.results["pgd20"].measures, run.results["pgd20"]
        assert row[1].text == f"{100 * result.report.worst:.1f}" and "class" in row[1].note
        assert row[2].text == f"{100 * found['honest_worst']:.1f}" and " to " in row[2].detail
        assert row[2].note == f"luck {100 * found['worst_bias']:+.1f}"
        assert row[3].text == f"{100 * found['class_average']:.1f}"
        assert row[4].text == f"{found['gini']:.3f}" and row[5].text == "none"  # no confusion was written
        assert (row[6].text, row[6].detail) == ("1.000", "training")  # the made runs keep the order


def test_the_order_in_training_is_that_of_the_epoch_that_was_evaluated(tmp_path: Path) -> None:
    folder = made.make_run(tmp_path / "run", made.RSLAD, epochs=4)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[1]["class_accuracy"] = [1 - a for a in rows[1]["class_accuracy"]]  # the opposite order
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(folder)
    assert order(run) == (pytest.approx(1), "training")  # no weights are there: the last
    save_weights(folder / "best.safetensors", torch.nn.Linear(1, 1), {"epoch": "2"})
    assert order(run) == (pytest.approx(-1), "training")
    for row in run.metrics:
        del row["class_accuracy"]
    assert order(run)[1] == "held out" and 0.7 < order(run)[0] <= 1
    run.metrics.clear()
    assert order(run)[1] == ""
