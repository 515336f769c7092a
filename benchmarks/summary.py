"""Parts that the scripts of this folder share: argument parser, table, mean with range, and the JSON of results."""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retemper.engine.device import device_name
from retemper.engine.evaluation.compare import Difference
from retemper.errors import UsageError
from retemper.files import write_atomically
from retemper.options import shown_value
from retemper.provenance import commit, versions


def words_of(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser of arguments whose help is the script's docstring."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown, a line a row, with a line break at its end."""
    lines = [f"| {' | '.join(str(cell) for cell in line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])


def mean_and_range(values: Sequence[float], form: str = ".1%") -> str:
    """Return the mean over the seeds, and of several seeds the lowest and the highest, all in one format."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def told(of: Difference) -> str:
    """Return a difference in hundredths with its two intervals, in words."""

    def points(ends: Sequence[float]) -> str:
        return " to ".join(f"{100 * end:+.1f}" for end in ends)

    seeds = "" if of.seeds is None else f"; seeds {points(of.seeds)}"
    return f"{100 * of.difference:+.1f} (images {points(of.images)}{seeds})"


def common_radius(evaluations: Iterable[Mapping[str, Any]]) -> str:
    """Return the radius that the networks of one table were evaluated at, as one types it.

    Args:
        evaluations: the content of each evaluation.json.
    Raises:
        UsageError: they are several.
    """
    found: dict[str, list[str]] = {}
    for protocol in (one["protocol"] for one in evaluations):
        found.setdefault(shown_value(protocol["eps"]), []).append(protocol.get("network", protocol.get("weights")))
    if len(found) > 1:
        radii = "; ".join(f"eps {eps}: {', '.join(map(str, names))}" for eps, names in found.items())
        raise UsageError(f"one table is of one radius, these are of {len(found)} ({radii}): evaluate them anew at one")
    return next(iter(found))


def write_summary(path: Path | None, content: dict[str, Any], device: torch.device) -> None:
    """Write the figures as JSON, with the versions, commit and device that they are from; nothing without a path."""
    if path is None:
        return
    content = content | {"versions": versions(), "commit": commit(), "device": device_name(device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
