"""A report's blocks (text, tables, plots, listings), written as one self-contained HTML page or as Markdown.

Every text is escaped here and nowhere else.
"""

import base64
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple


class Cell(NamedTuple):
    text: str
    note: str = ""  # small, beside it
    detail: str = ""  # small, below
    strong: bool = False
    fill: float = 0.0  # a bar behind the number, as a part of the cell's width
    colour: str = ""  # a square before the text
    span: int = 1


class Table(NamedTuple):
    caption: str
    head: list[str]
    groups: list[tuple[str, list[list[Cell]]]]
    title: str = ""  # of the fold that it is put in
    opened: bool = True


class Plot(NamedTuple):
    stem: str
    caption: str
    alt: str
    wide: bytes
    narrow: bytes
    png: bytes


class Text(NamedTuple):
    text: str
    code: str = ""


class Listing(NamedTuple):
    title: str
    text: str


class Copy(NamedTuple):
    """Lines to be taken over as they are; a click selects them all."""

    caption: str
    text: str


class Section(NamedTuple):
    anchor: str
    title: str
    blocks: list[Any]


class Page(NamedTuple):
    title: str
    headline: str
    subline: str
    notes: list[Text]
    sections: list[Section]
    footer: str


CSS = """
:root{color-scheme:light;--ink:#1b1f24;--muted:#5b6470;--rule:#dde1e6;--soft:#f5f6f8;
 --mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:2.5rem 1.25rem 4rem;color:var(--ink);background:#fff;
 font:1rem/1.55 system-ui,-apple-system,"Segoe UI","Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
h1{font-size:1.05rem;font-weight:600;color:var(--muted);margin:0 0 .6rem}
h2{font-size:1.3rem;line-height:1.25;margin:3.2rem 0 .9rem;padding-top:1rem;border-top:2px solid var(--ink)}
.lead{font-size:clamp(1.3rem,2.6vw,1.75rem);line-height:1.32;font-weight:650;letter-spacing:-.01em;
 margin:0;max-width:52rem;text-wrap:balance}
.sub{color:var(--muted);margin:.8rem 0 0;max-width:46rem}
nav{margin:1.5rem 0 0;display:flex;flex-wrap:wrap;gap:.25rem 1.2rem;font-size:.92rem}
a{color:#00507c;text-underline-offset:.18em}
.notes{margin:1.6rem 0 0;padding:.8rem 1.1rem;border-left:4px solid #b0330f;background:var(--soft);font-size:.94rem}
.notes p{margin:.3rem 0}
code{font:.88em/1.5 var(--mono);background:#e4e8ec;padding:.1em .35em;border-radius:3px}
figure{margin:1.4rem 0 2rem;break-inside:avoid}
figcaption{font-size:.9rem;color:var(--muted);margin:0 0 .55rem;max-width:50rem}
img{display:block;max-width:100%;height:auto}
.scroll{overflow-x:auto;border-top:1.5px solid var(--ink);border-bottom:1.5px solid var(--ink)}
.tall{max-height:34rem;overflow-y:auto}
table{border-collapse:collapse;width:100%;font-size:.94rem;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
tbody:last-child tr:last-child>*{border-bottom:0}
thead th{font-size:.84rem;color:var(--muted);font-weight:600;white-space:nowrap;background:#fff;
 position:sticky;top:0;z-index:2}
th[scope=row]{font-weight:500;background:#fff;min-width:5.5rem;max-width:13rem;position:sticky;left:0;z-index:1}
th[scope=rowgroup]{background:var(--soft);font-size:.88rem}
small{color:var(--muted);font-size:.82rem;white-space:nowrap;margin-left:.3em}
small.below{display:block;margin:0}
small.long{white-space:normal;min-width:14rem}
.short{white-space:nowrap}
td.bar{background:linear-gradient(90deg,#e3eaf1 calc(100%*var(--v)),transparent 0) no-repeat}
.swatch{display:inline-block;width:.72em;height:.72em;margin-right:.5em;border:1px solid rgba(0,0,0,.35)}
details{margin:.6rem 0}
summary{cursor:pointer;font-weight:600}
details figure{margin-top:.6rem}
pre{overflow:auto;max-height:30rem;background:var(--soft);padding:.9rem 1.1rem;font:.84rem/1.5 var(--mono)}
.copy{user-select:all;-webkit-user-select:all;border-left:4px solid var(--rule)}
footer{margin-top:3.2rem;border-top:1px solid var(--rule);padding-top:1rem;font-size:.88rem;color:var(--muted)}
@media(max-width:640px){body{padding:1.5rem 1rem 3rem}th,td{padding:.4rem .3rem}h2{margin-top:2.4rem}
 th[scope=row]{min-width:0}table{font-size:.88rem}small{font-size:.7rem}}
@media print{body{max-width:none;padding:0;font-size:10.5pt}nav,.raw{display:none}h2{break-after:avoid}
 table{font-size:.8rem}th,td{padding:.3rem .4rem}th,td,small,thead th,.short{white-space:normal;overflow-wrap:anywhere}
 thead th{min-width:3.5rem}.tall,pre{max-height:none}pre{white-space:pre-wrap;overflow-wrap:anywhere}
 .scroll{overflow:visible}thead th,th[scope=row]{position:static}
 details::details-content{content-visibility:visible;block-size:auto}
 td.bar,.swatch,th[scope=rowgroup]{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def to_html(page: Page) -> str:
    title = escape(page.title)
    notes = "".join(f"<p>{_inline(note)}</p>" for note in page.notes)
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in page.sections)
    sections = "".join(
        f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>{"".join(map(_html_block, s.blocks))}</section>\n'
        for s in page.sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>\n'
        f'<body><main><header><h1>{title}</h1><p class="lead">{escape(page.headline)}</p>'
        f'<p class="sub">{escape(page.subline)}</p><nav aria-label="Sections">{links}</nav>'
        + (f'<div class="notes" role="note">{notes}</div>' if notes else "")
        + f"</header>\n{sections}</main><footer>{escape(page.footer)}</footer></body></html>\n"
    )


def _inline(text: Text) -> str:
    return escape(text.text) + (f" <code>{escape(text.code)}</code>" if text.code else "")


def _html_block(block: Any) -> str:
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Listing):
        return (
            f'<details class="raw"><summary>{escape(block.title)}</summary><pre>{escape(block.text)}</pre></details>\n'
        )
    if isinstance(block, Text):
        return f"<p>{_inline(block)}</p>\n"
    if isinstance(block, Copy):
        caption = escape(block.caption)
        return (
            f'<figure><figcaption>{caption}</figcaption><pre class="copy" tabindex="0" aria-label="{caption}">'
            f"{escape(block.text)}</pre></figure>\n"
        )
    wide, narrow = ("data:image/svg+xml;base64," + base64.b64encode(svg).decode() for svg in (block.wide, block.narrow))
    return (
        f"<figure><figcaption>{escape(block.caption)}</figcaption><picture>"
        f'<source media="(max-width: 640px)" srcset="{narrow}"><img src="{wide}" alt="{escape(block.alt)}">'
        f"</picture></figure>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in table.head)
    bodies = []
    for title, rows in table.groups:
        heading = f'<tr><th scope="rowgroup" colspan="{len(table.head)}">{escape(title)}</th></tr>' if title else ""
        bodies.append("<tbody>" + heading + "".join(f"<tr>{_html_row(row)}</tr>" for row in rows) + "</tbody>")
    tall = " tall" if sum(len(rows) for _, rows in table.groups) > 30 else ""
    figure = (
        f'<figure><figcaption>{escape(table.caption)}</figcaption><div class="scroll{tall}" tabindex="0" role="region" '
        f'aria-label="{escape(table.caption)}"><table><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div></figure>\n'
    )
    opened = " open" if table.opened else ""
    return f"<details{opened}><summary>{escape(table.title)}</summary>{figure}</details>" if table.title else figure


def _html_row(row: Sequence[Cell]) -> str:
    out = []
    for i, cell in enumerate(row):
        text = f"<b>{escape(cell.text)}</b>" if cell.strong else escape(cell.text)
        if cell.colour:
            text = f'<span class="swatch" style="background:{cell.colour}"></span>{text}'
        text += f" <small>{escape(cell.note)}</small>" * bool(cell.note)
        kind = "below long" if len(cell.detail) > 30 else "below"
        text += f'<small class="{kind}">{escape(cell.detail)}</small>' * bool(cell.detail)
        span = f' colspan="{cell.span}"' if cell.span > 1 else ""
        fill = f' class="bar" style="--v:{cell.fill:.3f}"' if cell.fill else ""
        short = ' class="short"' * (len(cell.text) < 18)
        out.append(f'<th scope="row"{short}>{text}</th>' if i == 0 else f"<td{span}{fill}>{text}</td>")
    return "".join(out)


def to_markdown(page: Page) -> str:
    lines = [f"# {_plain(page.title)}", "", f"**{_plain(page.headline)}** {_plain(page.subline)}", ""]
    lines += [f"> {_plain(note.text)}{_code(note.code)}\n>" for note in page.notes]
    for section in page.sections:
        lines += ["", f"## {_plain(section.title)}", ""]
        for block in section.blocks:
            lines += [*_markdown_block(block), ""]
    return "\n".join([*lines, _plain(page.footer), ""])


def _markdown_block(block: Any) -> list[str]:
    if isinstance(block, Plot):
        return [f"![{_plain(block.alt)}]({block.stem}.png)", "", _plain(block.caption)]
    if isinstance(block, Listing):
        return []  # the page has it, and so has the run's folder
    if isinstance(block, Text):
        return [_plain(block.text) + _code(block.code)]
    if isinstance(block, Copy):
        return [_plain(block.caption), "", *(f"    {line}" for line in block.text.splitlines())]
    rows = [block.head, ["---"] * len(block.head)]
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    for title, cells in block.groups:
        if title:
            lines.append(f"| **{_plain(title)}** |" + " |" * (len(block.head) - 1))
        lines += ["| " + " | ".join(text for cell in row for text in _markdown_cell(cell)) + " |" for row in cells]
    return [_plain(block.caption), "", *lines]


def _markdown_cell(cell: Cell) -> list[str]:
    text = f"**{_plain(cell.text)}**" if cell.strong else _plain(cell.text)
    details = "; ".join(filter(None, (cell.note, cell.detail)))
    return [text + (f" ({_plain(details)})" if details else ""), *[""] * (cell.span - 1)]


def _plain(text: str) -> str:
    """Text that stays text: no markup, no table cell, no line of its own."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    return f" `` {' '.join(text.split())} ``" if text else ""
