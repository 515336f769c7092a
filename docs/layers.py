"""The picture and the table of docs/architecture.md, made from the imports in the code.

    python docs/layers.py            rewrite docs/images/layers.svg and the table in docs/architecture.md
    python docs/layers.py --check    say whether they are up to date: exit status 1 if not

The parts and their order are those of the import contract in pyproject.toml, the arrows are the imports of the code. An
import that a path of other arrows implies is left out of the picture, and so is one of the common ground, which
everything may import; one that runs upwards is drawn in red. Needs import-linter, which the extra `dev` brings.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import grimp
from importlinter.api import read_configuration

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs/architecture.md", ROOT / "docs/images/layers.svg"
BEGIN, END = "<!-- layers: python docs/layers.py -->", "<!-- /layers -->"
COLOURS = {"engine": "#dbeafe", "recipes": "#fef3c7", "kernels": "#dcfce7", "loaders": "#dcfce7", "bench": "#fae8ff"}
GROUND_COLOUR = "#e5e7eb"
WIDTH, ROW, BOX_HEIGHT, LETTER, GAP = 760, 58, 28, 8.2, 26  # pixels
ASIDE = 80  # by so many pixels short rows stand left and right of the middle, so that an arrow passes beside them


@dataclass(frozen=True)
class House:
    """The parts of the package, from the top layer to the bottom one, and what each imports.

    Attributes:
        layers: the parts of each layer, by their names without "retemper.".
        imports: for each part, the other parts that it imports.
    """

    layers: tuple[tuple[str, ...], ...]
    imports: dict[str, set[str]] = field(repr=False)

    def depth(self, part: str) -> int:
        """The number of layers above that of `part`."""
        return next(depth for depth, parts in enumerate(self.layers) if part in parts)

    def below(self, part: str) -> set[str]:
        """The imports of `part` that run downwards."""
        return {other for other in self.imports[part] if self.depth(other) > self.depth(part)}

    def reached(self, part: str) -> set[str]:
        """What `part` reaches downwards, in one import or more."""
        return self.below(part).union(*(self.reached(other) for other in self.below(part)))


def read_house() -> House:
    """Read the layers from pyproject.toml and the imports from the code."""
    graph = grimp.build_graph("retemper", cache_dir=None)
    (contract,) = [
        one for one in read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"] if one["type"] == "layers"
    ]
    there = graph.modules
    rows = [re.findall(r"[\w.]+", line) for line in contract["layers"]]
    layers = [tuple(name.removeprefix("retemper.") for name in row if name in there) for row in rows]
    parts = [part for row in layers for part in row]
    imports: dict[str, set[str]] = {part: set() for part in parts}
    for module in there:
        for imported in graph.find_modules_directly_imported_by(module):
            # what the engine's __init__ offers is imported from the modules that it comes from
            offered = graph.find_modules_directly_imported_by(imported) if imported == "retemper.engine" else {imported}
            if (source := _part_of(module, parts)) is not None:
                imports[source] |= {other for name in offered if (other := _part_of(name, parts)) not in (None, source)}
    return House(tuple(row for row in layers if row), imports)


def _part_of(module: str, parts: list[str]) -> str | None:
    """The part that a module belongs to; None for the two `__init__` above the parts."""
    name = module.removeprefix("retemper.")
    return next((part for part in parts if name == part or name.startswith(part + ".")), None)


def table(house: House) -> str:
    """The parts of each layer and what they import, as a table in Markdown."""
    lines = ["| part | imports |", "|---|---|"]
    for part in (part for row in house.layers for part in row):
        imports = sorted(house.imports[part], key=lambda other: (house.depth(other), other))
        lines.append(f"| `{part}` | {', '.join(f'`{other}`' for other in imports)} |")
    return "\n".join(lines)


def picture(house: House) -> str:
    """The parts as boxes in their layers and the imports as arrows, as SVG."""
    place = {part: box for depth, row in enumerate(house.layers) for part, box in _row(row, depth)}
    height = ROW * len(house.layers)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>The layers of retemper: each part imports only what stands below it</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="context-stroke"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for part, imported in house.imports.items():
        below = house.below(part)
        implied = {far for other in below for far in house.reached(other)}
        for other in sorted(other for other in imported - implied if not _is_ground(other) or _is_ground(part)):
            lines.append(_arrow(place[part], place[other], "#64748b" if other in below else "#dc2626"))
    lines += [_box(part, *box) for part, box in place.items()]
    return "\n".join([*lines, "</svg>", ""])


def _row(parts: tuple[str, ...], depth: int) -> list[tuple[str, tuple[float, float, float]]]:
    """Left edge, top edge and width of each part's box, in pixels."""
    widths = [LETTER * len(_label(part)) + 20 for part in parts]
    left, boxes = (WIDTH - sum(widths) - GAP * (len(parts) - 1)) / 2, []
    if len(parts) <= 2:
        left += ASIDE if depth % 2 else -ASIDE
    for part, width in zip(parts, widths, strict=True):
        boxes.append((part, (left, depth * ROW + (ROW - BOX_HEIGHT) / 2, width)))
        left += width + GAP
    return boxes


def _is_ground(part: str) -> bool:
    return part.partition(".")[0] not in COLOURS


def _label(part: str) -> str:
    return part.removeprefix("engine.")


def _box(part: str, left: float, top: float, width: float) -> str:
    colour = COLOURS.get(part.partition(".")[0], GROUND_COLOUR)
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="5" fill="{colour}" '
        f'stroke="#334155"/><text x="{left + width / 2:.0f}" y="{top + BOX_HEIGHT / 2 + 5:.0f}" '
        f'text-anchor="middle" font-size="14">{_label(part)}</text>'
    )


def _arrow(source: tuple[float, float, float], target: tuple[float, float, float], colour: str) -> str:
    (left, top, width), (to_left, to_top, to_width) = source, target
    x, y, to_x = left + width / 2, top + BOX_HEIGHT, to_left + to_width / 2
    if to_top < top:
        y, to_top = top, to_top + BOX_HEIGHT
    middle = (y + to_top) / 2
    return (
        f'<path d="M{x:.0f} {y:.0f}C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_top:.0f}" fill="none" '
        f'stroke="{colour}" stroke-opacity="0.7" marker-end="url(#tip)"/>'
    )


def with_table(page: str, rows: str) -> str:
    """The page with the table between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE} needs a line {BEGIN} and, below it, a line {END}")
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def made() -> dict[Path, str]:
    """What each file must hold, by its path."""
    house = read_house()
    return {PAGE: with_table(PAGE.read_text(), table(house)), PICTURE: picture(house)}


def main() -> None:
    parser = argparse.ArgumentParser(description="The picture and the table of the layers.")
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, text in made().items():
        if check and (not path.is_file() or path.read_text() != text):
            sys.exit(f"{os.path.relpath(path)} is not what the code says: run python docs/layers.py")
        path.write_text(text)


if __name__ == "__main__":
    main()
