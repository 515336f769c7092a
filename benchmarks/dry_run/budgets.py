"""What a step may cost. The budgets stand in one file, and may only fall.

Numbers are told apart by the path that leads to them: `settings/ResNet-18/launches/attack`. A check compares what was
counted with the budget of the same path. Counts are the same in every run of the same versions. The ratios under
`HOST` are of times of the host, so that a budget leaves room for what a busy machine adds.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("budgets.json")
HOST = "host"
ROOM = 1.25  # a new budget of a ratio, as a multiple of what was measured


@dataclass(frozen=True)
class Verdict:
    """What a check found: a line for each number above its budget, for each below, and for each on one side alone."""

    above: list[str]
    below: list[str]
    unmatched: list[str]

    @property
    def passes(self) -> bool:
        return not self.above and not self.unmatched


def flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of nested mappings, with its path."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{name}/")
        else:
            yield path + name, value


def nested(numbers: Mapping[str, float]) -> dict[str, Any]:
    """Return nested mappings of numbers given by their paths: the opposite of `flat`."""
    tree: dict[str, Any] = {}
    for path, number in numbers.items():
        *names, last = path.split("/")
        branch = tree
        for name in names:
            branch = branch.setdefault(name, {})
        branch[last] = number
    return tree


def wanted(path: str, counted: float) -> float:
    """Return the budget that fits what was counted."""
    return ceil(counted * ROOM * 10) / 10 if path.startswith(f"{HOST}/") else counted


def check(budgets: Mapping[str, Any], counted: Mapping[str, Any]) -> Verdict:
    """Compare what was counted with the budgets. A part that was not counted at all is left alone."""
    allowed, found = dict(flat(budgets)), dict(flat(counted))
    parts = {path.partition("/")[0] for path in found}
    above, below, unmatched = [], [], []
    for path, budget in allowed.items():
        if path not in found:
            if path.partition("/")[0] in parts:
                unmatched.append(f"{path}: was not counted, its budget is {budget:g}: take it out of {FILE.name}")
        elif found[path] > budget:
            above.append(f"{path}: {found[path]:g}, the budget is {budget:g}")
        elif (new := wanted(path, found[path])) < budget:
            below.append(f"{path}: {found[path]:g}, the budget is {budget:g}: lower it to {new:g}")
    unmatched += [
        f"{path}: {found[path]:g}, and has no budget: `lower` gives it one" for path in found.keys() - allowed
    ]
    return Verdict(above, below, sorted(unmatched))


def lowered(budgets: Mapping[str, Any], counted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the budgets, each no higher than before; what had none gets the one that fits."""
    numbers = dict(flat(budgets))
    for path, number in flat(counted):
        new = wanted(path, number)
        numbers[path] = min(numbers.get(path, new), new)
    return nested(numbers)


def load(path: Path = FILE) -> dict[str, Any]:
    """Return the budgets of a file."""
    return json.loads(path.read_text())


def save(budgets: Mapping[str, Any], path: Path = FILE) -> None:
    path.write_text(json.dumps(budgets, indent=1) + "\n")
