"""The page of a teacher's check: teacher.html, one self-contained file, and teacher.md with its figure as a PNG."""

import importlib.util
import math
from typing import Any

from retemper.console import say
from retemper.engine.class_report import read_result
from retemper.engine.report.page import Cell, Plot, Section, Table, Text, write_page
from retemper.engine.report.words import COLUMNS, columns, pixels
from retemper.text import number

FOOTER = (
    "Attack: PGD with 20 steps of a quarter of the radius on the cross-entropy, from a uniform start. An image that is "
    "wrong without an attack counts as wrong under it. Entropies are in nats. Intervals are at 95 %, and hold for the "
    "choice of images. The bounds behind the advice are stated in retemper.engine.teacher_check.advice."
)


def pages(content: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of the page by name, of what teacher.json holds."""
    plots = _plots(content)
    sections = [
        Section("classes", "Class by class", [*plots, _class_table(content)]),
        Section("labels", "Its soft labels", [_label_table(content)]),
        *([Section("students", "Attacks on students", [_student_table(content)])] if content["students"] else []),
    ]
    page: dict[str, Any] = {
        "title": f"Teacher check: {content['network']}",
        "headline": _capital(content["advice"]),
        "subline": _subline(content),
        "notes": [Text(f"{_capital(remark)}.") for remark in content["remarks"]],
        "sections": sections,
        "footer": FOOTER,
    }
    files = {
        f"teacher.{kind}": write_page(f"report.{kind}.jinja", **page).encode("utf-8", "replace")
        for kind in ("md", "html")
    }
    return {f"{plot.stem}.png": plot.png for plot in plots} | files


def _subline(content: dict[str, Any]) -> str:
    images = f"{content['images']:,} {content['split']} images of {content['dataset']}"
    said = f"Measured on {images}, L-inf radius {pixels(content['eps'])}."
    by_test = " Where results on the test images are reported, choose a teacher by training images: --split train."
    return said + by_test * (content["split"] == "test")


def _class_table(content: dict[str, Any]) -> Table:
    """Return the accuracies, the entropy, the norms and the transfer of each class, and the summaries."""
    clean, robust = content["clean"], content["robust"]
    norms = content["head"]["norms"] if content["head"] else None
    head = ["class", "clean", "under attack", "entropy", "hard images", *(["row norm"] if norms else [])]
    head += [f"fooled with {student['network']}" for student in content["students"]]
    rows = []
    for k, name in enumerate(content["classes"]):
        row = [Cell(name), _share(clean["accuracy"][k]), _share(robust["accuracy"][k])]
        row += [_value(content["soft_labels"]["entropy_by_class"][k]), Cell(f"{content['hard']['by_class'][k]:,}")]
        row += [_value(norms[k])] if norms else []
        rows.append([*row, *(_share(student["transfer_by_class"][k]) for student in content["students"])])
    results, summaries = [read_result(one) for one in (clean, robust)], []
    for summary, column in columns(len(content["classes"])).items():
        cells = [
            Cell(column.text(getattr(result.report, summary)), detail=column.between(result.interval[summary]))
            for result in results
        ]
        summaries.append([Cell(column.title), *cells, Cell("", span=len(head) - 3)])
    fooled = "; of the images that fool a student, the percentage that fool the teacher too" * bool(content["students"])
    caption = f"Accuracies in percent; the entropy of its answers to clean images{fooled}."
    return Table(caption, head, [("", rows), ("All classes", summaries)])


def _label_table(content: dict[str, Any]) -> Table:
    labels, hard = content["soft_labels"], content["hard"]
    of_k = f" of log {len(content['classes'])}"
    rows = [
        ("largest probability", labels["top"], "mean, clean images"),
        ("probability of the true class", labels["label"], "clean"),
        ("probability of the true class", labels["adv_label"], "under attack"),
        ("same class clean and under attack", labels["same"], "share of images"),
        ("entropy", labels["entropy"], "clean"),
        ("entropy", labels["adv_entropy"], "under attack"),
        ("best temperature", labels["temperature"], "above 1: surer than it is right"),
        ("hard images", hard["images"], f"wrong under attack for {hard['wrong_for']}"),
        ("entropy of hard images", hard["entropy"], f"{_percent(hard['share'])}{of_k}; more is better"),
        ("sure of hard images", hard["sure"], "share with a probability of 0.9 or more"),
        ("probability of the true class", hard["label"], "hard images"),
    ]
    if content["head"]:
        rows.append(("row norms and robust accuracy", content["head"]["correlation"], "correlation over classes"))
    cells = [[Cell(what), _value(value), Cell(note)] for what, value, note in rows]
    return Table("How sure it is, and whether it is right.", ["", "value", ""], [("", cells)])


def _student_table(content: dict[str, Any]) -> Table:
    head = ["student", "clean", "under attack", "agrees", "fooled", "fool the teacher too", "teacher moved"]
    rows = [
        [
            Cell(one["network"]),
            *(_share(one[name]) for name in ("clean", "robust", "agreement")),
            Cell(f"{one['fooled']:,}", detail="images"),
            _share(one["transfer"]),
            Cell(_digits(one["moved"]), detail="nats"),
        ]
        for one in content["students"]
    ]
    caption = (
        "Accuracies of the student, and the share of clean images that both give the same class, in percent. Fooled: "
        "images that the teacher has right, and the student wrong under attack."
    )
    return Table(caption, head, [("", rows)])


def _plots(content: dict[str, Any]) -> list[Plot]:
    """Return the figure of the classes; none, and a line that says so, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        say("note: the page has no figure: pip install 'retemper[plots]'")
        return []
    from retemper.engine.teacher_check.figure import class_plot

    return [class_plot(content)]


def as_text(content: dict[str, Any]) -> str:
    """Return what is measured in a few lines for the terminal, and the line of advice."""
    classes, labels, hard = content["classes"], content["soft_labels"], content["hard"]
    lines = [
        f"{content['network']}: {content['images']:,} {content['split']} images of {content['dataset']}, L-inf eps "
        f"{content['eps']:.4g}, PGD-20"
    ]
    for name, report in (("clean", content["clean"]), ("under attack", content["robust"])):
        worst, nsd = classes[report["worst_class"]], _digits(report["nsd"])
        lines.append(f"{name:14}{report['average']:.1%}, worst {report['worst']:.1%} ({worst}), NSD {nsd}")
    lines.append(
        f"{'soft labels':14}largest {_digits(labels['top'])}, entropy {_digits(labels['entropy'])}, of the true class "
        f"{_digits(labels['label'])} clean and {_digits(labels['adv_label'])} under attack; best temperature "
        f"{_digits(labels['temperature'])}"
    )
    lines.append(
        f"{'hard images':14}{hard['images']:,} (wrong under attack for {hard['wrong_for']}): entropy "
        f"{_digits(hard['entropy'])}, {_percent(hard['share'])} of the most there can be"
    )
    if content["head"]:
        norms, r = content["head"]["norms"], content["head"]["correlation"]
        lines.append(
            f"{'last layer':14}row norms {min(norms):.2f} to {max(norms):.2f}, r = {_digits(r)} with robust accuracy"
        )
    for one in content["students"]:
        lines.append(
            f"{'student':14}{one['network']}: {_percent(one['robust'])} under attack; of {one['fooled']:,} images that "
            f"fool it {_percent(one['transfer'])} fool the teacher too; both agree on {_percent(one['agreement'])}"
        )
    lines += [f"note: {remark}" for remark in content["remarks"]]
    return "\n".join([*lines, f"ADVICE: {content['advice']}"])


def _share(value: float | None) -> Cell:
    percent = math.nan if value is None else value
    return Cell(COLUMNS["average"].text(percent), fill=percent if math.isfinite(percent) else 0.0)


def _value(value: float | int | None) -> Cell:
    return Cell(f"{value:,}" if isinstance(value, int) else _digits(value))


def _digits(value: float | None) -> str:
    return number(math.nan if value is None else value, 2)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
