"""The section of the curves over the radius: average and weakest class, a figure and a table for each norm."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retemper.engine.class_report import Result, read_result
from retemper.engine.evaluation.consistency import violation_text
from retemper.engine.evaluation.curve_file import curves_in, read_curve
from retemper.engine.evaluation.curve_summary import beaten_text
from retemper.engine.evaluation.norms import NORMS, TITLES
from retemper.engine.evaluation.places import beside, is_stale
from retemper.engine.evaluation.verdicts import STRONGEST
from retemper.engine.report.figures import Look, as_plot, end_labels, new_figure, panels
from retemper.engine.report.page import Cell, Table, Text
from retemper.engine.report.read import RunRecord, as_dict, as_number, attack_title
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.words import PERCENT, at_most, called, percent, pixels
from retemper.errors import DataError
from retemper.text import shorten

PANELS = {"average": "average", "worst": "weakest class at each radius"}
CHARACTERS = 32  # that fit along the axis of a panel
Line = dict[float, Result]  # by radius


@dataclass(frozen=True)
class _Curve:
    """The curve of one run in one norm: by attack, the results by radius; and what curve.json holds."""

    norm: str
    lines: dict[str, Line]
    content: dict[str, Any]

    @property
    def fullness(self) -> tuple[int, int]:
        """Return the number of images and of results: of several curves of one network, the larger pair is shown."""
        return self.content["protocol"].get("images", 0), sum(len(line) for line in self.lines.values())

    def from_clean(self, attack: str) -> Line:
        """Return the line of an attack, which begins without an attack where that was measured."""
        line = self.lines[attack]
        clean = next(iter(self.lines.get("clean", {}).values()), None)
        if clean is None or clean.report.count != next(iter(line.values())).report.count:
            return line
        return {0.0: clean} | line


def radius_blocks(runs: RunSet) -> list[Any]:
    """Return the figure and the table of every norm that a run has a curve in, and what contradicts AutoAttack."""
    found = {run.label: _curves(run, len(runs.classes)) for run in runs.runs}
    blocks: list[Any] = []
    for norm in NORMS:
        curves = {label: of_run[norm] for label, of_run in found.items() if norm in of_run}
        if curves:
            blocks += _norm_blocks(norm, curves, runs)
    return blocks + [text for label, of_run in found.items() for text in _theory(label, list(of_run.values()))]


def _curves(run: RunRecord, classes: int) -> dict[str, _Curve]:
    """Return the fullest curve of each norm beside a run's evaluation, but none that is damaged or of other weights."""
    found: dict[str, _Curve] = {}
    weights = run.protocol.get("weights_sha256")
    stem = re.sub(r"(-l[12])?(\.\d+)?$", "", run.evaluation.stem).replace("evaluation", "curve", 1)
    for path in (one for main in curves_in(run.folder, stem) for one in (main, *beside(main))):
        try:
            content = read_curve(path).content
        except DataError:
            continue
        protocol = content["protocol"]
        if is_stale(path, protocol) or protocol.get("weights_sha256") != (weights or protocol.get("weights_sha256")):
            continue
        if len(protocol["classes"]) != classes:
            continue
        lines = {name: _line(attack["radii"]) for name, attack in content["attacks"].items()}
        curve = _Curve(protocol["norm"], {name: line for name, line in lines.items() if line}, content)
        if curve.norm not in found or curve.fullness > found[curve.norm].fullness:
            found[curve.norm] = curve
    return found


def _line(entries: Sequence[dict[str, Any]]) -> Line:
    return {as_number(entry.get("eps")): read_result(entry) for entry in entries}


def _norm_blocks(norm: str, curves: Mapping[str, _Curve], runs: RunSet) -> list[Any]:
    """Return the blocks of one norm."""
    attacks = list(dict.fromkeys(name for curve in curves.values() for name in curve.lines if name != "clean"))
    order = ["cross-check", *STRONGEST]
    attacks.sort(key=lambda name: order.index(name) if name in order else len(order))
    shared = [name for name in attacks if all(name in curve.lines for curve in curves.values())]
    blocks: list[Any] = []
    if attacks:
        attack = (shared or attacks)[0]
        lines = {label: curve.from_clean(attack) for label, curve in curves.items() if attack in curve.lines}
        caption = (
            f"{attack_title(attack)} in {TITLES[norm]} as the radius grows, with 95 % intervals; at 0, where it was "
        )
        caption += "measured, without an attack. Each radius attacks what held at the smaller ones: no accuracy rises."
        stem = f"radii_{norm}"
        blocks.append(as_plot(stem, caption, _said(lines), partial(radius_figure, lines, runs.look)))
        blocks += [_table(norm, name, curves, runs, name == attack) for name in attacks]
    return blocks + [text for label, curve in curves.items() for text in _found(label, curve)]


def _said(lines: Mapping[str, Line]) -> list[str]:
    """Return in words where each line begins and ends."""
    said = []
    for label, line in lines.items():
        (low, first), (high, last) = min(line.items()), max(line.items())
        ends = [f"{percent(one.report.average)} and {percent(one.report.worst)}" for one in (first, last)]
        said.append(f"{label}: average and weakest class {ends[0]} at {pixels(low)}, {ends[1]} at {pixels(high)}")
    return said


def radius_figure(lines: Mapping[str, Line], look: Mapping[str, Look], narrow: bool) -> Figure:
    """Draw the average, and beside it the weakest class, over the radius, with bands of 95 %."""
    figure = new_figure(narrow, 5.6 if narrow else 3.4)
    labelled = []
    for axes, (summary, title) in zip(panels(figure, 2, 1 if narrow else 2), PANELS.items(), strict=True):
        labels = []
        for label, line in lines.items():
            style, radii = look[label], sorted(line)
            height = [100 * getattr(line[eps].report, summary) for eps in radii]
            low, high = zip(*(line[eps].interval[summary] for eps in radii), strict=True)
            axes.fill_between(
                radii, [100 * v for v in low], [100 * v for v in high], color=style.colour, alpha=0.13, lw=0
            )
            axes.plot(radii, height, color=style.line, linestyle=style.dash, marker=style.marker, clip_on=False)
            labels.append((height[-1], shorten(style.name, 12 if narrow else 18), style.ink, True))
        axes.set_title(title)
        _radius_axis(axes, sorted({eps for line in lines.values() for eps in line}))
        axes.set_ylim(0, 102)
        axes.set_ylabel("correct, %")
        axes.yaxis.grid(True)
        labelled.append((axes, labels))
    end_labels(figure, labelled, 9)
    return figure


def _radius_axis(axes: Axes, radii: Sequence[float]) -> None:
    """Mark the radii along the horizontal axis, and name those whose names fit, the largest first."""
    character = (radii[-1] - radii[0]) / CHARACTERS
    named: list[float] = []
    for eps in reversed(radii):
        if not named or named[-1] - eps > character * (1 + len(pixels(named[-1]) + pixels(eps)) / 2):
            named.append(eps)
    axes.set_xticks(radii, [pixels(eps) if eps in named else "" for eps in radii])
    axes.set_xlabel("eps, of pixels in [0, 1]")


def _table(norm: str, attack: str, curves: Mapping[str, _Curve], runs: RunSet, opened: bool) -> Table:
    """Return the table of one attack: a row a radius, two columns a run."""
    of_run = {label: curve.lines[attack] for label, curve in curves.items() if attack in curve.lines}
    rows = []
    for eps in sorted({eps for line in of_run.values() for eps in line}):
        cells = [Cell(pixels(eps))]
        for line in of_run.values():
            cells += _cells(line[eps], runs) if eps in line else [Cell("not done"), Cell("")]
        rows.append(cells)
    head = ["eps", *(f"{label}, {what}" for label in of_run for what in ("average", "weakest class"))]
    images = dict.fromkeys(sum(next(iter(line.values())).report.count) for line in of_run.values())
    caption = f"{attack_title(attack)} in {TITLES[norm]}: correct, %, with 95 % intervals, "
    caption += f"of {' or '.join(f'{n:,}' for n in images)} images."
    return Table(caption, head, [("", rows)], f"{attack_title(attack)} in {TITLES[norm]}, in numbers", opened)


def _cells(result: Result, runs: RunSet) -> list[Cell]:
    """Return the average and the weakest class at one radius."""
    cells = []
    for summary, note in (("average", ""), ("worst", called(runs.weakest(result)))):
        value = getattr(result.report, summary)
        ends = PERCENT.between(result.interval[summary])
        fill = value if math.isfinite(value) else 0.0
        cells.append(Cell(at_most(result) + PERCENT.text(value), note, ends, fill=fill))
    return cells


def _found(label: str, curve: _Curve) -> list[Text]:
    """Return in words where a cross-check beat AutoAttack."""
    content, title = curve.content, TITLES[curve.norm]
    classes = content["protocol"]["classes"]
    texts, entries = [], as_dict(content["attacks"].get("cross-check")).get("radii", [])
    for entry in entries:
        parts = [beaten_text(name, one, classes) for name, one in entry.get("beats_autoattack", {}).items()]
        if told := "; ".join(filter(None, parts)):
            texts.append(Text(f"{label}, {title} {pixels(entry['eps'])}: {told}."))
    if entries and not texts:
        texts.append(Text(f"{label}, {title}: no cross-check beats AutoAttack at any radius."))
    return texts


def _theory(label: str, curves: Sequence[_Curve]) -> list[Text]:
    """Return in words where an attack on a run contradicts theory: the newest curve knows the most results."""
    found = [as_dict(curve.content.get("consistency")) for curve in curves]
    theory = max(found, key=lambda one: one.get("pairs", 0), default={})
    texts: list[Text] = []
    if theory.get("pairs"):
        held = f"{label}: what is broken in a ball must be broken in one that contains it: "
        held += f"{theory['pairs']} pairs of results compared image by image, "
        against = theory.get("violations", [])
        texts.append(Text(held + (f"{len(against)} with violations." if against else "none contradicts it.")))
        texts += [Text(f"{label}: {violation_text(one)}.") for one in against]
    return texts
