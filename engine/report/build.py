"""The report of one or several runs: report.html (one self-contained file), report.md, and the figures as PNG.

The same run folders give the same bytes.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from retemper.engine.report.classwise import classwise_blocks
from retemper.engine.report.confusion import confusion_blocks
from retemper.engine.report.corruptions import corruption_blocks
from retemper.engine.report.facts import protocol_blocks, run_blocks
from retemper.engine.report.headline import headline, subline, warnings
from retemper.engine.report.page import Plot, Section, write_page
from retemper.engine.report.paired import paired_blocks
from retemper.engine.report.paper import paper_blocks, seed_blocks
from retemper.engine.report.radii import radius_blocks
from retemper.engine.report.read import read_run
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.summary import summary_blocks
from retemper.engine.report.training import state_blocks, training_blocks
from retemper.engine.report.trust import check_blocks
from retemper.engine.report.unevenness import unevenness_blocks
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import UsageError
from retemper.files import write_atomically

FOOTER = (
    "Intervals, all at 95 %: Wilson's score for a class, bootstrap over the test images for the summaries and for "
    "paired differences. They hold for the choice of test images, not of seeds. NSD: population standard deviation of "
    "the class accuracies over their mean."
)


def build_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report, as `write_report` describes; matplotlib must be installed."""
    if not folders:
        raise UsageError("a report needs at least one run folder")
    out = Path(out)
    RunFolder(out).require_place()
    runs = RunSet([read_run(folder) for folder in folders])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {out} ({error.strerror}): name another folder with --out") from error
    with rc_context({"font.family": runs.fonts}):
        sections = [section for section in _sections(runs) if section.blocks]
    page = {"title": _title(runs), "headline": headline(runs), "subline": subline(runs), "notes": warnings(runs)}
    texts = {
        name: write_page(f"{name}.jinja", **page, sections=sections, footer=FOOTER).encode("utf-8", "replace")
        for name in ("report.md", "report.html")
    }
    plots = [block for section in sections for block in section.blocks if isinstance(block, Plot)]
    files = {f"{plot.stem}.png": plot.png for plot in plots} | texts
    before = _figures_in(out)
    for name, content in files.items():
        write_atomically(out / name, content)
    for name in before - set(files):
        (out / name).unlink(missing_ok=True)
    return out / "report.html"


def _figures_in(out: Path) -> set[str]:
    """Return the names of the figures of a report that was written into the folder before."""
    page = out / "report.md"
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    return set(re.findall(r"^!\[.*\]\(([a-z0-9_]+\.png)\)$", text, re.MULTILINE))


def _title(runs: RunSet) -> str:
    known = (run.recipe.get("dataset") or run.protocol.get("dataset") for run in runs.runs)
    datasets = sorted({str(dataset) for dataset in known if dataset})
    return "Robustness class by class" + (f": {', '.join(datasets)}" if datasets else "")


def _sections(runs: RunSet) -> list[Section]:
    shown = runs.comparable
    return [
        Section("summary", "Summary", summary_blocks(runs)),
        Section("unevenness", "The weakest class, honestly", unevenness_blocks(runs)),
        Section("seeds", "Seeds together", seed_blocks(shown, runs.in_order)),
        Section("paired", "Differences on the same images", paired_blocks(runs)),
        Section("classes", "Class by class", classwise_blocks(runs)),
        Section("radii", "Over the radius", radius_blocks(runs)),
        Section("confusion", "What is taken for what", confusion_blocks(runs)),
        Section("corruptions", "Corrupted images", corruption_blocks(runs)),
        Section("state", "Class state over the epochs", state_blocks(runs)),
        Section("training", "Training", training_blocks(runs)),
        Section("checks", "Can the numbers be trusted?", check_blocks(runs.evaluated, runs.look)),
        Section("protocol", "How it was evaluated", protocol_blocks(runs.evaluated)),
        Section("paper", "For a paper's table", paper_blocks(shown, runs.attacks)),
        Section("runs", "The runs", run_blocks(runs.runs)),
    ]
