"""The head of a report: what its numbers say in two sentences, and what must be known before believing them."""

import math
from collections.abc import Sequence

from retemper.engine.class_report import Result
from retemper.engine.report.page import Text
from retemper.engine.report.read import as_number, attack_title
from retemper.engine.report.run_set import RunSet
from retemper.engine.report.trust import check_warnings
from retemper.engine.report.words import at_most, ball, called, percent

FEW_IMAGES = 100  # in a class: the 95 % interval at 50 % is then 19 points wide
Subjects = Sequence[tuple[str, Result]]


def headline(runs: RunSet) -> str:
    """Return a sentence on the weakest class of every run, and one on how evenly accuracies are spread over classes."""
    subjects = _subjects(runs)
    if not subjects:
        return "None of these runs has been evaluated yet."
    where = "On clean images" if runs.reference == "clean" else f"Under {attack_title(runs.reference)}"
    weakest = [(name, runs.weakest(r), r.report.worst, at_most(r) + percent(r.report.worst)) for name, r in subjects]
    if len(subjects) > 4:
        low, high = (pick(weakest, key=lambda w: w[2]) for pick in (min, max))
        text = f"the weakest class of {len(subjects)} runs lies between {low[3]} ({low[0]}, {called(low[1])})"
        text += f" and {high[3]} ({high[0]}, {called(high[1])})"
    else:
        said = ["'s weakest class is"] + ["'s is"] * (len(subjects) - 1)
        text = "; ".join(f"{w[0]}{verb} {w[1]} at {w[3]}" for verb, w in zip(said, weakest, strict=True))
    return f"{where}, {text}. {_nsd_sentence(subjects)}"


def subline(runs: RunSet) -> str:
    """Return a sentence with the averages, and one on whether the intervals of the weakest classes overlap."""
    subjects = _subjects(runs)
    if not subjects:
        return ""
    averages = [(name, at_most(r) + percent(r.report.average)) for name, r in subjects]
    if len(subjects) == 1:
        return f"Its average over all images is {averages[0][1]}."
    low, high = (pick(subjects, key=lambda s: s[1].report.worst)[1] for pick in (min, max))
    overlap = "overlap: only more test images can settle it"
    if low.interval["worst"][1] < high.interval["worst"][0]:
        overlap = "do not overlap"
    whose = "their" if len(subjects) == 2 else "the lowest and highest"
    text = f"Averages over all images: {', '.join(map(' '.join, averages))}."
    return f"{text} The 95 % intervals of {whose} weakest classes {overlap}."


def warnings(runs: RunSet) -> list[Text]:
    """Return what keeps numbers from being compared or believed, and what is missing in the runs' folders."""
    out = []
    if runs.differing:
        what = "; ".join(f"{name} ({', '.join(values)})" for name, values in runs.differing.items())
        out.append(Text(f"These runs were evaluated under different protocols, do not compare them: {what}."))
    if runs.undrawn:
        some = ", ".join(f"{name} ({drawn})" for name, drawn in list(runs.undrawn.items())[:3])
        text = (
            f"No font on this machine has the letters of {some}{' and others' * (len(runs.undrawn) > 3)}: figures show "
        )
        out.append(
            Text(f"{text}numbers instead. Install one (Noto has fonts for all scripts) and make the report again.")
        )
    for run in runs.comparable:
        if runs.reference not in run.results:
            text = f"{run.label} was not evaluated under {attack_title(runs.reference)}, which the headline is about."
            out.append(Text(f"{text} To do it:", run.evaluate_by(runs.reference)))
    for run in runs.elsewhere:
        was, here = ball(run.protocol.get("eps"), run.norm), ball(runs.eps, runs.norm)
        text = (
            f"{run.label} was evaluated at eps {was}, the others at {here}: it has lines of its own in the summary, and"
        )
        out.append(
            Text(f"{text} is left out of all else. To evaluate it at {here}:", run.evaluate_at(runs.eps, runs.norm))
        )
    for run in runs.evaluated:
        if run.classes != runs.classes:
            out.append(Text(f"{run.label} has other classes: it is left out of the tables and figures by class."))
    counts = [n for run in runs.comparable for r in run.results.values() for n in r.report.count if n]
    if counts and min(counts) < FEW_IMAGES:
        width = 196 / math.sqrt(min(counts) + 1.96**2)  # of Wilson's interval at 50 %, in points
        text = f"Few test images: {min(counts)} in the smallest class."
        out.append(Text(f"{text} At 50 % a class's 95 % interval is {width:.0f} points wide."))
    for run in runs.runs:
        lost = sum("loss" in row and not math.isfinite(as_number(row["loss"])) for row in run.metrics)
        if lost:
            out.append(Text(f"{run.label}: the loss of {lost} of {len(run.metrics)} epochs is not a number."))
        if run.recipe.get("select_on") == "test":
            out.append(Text(f"{run.label} chose its best epoch on the test images: its numbers flatter it."))
        out += [*check_warnings(run), *(Text(f"{run.label}: {note.text}", note.code) for note in run.notes)]
    return out


def _subjects(runs: RunSet) -> Subjects:
    """Return the students' results under the reference attack, or those of all runs where there is no student."""
    results = runs.results(runs.reference)
    students = [run.label for run in runs.comparable if not run.is_teacher]
    return [(name, r) for name, r in results.items() if name in students] or list(results.items())


def _nsd_sentence(subjects: Subjects) -> str:
    values = [(name, f"{r.report.nsd:.2f}", r.report.nsd) for name, r in subjects if math.isfinite(r.report.nsd)]
    if not values:
        return ""
    if len(values) == 1:
        return f"NSD is {values[0][1]}" + (f" for {values[0][0]}." if len(subjects) > 1 else ".")
    if len(values) == 2:
        (_, before, a), (_, after, b) = values
        change = f"{'falls' if b < a else 'rises'} from {before} to {after}"
        return f"NSD {change}." if before != after else f"NSD stays at {before}."
    low, high = (pick(values, key=lambda v: v[2]) for pick in (min, max))
    return f"NSD is lowest for {low[0]} ({low[1]}), highest for {high[0]} ({high[1]})."
