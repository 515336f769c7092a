"""The comparison as tables: the blocks of the page, CSV with every number, and LaTeX for a paper (booktabs)."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from retemper.engine.report.figures import Look
from retemper.engine.report.methods.measured import FURTHER, MEASURES, Measured
from retemper.engine.report.methods.rows import ATTACKS, METHOD, PUBLISHED, TEACHER, Group, Key, Row
from retemper.engine.report.page import Cell, Table
from retemper.engine.report.paper import latex_text
from retemper.engine.report.words import COLUMNS, pixels
from retemper.text import number, shorten

TITLES = {"clean": "Clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}
STRONGEST_FIRST = ("autoattack", "pgd20", "clean")
HEADINGS = {METHOD: "", TEACHER: "the teacher", PUBLISHED: "published by others, not measured here"}
COST = "seconds_per_step images_per_second peak_memory_mib".split()


def group_title(group: Group) -> str:
    """Return in words what the rows of a group were evaluated on."""
    of = group.protocol
    images = f"{of['images']:,} {of['split']} images" if isinstance(of.get("images"), int) else "unknown images"
    norm = "" if of.get("norm") in (None, "linf") else f", {of['norm']}"
    return shorten(f"{of.get('dataset')}, {images}, eps {pixels(of.get('eps'))}{norm}", 100)


def accuracy_table(group: Group, look: Mapping[Key, Look]) -> Table:
    """Return the table of accuracies: a line a row, three columns an attack."""
    best = {(attack, name): _best(group, attack, name) for attack in ATTACKS for name in MEASURES}
    groups = []
    for kind, heading in HEADINGS.items():
        rows = []
        for row in group.of(kind):
            cells = [_name_cell(row, look)]
            for attack in STRONGEST_FIRST:
                cells += [_cell(row.get(attack, name), name, best[attack, name], kind) for name in MEASURES]
            rows.append(cells)
        groups += [(heading, rows)] if rows else []
    caption = (
        f"{group_title(group)}. Correct, %; NSD: spread of the class accuracies over their mean, 0 is fair. The mean "
        "of the seeds; below it 95 % intervals: over the seeds, for chance in training (Student's t), where there are "
        "several; then over the images, for the choice of test images (bootstrap, all seeds on the same). Best worst "
        "class first; bold: best of its column among the methods measured here. ≤: an upper bound, from a weaker "
        "attack or one broken off."
    )
    head = ["method", *(f"{TITLES[attack]} {COLUMNS[name].short}" for attack in STRONGEST_FIRST for name in MEASURES)]
    return Table(caption, head, groups)


def _best(group: Group, attack: str, name: str) -> float:
    """Return the best mean of a column among the methods that were measured alike; NaN for fewer than two."""
    found = [one.mean for row in group.of(METHOD) if (one := row.get(attack, name)) and not one.note]
    return math.nan if len(found) < 2 else (min if name == "nsd" else max)(found)


def _name_cell(row: Row, look: Mapping[Key, Look]) -> Cell:
    note = {METHOD: f"{len(row.runs)} seed{'s' * (len(row.runs) != 1)}", TEACHER: "", PUBLISHED: "published"}[row.kind]
    colour = "" if row.kind == PUBLISHED else look[row.key].colour
    detail = "\n".join(filter(None, (shorten(row.network, 30), shorten(row.source, 120) * (row.kind == PUBLISHED))))
    return Cell(shorten(row.name, 60), note, detail, colour=colour)


def _cell(one: Measured | None, name: str, best: float, kind: str) -> Cell:
    if one is None:
        return Cell("none" if kind == PUBLISHED else "not evaluated")
    text = "≤ " * one.upper_bound + COLUMNS[name].text(one.mean)
    ends = [pair for pair in (one.seeds, one.images) if pair is not None]
    detail = "\n".join(COLUMNS[name].between(pair) for pair in ends)
    return Cell(text, one.note, detail, strong=kind == METHOD and one.mean == best and not one.note)


def cost_table(group: Group) -> Table:
    """Return the table of what each method took to train. The device stands in its caption where it is one for all."""
    rows, shown = [], group.of(METHOD, TEACHER)
    devices = {row.cost.device for row in shown if row.runs}
    for row in shown:
        cost = row.cost
        times = [_time(cost.seconds_per_step), _known(cost.images_per_second, ",.0f"), _memory(cost.peak_memory_mib)]
        rows.append([Cell(shorten(row.name, 60)), *map(Cell, [*times, cost.epochs or "not known"])])
        model, _, folder = row.teacher.partition(", ")
        rows[-1] += [Cell(shorten(model or "not known", 40), detail=shorten(folder, 30) if folder else "")]
        rows[-1] += [Cell(shorten(cost.device or "several, or unknown", 60))] * (len(devices) > 1)
    caption = (
        "What training took, by each run's own record: the median over the epochs of all seeds, with all that an epoch "
        "does. Peak memory: on a GPU that of its tensors, else the process's."
    )
    caption += " Times on different devices do not compare." if len(devices) > 1 else f" On {', '.join(devices)}."
    head = ["method", "a step", "images/s", "peak memory", "epochs", "teacher"]
    return Table(caption, head + ["device"] * (len(devices) > 1), [("", rows)])


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else _known(seconds, ".3g", " s")


def _memory(mib: float) -> str:
    return f"{mib / 1024:,.1f} GiB" if mib >= 1024 else _known(mib, ",.0f", " MiB")


def _known(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else "not recorded"


def csv_text(groups: Iterable[Group]) -> str:
    """Return every number of every row; accuracies are fractions, what is not known is empty."""
    numbers = {
        f"{attack}_{name}{suffix}": (attack, name, pick)
        for attack in ATTACKS
        for name in MEASURES
        for suffix, pick in PICKED.items()
    }
    numbers |= {f"{attack}_{name}": (attack, name, PICKED[""]) for attack in ATTACKS for name in FURTHER}
    about = ["method", "kind", "network", "dataset", "eps", "norm", "images", "seeds"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*about, *numbers, *COST, "epochs", "teacher", "device", "source"])
    for group in groups:
        facts = [group.protocol.get(name) for name in ("dataset", "eps", "norm", "images")]
        for row in group.rows:
            where = [""] * len(facts) if row.kind == PUBLISHED else facts
            cells = [row.name, row.kind, row.network, *where, len(row.runs) or ""]
            found = ((row.get(attack, name), pick) for attack, name, pick in numbers.values())
            cells += ["" if one is None else _plain(pick(one)) for one, pick in found]
            cells += [_plain(getattr(row.cost, name)) for name in COST]
            writer.writerow([*cells, row.cost.epochs, row.teacher, row.cost.device, row.source])
    return text.getvalue()


PICKED: dict[str, Callable[[Measured], Any]] = {  # columns of the CSV file, by what ends their names
    "": lambda one: one.mean,
    "_lowest_seed": lambda one: one.low,
    "_highest_seed": lambda one: one.high,
    "_seeds_low": lambda one: (one.seeds or (math.nan,))[0],
    "_seeds_high": lambda one: (one.seeds or (math.nan,))[-1],
    "_images_low": lambda one: (one.images or (math.nan,))[0],
    "_images_high": lambda one: (one.images or (math.nan,))[-1],
    "_note": lambda one: "; ".join(filter(None, ("upper bound" * one.upper_bound, one.note))),
}


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return str(value)


def latex_table(groups: Sequence[Group]) -> str:
    """Return a table for a paper that uses booktabs: mean and standard deviation over the seeds, the best in bold."""
    width = 1 + len(ATTACKS) * len(MEASURES)
    lines = ["% needs \\usepackage{booktabs}; %, NSD as it is; mean and standard deviation over the seeds"]
    lines += [f"\\begin{{tabular}}{{l{'r' * (width - 1)}}}", "\\toprule"]
    lines.append(" & ".join(["", *(f"\\multicolumn{{{len(MEASURES)}}}{{c}}{{{TITLES[a]}}}" for a in ATTACKS)]) + r" \\")
    ends = [(2 + i * len(MEASURES), 1 + (i + 1) * len(MEASURES)) for i in range(len(ATTACKS))]
    lines.append("".join(f"\\cmidrule(lr){{{first}-{last}}}" for first, last in ends))
    lines.append(" & ".join(["method", *([COLUMNS[name].short for name in MEASURES] * len(ATTACKS))]) + r" \\")
    for group in groups:
        if len(groups) > 1:
            lines += ["\\midrule", f"\\multicolumn{{{width}}}{{l}}{{\\emph{{{latex_text(group_title(group))}}}}} \\\\"]
        for kind in HEADINGS:
            rows = group.of(kind)
            lines += ["\\midrule"] if rows else []
            lines += [_latex_row(row, group) for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _latex_row(row: Row, group: Group) -> str:
    said = {METHOD: "", TEACHER: " (teacher)", PUBLISHED: "$^\\dagger$"}[row.kind]
    cells = [latex_text(shorten(row.name, 60)) + said]
    for attack in ATTACKS:
        for name in MEASURES:
            one = row.get(attack, name)
            best = one is not None and not one.note and one.mean == _best(group, attack, name) and row.kind == METHOD
            cells.append("--" if one is None else _latex_number(one, name, best))
    source = f" % published: {' '.join(row.source.split())}" if row.kind == PUBLISHED else ""
    return " & ".join(cells) + r" \\" + source


def _latex_number(one: Measured, name: str, best: bool) -> str:
    column = COLUMNS[name]
    mean = column.text(one.mean)
    text = f"\\mathbf{{{mean}}}" if best else mean
    spread = f"_{{\\pm {number(column.scale * one.std, column.digits)}}}" if math.isfinite(one.std) else ""
    bound = "\\leq " if one.upper_bound else ""  # no backslash may stand within the braces of an f-string before 3.12
    return f"${bound}{text}{spread}$" + "*" * bool(one.note)
