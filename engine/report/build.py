"""The report of one or several runs: report.html (one self-contained file), report.md, and the figures as PNG.

The same run folders give the same bytes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retemper.engine.class_report import Result
from retemper.engine.evaluation.verdicts import STRONGEST
from retemper.engine.report import plots
from retemper.engine.report.classwise import classwise
from retemper.engine.report.confusion import confusion_blocks
from retemper.engine.report.page import Cell, Listing, Page, Plot, Section, Table, Text, to_html, to_markdown
from retemper.engine.report.paired import paired_blocks
from retemper.engine.report.paper import paper_blocks, seed_blocks
from retemper.engine.report.plot_style import BARS_UP_TO, as_plot, looks, shorten
from retemper.engine.report.read import (
    ATTACKS,
    Run,
    attack_title,
    curves_of,
    find_teachers,
    read_run,
    state_panels,
    tell_apart,
)
from retemper.engine.report.trust import check_blocks, check_warnings
from retemper.engine.report.words import (
    between,
    bound,
    ends,
    nsd_sentence,
    number,
    percent,
    protocol_facts,
    run_facts,
    slug,
    wilson_width,
)
from retemper.errors import UsageError
from retemper.files import write_atomically

FOOTER = (
    "Intervals, all at 95 %: Wilson's score for a class, bootstrap over the test images for the summaries and for "
    "paired differences. They hold for the choice of test images, not of seeds. NSD: population standard deviation of "
    "the class accuracies over their mean."
)
COMPARED = ("dataset", "split", "images", "subset", "eps", "norm", "precision", "seed", "classes")  # of a protocol
FEW_IMAGES = 100  # in a class: the 95 % interval at 50 % is then 19 points wide


def write_report(runs: Sequence[Path], out: Path, title: str | None = None) -> Path:
    """Write report.html, report.md and the PNG figures of the runs into `out`; returns the path of report.html.

    Raises:
        DataError: a folder that holds no run.
        UsageError: no folder given, `out` cannot be made, or matplotlib is missing.
    """
    if not runs:
        raise UsageError("a report needs at least one run folder")
    report = Report([read_run(Path(folder)) for folder in runs])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be made a folder ({error.strerror})") from error
    page = report.page(title)
    for plot in (block for section in page.sections for block in section.blocks if isinstance(block, Plot)):
        write_atomically(out / f"{plot.stem}.png", plot.png)
    write_atomically(out / "report.md", to_markdown(page).encode("utf-8", "replace"))
    write_atomically(out / "report.html", to_html(page).encode("utf-8", "replace"))
    return out / "report.html"


class Report:
    """The runs side by side, and what can be said about them."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        find_teachers(runs)
        tell_apart(runs)
        self.look = dict(zip([r.label for r in runs], looks([r.is_teacher for r in runs]), strict=True))
        self.evaluated = [run for run in runs if run.results]
        self.classes = self.evaluated[0].classes if self.evaluated else runs[0].classes
        self.comparable = [run for run in self.evaluated if run.classes == self.classes]
        found = {attack for run in self.comparable for attack in run.results}
        self.attacks = [a for a in ATTACKS if a in found] + sorted(found - set(ATTACKS))
        shared = [a for a in found if all(a in run.results for run in self.comparable)]
        candidates = [a for a in STRONGEST if a in shared] + [a for a in STRONGEST if a in found] + self.attacks
        self.reference = (candidates or ["pgd20"])[0]  # the attack that the headline speaks of
        self.differing = self._differing_protocol()

    def page(self, title: str | None = None) -> Page:
        if not title:
            known = (run.recipe.get("dataset") or run.protocol.get("dataset") for run in self.runs)
            datasets = sorted({str(dataset) for dataset in known if dataset})
            title = "Robustness class by class" + (f": {', '.join(datasets)}" if datasets else "")
        return Page(title, self.headline(), self.subline(), self.warnings(), self._sections(), FOOTER)

    def results(self, attack: str) -> dict[str, Result]:
        return {run.label: run.results[attack] for run in self.comparable if attack in run.results}

    def class_name(self, k: int) -> str:
        return shorten(self.classes[k], 40) if k >= 0 else "none"

    def _subjects(self) -> list[tuple[str, Result]]:
        """Whom the headline is about: the students, or whoever there is."""
        have = [run for run in self.comparable if self.reference in run.results]
        chosen = [run for run in have if not run.is_teacher] or have
        return [(run.label, run.results[self.reference]) for run in chosen]

    def headline(self) -> str:
        subjects = self._subjects()
        if not subjects:
            return "None of these runs has been evaluated yet."
        where = "On clean images" if self.reference == "clean" else f"Under {attack_title(self.reference)}"
        weakest = [
            (name, self.class_name(r.report.worst_class), r.report.worst, bound(r) + percent(r.report.worst))
            for name, r in subjects
        ]
        if len(subjects) > 4:
            low, high = (pick(weakest, key=lambda w: w[2]) for pick in (min, max))
            text = f"the weakest class of {len(subjects)} runs lies between {low[3]} ({low[0]}, {low[1]})"
            text += f" and {high[3]} ({high[0]}, {high[1]})"
        else:
            parts = [f"{name}'s weakest class is {label} at {worst}" for name, label, _, worst in weakest]
            text = "; ".join(parts[:1] + [part.replace("'s weakest class is", "'s is", 1) for part in parts[1:]])
        return f"{where}, {text}. {nsd_sentence(subjects)}"

    def subline(self) -> str:
        subjects = self._subjects()
        if not subjects:
            return ""
        averages = [(name, bound(r) + percent(r.report.average)) for name, r in subjects]
        if len(subjects) == 1:
            return f"Its average over all images is {averages[0][1]}."
        text = f"Averages over all images: {', '.join(map(' '.join, averages))}."
        low, high = (pick(subjects, key=lambda s: s[1].report.worst)[1] for pick in (min, max))
        whose = "their" if len(subjects) == 2 else "the lowest and highest"
        if low.interval["worst"][1] < high.interval["worst"][0]:
            return f"{text} The 95 % intervals of {whose} weakest classes do not overlap."
        return f"{text} The 95 % intervals of {whose} weakest classes overlap: only more test images can settle it."

    def warnings(self) -> list[Text]:
        """What a reader must know before believing the numbers."""
        out = []
        if self.differing:
            what = "; ".join(f"{name} ({', '.join(values)})" for name, values in self.differing.items())
            out.append(Text(f"These runs were evaluated under different protocols, do not compare them: {what}."))
        for run in self.evaluated:
            if run not in self.comparable:
                out.append(Text(f"{run.label} has other classes: it is left out of the tables and figures by class."))
        counts = [n for run in self.comparable for r in run.results.values() for n in r.report.count if n]
        if counts and min(counts) < FEW_IMAGES:
            width = f"At 50 % a class's 95 % interval is {100 * wilson_width(min(counts)):.0f} points wide."
            out.append(Text(f"Few test images: {min(counts)} in the smallest class. {width}"))
        for run in self.runs:
            if run.recipe.get("select_on") == "test":
                out.append(Text(f"{run.label} chose its best epoch on the test images: its numbers flatter it."))
            out += [*check_warnings(run), *(Text(f"{run.label}: {note}", code) for note, code in run.notes)]
        return out

    def _sections(self) -> list[Section]:
        """Everything below the headline, without the sections that would be empty."""
        first = [self.reference] + [a for a in self.attacks if a != self.reference]
        by_class = [block for attack in first if attack in self.attacks for block in self._attack_blocks(attack)]
        sections = [
            Section("summary", "Summary", self._summary_blocks()),
            Section("seeds", "Seeds together", seed_blocks(self.comparable, self.attacks)),
            Section(
                "paired", "Differences on the same images", paired_blocks(self.comparable, self.reference, self.look)
            ),
            Section("classes", "Class by class", by_class),
            Section("confusion", "What is taken for what", confusion_blocks(self.comparable, self.reference)),
            Section("state", "Class state over the epochs", self._state_blocks()),
            Section("training", "Training", self._training_blocks()),
            Section("checks", "Can the numbers be trusted?", check_blocks(self.evaluated, self.look)),
            Section("protocol", "How it was evaluated", self._protocol_blocks()),
            Section("paper", "For a paper's table", paper_blocks(self.comparable, self.attacks)),
            Section("runs", "The runs", self._run_blocks()),
        ]
        return [section for section in sections if section.blocks]

    def _summary_blocks(self) -> list[Any]:
        if not self.attacks:
            return []
        tenth = len(self.classes) > 10
        head = ["run", "average", "weakest class"] + ["worst tenth"] * tenth + ["NSD"]
        groups = [(self._attack_heading(attack), self._summary_rows(attack, tenth)) for attack in self.attacks]
        caption = "Correct, %, with 95 % intervals. NSD: spread of the class accuracies over their mean, 0 is fair."
        if tenth:
            caption += " Worst tenth: mean of the weakest tenth of the classes, steadier than the weakest alone."
        if len(self.comparable) > 1 and not self.differing:
            caption += " Bold: best of its column."
        if "autoattack" not in self.attacks:
            caption += " Without AutoAttack, read robust accuracies as upper bounds."
        if any(result.upper_bound for attack in self.attacks for result in self.results(attack).values()):
            caption += " ≤: an upper bound, from a part of AutoAttack's standard suite."
        blocks: list[Any] = [Table(caption, head, groups)]
        results = self.results(self.reference)
        if len(results) > 1:
            caption = f"Under {attack_title(self.reference)}: right is stronger, up is fairer. Lines: 95 % intervals."
            blocks.append(as_plot("summary", caption, self._said(results), partial(plots.summary, results, self.look)))
        return blocks

    def _attack_heading(self, attack: str) -> str:
        images = sorted({sum(r.report.count) for r in self.results(attack).values()})
        return f"{attack_title(attack)}, {' or '.join(f'{n:,}' for n in images)} images"

    def _summary_rows(self, attack: str, tenth: bool) -> list[list[Cell]]:
        results = self.results(attack)
        names = ["average", "worst"] + ["worst_tenth"] * tenth + ["nsd"]
        best = {}
        if len(results) > 1 and not self.differing:
            for name in names:
                known = [v for v in (getattr(r.report, name) for r in results.values()) if math.isfinite(v)]
                best[name] = (min if name == "nsd" else max)(known, default=math.nan)
        rows = []
        for run, result in results.items():
            cells = [Cell(run, colour=self.look[run].colour)]
            for name in names:
                value, (scale, digits) = getattr(result.report, name), (1, 2) if name == "nsd" else (100, 1)
                detail = between(result.interval[name], scale, digits)
                note = f"class {self.class_name(result.report.worst_class)}" if name == "worst" else ""
                text = bound(result) * (name != "nsd") + number(scale * value, digits)
                cells.append(Cell(text, note, detail, value == best.get(name)))
            rows.append(cells)
        return rows

    def _attack_blocks(self, attack: str) -> list[Any]:
        results = self.results(attack)
        caption = (
            "one bar a run, 95 % whiskers; outline and number mark each run's weakest class. Lines across: averages."
        )
        if len(self.classes) > BARS_UP_TO:
            caption = "classes sorted by accuracy, each run in its own order; bands are 95 % intervals. Flat: averages."
        caption = f"{attack_title(attack)}: {caption}"
        draw = partial(classwise, results, self.classes, self.look)
        plot = as_plot(f"classwise_{slug(attack)}", caption, self._said(results), draw)
        return [plot, self._class_table(attack, results)]

    def _said(self, results: Mapping[str, Result]) -> list[str]:
        return [
            f"{name}: average {bound(r)}{percent(r.report.average)}, "
            f"weakest class {self.class_name(r.report.worst_class)} at {bound(r)}{percent(r.report.worst)}"
            for name, r in results.items()
        ]

    def _class_order(self, results: Mapping[str, Result]) -> list[int]:
        """As the data set has them; of many classes the weakest first."""
        mean_K = np.mean([np.nan_to_num(r.report.accuracy, nan=math.inf) for r in results.values()], axis=0)
        many = len(self.classes) > BARS_UP_TO
        return np.argsort(mean_K, kind="stable").tolist() if many else list(range(len(self.classes)))

    def _class_table(self, attack: str, results: Mapping[str, Result]) -> Table:
        rows = []
        for k in self._class_order(results):
            cells = [Cell(self.classes[k])]
            for result in results.values():
                value, weakest = result.report.accuracy[k], k == result.report.worst_class
                text = bound(result) + number(100 * value) + (" ▼" if weakest else "")
                fill = value if math.isfinite(value) else 0.0
                cells.append(Cell(text, detail=between(result.interval["class"][k], 100, 1), strong=weakest, fill=fill))
            counts = sorted({result.report.count[k] for result in results.values()})
            rows.append([*cells, Cell(" or ".join(map(str, counts)))])
        return Table(
            "Correct, %, with 95 % intervals. ▼ weakest class of the run."
            + " Weakest first." * (len(self.classes) > BARS_UP_TO),
            ["class", *results, "images"],
            [("", rows)],
            f"{attack_title(attack)} in numbers",
            attack == self.reference,
        )

    def _state_blocks(self) -> list[Any]:
        runs = [run for run in self.runs if run.classes == self.classes]
        panels = [panel for run in runs for panel in state_panels(run, self.reference)]
        if not panels:
            return []
        said = [
            f"{p.run}, {p.key.replace('_', ' ')}: first epoch {ends(p.values[0])}, last epoch {ends(p.values[-1])}"
            + "".join(f", weakest class {self.class_name(k)} at {p.values[-1, k]:.2f}" for k in p.weakest[:1])
            for p in panels
        ]
        caption = "One line a class."
        if any(panel.weakest for panel in panels):
            against = attack_title(self.reference)
            caption += f" Thick and red: the run's weakest class under {against}; dashed and dotted: the next two."
        return [as_plot("class_state", caption, said, partial(plots.class_state, panels, self.classes))]

    def _chosen_by(self) -> str:
        """The images that choose the best epoch."""
        on_test = [run for run in self.runs if run.recipe.get("select_on") == "test"]
        where = "test" if len(on_test) == len(self.runs) else "held-out or test" if on_test else "held-out training"
        return f"{where} images, by which the best epoch is chosen"

    def _training_blocks(self) -> list[Any]:
        runs = [run for run in self.runs if run.metrics]
        if not runs:
            return []
        held_out = any("holdout" in row for run in runs for row in run.metrics)
        series = {run.label: curves_of(run.metrics, held_out) for run in runs}
        if not any(curve[key][0] for curve in series.values() for key in ("loss", "average")):
            return []
        losses = {name: curve["loss"][1] for name, curve in series.items() if curve["loss"][1]}
        said = [f"{name}: loss {values[0]:.3g} to {values[-1]:.3g}" for name, values in losses.items()]
        caption = self._chosen_by() if held_out else "the training batches"
        caption = f"Losses of different methods have different scales. Robust accuracies are those of {caption}."
        caption += " Dotted: the learning rate drops."
        where = "held out" if held_out else "training"
        return [as_plot("training", caption, said, partial(plots.curves, series, self.look, where))]

    def _protocol_blocks(self) -> list[Any]:
        if not self.evaluated:
            return []
        facts = {run.label: protocol_facts(run) for run in self.evaluated}
        return [_facts_table("What was attacked, and how. Accuracies are of the weights named here.", facts)]

    def _run_blocks(self) -> list[Any]:
        facts = {run.label: run_facts(run) for run in self.runs}
        trained = [run for run in self.runs if not run.is_foreign]
        listings = [Listing(f"{run.label}: config.json", json.dumps(run.config, indent=2)) for run in trained]
        return [_facts_table("What was trained, and where.", facts), *listings]

    def _differing_protocol(self) -> dict[str, list[str]]:
        """What keeps the numbers of two runs from being compared: field -> its values."""
        facts = [protocol_facts(run) for run in self.comparable]
        shared = [
            attack_title(attack) for attack in self.attacks if all(attack in run.results for run in self.comparable)
        ]
        values = {name: list(dict.fromkeys(fact.get(name, "?") for fact in facts)) for name in [*COMPARED, *shared]}
        return {name: found for name, found in values.items() if len(found) > 1}


def _facts_table(caption: str, facts: dict[str, dict[str, str]]) -> Table:
    """A field a row: first a column a run, then one cell across for what all runs agree on."""
    differing, same = [], []
    for name in dict.fromkeys(name for fact in facts.values() for name in fact):
        values = [fact.get(name, "not recorded") for fact in facts.values()]
        if len(set(values)) == 1:
            same.append([Cell(name), Cell(values[0], span=len(values))])
        else:
            differing.append([Cell(name), *map(Cell, values)])
    title = "the same for all runs" if len(facts) > 1 else ""
    return Table(caption, ["", *facts], [(t, rows) for t, rows in (("", differing), (title, same)) if rows])
