"""The result of a benchmark: a JSON file with all that a reader needs to judge it, and a table for the terminal."""

import json
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from retemper.bench.case import Request
from retemper.engine.device import device_name
from retemper.files import write_atomically
from retemper.provenance import clocks, commit, driver, uncommitted_changes, versions

Row = dict[str, Any]

COLUMNS = (  # of every row in the JSON; None where a thing was not, or cannot be, measured
    *("table", "name", "exactness", "precision", "reason", "clock", "start_up_s", "rounds", "calls_a_round"),
    *("ms", "round_ms", "host_ms", "kernel_ms", "ratio_to", "ratio"),
    *("images_per_s", "tflop_per_s", "gb_per_s", "bound_ms", "share_of_bound"),
    *("launches", "launches_kind", "peak_mb", "added_mb"),
)
PACKAGES = ("numpy", "torchattacks", "foolbox", "liger-kernel", "torchvision", "ffcv")


def header(request: Request) -> dict[str, Any]:
    """Return a result without rows: the command, the device, the versions and the date."""
    return {
        "what": request.what,
        "command": request.command,
        "device": device_name(request.device),
        "driver": driver() if request.on_gpu else None,
        "clocks": clocks() if request.on_gpu else None,
        "versions": versions() | {name: found for name in PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda,
        "commit": commit(),
        "uncommitted_changes": uncommitted_changes(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rounds": request.rounds,
        "checked": request.checked,
        "complete": False,
        "rates": {},
        "rows": [],
        "notes": [],
    }


def begun(path: str | Path, request: Request) -> dict[str, Any] | None:
    """Return the result in a file if the same request was cut short there, of the same code on the same device."""
    if not Path(path).is_file():
        return None
    found, wanted = json.loads(Path(path).read_text()), header(request)
    same = ("what", "command", "device", "commit", "uncommitted_changes", "checked")
    return found if not found["complete"] and all(found[key] == wanted[key] for key in same) else None


def save(path: str | Path, result: dict[str, Any]) -> None:
    """Write the JSON, atomically; a row of the result is a line of the file."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1, allow_nan=False)
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in result["rows"])
    write_atomically(path, f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'.encode())


def as_table(rows: list[Row]) -> str:
    """Return the rows of one case, aligned, without empty columns; a reason stands in the place of the times."""
    first = rows[0]
    operations = first["ms"] is not None and "operations" in str(first["launches_kind"])
    optional: dict[str, Callable[[Row], str]] = {
        "host ms": lambda row: _number((row["host_ms"] or {}).get("median")),
        "kernels ms": lambda row: _number(row["kernel_ms"]),
        "images/s": lambda row: _number(row["images_per_s"]),
        "TFLOP/s": lambda row: _number(row["tflop_per_s"]),
        "GB/s": lambda row: _number(row["gb_per_s"]),
        "of bound": lambda row: "" if row["share_of_bound"] is None else f"{row['share_of_bound']:.0%}",
        "torch ops" if operations else "launches": lambda row: _number(row["launches"]),
        "added MB": lambda row: _number(row["added_mb"]),
        "start-up s": lambda row: _number(row["start_up_s"]),
    }
    columns = [[first["table"], *(row["name"] for row in rows)]]
    for key in ("ms", "ratio"):
        for part, title in (("median", key), ("p10", "p10"), ("p90", "p90")):
            columns.append([title, *(_number((row[key] or {}).get(part)) for row in rows)])
    said = {title: [show(row) for row in rows] for title, show in optional.items()}
    columns += [[title, *cells] for title, cells in said.items() if any(cells)]
    padded = [[f"{cell:>{max(map(len, column))}}" for cell in column] for column in columns]
    padded[0] = [f"{cell:<{max(map(len, columns[0]))}}" for cell in columns[0]]
    lines = [
        "  ".join(cells) for cells in zip(*padded, ["exactness", *(row["exactness"] for row in rows)], strict=True)
    ]
    for number, row in enumerate(rows, start=1):
        if row["reason"] is not None:
            lines[number] = f"{padded[0][number]}  no time: {row['reason']}"
    return "\n".join(lines)


def as_text(result: dict[str, Any]) -> str:
    """Return the device, its rates and the notes, for the terminal."""
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


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
