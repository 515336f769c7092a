"""Evaluations read back with their verdicts image by image, and what must agree before two can be compared."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from retemper.commands import command
from retemper.engine.checkpoints.header import is_run
from retemper.engine.evaluation.content import AGAIN, read_evaluation
from retemper.engine.evaluation.norms import TITLES
from retemper.engine.evaluation.places import beside, content_of, fullest, is_stale
from retemper.engine.evaluation.protocols import attack_options, strongest_first
from retemper.engine.run.commands import evaluate_again
from retemper.errors import DataError, UsageError, nearest
from retemper.files import write_atomically
from retemper.loaders import usual_eps
from retemper.options import shown_value

STRONGEST = strongest_first()
MUST_AGREE = ("dataset", "split", "image_size", "norm", "precision", "classes")
Verdicts = dict[str, dict[int, tuple[int, bool]]]  # attack -> image -> (label, correct), only where it was attacked


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that was read back.

    Attributes:
        path: of evaluation.json; which images withstood which attack stands in evaluation.csv beside it.
        name: what the user calls it.
        content: what evaluation.json holds.
    """

    path: Path
    name: str
    content: dict[str, Any]

    @property
    def protocol(self) -> dict[str, Any]:
        """Return the protocol that the evaluation was made under."""
        return self.content["protocol"]

    @cached_property
    def verdicts(self) -> Verdicts:
        """Return the content of evaluation.csv. Raises DataError if there is no such file, or it is damaged."""
        path = self.path.with_suffix(".csv")
        try:
            with open(path, newline="", encoding="utf-8") as file:
                return _read_verdicts(csv.DictReader(file, strict=True))
        except FileNotFoundError:
            again = evaluate_again(path.parent, self.content)
            raise DataError(f"{path} does not exist: run `{again}`, it writes one") from None
        except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
            again = evaluate_again(path.parent, self.content)
            raise DataError(f"{path} is damaged ({error}): run `{again}`") from None


def _read_verdicts(rows: "csv.DictReader[str]") -> Verdicts:
    """Return the rows by attack. Raises ValueError, TypeError or KeyError for one that `write_verdicts` cannot make."""
    found: Verdicts = {name: {} for name in rows.fieldnames or () if name not in ("image", "label")}
    for row in rows:
        image, label = int(row["image"]), int(row["label"])
        for name, of_image in found.items():
            if row[name] == "":
                continue
            if row[name] not in ("0", "1") or image in of_image or image < 0 or label < 0:
                raise ValueError(f"line {rows.line_num}")
            of_image[image] = label, row[name] == "1"
    return found


def write_verdicts(path: Path, verdicts: Verdicts) -> None:
    """Write evaluation.csv: a row an image, a column an attack, empty where the image was not attacked."""
    labels = {image: label for of_image in verdicts.values() for image, (label, _) in of_image.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "label", *verdicts))
    for image in sorted(labels):
        cells = (str(int(of_image[image][1])) if image in of_image else "" for of_image in verdicts.values())
        writer.writerow((image, labels[image], *cells))
    write_atomically(path, text.getvalue().encode())


def read_evaluated(target: str | Path, name: str | None = None) -> Evaluated:
    """Read an evaluation back.

    Args:
        target: the folder of a run or of an evaluation, of which the fullest is taken; or the file of one.
        name: what to call it; None for the name of its folder.
    Raises:
        DataError: there is no such folder, it was not evaluated, or what is there is damaged.
    """
    target = Path(target)
    path = fullest(target / "evaluation.json") if target.is_dir() else target
    if not path.exists():
        raise DataError(_missing(target))
    content = {"protocol": {}, "attacks": {}} | read_evaluation(path, partial=True)
    if "eps" not in content["protocol"]:
        raise DataError(f"{path} is damaged (it has no protocol.eps): {AGAIN}")
    if is_stale(path, content["protocol"]):
        weights = content["protocol"]["weights"]
        raise DataError(f"{path} is of other weights than {weights} has now: run `{evaluate_again(path.parent, {})}`")
    return Evaluated(path, name or path.resolve().parent.name, content)


def _missing(target: Path) -> str:
    """Return in words why there is no evaluation to be read, and what would help."""
    if not target.is_dir():
        return f"{target} does not exist: name a run's folder, an evaluation's, or an evaluation.json"
    others = sorted(one.name for one in target.glob("evaluation-*.json"))
    if others:
        return f"{target} holds no evaluation.json: name one of {', '.join(others)}"
    if is_run(target):
        return f"{target} was not evaluated yet: run `{command('retemper', 'evaluate', target)}` first"
    return f"{target} holds no evaluation, and is no run's folder"


def strongest(runs: Sequence[Evaluated]) -> str:
    """Return the strongest attack that all evaluations hold. Raises UsageError where they share none."""
    shared = [name for name in runs[0].verdicts if all(name in run.verdicts for run in runs)]
    chosen = [name for name in STRONGEST if name in shared] + shared
    if not chosen:
        raise UsageError(f"{runs[0].name} and the others share no attack: evaluate them with the same --attacks")
    return chosen[0]


def require_attack(run: Evaluated, attack: str) -> None:
    """Raise UsageError unless the evaluation has every verdict under `attack`."""
    if attack not in STRONGEST and attack not in run.verdicts:
        has = ", ".join(run.verdicts)
        raise UsageError(f"there is no attack {attack!r}{nearest(attack, run.verdicts)}: {run.name} has {has}")
    again = f"run `{evaluate_again(run.path.parent, run.content, **attack_options(attack, run.protocol))}`"
    if not run.verdicts.get(attack) or attack not in run.content["attacks"]:
        raise UsageError(f"{run.name} has no verdicts under {attack}: {again}")
    if run.content["attacks"][attack].get("complete") is False:
        raise UsageError(f"{attack} of {run.name} was interrupted: {again} to go on with it")
    _require_its_own(run, attack)


def _require_its_own(run: Evaluated, attack: str) -> None:
    """Raise DataError where the verdicts are not those that the evaluation's accuracies were made of."""
    entry, path = run.content["attacks"][attack], run.path.with_suffix(".csv")
    accuracy, count = entry.get("accuracy"), entry.get("count")
    if not isinstance(accuracy, list) or not isinstance(count, list):
        return
    right = sum(round(a * n) for a, n in zip(accuracy, count, strict=False) if a is not None)
    answers = run.verdicts[attack].values()
    if (sum(count), right) != (len(answers), sum(correct for _, correct in answers)):
        raise DataError(f"{path} does not belong to {run.path.name} ({attack}): run `retemper evaluate` again")


def _same_pixels(first: Evaluated, run: Evaluated) -> list[tuple[str, Any, Any]]:
    """Return what must agree so that two evaluations of one data set saw the same pixels, where both say it."""
    was, now = first.protocol, run.protocol
    if was.get("images") != now.get("images") or None in (was.get("images_sha256"), now.get("images_sha256")):
        return []
    return [("the digest of the images", was["images_sha256"], now["images_sha256"])]


def require_same_radius(first: Evaluated, run: Evaluated) -> None:
    """Raise UsageError, with what helps, where two evaluations are at different radii, or in different norms."""
    was, now = (one.protocol.get("norm") or "linf" for one in (first, run))
    if was != now:
        raise UsageError(
            f"{run.name} cannot be compared with {first.name}: they were evaluated in {TITLES.get(now, now)} and "
            f"{TITLES.get(was, was)}: name two files of one norm (evaluation-l2.json)"
        )
    if first.protocol["eps"] == run.protocol["eps"]:
        return
    usual = usual_eps(str(run.protocol.get("dataset")), now)
    other, good = (first, run) if run.protocol["eps"] == usual else (run, first)
    eps = good.protocol["eps"]
    folder = other.path.parent
    there = [one for one in (folder / "evaluation.json", *beside(folder / "evaluation.json")) if _radius_of(one) == eps]
    again = evaluate_again(folder, {**other.content, "protocol": other.protocol | {"eps": eps}})
    raise UsageError(
        f"{run.name} cannot be compared with {first.name}: they were evaluated at eps "
        f"{shown_value(run.protocol['eps'])} and {shown_value(first.protocol['eps'])}: "
        + (f"name {there[0]} in place of {other.name}" if there else f"run `{again}`")
    )


def _radius_of(path: Path) -> Any:
    """Return the radius of an evaluation; None where there is none."""
    content = content_of(path)
    return None if content is None else content["protocol"].get("eps")


def require_same(first: Evaluated, run: Evaluated, attack: str) -> None:
    """Raise UsageError unless two evaluations differ in nothing but the network: protocol, attack, images, labels."""
    pairs = [(name, first.protocol.get(name), run.protocol.get(name)) for name in MUST_AGREE]
    was, now = (one.protocol.get("attacks", {}).get(attack, {}) for one in (first, run))
    pairs += _same_pixels(first, run)
    pairs += [(f"{attack}'s {name}", was.get(name), now.get(name)) for name in dict.fromkeys([*was, *now])]
    for name, before, after in pairs:
        if before != after:
            raise UsageError(f"{run.name} cannot be compared with {first.name}: {name} is {after}, not {before}")
    before, after = first.verdicts[attack], run.verdicts[attack]
    for image in sorted(before.keys() | after.keys()):
        if image not in before or image not in after:
            only = run.name if image in after else first.name
            raise UsageError(
                f"{first.name} and {run.name} were evaluated on other images ({len(before)} and {len(after)}): "
                f"image {image} is only in {only}"
            )
        if before[image][0] != after[image][0]:
            raise UsageError(f"{first.name} and {run.name} hold other labels for image {image}: other data sets")
