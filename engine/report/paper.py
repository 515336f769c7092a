"""Lines for a paper's table, in LaTeX and in Markdown: every run, and together those that differ only in the seed."""

import json
import math
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from retemper.engine.report.page import Cell, Copy, Table
from retemper.engine.report.plot_style import shorten
from retemper.engine.report.read import Run, attack_title
from retemper.engine.report.words import pixels

TITLES = {"average": "avg.", "worst": "worst", "worst_tenth": "tenth", "nsd": "NSD"}
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
} | {char: f"\\{char}" for char in "&%$#_{}"}


def seed_groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one recipe with different seeds, at least two of them, by method and setting."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        what = {"method": run.config.get("method"), "setting": run.config.get("setting"), "recipe": run.recipe}
        groups.setdefault(json.dumps(what, sort_keys=True, default=str), []).append(run)
    found: dict[str, list[Run]] = {}
    for members in groups.values():
        if len({str(run.config.get("seed")) for run in members}) == len(members) > 1:
            name = shorten(f"{members[0].config.get('method')}:{members[0].config.get('setting')}", 40)
            found[f"{name} ({len(found) + 1})" if name in found else name] = members
    return found


def seed_blocks(runs: Sequence[Run], attacks: Sequence[str]) -> list[Any]:
    """A table of means over seeds and of their lowest and highest."""
    groups = seed_groups(runs)
    if not groups:
        return []
    names = _columns(runs)
    titles = {"average": "average", "worst": "weakest class", "worst_tenth": "worst tenth", "nsd": "NSD"}
    sections = []
    for attack in attacks:
        rows = []
        for title, members in groups.items():
            numbers = [_of_seeds(members, attack, name) for name in names]
            if any(numbers):
                cells = [Cell(*pair) if pair else Cell("none") for pair in numbers]
                rows.append([Cell(title, f"{len(members)} seeds"), *(Cell(c.text, detail=c.note) for c in cells)])
        sections.append((attack_title(attack), rows))
    caption = "Runs that differ in nothing but the seed: mean, and the lowest and highest of the seeds. Correct, %."
    return [Table(caption, ["recipe", *(titles[name] for name in names)], [s for s in sections if s[1]])]


def paper_blocks(runs: Sequence[Run], attacks: Sequence[str]) -> list[Any]:
    """The lines, with a comment that says what they hold; numbers are % except for NSD."""
    shown = [attack for attack in attacks if any(attack in run.results for run in runs)]
    if not shown:
        return []
    names = _columns(runs)
    head = [f"{attack_title(attack)} {TITLES[name]}" for attack in shown for name in names]
    rows = [(shorten(run.label, 60), _numbers(run, shown, names)) for run in runs]
    for title, members in seed_groups(runs).items():
        pairs = [_of_seeds(members, attack, name) for attack in shown for name in names]
        rows.append((f"{title}, {len(members)} seeds", [f"{p[0]} ({p[1]})" if p else "--" for p in pairs]))
    protocol = runs[0].protocol
    facts = (
        f"{protocol.get('dataset', 'unknown data')}, eps {pixels(protocol.get('eps'))}, {protocol.get('norm', 'linf')}"
    )
    facts = shorten(f"{facts}; %, NSD as it is", 100)
    latex = [f"% {facts}", "% " + " & ".join(["method", *head]) + r" \\"]
    latex += [" & ".join([_latex(name), *map(_latex_number, numbers)]) + r" \\" for name, numbers in rows]
    lines = [["method", *head], ["---", *["---:"] * len(head)], *([_cell(name), *numbers] for name, numbers in rows)]
    markdown = ["| " + " | ".join(line) + " |" for line in lines]
    note = " A range: lowest to highest of the seeds." if seed_groups(runs) else ""
    return [
        Copy(f"LaTeX ({facts}).{note} A click selects all.", "\n".join(latex)),
        Copy("The same in Markdown.", "\n".join(markdown)),
    ]


def _columns(runs: Sequence[Run]) -> list[str]:
    return ["average", "worst"] + ["worst_tenth"] * (len(runs[0].classes) > 10) + ["nsd"]


def _numbers(run: Run, attacks: Sequence[str], names: Sequence[str]) -> list[str]:
    out = []
    for attack in attacks:
        result = run.results.get(attack)
        for name in names:
            value = math.nan if result is None else getattr(result.report, name)
            most = "≤ " if result and result.upper_bound and name != "nsd" else ""
            out.append(f"{most}{_text(value, name)}" if math.isfinite(value) else "--")
    return out


def _of_seeds(runs: Sequence[Run], attack: str, name: str) -> tuple[str, str] | None:
    """Mean and range; None unless every seed has the number."""
    results = [run.results[attack] for run in runs if attack in run.results]
    values = [getattr(result.report, name) for result in results]
    if len(values) < len(runs) or not all(map(math.isfinite, values)):
        return None
    most = "≤ " if any(result.upper_bound for result in results) and name != "nsd" else ""
    return most + _text(fmean(values), name), f"{_text(min(values), name)} to {_text(max(values), name)}"


def _text(value: float, name: str) -> str:
    return f"{value:.3f}" if name == "nsd" else f"{100 * value:.1f}"


def _latex(text: str) -> str:
    return "".join(LATEX.get(char, char) for char in text)


def _latex_number(text: str) -> str:
    return text.replace("≤ ", r"$\leq$").replace(" to ", "--")


def _cell(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)
