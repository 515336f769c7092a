"""The page that compares many methods, on made-up runs: what is grouped, what is told apart, what is refused."""

import csv
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retemper.cli import run
from retemper.engine.report import write_report
from retemper.engine.report.methods import write_comparison
from retemper.engine.report.methods.measured import measured
from retemper.engine.report.methods.published import read_published
from retemper.engine.report.methods.rows import METHOD, TEACHER, groups_of, run_folders
from retemper.engine.report.read import read_run

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_runs.py"))))  # the tests are no package
RSLAD, ABSLD = made.RSLAD, made.ABSLD
PUBLISHED = Path(__file__).parents[2] / "benchmarks/published/cifar10.csv"
HEAD = "method,network,data,clean,pgd20,autoattack,worst,nsd,source"
ALL = {"attacks": ("clean", "pgd20", "autoattack"), "verdicts": True, "epochs": 2, "state": False}


def edit(file: Path, **change: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {name: content[name] | value for name, value in change.items()}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two methods of two seeds each and of their teacher, all evaluated alike."""
    root = tmp_path_factory.mktemp("methods")
    made.make_run(root / "teacher", [min(1, a + 0.04) for a in RSLAD], method="sat", **ALL)
    teacher = {"path": str(root / "teacher"), "model": "tiny_resnet", "sha256": "teacher"}
    for name, accuracy in (("rslad", RSLAD), ("absld", ABSLD)):
        for seed in (0, 1):
            better = [a + 0.04 * seed for a in accuracy]
            made.make_run(root / f"{name}-{seed}", better, method=name, seed=seed, teacher=teacher, **ALL)
    return root


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison([runs], tmp_path_factory.mktemp("page") / "out").parent


def rows_of(page: Path) -> dict[str, dict[str, str]]:
    with open(page / "comparison.csv", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_seeds_become_one_row_and_the_best_worst_class_comes_first(page: Path) -> None:
    rows = rows_of(page)
    assert [(row["method"], row["kind"], row["seeds"]) for row in rows.values()] == [
        ("absld:digits", "method", "2"), ("rslad:digits", "method", "2"), ("teacher", "teacher", "1"),
    ]  # fmt: skip
    worst = {name: float(row["autoattack_worst"]) for name, row in rows.items()}
    assert worst["rslad:digits"] == pytest.approx((0.39 + 0.42) / 2, abs=1e-6)  # 0.9 * 0.43 and 0.47, of 100 images
    assert worst["absld:digits"] > worst["rslad:digits"]
    one = rows["rslad:digits"]
    assert float(one["autoattack_worst_lowest_seed"]) == 0.39 and float(one["autoattack_worst_highest_seed"]) == 0.42
    for name in ("average", "worst", "nsd"):
        low, mean, high = (float(one[f"pgd20_{name}{end}"]) for end in ("_images_low", "", "_images_high"))
        assert low < mean < high
    assert one["pgd20_average_seeds_low"] != "" and rows["teacher"]["pgd20_average_seeds_low"] == ""


def test_the_interval_over_images_is_the_whole_side_s(runs: Path) -> None:
    """Two seeds on the same images vary together: their mean varies as much as one of them, not less by sqrt(2)."""
    one, two = (read_run(runs / f"rslad-{seed}") for seed in (0, 1))
    alone, both = measured([one], "pgd20")["average"], measured([one, two], "pgd20")["average"]
    assert alone.images and both.images and both.seeds and alone.seeds is None
    width = alone.images[1] - alone.images[0]
    assert both.images[1] - both.images[0] == pytest.approx(width, rel=0.15)
    assert sum(both.images) / 2 == pytest.approx(both.mean, abs=0.005)
    half = 12.706 * np.std([one.results["pgd20"].report.average, two.results["pgd20"].report.average], ddof=1) / 2**0.5
    assert both.seeds[1] - both.mean == pytest.approx(min(half, 1 - both.mean), rel=1e-3)


def test_of_one_seed_the_interval_is_the_reports(tmp_path: Path) -> None:
    """Where every image is right, resampling cannot vary, and would be sure of what twenty images say."""
    run = read_run(made.make_run(tmp_path / "one", [1.0] * len(RSLAD), attacks=("clean",), verdicts=True))
    found = measured([run], "clean")["average"]
    assert found.images and found.images[0] < 1.0
    assert found.images == pytest.approx(run.results["clean"].interval["average"])


def test_what_else_an_evaluation_measured_is_read_where_it_is_there(runs: Path) -> None:
    one = read_run(runs / "rslad-0")
    before = one.results["pgd20"]
    more: Any = SimpleNamespace(**vars(before), measures={"gini": 0.1, "honest_worst": None})
    one.results["pgd20"] = more
    found = measured([one], "pgd20")
    assert found["gini"].mean == 0.1 and "honest_worst" not in found


def test_all_forms_say_the_same_and_the_page_fetches_nothing(page: Path) -> None:
    names = {path.name for path in page.iterdir()}
    assert names == {f"comparison.{kind}" for kind in ("html", "md", "csv", "tex", "png")}
    html, markdown, latex = ((page / f"comparison.{kind}").read_text() for kind in ("html", "md", "tex"))
    mean = f"{100 * float(rows_of(page)['rslad:digits']['autoattack_average']):.1f}"
    assert mean in html and mean in markdown and mean in latex
    assert "Under AutoAttack, absld:digits protects its worst class best" in html
    assert not re.search(r"<script|https?://", html) and "the teacher" in html
    lines = [line for line in latex.splitlines() if "&" in line and "multicolumn" not in line]
    assert all(line.count("&") == 9 and line.endswith(r"\\") for line in lines) and len(lines) == 4
    assert latex.count("{") == latex.count("}") and r"\mathbf{" in latex and "_" not in lines[1].split("&")[0]


def test_what_training_took_is_told(runs: Path, tmp_path: Path) -> None:
    out = made.make_run(tmp_path / "r" / "one", RSLAD, **ALL)
    edit(out / "config.json", recipe={"batch_size": 400})
    lines = [
        json.loads(line) | {"peak_memory_mib": 2048.0} for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = groups_of([read_run(out)])[0].rows
    assert row.cost.seconds_per_step == pytest.approx(
        1.5 / 4
    )  # 900 images a second for 1.5 s are 4 steps of 400 and less
    assert (row.cost.images_per_second, row.cost.peak_memory_mib, row.cost.epochs) == (900.0, 2048.0, "2")
    text = write_comparison([out], tmp_path / "page").read_text()
    assert "375 ms" in text and "2.0 GiB" in text


def test_what_was_evaluated_otherwise_has_a_table_or_a_note_of_its_own(runs: Path, tmp_path: Path) -> None:
    far = made.make_run(tmp_path / "far", RSLAD, protocol={"eps": 0.1}, **ALL)
    few = made.make_run(tmp_path / "few", ABSLD, **ALL)
    content = json.loads((few / "evaluation.json").read_text())
    content["attacks"]["autoattack"] = made.entry(ABSLD, 50)
    (few / "evaluation.json").write_text(json.dumps(content))
    groups = groups_of([read_run(one) for one in [*run_folders([runs]), far, few]])
    assert [len(group.of(METHOD)) for group in groups] == [3, 1]
    notes = {row.name: getattr(row.get("autoattack", "worst"), "note", None) for row in groups[0].rows}
    assert notes == {"absld:digits": "", "rslad:digits": "", "few:digits": "500 images", "teacher": ""}
    text = write_comparison([runs, far, few], tmp_path / "page").read_text()
    assert "Not all were evaluated alike" in text and "eps 0.1" in text and "500 images" in text


def test_seeds_on_other_images_than_one_another_are_marked(runs: Path, tmp_path: Path) -> None:
    seeds = [made.make_run(tmp_path / str(seed), RSLAD, method="rslad", seed=seed, **ALL) for seed in (0, 1)]
    content = json.loads((seeds[1] / "evaluation.json").read_text())
    content["attacks"]["autoattack"] = made.entry(RSLAD, 50)
    (seeds[1] / "evaluation.json").write_text(json.dumps(content))
    (row,) = groups_of([read_run(one) for one in seeds])[0].rows
    one, other = row.get("autoattack", "worst"), row.get("pgd20", "worst")
    assert one and other and (one.note, other.note) == ("500 or 1,000 images", "")


def test_the_norm_stands_in_the_csv_file_and_in_the_teachers_command(tmp_path: Path) -> None:
    told: dict[str, Any] = {"path": str(tmp_path / "teacher"), "model": "tiny_resnet", "sha256": "teacher"}
    made.make_run(tmp_path / "teacher", RSLAD, method="sat", **ALL)
    l2 = made.make_run(tmp_path / "l2", ABSLD, teacher=told, protocol={"norm": "l2", "eps": 0.6}, **ALL)
    page = write_comparison([l2], tmp_path / "page")
    assert {row["norm"] for row in rows_of(page.parent).values()} == {"l2"}
    assert f"retemper evaluate {tmp_path / 'teacher'} --norm l2 --attacks" in page.read_text()
    content = json.loads((tmp_path / "teacher" / "evaluation.json").read_text())
    content["protocol"] |= {"norm": "l2", "eps": 0.6}
    (tmp_path / "teacher" / "evaluation-l2.json").write_text(json.dumps(content))
    (group,) = groups_of([read_run(l2)])
    assert [row.name for row in group.of(TEACHER) if row.numbers] == ["teacher"]


def test_a_missing_evaluation_is_told_with_its_command(runs: Path, tmp_path: Path) -> None:
    bare = made.make_run(tmp_path / "bare", RSLAD, attacks=())
    part = made.make_run(tmp_path / "part", ABSLD, attacks=("clean",), epochs=2, teacher={
        "path": str(bare), "model": "tiny_resnet", "sha256": "x"})  # fmt: skip
    text = " ".join(write_comparison([part], tmp_path / "page").read_text().split())
    assert f"part: not evaluated under PGD-20, AutoAttack. To evaluate: <code>retemper evaluate {part}" in text
    assert f"evaluated as its students were. To evaluate: <code>retemper evaluate {bare} " in text
    (group,) = groups_of([read_run(part)])
    assert [(row.name, row.numbers) for row in group.of(TEACHER)] == [("bare", {})]


def test_runs_of_one_recipe_and_seed_or_of_other_options_stay_apart(tmp_path: Path) -> None:
    same = {"method": "rslad", **ALL}
    a, b = (made.make_run(tmp_path / name, RSLAD, **same) for name in ("a", "b"))
    c = made.make_run(tmp_path / "c", ABSLD, **same)
    edit(c / "config.json", recipe={"igdm": 1.0})
    edit(a / "config.json", recipe={"igdm": 0.0})
    names = [row.name for row in groups_of([read_run(one) for one in (a, b, c)])[0].rows]
    assert len(set(names)) == 3 and {"rslad:digits, igdm 1", "rslad:digits, igdm 0"} <= set(names)


def test_published_numbers_are_marked_and_stand_beside_their_own_data_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near, other = tmp_path / "near.csv", tmp_path / "other.csv"
    ours = 'Theirs,tiny_resnet,digits,98,,71.5,40,0.2,"A paper, Table 1",0.15'
    near.write_text(f"{HEAD},eps\n{ours}\nNearer,n,digits,99,,,,,A paper,0.1\n")
    other.write_text(f"\ufeff{HEAD}\nFar,resnet18,cifar10,80,50,48,20,,A paper\n")
    page = write_comparison([runs], tmp_path / "page", near)
    text, row = page.read_text(), rows_of(page.parent)["Theirs"]
    assert "Nearer" not in rows_of(page.parent)  # at another radius
    assert "published by others, not measured here" in text and "A paper, Table 1" in text
    assert (row["kind"], row["autoattack_average"], row["autoattack_worst"], row["clean_worst"]) == (
        "published", "0.715", "0.4", "")  # fmt: skip
    assert "Theirs$^\\dagger$ & $98.0$" in (page.parent / "comparison.tex").read_text()
    words = ["compare", str(runs), "--out", str(tmp_path / "no"), "--against", str(other)]
    assert run(words) == 2 and "numbers on other data do not compare" in capsys.readouterr().err
    assert not (tmp_path / "no").exists() and run([*words, "--other-data"]) == 0
    assert rows_of(tmp_path / "no")["Far"]["source"] == "A paper (cifar10, eps 8/255)"


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "lacks method, network, data, source, clean"),
        (f"{HEAD}\n", "holds no row"),
        (f"{HEAD},pgd10\n", "has pgd10"),
        (f"{HEAD}\nA,n,cifar10,80,,,,\n", "line 2: it has not as many cells"),
        (f"{HEAD}\nA,n,cifar10,,,,,,s\n", "line 2: it holds no number"),
        (f"{HEAD}\nA,n,cifar10,80,,,,,\n", "line 2: source is empty"),
        (f"{HEAD}\nA,n,cifar10,80,,fifty,,,s\n", "line 2: autoattack is 'fifty', no number"),
        (f"{HEAD}\nA,n,cifar10,800,,,,,s\n", "line 2: clean is 800: write it in %, 0 to 100"),
        (f"{HEAD}\nA,n,cifar10,80,,,,nan,s\n", "line 2: nsd is nan"),
        (f"{HEAD},eps\nA,n,cifar10,80,,,,,s,8\n", "line 2: eps is 8: write it in [0, 1] pixels"),
    ],
)
def test_a_bad_file_of_published_numbers_is_refused_in_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.csv"
    file.write_text(text)
    assert run(["compare", str(tmp_path), "--out", str(tmp_path / "out"), "--against", str(file)]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and str(file) in lines[0]


def test_the_file_that_we_ship_is_whole() -> None:
    rows = read_published(PUBLISHED)
    assert len(rows) >= 25 and {row.data for row in rows} == {"cifar10"}
    assert all(row.worst is None or (row.autoattack or 0) > row.worst for row in rows)


def test_wrong_usage_is_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, said in (
        ([runs], 2, "compare takes two runs"),
        ([runs, runs, runs], 2, "not 3; --out DIR makes a page"),
        ([runs, runs, "--against", PUBLISHED], 2, "name its folder with --out"),
        ([runs, "--out", tmp_path / "x", "--attack", "pgd20"], 2, "--attack is for two runs"),
        ([tmp_path, "--out", tmp_path / "x"], 3, "holds no run"),
        ([tmp_path / "nowhere", "--out", tmp_path / "x"], 3, "does not exist"),
        ([runs, "--out", PUBLISHED], 2, "is a file"),
    ):
        assert run(["compare", *map(str, words)]) == code and said in capsys.readouterr().err


def test_a_report_shows_corrupted_images(tmp_path: Path) -> None:
    out = made.make_run(tmp_path / "run", RSLAD, epochs=2)
    content = json.loads((out / "evaluation.json").read_text())
    rows = [[a - 0.05 * severity for a in RSLAD] for severity in range(5)]
    content["corruptions"] = {"count": [100] * 10, "accuracy": {"fog": rows, "frost": rows, "snow": [*rows[:1], []]}}
    (out / "evaluation.json").write_text(json.dumps(content))
    page = write_report([out], tmp_path / "page")
    text = page.read_text().replace("\u00a0", " ")
    assert "Corrupted images" in text and "corruptions.png" in {path.name for path in page.parent.iterdir()}
    assert "60.4" in text and "worst 33 %, class 8" in text and ">snow<" not in text
