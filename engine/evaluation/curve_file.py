"""The curve of a network over the radius: curve.json, and curve.csv with the radius that breaks each image.

    curve.json            in L-inf; curve-l2.json and curve-l1.json in the other norms
    curve.csv             a row an image, a column an attack: the smallest radius of the list at which it is wrong, 0
                          where it is wrong without an attack, empty where it holds at all, - where it was not attacked;
                          of FMN the distance itself
    curve.1.json ...      curves under other protocols: other radii, images or weights

Rows hold at every radius below what stands there and at none above, so that no accuracy rises with the radius.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from retemper.console import say
from retemper.engine.evaluation.content import AttackResult, Consistency
from retemper.engine.evaluation.places import beside, free_name
from retemper.errors import DataError
from retemper.files import read_json, write_atomically, write_json

NAMES = ("network", "data_root", "attacks")  # of a protocol: what the numbers do not depend on
AGAIN = "delete it and run `retemper evaluate` with the same radii again"
UNTRIED = "-"


class _Protocol(TypedDict):
    dataset: str
    split: str
    images: int
    eps: list[float]
    norm: str
    classes: list[str]
    attacks: dict[str, dict[str, Any]]


class _Attack(TypedDict):
    radii: list[AttackResult]


class _Numbers(TypedDict):
    protocol: _Protocol
    attacks: dict[str, _Attack]


class Curve(_Numbers, total=False):
    """The content of curve.json."""

    consistency: Consistency


@dataclass
class CurveFile:
    """The two files of one curve.

    Attributes:
        path: of curve.json.
        content: what it holds: "protocol", whose "eps" is the list of radii, and "attacks", each with "radii", the
            entries as evaluation.json has them, at as many radii as are done.
        broken: by attack and image, (label, the radius that breaks it); inf where it holds.
    """

    path: Path
    content: dict[str, Any]
    broken: dict[str, dict[int, tuple[int, float]]] = field(default_factory=dict)

    @classmethod
    def begin(cls, path: Path, protocol: dict[str, Any]) -> "CurveFile":
        """Return the curve that was made under `protocol`, at `path` or kept beside it, else an empty one at `path`.

        One under another protocol is kept beside it.
        """
        for there in (path, *beside(path)):
            known = _readable(there)
            if known is not None and _same(known.content["protocol"], protocol):
                if there != path:
                    _set_aside(path)
                    _rename(there, path)
                known.path = path
                return known
        _set_aside(path)
        return cls.empty(path, protocol)

    @classmethod
    def empty(cls, path: Path, protocol: dict[str, Any]) -> "CurveFile":
        """Return a curve without attacks."""
        return cls(path, {"protocol": protocol | {"attacks": {}}, "attacks": {}})

    @property
    def radii(self) -> list[float]:
        """Return the radii, the smallest first."""
        return self.content["protocol"]["eps"]

    def is_done(self, name: str) -> bool:
        """Say whether an attack is done at every radius."""
        entries = self.content["attacks"].get(name, {}).get("radii", [])
        return len(entries) == len(self.radii) and not any(entry.get("complete") is False for entry in entries)

    def set(
        self, name: str, described: dict[str, Any], entries: list[dict[str, Any]], broken: dict[int, tuple[int, float]]
    ) -> None:
        """Hold what is known of one attack so far; one that is done keeps what it has beside less."""
        if self.is_done(name) and self._is_less(entries, self.content["attacks"][name]["radii"]):
            return
        self.content["protocol"]["attacks"][name] = described
        self.content["attacks"][name] = {"radii": entries}
        self.broken[name] = broken

    def _is_less(self, entries: list[dict[str, Any]], done: list[dict[str, Any]]) -> bool:
        """Say whether entries have fewer radii or images than those that are done, or are not finished."""
        unfinished = len(entries) < len(done) or any(entry.get("complete") is False for entry in entries)
        return unfinished or sum(entries[0].get("count", ())) < sum(done[0].get("count", ()))

    def write(self) -> None:
        """Write both files, each atomically."""
        labels = {image: label for of_image in self.broken.values() for image, (label, _) in of_image.items()}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("image", "label", *self.broken))
        for image in sorted(labels):
            writer.writerow((image, labels[image], *(_cell(one.get(image)) for one in self.broken.values())))
        write_atomically(self.path.with_suffix(".csv"), text.getvalue().encode())
        write_json(self.path, self.content)


def _cell(broken: tuple[int, float] | None) -> str:
    """Return the radius that breaks an image, as curve.csv has it."""
    return UNTRIED if broken is None else "" if broken[1] == float("inf") else repr(float(broken[1]))


def read_curve(path: Path) -> CurveFile:
    """Read a curve back. Raises DataError if it is not there, or damaged."""
    content = read_json(path, Curve, AGAIN)
    table = path.with_suffix(".csv")
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        broken = {
            name: {
                int(row["image"]): (int(row["label"]), float(row[name] or "inf"))
                for row in rows
                if row[name] != UNTRIED
            }
            for name in content["attacks"]
        }
        for name, of_image in broken.items():
            if len(of_image) != sum(content["attacks"][name]["radii"][0]["count"]):
                raise ValueError(f"it has {len(of_image)} images under {name}")
    except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        raise DataError(f"{table} is damaged ({error}): {AGAIN}") from None
    return CurveFile(path, content, broken)


def curves_in(folder: Path, stem: str = "curve") -> list[Path]:
    """Return the curves of a folder's best weights, one a norm: curve.json, curve-l2.json, curve-l1.json."""
    return [path for norm in ("", "-l2", "-l1") if (path := folder / f"{stem}{norm}.json").is_file()]


def _readable(path: Path) -> CurveFile | None:
    try:
        return read_curve(path)
    except DataError:
        return None


def _set_aside(path: Path) -> None:
    """Keep a curve that is there under a numbered name."""
    if not path.exists():
        return
    kept = free_name(path)
    _rename(path, kept)
    say(f"{path.name} was made under another protocol and is now {kept.name}")


def _rename(path: Path, new: Path) -> None:
    """Rename a curve and its table. An interruption between the two leaves one without its other half."""
    path.replace(new)
    if path.with_suffix(".csv").exists():
        path.with_suffix(".csv").replace(new.with_suffix(".csv"))


def _same(was: dict[str, Any], now: dict[str, Any]) -> bool:
    """Say whether two protocols are alike in all that the numbers depend on."""
    names: Sequence[str] = [name for name in now if name not in NAMES]
    return all(was.get(name) == now[name] for name in names)
