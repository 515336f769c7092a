"""The report on made-up runs: what is written, that it says what the numbers say, and that no content breaks it."""

import base64
import json
import math
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from shlex import quote
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from retemper.engine.class_report import class_report, intervals, read_result
from retemper.engine.report import write_report
from retemper.engine.report.classwise import classwise, classwise_blocks
from retemper.engine.report.confusion import confusion_blocks
from retemper.engine.report.facts import protocol_blocks
from retemper.engine.report.figures import limits
from retemper.engine.report.headline import headline, subline, warnings
from retemper.engine.report.paired import paired_blocks
from retemper.engine.report.radii import radius_blocks
from retemper.engine.report.read import RunRecord, read_run
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.training import training_blocks
from retemper.engine.report.words import pixels
from retemper.errors import DataError, UsageError

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_runs.py"))))  # the tests are no package
make_run, three_runs, RSLAD, ABSLD, DIGITS = made.make_run, made.three_runs, made.RSLAD, made.ABSLD, made.DIGITS
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Balance(HTMLParser):
    """A parser that notes tags left open, closed twice or out of order, and the attributes that can load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.wrong: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action", "data")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)


def read_page(path: Path) -> str:
    """Return the page; a space that must not break counts as any other."""
    return path.read_text().replace("\u00a0", " ")


def text_of(page: str) -> str:
    """The page's words, tags and data URIs taken out."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three runs and their report, in `report`."""
    root = tmp_path_factory.mktemp("three")
    assert write_report(three_runs(root), root / "report") == root / "report/report.html"
    return root


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return read_page(folder / "report/report.html")


@pytest.fixture(scope="module")
def markdown(folder: Path) -> str:
    return (folder / "report/report.md").read_text()


def test_writes_the_page_the_markdown_and_the_figures(folder: Path, markdown: str) -> None:
    figures = {"classwise_clean.png", "classwise_pgd20.png", "class_state.png", "training.png", "summary.png"}
    assert {path.name for path in (folder / "report").iterdir()} == figures | {"report.html", "report.md"}
    assert set(re.findall(r"\]\((.*?)\)", markdown)) == figures
    for name in figures:
        with Image.open(folder / "report" / name) as image:
            image.load()
            assert image.width >= 1000 and image.height >= 400
            assert len(image.convert("L").getcolors() or []) > 20  # something is drawn


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    balance = Balance(page)
    assert balance.wrong == [] and balance.stack == []
    assert all(url.startswith(("data:image/svg+xml;base64,", "#")) for url in balance.loads)
    assert not re.search(r"https?:|url\(|@import|<script|<link", re.sub(r'"data:[^"]*"', "", page))
    assert '<html lang="en">' in page and "<title>Robustness class by class: digits</title>" in page


def test_every_figure_is_there_in_two_widths_with_words_for_it(page: str) -> None:
    balance = Balance(page)
    assert len(balance.images) == 5
    assert all(image["alt"] and len(image["alt"]) > 40 for image in balance.images)
    drawings = [url.partition(",")[2] for url in balance.loads if url.startswith("data:")]
    assert len(drawings) == len(set(drawings)) == 10
    for drawing in drawings:
        root = ElementTree.fromstring(base64.b64decode(drawing))
        links = [value for part in root.iter() for name, value in part.attrib.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)


def test_the_headline_says_what_the_numbers_say(page: str, markdown: str) -> None:
    nsd = [class_report([round(100 * a) for a in run], [100] * 10).nsd for run in (RSLAD, ABSLD)]
    said = "Under PGD-20, rslad's weakest class is 8 at 43 %; absld's is 3 at 61 %."
    said += f" NSD falls from {nsd[0]:.2f} to {nsd[1]:.2f}."
    assert said.replace("'", "&#39;") in page
    assert said in markdown
    assert "Averages over all images: rslad 70 %, absld 73 %." in page


def test_the_tables_hold_the_numbers(markdown: str) -> None:
    assert "| absld | 73.0 (" in markdown and "**61.0** (class 3; " in markdown
    low, high = intervals([43], [100])["class"][0]
    assert f"**43.0 ▼** ({100 * low:.1f} to {100 * high:.1f})" in markdown
    assert "| eps | 0.15 |" in markdown and "steps 20, step 2/255" in markdown
    assert "teacher of rslad, absld" in markdown


def test_the_same_runs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    runs = [folder / name for name in ("teacher", "rslad", "absld")]
    write_report(runs, tmp_path)
    for path in (folder / "report").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_no_warning_where_the_protocols_agree(page: str) -> None:
    assert 'role="note"' not in page


def test_text_from_runs_stays_text(tmp_path: Path) -> None:
    names = [
        "<script>alert(1)</script>",
        "a|b",
        "$\\frac$",
        "](http://x)",
        '" onload="x',
        "",
        "*b*\n# h",
        "&amp;",
        "猫\x00",
        "\ud800",
    ]
    run = make_run(tmp_path / "<b>&'", RSLAD, names, attacks=("pgd20", "<i>"), epochs=2)
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write("cut sho")  # so that there is a note with the run's name
    config = json.loads((run / "config.json").read_text())
    config["recipe"]["dataset"] = "</title><script>"
    (run / "config.json").write_text(json.dumps(config))
    page = read_page(write_report([run], tmp_path / "out"))
    balance = Balance(page)
    assert balance.wrong == [] and balance.stack == []
    assert "<script" not in page and "<b>&'" not in page and "<i>" not in page and ' onload="' not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    markdown = (tmp_path / "out/report.md").read_text()
    assert "<script" not in markdown and "a\\|b" in markdown and "](http" not in markdown.replace("\\]", "")
    assert not re.search("^# h", markdown, re.MULTILINE)


def test_a_run_that_was_not_evaluated_is_shown_with_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run", ABSLD, attacks=(), epochs=2)
    page = read_page(write_report([run], tmp_path / "out"))
    assert "None of these runs has been evaluated yet." in page
    assert f"retemper evaluate &#39;{run}&#39;" in page
    assert len(Balance(page).images) == 2  # class state and training


def test_a_run_that_was_not_trained_is_shown_with_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "absld", ABSLD, attacks=("pgd20",))
    (run / "metrics.jsonl").unlink()
    report = RunSet([read_run(run)])
    assert [note.code for note in warnings(report)] == [
        f"retemper train absld:digits --out {quote(str(run))} --eps 8/255"
    ]
    assert headline(report).startswith("Under PGD-20, absld's weakest class is 3 at 61 %. NSD is 0.")
    assert subline(report) == "Its average over all images is 73 %."


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"attacks": []}',
        '{"attacks": {"pgd20": 3}}',
        '{"attacks": {"pgd20": {"accuracy": ["x"], "count": [1]}}}',
    ],
)
def test_a_damaged_evaluation_does_not_stop_the_report(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "absld", ABSLD, epochs=2)
    (run / "evaluation.json").write_text(content)
    report = RunSet([read_run(run)])
    assert headline(report) == "None of these runs has been evaluated yet."
    assert warnings(report)[0].code == f"retemper evaluate {quote(str(run))}"


def test_holes_in_the_numbers_are_left_blank(tmp_path: Path) -> None:
    run = make_run(tmp_path / "absld", ABSLD, attacks=("pgd20",), epochs=4)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["attacks"]["pgd20"]["accuracy"][3] = None
    evaluation["attacks"]["pgd20"]["interval"] = {"class": None}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write(
            '{"epoch": 5, "loss": null, "temperature_adv": [null, 1, 1, 1, 1, 1, 1, 1, 1, 1]}\n{"epoch": 6, "lo'
        )
    page = read_page(write_report([run], tmp_path / "out"))
    assert "absld&#39;s weakest class is 8 at 64 %" in page
    assert "1 unreadable lines of metrics.jsonl" in page
    assert re.search(r"\b3 none", text_of(page))


def test_different_protocols_are_pointed_out(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", RSLAD, epochs=1, attacks=("pgd20",)),
        make_run(tmp_path / "b", ABSLD, epochs=1, attacks=("pgd20",), count=40, protocol={"seed": 1}),
    ]
    write_report([str(run) for run in runs], str(tmp_path / "out"))
    markdown = (tmp_path / "out/report.md").read_text()
    assert "different protocols, do not compare them: images (1000, 400); seed (0, 1)." in markdown
    assert "Few test images: 40 in the smallest class." in markdown
    assert "best of its column" not in markdown


def test_a_radius_is_written_as_one_types_it() -> None:
    written = {8 / 255: "8/255", 2.5 / 255: "2.5/255", 0.1: "0.1", 0.15: "0.15", 0.031: "0.031", 0: "0"}
    assert {value: pixels(value) for value in written} == written


def test_runs_at_two_radii_have_lines_apart(tmp_path: Path) -> None:
    usual, other = 0.15, {"eps": 0.031}
    runs = [
        make_run(tmp_path / "narrow", ABSLD, epochs=1, attacks=("pgd20",), protocol=other, verdicts=True),
        make_run(tmp_path / "a", RSLAD, epochs=1, attacks=("pgd20",), verdicts=True),
        make_run(tmp_path / "b", RSLAD, epochs=1, attacks=("pgd20",), verdicts=True),
    ]
    report = RunSet([read_run(run) for run in runs])
    assert (report.eps, [run.label for run in report.comparable]) == (usual, ["a", "b"])
    assert not report.differing and [run.label for run in report.elsewhere] == ["narrow"]
    note = warnings(report)[0]
    assert note.text.startswith("narrow was evaluated at eps 0.031, the others at 0.15")
    assert note.code == f"retemper evaluate {runs[0]}"
    write_report([str(run) for run in runs], str(tmp_path / "out"))
    markdown = (tmp_path / "out/report.md").read_text()
    summary, paired = (markdown.partition(f"## {name}")[2].partition("\n## ")[0] for name in ("Summary", "Differences"))
    assert "under attacks within eps 0.15" in summary and "eps 0.031: PGD-20, 1,000 images" in summary
    own = summary.partition("eps 0.031: PGD-20")[2]
    assert "narrow" in own and "narrow" not in summary.partition("eps 0.031: PGD-20")[0] and "| b" not in own
    assert (
        "narrow" not in paired and "narrow" not in markdown.partition("## For a paper's table")[2].partition("\n## ")[0]
    )


def test_a_run_in_another_norm_at_the_same_radius_stands_apart(tmp_path: Path) -> None:
    l2 = make_run(tmp_path / "l2", RSLAD, epochs=1, attacks=("pgd20",), protocol={"norm": "l2"})
    linf = make_run(tmp_path / "linf", RSLAD, epochs=1, attacks=("pgd20",))
    report = RunSet([read_run(run) for run in (l2, linf)])
    assert ([run.label for run in report.comparable], [run.label for run in report.elsewhere]) == (["linf"], ["l2"])
    note = warnings(report)[0]
    assert note.text.startswith("l2 was evaluated at eps 0.15 in L2, the others at 0.15")
    assert note.code == f"retemper evaluate {l2}"
    assert [run.label for run in RunSet([read_run(l2)]).comparable] == ["l2"]
    write_report([str(l2), str(linf)], str(tmp_path / "out"))
    markdown = (tmp_path / "out/report.md").read_text()
    assert "eps 0.15 in L2: PGD-20" in markdown and "--norm l2" not in markdown


def test_without_the_usual_radius_a_report_is_at_the_first_ones(tmp_path: Path) -> None:
    radii = {"a": 4 / 255, "b": 8 / 255, "c": 4 / 255}
    runs = [make_run(tmp_path / name, RSLAD, epochs=1, protocol={"eps": eps}) for name, eps in radii.items()]
    report = RunSet([read_run(run) for run in runs])
    assert [run.label for run in report.comparable] == ["a", "c"]
    assert warnings(report)[0].code == f"retemper evaluate {runs[1]} --eps 4/255"


def test_a_papers_own_evaluation_is_called_weaker(tmp_path: Path) -> None:
    attacks = ("clean", "pgd20", "cw", "pgd20-fair-ard", "cw-fair-ard", "autoattack-fair-ard")
    weaker = attacks[3:]
    runs = [make_run(tmp_path / name, RSLAD, attacks=attacks, partly=weaker, epochs=1) for name in ("a", "b")]
    report = RunSet([read_run(run) for run in runs])
    assert report.reference == "pgd20"
    write_report([str(run) for run in runs], str(tmp_path / "out"))
    markdown = (tmp_path / "out/report.md").read_text()
    for title in ("PGD-20", "CW", "AutoAttack"):
        assert f"{title} (fair-ard, weaker), 1,000 images" in markdown
    assert "from a weaker protocol" in markdown


def test_a_recipe_that_selects_on_the_test_images_is_pointed_out(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "absld", ABSLD, epochs=1))
    run.recipe["select_on"] = "test"
    assert "absld chose its best epoch on the test images" in warnings(RunSet([run]))[0].text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / part / "absld", ABSLD, epochs=1) for part in ("x", "y")]
    report = RunSet([read_run(run) for run in (*runs, runs[0])])
    assert [run.label for run in report.runs] == ["x/absld (1)", "y/absld", "x/absld (3)"]


def test_only_runs_that_taught_are_called_teachers(tmp_path: Path) -> None:
    base = make_run(tmp_path / "robust", RSLAD, epochs=1)
    teacher = {"path": str(base / "best.safetensors"), "model": "tiny_resnet", "sha256": "0"}
    student = make_run(tmp_path / "absld", ABSLD, epochs=1, teacher=teacher)
    other = make_run(tmp_path / "trades", RSLAD, epochs=1)
    report = RunSet([read_run(run) for run in (base, student, other)])
    assert [run.label for run in report.runs] == ["robust (teacher)", "absld", "trades"]
    assert "absld's weakest class is 3 at 61 %; trades's is 8 at 43 %. NSD rises" in headline(report)


def test_many_runs_share_one_sentence(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / f"run{i}", RSLAD, epochs=1)) for i in range(9)]
    text = headline(RunSet(runs))
    assert "the weakest class of 9 runs lies between 43 % (run0, class 8) and 43 % (run0, class 8)" in text


@pytest.mark.parametrize("number, narrow, lying", [(3, True, False), (4, True, True), (4, False, False)])
def test_bars_lie_down_before_they_become_hairlines(number: int, narrow: bool, lying: bool, tmp_path: Path) -> None:
    runs = RunSet([read_run(make_run(tmp_path / f"run{i}", RSLAD, epochs=1)) for i in range(number)])
    (axes,) = classwise(runs, "pgd20", narrow).axes
    labels = (axes.get_yticklabels() if lying else axes.get_xticklabels())[: len(runs.classes)]
    assert [label.get_text() for label in labels] == runs.classes
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle) and bar.get_fill()]
    lengths = [round(bar.get_width() if lying else bar.get_height(), 6) for bar in bars]
    assert lengths == [round(100 * a, 6) for a in RSLAD] * number


def test_a_hundred_classes(tmp_path: Path) -> None:
    accuracy = np.random.default_rng(0).beta(2, 4, 100).round(2).tolist()
    names = [f"class {k}" for k in range(100)]
    run = make_run(tmp_path / "absld", accuracy, names, attacks=("autoattack",), epochs=3)
    page = read_page(write_report([run], tmp_path / "out"))
    assert "worst tenth" in text_of(page) and "class 99" in text_of(page)
    weakest = int(np.argmin([round(90 * a) for a in accuracy]))
    assert f"Under AutoAttack, absld&#39;s weakest class is class {weakest} at " in page
    assert len(Balance(page).images) == 3


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json, no evaluation\.json") as error:
        write_report([tmp_path], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_config_is_one_clear_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "absld", ABSLD, epochs=1)
    for content in ("{", '{"method": "absld"}'):
        (run / "config.json").write_text(content)
        with pytest.raises(DataError, match=r"config\.json") as error:
            write_report([run], tmp_path / "out")
        assert "\n" not in str(error.value)


def test_an_evaluation_of_a_network_from_elsewhere_stands_beside_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "absld", ABSLD, verdicts=True), make_run(tmp_path / "net-build", RSLAD, verdicts=True)]
    for name in ("config.json", "metrics.jsonl"):
        (runs[1] / name).unlink()
    evaluation = json.loads((runs[1] / "evaluation.json").read_text())
    evaluation["protocol"]["weights"] = "net.py:build"
    (runs[1] / "evaluation.json").write_text(json.dumps(evaluation))
    write_report(runs, tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "| role | trained without a teacher | from elsewhere |" in text
    assert re.search(
        f"retemper evaluate net.py:build --dataset digits .*--out {re.escape(quote(str(runs[1])))} --check", text
    )
    assert "net-build" in text.split("## Differences on the same images")[1].split("##")[0]
    assert "retemper train None" not in text and "absld (teacher)" not in text and "net-build (teacher)" not in text


def test_refuses_no_runs_and_an_impossible_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        write_report([], tmp_path)
    run = make_run(tmp_path / "absld", ABSLD, epochs=1)
    with pytest.raises(
        UsageError, match=r"cannot write to .*config\.json \(.*config\.json is a file\): name another folder with --out"
    ):
        write_report([run], run / "config.json")


def test_says_what_to_install_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "absld", ABSLD, epochs=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'retemper[plots]'")):
        write_report([run], tmp_path / "out")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return HTML and Markdown of a teacher, two seeds of one recipe and a suspect, with every file there may be."""
    root, attacks = tmp_path_factory.mktemp("full"), ("clean", "pgd20", "autoattack-fast")
    same = {"attacks": attacks, "partly": attacks[2:], "verdicts": True, "epochs": 1, "state": False}
    seeds = [make_run(root / f"r_{i}", RSLAD[i:] + RSLAD[:i], method="rslad", seed=i, **same) for i in (0, 1)]
    teacher = make_run(root / "teacher", ABSLD, **same)
    suspect = make_run(root / "absld", ABSLD, checks=made.checks(suspect=True), **same)
    write_report([teacher, *seeds, suspect], root / "page")
    return read_page(root / "page/report.html"), (root / "page/report.md").read_text()


def test_upper_bounds_are_marked(full: tuple[str, str]) -> None:
    page, markdown = full
    assert "Under AutoAttack, fast suite, r_0&#39;s weakest class is 8 at ≤ 40 %" in page
    assert "| r\\_0 | ≤ 64.8 (" in markdown and "≤ 40.0 ▼" in markdown
    assert "≤: an upper bound" in page


def test_paired_differences_are_taken_from_the_first_student(full: tuple[str, str]) -> None:
    _, markdown = full
    section = markdown.partition("## Differences on the same images")[2].partition("## Class by class")[0]
    assert "run minus r\\_0" in section
    rows = {row.split("|")[1].strip(): row for row in section.splitlines() if row.startswith("|")}
    assert {"r\\_1", "absld", "teacher"} <= rows.keys() and "r\\_0" not in rows
    gain = 100 * (np.mean(np.round(92 * np.array(ABSLD)) / 100) - np.mean(np.round(92 * np.array(RSLAD)) / 100))
    assert f"{gain:+.1f}" in rows["absld"] and "8" in rows["absld"].split("|")[5]  # class 8 gained most: 43 % to 64 %


def test_confusion_names_the_most_frequent_mistake(full: tuple[str, str]) -> None:
    assert "r\\_0: most often 8 is taken for 9, 60 %" in full[1]


def test_a_suspect_is_called_one(full: tuple[str, str]) -> None:
    page, markdown = full
    assert "absld is suspect: gradients are masked or misleading" in page
    assert "| radius end | **raised** (0.12; At eps 1 still 12 %" in markdown
    assert re.search(
        "r_0: the checks were not run. To run them: <code>retemper evaluate .*r_0(&#x?[0-9]+;)? --check</code>", page
    )


def test_lines_for_a_papers_table(full: tuple[str, str]) -> None:
    page, markdown = full
    clean, pgd, fast = (class_report([round(100 * min(1, g * a)) for a in RSLAD], [100] * 10) for g in (1.12, 1, 0.92))
    numbers = [f"{100 * clean.average:.1f}", f"{100 * clean.worst:.1f}", f"{clean.nsd:.3f}"]
    numbers += [f"{100 * pgd.average:.1f}", f"{100 * pgd.worst:.1f}", f"{pgd.nsd:.3f}"]
    bounds = [f"{100 * fast.average:.1f}", f"{100 * fast.worst:.1f}"]
    assert " & ".join([r"r\_0", *numbers, *(rf"$\leq${b}" for b in bounds), f"{fast.nsd:.3f}"]) + r" \\" in markdown
    assert " | ".join([r"| r\_0", *numbers, *(f"≤ {b}" for b in bounds), f"{fast.nsd:.3f} |"]) in markdown
    assert f"rslad:digits, 2 seeds & {numbers[0]} ({numbers[0]}--{numbers[0]}) &" in markdown
    assert page.count('<pre class="copy"') == 2


def test_seeds_are_put_together(full: tuple[str, str]) -> None:
    section = full[1].partition("## Seeds together")[2].partition("##")[0]
    assert "| rslad:digits (2 seeds) | 70.4 (70.4 to 70.4) | 43.0 (43.0 to 43.0) |" in section
    assert "absld" not in section


def test_runs_on_other_images_are_not_compared(tmp_path: Path) -> None:
    same = {"attacks": ("pgd20",), "epochs": 1, "state": False, "verdicts": True}
    runs = [make_run(tmp_path / "a", RSLAD, **same), make_run(tmp_path / "b", ABSLD, count=90, **same)]
    runs.append(make_run(tmp_path / "c", ABSLD, **same | {"verdicts": False}))
    (tmp_path / "c/evaluation.csv").write_text("image,lab")
    blocks = paired_blocks(RunSet([read_run(run) for run in runs]))
    assert [block.text.partition(":")[0] for block in blocks] == ["b is not compared", "c is not compared"]
    assert "other labels for image 90" in blocks[0].text and "no verdicts under pgd20" in blocks[1].text


def test_an_interrupted_attack_comes_with_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "absld", ABSLD, attacks=("autoattack",), epochs=1)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["attacks"]["autoattack"] |= {"complete": False, "confusion": [[1]], "flags": ["outputs are random"]}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    found = read_run(run)
    assert found.results["autoattack"].upper_bound and found.results["autoattack"].confusion is None
    assert found.notes[0].text.split()[2] == "interrupted:"
    assert found.notes[0].code == f"retemper evaluate {quote(str(run))} --attacks autoattack"
    assert "AutoAttack: outputs are random" in warnings(RunSet([found]))[0].text


def test_many_classes_are_listed_where_they_cannot_be_drawn() -> None:
    share, names = np.eye(30) * 0.5, [f"class {k}" for k in range(30)]
    share[3] = 0.9 * np.eye(30)[4] + 0.1 * np.eye(30)[3]
    entry = {"accuracy": share.diagonal().tolist(), "count": [100] * 30, "confusion": (100 * share).tolist()}
    run = RunRecord(Path("x"), "x", results={"pgd20": read_result(entry)}, classes=names)
    (table,) = confusion_blocks(RunSet([run]))
    first = table.groups[0][1][0]
    assert (first[0].text, first[1].text, first[1].detail) == ("class 3", "class 4 (90 %)", "right: 10 %")


def test_the_summary_starts_with_the_attack_of_the_headline(markdown: str) -> None:
    section = markdown.partition("## Summary")[2].partition("##")[0]
    assert re.findall(r"^\| \*\*(.+?), ", section, re.MULTILINE) == ["PGD-20", "Clean"]


def test_a_hollow_mark_says_what_holms_correction_is_for(full: tuple[str, str]) -> None:
    section = full[1].partition("## Differences on the same images")[2].partition("##")[0]
    assert "Filled marks: p below 0.05 after Holm's correction" in section


def test_names_that_no_font_has_are_numbers_in_figures_and_in_the_table(tmp_path: Path) -> None:
    names = ["\U00012000", "Ⓐ", "מטוס", *DIGITS[3:]]  # cuneiform; a letter of a font that comes with matplotlib
    run = make_run(tmp_path / "\U00012000", RSLAD, names, epochs=1)
    runs = RunSet([read_run(run)])
    assert runs.drawn[:2] == ["class 0", "Ⓐ"] and runs.drawn[3:] == names[3:]
    assert runs.fonts[0] == "DejaVu Sans" and len(runs.fonts) > 1
    assert runs.look[run.name].name == "run 1"
    assert "figures show numbers instead" in warnings(runs)[0].text
    plot, table = classwise_blocks(runs)[:2]
    assert plot.wide != plot.narrow
    assert [(row[0].text, row[0].note) for row in table.groups[0][1][:2]] == [(names[0], "class 0"), (names[1], "")]


def test_a_name_from_right_to_left_does_not_turn_the_sentence(tmp_path: Path) -> None:
    names = [*DIGITS[:8], "מטוס", "9"]
    assert f"weakest class is \u2068{names[8]}\u2069 at 43 %" in headline(
        RunSet([read_run(make_run(tmp_path / "a", RSLAD, names))])
    )


def test_long_names_stay_apart_in_figures(tmp_path: Path) -> None:
    names = [f"class {k} of a name whose beginning and end are much alike" for k in range(10)]
    runs = RunSet([read_run(make_run(tmp_path / f"{'a long name of a run, ' * 5}{i}", RSLAD, names)) for i in range(2)])
    for narrow in (False, True):
        shown = [label.get_text() for label in classwise(runs, "pgd20", narrow).axes[0].get_xticklabels()]
        assert len(set(shown)) == 10 and max(map(len, shown)) <= 14
    assert max(len(run.label) for run in runs.runs) <= 40 and len({run.label for run in runs.runs}) == 2


def test_classes_as_weak_as_the_weakest_are_counted(tmp_path: Path) -> None:
    runs = RunSet([read_run(make_run(tmp_path / "a", [0.5, 0.2, 0.2, *[0.6] * 7], epochs=1))])
    assert "a's weakest class is 1 and 1 more at 20 %" in headline(runs)


def test_axes_of_percentages_stay_between_0_and_100_and_show_no_false_digits() -> None:
    assert limits([0, 0, 0], 10) == (0, 10) and limits([100], 10) == (90, 100)
    assert limits([40, 60], 10) == (39, 61) and limits([0, 100], 10) == (0, 100)
    assert limits([50, math.nan], 10) == (45, 55) and limits([], 10) == (0, 100)
    assert limits([0, 0], 4, (-100, 100)) == (-2, 2)


def test_a_loss_that_grows_without_end_does_not_hide_the_others(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, RSLAD, epochs=4) for name in "ab"]
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    rows[2]["loss"], rows[3]["loss"] = 1e20, None
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = RunSet([read_run(run) for run in runs])
    (plot,) = training_blocks(report)
    assert "a: loss 1.4 to 1e+20" in plot.alt
    assert warnings(report)[0].text == "a: the loss of 1 of 4 epochs is not a number."


def test_a_class_without_images_is_taken_for_nothing(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", [0.5] * 25, [f"class {k}" for k in range(25)], verdicts=True, epochs=1))
    counts_KK = run.results["pgd20"].confusion
    assert counts_KK is not None
    counts_KK[3] = 0
    (table,) = confusion_blocks(RunSet([run]))
    assert "class 3" not in [row[0].text for row in table.groups[0][1]] and len(table.groups[0][1]) == 15


def test_a_run_without_the_attack_of_the_headline_comes_with_the_command(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", RSLAD, attacks=("pgd20",)),
        make_run(tmp_path / "b", ABSLD, attacks=("autoattack",)),
    ]
    report = RunSet([read_run(run) for run in runs])
    assert report.reference == "autoattack"
    (note,) = warnings(report)
    assert note.text.startswith("a was not evaluated under AutoAttack")
    assert note.code == f"retemper evaluate {runs[0]} --attacks autoattack"
    runs = [make_run(tmp_path / run, RSLAD, attacks=(a,)) for run, a in (("c", "clean"), ("d", "autoattack-fair-ard"))]
    (note,) = warnings(RunSet([read_run(run) for run in runs]))
    assert note.code == f"retemper evaluate {runs[0]} --attacks autoattack --protocol fair-ard"
    (table,) = protocol_blocks(report.runs)
    (row,) = [row for _, rows in table.groups for row in rows if row[0].text == "AutoAttack"]
    assert row[1].text == "not run" and row[2].text.startswith("loss cross-entropy")


def test_a_second_report_replaces_the_figures_of_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ABSLD, attacks=("pgd20",), state=False, epochs=1)
    for name in ("summary", "mine"):
        (tmp_path / f"{name}.png").write_bytes(b"a picture")
    (tmp_path / "report.md").write_text("# of three runs\n\n![what it shows](summary.png)\n")
    write_report([run], tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"classwise_pgd20.png", "training.png", "mine.png"}


def test_a_report_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", ABSLD, attacks=("pgd20",), state=False, epochs=1)
    (tmp_path / "report.html").write_text("the one before")

    def fail(*_: object) -> None:
        raise RuntimeError("no memory for a figure")

    monkeypatch.setattr("retemper.engine.report.build.paper_blocks", fail)
    with pytest.raises(RuntimeError):
        write_report([run], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "report.html"}
    assert (tmp_path / "report.html").read_text() == "the one before"


def test_every_number_of_the_summary_is_the_evaluations(folder: Path, markdown: str) -> None:
    section = markdown.partition("## Summary")[2].partition("##")[0]
    for name in ("teacher", "rslad", "absld"):
        evaluation = json.loads((folder / name / "evaluation.json").read_text())["attacks"]
        rows = re.findall(rf"^\| {name} \|(.*)\|$", section, re.MULTILINE)
        for attack, row in zip(("pgd20", "clean"), rows, strict=True):
            average, worst, nsd = (float(re.sub(r"[* ]", "", cell).partition("(")[0]) for cell in row.split("|"))
            entry = evaluation[attack]
            assert (average, worst) == (round(100 * entry["average"], 1), round(100 * entry["worst"], 1))
            assert nsd == round(entry["nsd"], 2) and f"class {entry['worst_class']}" in row


def test_a_curve_of_other_weights_is_not_that_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", RSLAD, epochs=1, attacks=("pgd20",), protocol={"weights_sha256": "best"})
    made.add_curve(run, 4 / 255, 8 / 255)
    best = json.loads((run / "evaluation.json").read_text())
    last = run / "evaluation-last.json"
    last.write_text(json.dumps(best | {"protocol": best["protocol"] | {"weights_sha256": "last"}}))
    table = radius_blocks(RunSet([read_run(run)]))[1]
    assert table.groups[0][1][0][2].note.startswith("class ")
    assert not radius_blocks(RunSet([read_run(last)]))
    for kind in ("json", "csv"):
        (run / f"curve.{kind}").rename(run / f"curve-last.{kind}")
    assert not radius_blocks(RunSet([read_run(last)]))
    mended = json.loads((run / "curve-last.json").read_text())
    mended["protocol"]["weights_sha256"] = "last"
    (run / "curve-last.json").write_text(json.dumps(mended))
    assert radius_blocks(RunSet([read_run(last)]))
