"""How each run was trained and evaluated, fact by fact: the sections on the protocol and on the runs."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from retemper.engine.report.page import Cell, Listing, Table
from retemper.engine.report.read import RunRecord, as_dict, as_number, attack_title
from retemper.engine.report.words import pixels, plain


def protocol_blocks(runs: Sequence[RunRecord]) -> list[Any]:
    """Return the table of the protocols of evaluated runs."""
    caption = "What was attacked, and how. Accuracies are of the weights named here."
    facts = {run.label: protocol_facts(run) for run in runs}
    for run in runs:
        others = {attack_title(attack): "not run" for other in runs for attack in other.results.keys() - run.results}
        facts[run.label] |= dict(sorted(others.items()))
    return [_facts_table(caption, facts)] if runs else []


def run_blocks(runs: Sequence[RunRecord]) -> list[Any]:
    """Return the table of what was trained, and every run's config.json."""
    configs = [
        Listing(f"{run.label}: config.json", (run.folder / "config.json").read_text().strip(), folded=True)
        for run in runs
        if not run.is_foreign
    ]
    return [_facts_table("What was trained, and where.", {run.label: _run_facts(run) for run in runs}), *configs]


def protocol_facts(run: RunRecord) -> dict[str, str]:
    """Return the protocol's fields in words; each attack is a field, under its title."""
    facts = {"classes": str(len(run.classes))}
    for name, value in run.protocol.items():
        if name not in ("attacks", "classes", "data_root"):
            facts[name.replace("_", " ")] = pixels(value) if name == "eps" else plain(value)
    settings = as_dict(run.protocol.get("attacks"))
    return facts | {attack_title(a): _attack_settings(as_dict(settings[a])) for a in run.results if a in settings}


def _attack_settings(settings: dict[str, Any]) -> str:
    if settings.get("steps") == 0:
        return "no attack"
    return ", ".join(f"{name} {pixels(value) if name == 'step' else plain(value)}" for name, value in settings.items())


OF_TRAINING = ("variant", "preset", "learning rate", "epochs", "training attack")


def _run_facts(run: RunRecord) -> dict[str, str]:
    if run.is_foreign:
        return {"folder": str(run.folder), "role": "from elsewhere", "network": plain(run.protocol.get("weights"))}
    config, recipe, teacher = run.config, run.recipe, as_dict(run.config.get("teacher"))
    role = f"teacher of {', '.join(run.taught)}" if run.taught else "trained without a teacher"
    start, evened, extra = (as_dict(config.get(what)) for what in ("start", "evened", "extra"))
    role = f"{start.get('path')}, evened by {evened.get('by')}" if evened else role
    seconds, speed = (
        [float(row[name]) for row in run.metrics if as_number(row.get(name)) >= 0]
        for name in ("seconds", "images_per_second")
    )
    return {
        "folder": str(run.folder),
        "recipe": f"{config.get('method')}:{config.get('setting')}",
        "role": f"taught by {teacher.get('model')} from {teacher.get('path')}" if teacher else role,
        "begins with": plain(start.get("path", "random weights")),
        "variant": plain(recipe.get("variant")),
        "preset": plain(recipe.get("preset", "paper")),
        "learning rate": f"{plain(recipe.get('lr'))}, by {plain(recipe.get('lr_schedule', 'steps'))}",
        "student": plain(recipe.get("student")),
        "extra images": f"{recipe.get('extra_fraction'):.0%} of each batch, from {extra.get('path')}"
        if extra
        else "none",
        "epochs": f"{len(run.metrics)} of {recipe.get('epochs', 'unknown')}",
        "training eps": pixels(recipe.get("eps")),
        "training attack": plain(recipe.get("attack", "pgd")),
        "seed": plain(config.get("seed")),
        "training time": f"{sum(seconds):,.0f} s" if seconds else "not recorded",
        "images per second, all told": f"{median(speed):,.0f}" if speed else "not recorded",
        **{name: plain(config.get(name)) for name in ("device", "commit", "versions", "started")},
        "teacher's digest": plain(teacher.get("sha256")) if teacher else "none",
        **(dict.fromkeys(OF_TRAINING, "none: not trained") if evened else {}),
    }


def _facts_table(caption: str, facts: dict[str, dict[str, str]]) -> Table:
    """Return a table of facts: first those in which the runs differ, then those that they share, in one cell each."""
    differing, same = [], []
    for name in dict.fromkeys(name for of_run in facts.values() for name in of_run):
        values = [of_run.get(name, "not recorded") for of_run in facts.values()]
        if len(set(values)) == 1:
            same.append([Cell(name), Cell(values[0], span=len(values))])
        else:
            differing.append([Cell(name), *map(Cell, values)])
    title = "the same for all runs" if len(facts) > 1 else ""
    return Table(caption, ["", *facts], [(t, rows) for t, rows in (("", differing), (title, same)) if rows])
