"""Published numbers, read from a CSV file to be set beside one's own.

    method,network,data,clean,pgd20,autoattack,worst,nsd,source[,eps]

`clean`, `pgd20` and `autoattack` are averages in %, `worst` is the worst class under AutoAttack in %, `nsd` is under
AutoAttack too and no percentage. An empty cell is a number that was not published. `source` says where the row was
read, `data` is the data set's name as `retemper` has it, `eps` the radius (8/255), by default the data set's usual one.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from retemper.errors import DataError
from retemper.loaders import usual_eps
from retemper.options import parse_value

TEXTS, NUMBERS = ("method", "network", "data", "source"), ("clean", "pgd20", "autoattack", "worst", "nsd")


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row. Accuracies are fractions; None was not published."""

    method: str
    network: str
    data: str
    source: str
    eps: float
    clean: float | None
    pgd20: float | None
    autoattack: float | None
    worst: float | None
    nsd: float | None


def read_published(path: str | Path) -> list[Published]:
    """Return the rows of a file of published numbers.

    Raises:
        DataError: it cannot be read, lacks a column or has an unknown one, or a row does not say what it must; the
            message names the line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            _require_columns(path, list(reader.fieldnames or ()))
            rows = [_row(path, reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file in UTF-8 ({error})") from None
    if not rows:
        raise DataError(
            f"{path} holds no row: it needs one a method under {','.join((*TEXTS[:3], *NUMBERS, 'source'))}"
        )
    return rows


def _require_columns(path: str | Path, columns: list[str]) -> None:
    known = (*TEXTS, *NUMBERS, "eps")
    lacking = [name for name in known[:-1] if name not in columns]
    unknown = [str(name) for name in columns if name not in known or columns.count(name) > 1]
    if lacking or unknown:
        wrong = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(unknown)}"
        raise DataError(
            f"{path} {wrong}: its columns are {','.join((*TEXTS[:3], *NUMBERS, 'source'))}, and eps if need be"
        )


def _row(path: str | Path, line: int, row: dict[str, str | None]) -> Published:
    where = f"{path}, line {line}"
    if None in row or None in row.values():
        raise DataError(f"{where}: it has not as many cells as the first line has columns")
    text = {name: (cell or "").strip() for name, cell in row.items()}
    for name in TEXTS:
        if not text[name]:
            raise DataError(f"{where}: {name} is empty")
    values = {name: _number(where, name, text[name]) for name in NUMBERS}
    if all(value is None for value in values.values()):
        raise DataError(f"{where}: it holds no number")
    try:
        eps = parse_value(float, text["eps"]) if text.get("eps") else usual_eps(text["data"])
    except ValueError as error:
        raise DataError(f"{where}: eps is {text['eps']!r}: {error}") from None
    if not 0 <= eps <= 1:
        raise DataError(f"{where}: eps is {text['eps']}: write it in [0, 1] pixels, 8/255 not 8")
    method, network, data, source = (text[name] for name in TEXTS)
    return Published(method=method, network=network, data=data, source=source, eps=eps, **values)


def _number(where: str, name: str, text: str) -> float | None:
    """Return a cell's number: an accuracy as a fraction, an NSD as it is; None for an empty cell."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where}: {name} is {text!r}, no number") from None
    most = 10 if name == "nsd" else 100
    if not 0 <= value <= most:
        raise DataError(
            f"{where}: {name} is {text}: {'it is no percentage' if name == 'nsd' else 'write it in %'}, 0 to {most}"
        )
    return value if name == "nsd" else value / 100
