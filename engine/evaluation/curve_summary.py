"""The lines of a curve for the terminal, and those of what the cross-checks found."""

from typing import Any

from retemper.engine.evaluation.norms import TITLES
from retemper.options import shown_value


def curve_summary(content: dict[str, Any]) -> str:
    """Return a table of curve.json for the terminal, a line an attack and radius, with 95 % intervals."""
    protocol, notes = content["protocol"], []
    wide = max([16, *(len(name) + 2 for name in content["attacks"])])
    lines = [f"{'':{wide}}{'eps':>10}{'average':>10}{'':18}{'worst':>10}{'':18}class"]
    for name, attack in content["attacks"].items():
        for number, entry in enumerate(attack["radii"]):
            lines.append(_line("" if number else name, entry, protocol["classes"], wide))
        flags = dict.fromkeys(flag for entry in attack["radii"] for flag in entry.get("flags", ()))
        notes += [f"{name}: {flag}" for flag in flags]
        images = sum(attack["radii"][0]["count"]) if attack["radii"] else protocol["images"]
        if images < protocol["images"]:
            notes.append(f"{name}: on the first {images} of the images")
        if any(entry.get("complete") is False for entry in attack["radii"]):
            notes.append(f"{name} was interrupted: these are upper bounds, and the same command goes on")
    images = f"{protocol['images']} {protocol['split']} images, {TITLES[protocol['norm']]}, fp32"
    lines.append(f"{images}; at each radius the images that held at the smaller ones are attacked")
    return "\n".join(lines + notes)


def _line(name: str, entry: dict[str, Any], classes: list[str], wide: int) -> str:
    """Return the line of one radius."""
    bound = "<= " if entry.get("upper_bound") else ""
    cells = f"{name:{wide}}{shown_value(entry['eps']):>10}"
    for summary in ("average", "worst"):
        value, ends = entry[summary], entry["interval"][summary]
        shown = "-" if value is None else f"{bound}{value:.1%}"
        between = "" if None in ends else f" [{ends[0]:.1%}, {ends[1]:.1%}]"
        cells += f"{shown:>10}{between:18}"
    return cells + (classes[entry["worst_class"]] if entry["worst_class"] >= 0 else "-")


def beaten_lines(content: dict[str, Any]) -> list[str]:
    """Return in words how many images the cross-checks broke where AutoAttack had not, a line a radius."""
    found = content["attacks"].get("cross-check")
    if found is None:
        return []
    entries = found["radii"] if "radii" in found else [{"eps": content["protocol"]["eps"]} | found]
    classes, lines = content["protocol"]["classes"], []
    for entry in entries:
        parts = [beaten_text(name, one, classes) for name, one in entry.get("beats_autoattack", {}).items()]
        told = "; ".join(part for part in parts if part) or "none of them beats AutoAttack"
        lines.append(f"cross-checks at eps {shown_value(entry['eps'])}: {told}")
    return lines


def beaten_text(attack: str, one: dict[str, Any], classes: list[str]) -> str:
    """Return in words how many images an attack broke where AutoAttack had not; "" for none."""
    of_class = ", ".join(f"{name}: {n}" for name, n in zip(classes, one["by_class"], strict=False) if n)
    images = f"{one['images']} image{'s' * (one['images'] != 1)}"
    return f"{attack} beats AutoAttack on {images} ({of_class})" if one["images"] else ""
