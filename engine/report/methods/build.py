"""The comparison of many methods, written: comparison.html, .md, .csv and .tex, and its figures as PNG.

The same run folders give the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from retemper.commands import command
from retemper.engine.checkpoints.header import is_run
from retemper.engine.report.figures import Look, looks
from retemper.engine.report.fonts import find_fonts
from retemper.engine.report.methods.figure import figure_blocks
from retemper.engine.report.methods.published import Published, read_published
from retemper.engine.report.methods.rows import (
    ATTACKS,
    METHOD,
    PUBLISHED,
    TEACHER,
    Group,
    Key,
    Row,
    groups_of,
    is_alike,
    run_folders,
    with_published,
)
from retemper.engine.report.methods.tables import (
    TITLES,
    accuracy_table,
    cost_table,
    csv_text,
    group_title,
    latex_table,
)
from retemper.engine.report.page import Listing, Plot, Section, Text, write_page
from retemper.engine.report.read import RunRecord, read_run
from retemper.engine.report.words import percent, pixels
from retemper.engine.run.commands import evaluate_again
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError, UsageError
from retemper.files import write_atomically
from retemper.text import shorten

FOOTER = (
    "A difference between two methods is worth a claim when retemper compare says so of their seeds, image by image: "
    "the intervals here are each method's own."
)


def build_comparison(
    targets: Sequence[Path], out: Path, against: Path | None = None, *, other_data: bool = False
) -> Path:
    """Write the comparison, as `write_comparison` describes; matplotlib must be installed."""
    RunFolder(out).require_place()
    published = [] if against is None else read_published(against)
    runs = [read_run(folder) for folder in run_folders(targets)]
    groups = groups_of(runs)
    if not groups:
        raise DataError(
            f"none of the {len(runs)} runs was evaluated: run `{runs[0].evaluate}` first, and for the others"
        )
    groups = _beside(groups, published, against, other_data)
    named = list(dict.fromkeys(row.name for group in groups for row in group.rows))
    fonts, lacking = find_fonts(named)
    with rc_context({"font.family": fonts}):
        sections = [one for i, group in enumerate(groups) for one in _sections(group, i, _looks(group, lacking))]
    latex = latex_table(groups)
    sections.append(Section("latex", "For a paper", [Listing("LaTeX, with booktabs. A click selects all.", latex)]))
    page = {"title": "Methods compared", "headline": _headline(groups[0]), "subline": _subline(groups[0])}
    page |= {"notes": _notes(groups, runs), "sections": sections, "footer": FOOTER}
    files = {
        "comparison.csv": csv_text(groups).encode(),
        "comparison.tex": latex.encode(),
        **{block.stem + ".png": block.png for one in sections for block in one.blocks if isinstance(block, Plot)},
        **{f"comparison.{kind}": write_page(f"report.{kind}.jinja", **page).encode() for kind in ("md", "html")},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {out} ({error.strerror}): name another folder with --out") from error
    for name, content in files.items():
        write_atomically(out / name, content)
    return out / "comparison.html"


def _beside(groups: list[Group], published: list[Published], against: Path | None, other_data: bool) -> list[Group]:
    """Return the groups with the published numbers. Raises UsageError where none is of the data of any group."""
    if published and not other_data and not any(is_alike(group, one) for group in groups for one in published):
        theirs = ", ".join(sorted({f"{one.data} at eps {pixels(one.eps)}" for one in published}))
        raise UsageError(
            f"--against {against} is of {theirs}, these runs are of {group_title(groups[0])}: numbers on other data do "
            "not compare; --other-data sets them beside these all the same"
        )
    first, *others = [with_published(group, published) for group in groups]
    if other_data:
        first = with_published(groups[0], published, other_data=True)
    return [first, *others]


def _looks(group: Group, lacking: frozenset[str]) -> dict[Key, Look]:
    """Return the look of each row, by its key; one with a letter that no font has is called by its number."""
    called = [f"row {i}" if lacking & set(row.name) else row.name for i, row in enumerate(group.rows, 1)]
    found = looks(called, [row.kind == TEACHER for row in group.rows])
    return dict(zip((row.key for row in group.rows), found, strict=True))


def _sections(group: Group, place: int, look: dict[Key, Look]) -> list[Section]:
    end = f"-{place + 1}" if place else ""
    blocks = [accuracy_table(group, look), *figure_blocks(group, look, f"comparison{end.replace('-', '_')}")]
    title = f"Accuracy: {group_title(group)}" if place else "Accuracy"
    cost = Section(f"cost{end}", f"Cost: {group_title(group)}" if place else "Cost", [cost_table(group)])
    return [Section(f"accuracy{end}", title, blocks), cost]


def _headline(group: Group) -> str:
    rows = group.of(METHOD)
    for attack in ("autoattack", "pgd20", "clean"):
        found = sorted((one.mean, row.name) for row in rows if (one := row.get(attack, "worst")) and not one.note)
        if found:
            where = "On clean images" if attack == "clean" else f"Under {TITLES[attack]}"
            best = f"{where}, {found[-1][1]} protects its worst class best, at {percent(found[-1][0])}"
            return best + (f"; {found[0][1]} least, at {percent(found[0][0])}." if len(found) > 1 else ".")
    return "Clean images, PGD-20 and AutoAttack: none of these methods was evaluated under one of them with every seed."


def _subline(group: Group) -> str:
    seeds = sorted({len(row.runs) for row in group.of(METHOD)})
    many = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) if seeds else "no"
    count = len(group.of(METHOD))
    return f"{count} method{'s' * (count != 1)} of {many} seed{'s' * (seeds != [1])} each; {group_title(group)}."


def _notes(groups: Sequence[Group], runs: Sequence[RunRecord]) -> list[Text]:
    """Return what keeps numbers from being compared, and what is missing with the command for it."""
    notes = []
    if len(groups) > 1:
        what = "; ".join(map(group_title, groups))
        notes.append(Text(f"Not all were evaluated alike: a table each, not to be compared with one another ({what})."))
    notes += [Text(f"{run.label}: not evaluated. To evaluate:", run.evaluate) for run in runs if not run.results]
    for group in groups:
        notes += [note for row in group.of(METHOD) for note in _missing(row)]
        notes += [_teacher_note(row, group) for row in group.of(TEACHER) if not row.numbers]
    if any(group.of(PUBLISHED) for group in groups):
        notes.append(Text("Published numbers are of other teachers, schedules and choices of the epoch than these."))
    return notes


def _missing(row: Row) -> list[Text]:
    """Return a line for each run of a method that lacks one of the attacks."""
    notes = []
    for run in row.runs:
        lacking = [name for name in ATTACKS if name not in row.numbers and name not in run.results]
        if lacking:
            text = f"{run.label}: not evaluated under {', '.join(TITLES[name] for name in lacking)}. To evaluate:"
            content = {"protocol": run.protocol, "asked": run.asked}
            notes.append(Text(text, evaluate_again(run.folder, content, attacks=",".join(lacking))))
    return notes


def _teacher_note(row: Row, group: Group) -> Text:
    """Return the line of a teacher that was not evaluated as its students were."""
    name, path = shorten(row.name, 60), Path(row.source)
    if not path.exists() and ":" not in row.source:
        return Text(f"{name}, the teacher, is not at {path} any more: no row of numbers for it.")
    known = {name: group.protocol.get(name) for name in ("dataset", "eps", "norm")}
    if is_run(path):
        again = evaluate_again(path, {"protocol": known}, attacks=",".join(ATTACKS))
    else:
        norm = None if known["norm"] in (None, "linf") else known["norm"]
        options = {"model": row.network, "dataset": known["dataset"], "norm": norm, "eps": pixels(known["eps"])}
        again = command("retemper", "evaluate", row.source, **options, attacks=",".join(ATTACKS))
    return Text(f"{name}, the teacher: not evaluated as its students were. To evaluate:", again)
