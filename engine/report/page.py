"""The blocks that a report is made of, and how they become one self-contained HTML page or Markdown.

The templates beside this module say how each kind of block is written. All texts are escaped there.
"""

import base64
import re
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from retemper.templates import render


class Cell(NamedTuple):
    text: str
    note: str = ""  # small, beside the text
    detail: str = ""  # small, below the text
    strong: bool = False
    fill: float = 0.0  # a bar behind the number, as a part of the cell's width
    colour: str = ""  # of a square before the text
    span: int = 1  # columns


class Table(NamedTuple):
    caption: str
    head: list[str]
    groups: list[tuple[str, list[list[Cell]]]]  # heading, rows
    title: str = ""  # a table with a title can be folded away
    opened: bool = True


class Plot(NamedTuple):
    stem: str  # of the PNG file's name
    caption: str
    alt: str
    wide: bytes
    narrow: bytes
    png: bytes


class Text(NamedTuple):
    text: str
    code: str = ""


class Listing(NamedTuple):
    """Lines shown as they are, to be copied; those that are `folded` away are on the HTML page alone."""

    caption: str
    text: str
    folded: bool = False


class Section(NamedTuple):
    anchor: str
    title: str
    blocks: list[Any]


def write_page(template: str, **page: Any) -> str:
    """Fill in report.html.jinja, which loads nothing, or report.md.jinja, whose figures are the PNG files beside it.

    Args:
        page: title, headline, subline, notes, sections, footer.
    """
    filters = {
        "kind": lambda block: type(block).__name__,
        "data_uri": _data_uri,
        "plain": _plain,
        "code": _code,
        "together": _together,
    }
    return render(Path(__file__).parent, template, filters | {"cell": _markdown_cell}, **page)


def _together(text: str) -> str:
    """Keep a number and its percent sign, or its bound, on one line."""
    return re.sub(r"(?<=\d) (?=%)|(?<=≤) (?=\d)", "\u00a0", text)


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _markdown_cell(cell: Cell) -> str:
    text = f"**{_plain(cell.text)}**" if cell.strong else _plain(cell.text)
    details = "; ".join(filter(None, (cell.note, *cell.detail.splitlines())))
    return text + (f" ({_plain(details)})" if details else "") + " | " * (cell.span - 1)


def _plain(text: str) -> str:
    """Escape text so that Markdown takes nothing in it for markup, a table cell or a new line."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    return f" `` {' '.join(text.split())} ``" if text else ""
