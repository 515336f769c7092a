"""AutoAttack's ledger: what became of every image, in a CSV file that is whole at any moment, to be gone on with.

The first line, behind a #, is a JSON object with what the rows were made under and their digest. Then comes one row an
image:

    image, label   its index in the split, its class
    clean          1: classified correctly without an attack
    tried          how many attacks are done with it
    broken_by      the first attack that broke it; empty while it holds
    predicted      the class it is given in the end: its label while it holds
    margin         z_label - max of the other logits, on the image that broke it; on the clean one while it holds
    seed           of the attacks' random draws
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from retemper.console import say
from retemper.engine.evaluation.places import beside, free_name
from retemper.errors import DataError
from retemper.files import locked, write_atomically
from retemper.shape import misfit, parse_json

COLUMNS = ("image", "label", "clean", "tried", "broken_by", "predicted", "margin", "seed")
WHOLE_NUMBERS = ("image", "label", "clean", "tried", "predicted")
LATER = ("images_sha256",)  # of the facts: what ledgers of earlier versions do not say
UNTRIED = -1  # `clean` of an image that the network has not been shown yet


class Notes(TypedDict):
    """What was noticed on the way."""

    flags: list[str]
    seconds: float
    perturbation: float


class Head(TypedDict):
    """The first line."""

    facts: dict[str, Any]
    notes: Notes
    sha256: str


class Ledger:
    """The ledger of a suite: a row an image, in the order in which they are attacked.

    Attributes:
        path: of the file.
        facts: what must be the same for the rows to be gone on with: weights, images, radius, seed, batch size, ...
        notes: what was noticed on the way: "flags", "seconds", "perturbation".
        image_N, label_N, clean_N, tried_N, predicted_N: (N,) int64; margin_N: (N,) float64.
        broken_by: (N,) str, the name of an attack or "".
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], image_N: np.ndarray, label_N: np.ndarray) -> None:
        self.path, self.facts = path, json.loads(json.dumps(dict(facts)))
        self.notes: dict[str, Any] = {"flags": [], "seconds": 0.0, "perturbation": 0.0}
        self.image_N, self.label_N = image_N.astype(np.int64), label_N.astype(np.int64)
        rows = len(image_N)
        self.clean_N = np.full(rows, UNTRIED, dtype=np.int64)
        self.tried_N, self.predicted_N = np.zeros(rows, dtype=np.int64), np.full(rows, -1, dtype=np.int64)
        self.margin_N, self.broken_by = np.full(rows, np.nan), np.full(rows, "", dtype=object)

    def holds(self, attacks: Sequence[str]) -> np.ndarray:
        """Return which images are classified correctly and broken by none of `attacks` so far: (N,) bool."""
        return (self.clean_N == 1) & ~np.isin(self.broken_by, list(attacks))

    def predicted_under(self, attacks: Sequence[str]) -> np.ndarray:
        """Return the class given under `attacks`: (N,) int64, -1 for none; the label where nothing was tried yet.

        So the accuracies of a suite that was interrupted are upper bounds.
        """
        fell = (self.clean_N == 0) | np.isin(self.broken_by, list(attacks))  # else a later attack broke it
        return np.where(fell, self.predicted_N, self.label_N)

    def is_complete(self, attacks: Sequence[str]) -> bool:
        """Say whether every attack of a suite has tried every image that held until then."""
        done_N = (self.clean_N == 0) | (self.broken_by != "") | (self.tried_N >= len(attacks))
        return bool((self.clean_N != UNTRIED).all() and done_N.all())

    def write(self) -> None:
        """Write the rows to the file, atomically."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        margins = ("" if np.isnan(margin) else f"{margin:.6g}" for margin in self.margin_N)
        columns = (self.image_N, self.label_N, self.clean_N, self.tried_N, self.broken_by, self.predicted_N)
        seed = self.facts.get("seed", "")
        writer.writerows((*row, margin, seed) for *row, margin in zip(*columns, margins, strict=True))
        body = text.getvalue().encode()
        head = {"facts": self.facts, "notes": self.notes, "sha256": hashlib.sha256(body).hexdigest()}
        write_atomically(self.path, b"# " + json.dumps(head).encode() + b"\n" + body)

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """Return the ledger at `path`. Raises DataError if it cannot be read, or is not what was written."""
        try:
            first, _, body = path.read_bytes().partition(b"\n")
            head = parse_json(first.removeprefix(b"# "))
            if wrong := misfit(head, Head):
                raise ValueError(wrong)
            if head["sha256"] != hashlib.sha256(body).hexdigest():
                raise ValueError("its rows do not match their digest")
            rows = list(csv.DictReader(io.StringIO(body.decode())))
            whole = {name: np.array([int(row[name]) for row in rows], dtype=np.int64) for name in WHOLE_NUMBERS}
            ledger = cls(path, head["facts"], whole["image"], whole["label"])
            ledger.notes |= head["notes"]
            ledger.clean_N, ledger.tried_N, ledger.predicted_N = whole["clean"], whole["tried"], whole["predicted"]
            ledger.margin_N = np.array([float(row["margin"] or "nan") for row in rows])
            ledger.broken_by = np.array([row["broken_by"] for row in rows], dtype=object)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
            raise DataError(f"{path} is damaged ({error}): delete it to begin the suite anew") from None
        return ledger

    @classmethod
    def begin(cls, path: Path, facts: Mapping[str, Any], image_N: np.ndarray, label_N: np.ndarray) -> "Ledger":
        """Return the ledger that was made under `facts`, at `path` or kept beside it, else a fresh one.

        A ledger of another protocol is kept under another name, and found again when it is asked for. Hold the lock on
        `path` meanwhile. Raises DataError if the one at `path` is damaged.
        """
        known, fresh = cls.found(path, facts, image_N, label_N), cls(path, facts, image_N, label_N)
        if known is not None or not path.exists():
            return known or fresh
        found = cls.read(path)
        kept = free_name(path)
        path.replace(kept)
        changed = sorted(key for key in fresh.facts if found.facts.get(key) != fresh.facts[key]) or ["images"]
        say(f"{path.name} was made under another protocol ({', '.join(changed)}) and is now {kept.name}")
        return fresh

    @classmethod
    def found(cls, path: Path, facts: Mapping[str, Any], image_N: np.ndarray, label_N: np.ndarray) -> "Ledger | None":
        """Return the ledger that was made under `facts`, at `path` or kept beside it; None where there is none.

        Raises DataError if the one at `path` is damaged.
        """
        fresh = cls(path, facts, image_N, label_N)
        main = cls.read(path) if path.exists() else None
        return main if main is not None and fresh._continues(main) else fresh._kept()

    def _continues(self, found: "Ledger") -> bool:
        """Say whether `found` was made under the facts and on the images of this fresh ledger."""
        known = {name: self.facts[name] for name in LATER if name in self.facts}
        agreed = known | {key: value for key, value in found.facts.items() if key != "shards"}
        return agreed == self.facts and np.array_equal(found.image_N, self.image_N)

    def _kept(self) -> "Ledger | None":
        """Return the ledger beside this fresh one that it would begin anew, if there is one."""
        for path in beside(self.path):
            try:
                found = Ledger.read(path)
            except DataError:
                continue
            if self._continues(found):
                return found
        return None

    @classmethod
    def merged(cls, path: Path, parts: Sequence["Ledger"]) -> "Ledger":
        """Return the shards' ledgers as one, in order. Raises DataError if they were made under several protocols."""
        facts = [{key: value for key, value in part.facts.items() if key != "shard"} for part in parts]
        if any(one != facts[0] for one in facts):
            raise DataError(f"the shards of {path.name} were made under different protocols: run them anew")
        image_N, label_N = (np.concatenate([getattr(part, name) for part in parts]) for name in ("image_N", "label_N"))
        whole = cls(path, facts[0] | {"shards": len(parts)}, image_N, label_N)
        for name in ("clean_N", "tried_N", "predicted_N", "margin_N", "broken_by"):
            setattr(whole, name, np.concatenate([getattr(part, name) for part in parts]))
        whole.notes = {
            "flags": sorted({flag for part in parts for flag in part.notes["flags"]}),
            "seconds": sum(part.notes["seconds"] for part in parts),
            "perturbation": max(part.notes["perturbation"] for part in parts),
        }
        return whole

    def locked(self) -> AbstractContextManager[None]:
        """Hold the file for this process. Raises UsageError if another process writes it."""
        return lock_on(self.path)


def lock_on(path: Path, wait: bool = False) -> AbstractContextManager[None]:
    """Hold the ledger at `path`, and those kept beside it. If another process writes it, raises Busy, or waits."""
    busy = f"another process is writing {path}: wait for it"
    return locked(path.with_name(f".{path.name}.lock"), None if wait else busy)
