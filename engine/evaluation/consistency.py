"""What theory says of two results on one network, and for how many images the attacks contradict it.

Where one ball lies inside another (norms.py), an image that is broken in the smaller is not robust in the larger, so
accuracy cannot rise with the radius, and who is robust in L-inf at eps is robust in L2 at eps. An image that an attack
broke in the smaller ball and left standing in the larger shows that the attack failed there: it is a violation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retemper.engine.evaluation.content import read_evaluation
from retemper.engine.evaluation.curve_file import read_curve
from retemper.engine.evaluation.norms import TITLES, Ball, is_inside
from retemper.engine.evaluation.verdicts import Evaluated
from retemper.errors import DataError
from retemper.options import shown_value

SAME = ("weights_sha256", "dataset", "split", "image_size")  # of two protocols, so that their images are the same
SHOWN = 20  # images of a violation that are named


@dataclass(frozen=True)
class _Found:
    """What one attack found in one ball, by the file that says so: by image, whether it is wrong there."""

    source: Path
    attack: str
    ball: Ball
    wrong: dict[int, bool]


def consistency(folder: Path, protocol: dict[str, Any], pixels: int) -> dict[str, Any]:
    """Compare every two results of a network that lie in a folder, attack by attack.

    Args:
        protocol: whose network and images are meant.
        pixels: the numbers that an image has.
    Returns:
        "pairs" of balls of which one lies inside the other, "images" that were looked at in all pairs together, and
        "violations", each with the attack, both balls, the number of images, and the first of them.
    """
    found = [one for of in (_of_curves, _of_evaluations) for one in of(folder, protocol)]
    pairs, images, violations = 0, 0, []
    for inner in found:
        for outer in found:
            if inner.attack != outer.attack or inner.attack == "clean" or inner.source == outer.source:
                continue  # the radii of one curve cannot contradict one another
            if inner.ball == outer.ball or not is_inside(inner.ball, outer.ball, pixels):
                continue
            both = inner.wrong.keys() & outer.wrong.keys()
            if not both:
                continue
            pairs, images = pairs + 1, images + len(both)
            against = sorted(image for image in both if inner.wrong[image] and not outer.wrong[image])
            if against:
                balls = {"inner": list(inner.ball), "outer": list(outer.ball)}
                shown = {"images": len(against), "of": len(both), "first": against[:SHOWN]}
                violations.append({"attack": inner.attack, **balls, **shown})
    return {"pairs": pairs, "images": images, "violations": violations}


def consistency_lines(found: dict[str, Any] | None) -> list[str]:
    """Return what was found in words; nothing where there was nothing to compare."""
    if not found or not found["pairs"]:
        return []
    broken = sum(one["images"] for one in found["violations"])
    head = f"theory (broken in a ball is broken in a larger one): {found['pairs']} pairs of results, "
    head += f"{found['images']:,} images, {broken} violations"
    return [head, *(f"  {violation_text(one)}" for one in found["violations"])]


def violation_text(one: dict[str, Any]) -> str:
    """Return one violation in words."""
    inner, outer = (f"{TITLES[norm]} {shown_value(eps)}" for norm, eps in (one["inner"], one["outer"]))
    images = ", ".join(map(str, one["first"])) + (", ..." if one["images"] > len(one["first"]) else "")
    return (
        f"{one['attack']}: {one['images']} of {one['of']} images broken in {inner} hold in {outer}, "
        f"which contains it (images {images})"
    )


def _of_curves(folder: Path, protocol: dict[str, Any]) -> Iterator[_Found]:
    """Yield what the curves in a folder say."""
    for path in sorted(folder.glob("curve*.json")):
        try:
            curve = read_curve(path)
        except DataError:
            continue
        was = curve.content["protocol"]
        if not _same(was, protocol):
            continue
        for name, of_image in curve.broken.items():
            for entry in curve.content["attacks"][name]["radii"]:
                if entry.get("complete") is not False:
                    wrong = {image: at <= entry["eps"] for image, (_, at) in of_image.items()}
                    yield _Found(path, name, (was["norm"], entry["eps"]), wrong)


def _of_evaluations(folder: Path, protocol: dict[str, Any]) -> Iterator[_Found]:
    """Yield what the evaluations in a folder say."""
    for path in sorted(folder.glob("evaluation*.json")):
        try:
            content = read_evaluation(path, partial=True)
            was = content.get("protocol", {})
            if not _same(was, protocol) or was.get("norm") not in TITLES or not isinstance(was.get("eps"), float):
                continue
            verdicts = Evaluated(path, path.stem, {"protocol": {}, "attacks": {}} | content).verdicts
        except DataError:
            continue
        for name, of_image in verdicts.items():
            if content["attacks"].get(name, {"complete": False}).get("complete") is not False:
                wrong = {image: not right for image, (_, right) in of_image.items()}
                yield _Found(path, name, (was["norm"], was["eps"]), wrong)


def _same(was: dict[str, Any], now: dict[str, Any]) -> bool:
    return all(was.get(name) == now.get(name) for name in SAME)
