"""The table of launches by phase, with what the model makes of them, as docs/speed.md shows it."""

from pathlib import Path
from typing import Any

from dry_run.environment import ROOT

RESULT = ROOT / "benchmarks/results/dry_run/launches.md"
PHASES = ("augment", "fold", "teacher", "attack", "train", "rest")
GOALS = {"ResNet-18, teacher known": 12.0, "MobileNetV2, teacher known": 16.0}  # milliseconds on one H200
HEAD = ("step, batch 128, bf16", *PHASES, "launches in all (counted)", "MB (counted)", "ms (modelled)", "goal, ms")


def line(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def row(name: str, found: dict[str, Any]) -> str:
    """Return the line of a setting. The model's two numbers are with its usual and with its careful efficiencies."""
    launches = found["launches"]
    model, careful = (sum(found[what].values()) for what in ("model", "careful model"))
    cells = [launches.get(phase, 0) for phase in PHASES]
    total, size = sum(launches.values()), sum(found["megabytes"].values())
    return line(name, *cells, f"{total:,}", f"{size:,}", f"{model:.1f} to {careful:.1f}", GOALS.get(name, ""))


def methods(found: dict[str, Any]) -> list[str]:
    """Return the lines of a second table: the launches of each method's step on ResNet-18."""
    rows = [line(f"`{name}`", f"{one['launches']:,}") for name, one in sorted(found.items())]
    return ["", line("method, ResNet-18, batch 128", "launches (counted)"), line("---", "---"), *rows]


def write_table(found: dict[str, Any], path: Path = RESULT) -> Path:
    """Write both tables, and return where."""
    rows = [line(*HEAD), line(*["---"] * len(HEAD)), *(row(name, one) for name, one in found["settings"].items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*rows, *methods(found["methods"]), ""]))
    return path
