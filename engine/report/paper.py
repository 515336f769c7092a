"""The sections of lines for a paper's table, in LaTeX and Markdown, and of runs that differ only in the seed."""

import json
import math
import re
from collections.abc import Sequence
from statistics import fmean

from retemper.engine.report.page import Cell, Listing, Table
from retemper.engine.report.read import RunRecord, attack_title
from retemper.engine.report.words import Column, at_most, columns, pixels
from retemper.text import shorten

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"} | {char: f"\\{char}" for char in "&%$#_{}"}


def seed_blocks(runs: Sequence[RunRecord], attacks: Sequence[str]) -> list[Table]:
    """Return the table of recipes that were run with several seeds: the means, and the lowest and highest seed."""
    groups = _seed_groups(runs)
    if not groups:
        return []
    shown = columns(len(runs[0].classes))
    sections = []
    for attack in attacks:
        rows = []
        for title, members in groups.items():
            numbers = [_over_seeds(members, attack, name, column) for name, column in shown.items()]
            if any(numbers):
                cells = [Cell(mean, detail=ends) for mean, ends in (pair or ("none", "") for pair in numbers)]
                rows.append([Cell(title, f"{len(members)} seeds"), *cells])
        sections += [(attack_title(attack), rows)] if rows else []
    caption = "Runs that differ in nothing but the seed: mean, and the lowest and highest of the seeds. Correct, %."
    return [Table(caption, ["recipe", *(column.title for column in shown.values())], sections)]


def paper_blocks(runs: Sequence[RunRecord], attacks: Sequence[str]) -> list[Listing]:
    """Return a line a run in LaTeX and in Markdown, with a comment on what they hold; all is in % except for NSD."""
    if not attacks:
        return []
    shown = [(attack, name, column) for attack in attacks for name, column in columns(len(runs[0].classes)).items()]
    head = ["method", *(f"{attack_title(attack)} {column.short}" for attack, _, column in shown)]
    rows = [(shorten(run.label, 60), [_number(run, *which) for which in shown]) for run in runs]
    groups, protocol = _seed_groups(runs), runs[0].protocol
    for title, members in groups.items():
        pairs = [_over_seeds(members, *which) for which in shown]
        rows.append((f"{title}, {len(members)} seeds", [f"{p[0]} ({p[1]})" if p else "--" for p in pairs]))
    facts = f"{protocol.get('dataset', 'unknown data')}, eps {pixels(protocol.get('eps'))}"
    facts = shorten(f"{facts}, {protocol.get('norm', 'linf')}; %, NSD as it is", 100)
    latex = [f"% {facts}", "% " + " & ".join(head) + r" \\"]
    latex += [" & ".join([latex_text(name), *map(_latex_number, numbers)]) + r" \\" for name, numbers in rows]
    lines = [head, ["---", *["---:"] * len(shown)], *([_markdown(name), *numbers] for name, numbers in rows)]
    note = " A range: lowest to highest of the seeds." if groups else ""
    return [
        Listing(f"LaTeX ({facts}).{note} A click selects all.", "\n".join(latex)),
        Listing("The same in Markdown.", "\n".join("| " + " | ".join(line) + " |" for line in lines)),
    ]


def _seed_groups(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Return the runs of one recipe with different seeds, at least two of them, by method and setting."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        what = [run.config.get("method"), run.config.get("setting"), run.recipe]
        groups.setdefault(json.dumps(what, sort_keys=True, default=str), []).append(run)
    found: dict[str, list[RunRecord]] = {}
    for members in groups.values():
        if len({str(run.config.get("seed")) for run in members}) == len(members) > 1:
            config, preset = members[0].config, members[0].recipe.get("preset", "paper")
            strength = f", {preset}" * (preset != "paper")
            name = shorten(f"{config.get('method')}:{config.get('setting')}{strength}", 40)
            found[f"{name} ({len(found) + 1})" if name in found else name] = members
    return found


def _number(run: RunRecord, attack: str, name: str, column: Column) -> str:
    result = run.results.get(attack)
    value = math.nan if result is None else getattr(result.report, name)
    return at_most(result, name) + column.text(value) if result and math.isfinite(value) else "--"


def _over_seeds(runs: Sequence[RunRecord], attack: str, name: str, column: Column) -> tuple[str, str] | None:
    """Return the mean and the range over the seeds; None unless every seed has the number."""
    results = [run.results[attack] for run in runs if attack in run.results]
    values = [getattr(result.report, name) for result in results]
    if len(values) < len(runs) or not all(map(math.isfinite, values)):
        return None
    most = max(at_most(result, name) for result in results)
    return most + column.text(fmean(values)), column.between((min(values), max(values)))


def latex_text(text: str) -> str:
    """Return the text with what LaTeX takes for markup escaped."""
    return "".join(LATEX.get(char, char) for char in text)


def _latex_number(text: str) -> str:
    return text.replace("≤ ", r"$\leq$").replace(" to ", "--")


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)
