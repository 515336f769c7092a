"""What a benchmark leaves: a JSON with all that a reader needs to judge it, and a table for the terminal."""

import json
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from retemper.engine.device import device_name
from retemper.files import write_atomically
from retemper.provenance import commit, driver, uncommitted_changes, versions

COLUMNS = (  # of every row in the JSON; None where a thing was not, or cannot be, measured
    *("table", "name", "exactness", "precision", "reason", "start_up_s", "rounds", "calls_a_round"),
    *("ms", "round_ms", "host_ms", "kernel_ms", "ratio_to", "ratio"),
    *("images_per_s", "tflop_per_s", "gb_per_s", "bound_ms", "share_of_bound"),
    *("launches", "launches_kind", "peak_mb", "added_mb"),
)
PACKAGES = ("numpy", "torchattacks", "foolbox", "liger-kernel", "torchvision", "ffcv")


def header(what: str, device: torch.device, command: str, rounds: int) -> dict[str, Any]:
    """What the rows were measured on, with and when."""
    return {
        "what": what,
        "command": command,
        "device": device_name(device),
        "driver": driver() if device.type == "cuda" else None,
        "versions": versions() | {name: found for name in PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda,
        "commit": commit(),
        "uncommitted_changes": uncommitted_changes(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rounds": rounds,
        "complete": False,
        "rates": {},
        "rows": [],
        "notes": [],
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON, atomically; a row of the result is a line of the file."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1, allow_nan=False)
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in result["rows"])
    write_atomically(path, f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'.encode())


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows of one race, aligned; only columns that say something."""
    first = rows[0]
    head = [first["table"], "ms", "p10", "p90", "ratio", "p10", "p90"]
    cells = [[row["name"], *_three(row["ms"]), *_three(row["ratio"], "median p10 p90")] for row in rows]
    for title, show in (
        ("host ms", lambda row: _number((row["host_ms"] or {}).get("median"))),
        ("kernels ms", lambda row: _number(row["kernel_ms"])),
        ("images/s", lambda row: _number(row["images_per_s"])),
        ("TFLOP/s", lambda row: _number(row["tflop_per_s"])),
        ("GB/s", lambda row: _number(row["gb_per_s"])),
        ("of bound", lambda row: "" if row["share_of_bound"] is None else f"{row['share_of_bound']:.0%}"),
        ("launches" if first["ms"] is None or "operations" not in str(first["launches_kind"]) else "torch ops",
         lambda row: _number(row["launches"])),
        ("added MB", lambda row: _number(row["added_mb"])),
        ("start-up s", lambda row: _number(row["start_up_s"])),
    ):  # fmt: skip
        column = [show(row) for row in rows]
        if any(column):
            head.append(title)
            for line, cell in zip(cells, column, strict=True):
                line.append(cell)
    head.append("exactness")
    for line, row in zip(cells, rows, strict=True):
        line.append(row["exactness"])
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = [_line(head, widths)]
    for row, line in zip(rows, cells, strict=True):
        lines.append(
            _line(line, widths) if row["reason"] is None else f"{line[0]:{widths[0]}}  no time: {row['reason']}"
        )
    return "\n".join(lines)


def as_text(result: dict[str, Any]) -> str:
    """The result's first lines."""
    rates = result["rates"]
    lines = [
        f"{result['what']} on {result['device']}: medians of up to {result['rounds']} rounds, ratios to first rows"
    ]
    if rates.get("copy_gb_per_s"):
        lines.append(f"a large copy: {rates['copy_gb_per_s']:.3g} GB/s")
    lines += [
        f"a large matrix product, {name}: {rate:.3g} TFLOP/s"
        for name, rate in rates.get("matmul_tflop_per_s", {}).items()
    ]
    return "\n".join([*lines, *result["notes"]])


def _line(cells: list[str], widths: list[int]) -> str:
    first, *rest = (
        f"{cell:{'<' if i in (0, len(cells) - 1) else '>'}{width}}"
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def _three(values: dict[str, float] | None, keys: str = "median p10 p90") -> list[str]:
    return [_number(values[key]) if values else "" for key in keys.split()]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
