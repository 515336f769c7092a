"""What the numbers of a teacher mean for a student, in plain words.

The bounds are ours, for want of any that is published; each reason has its number, so that it can be weighed.

    chance      robust accuracy is no more than chance explains: it is no robust teacher
    unlearned   a class's clean accuracy is below half of the average, and below the average up to the end of its
                interval, of 5 images or more: its soft labels teach the wrong class
    uneven      the weakest class's robust accuracy, up to the end of its interval, is below half of the average
    sure        mean entropy on the hard images is below a quarter of log K, as far as there are 30 of them
    stiff       below a fifth of the images that fool a student fool the teacher too, as far as there are 30 of them
    overdone    the soft labels fit best at a temperature above 1.5: it is surer than it is right
    head        norms of the last layer differ by a fifth, and go with robust accuracy (r of 0.8 or more)

From fewer than 30 images in all nothing is concluded. The first two say that it is no teacher, the next four that it is
one to think about; the last is for information.
"""

import math
from collections.abc import Sequence
from typing import Any

from retemper.engine.checkpoints.published import margin
from retemper.engine.teacher_check.measure import Findings

HALF = 0.5
ENTROPY = 0.25  # of log K
TRANSFER = 0.2
TEMPERATURE = 1.5
SPREAD, CORRELATION = 1.2, 0.8
FEW, FEW_OF_A_CLASS = 30, 5  # images: from fewer nothing is concluded


def advice(found: Findings, classes: Sequence[str]) -> str:
    """Return one line: whether to distil from the teacher, why, and what would help."""
    if (images := sum(found.robust["count"])) < FEW:
        return f"no word for or against it: {images} images are too few to judge it by; give --limit {FEW} or more."
    against, doubts = _refusals(found, classes), _doubts(found, classes)
    if against:
        return f"do not distil from it: {'; '.join(against)}."
    if doubts:
        return f"think twice: {'; '.join(doubts)}."
    return f"go ahead: {_reassurance(found)}."


def remarks(found: Findings) -> list[str]:
    """Return what is worth knowing besides: it speaks neither for nor against the teacher."""
    head, out = found.head, []
    if head is not None and head.correlation >= CORRELATION and max(head.norms) >= SPREAD * min(head.norms):
        out.append(
            f"the norms of its last layer go with the robust accuracy of the classes (r = {head.correlation:.2f}): "
            "part of its unevenness is the last layer's, and can be evened there without training"
        )
    if found.hard.images < FEW:
        out.append(f"only {found.hard.images} images are hard: too few to say how sure it is of such images")
    if not found.students:
        out.append("no student was named: --student NETWORK tells how far attacks on it move the teacher")
    return out


def _refusals(found: Findings, classes: Sequence[str]) -> list[str]:
    clean, robust = found.clean, found.robust
    chance, out = 1 / len(classes), []
    bound = chance + margin(chance, sum(robust["count"]))
    if robust["average"] <= bound:
        serves = " (it may serve as a second, clean one: --clean-teacher)" * (clean["average"] > bound)
        out.append(
            f"it holds {robust['average']:.1%} of the images under attack, which chance explains: it is no robust "
            f"teacher{serves}"
        )
    if _is_unlearned(clean):
        out.append(
            f"it never learned class {classes[clean['worst_class']]} ({clean['worst']:.1%} right without an attack, "
            f"{clean['average']:.1%} on average): its soft labels teach another class there"
        )
    return out


def _is_unlearned(clean: dict[str, Any]) -> bool:
    k, average = clean["worst_class"], clean["average"]
    is_sure = clean["count"][k] >= FEW_OF_A_CLASS and clean["interval"]["class"][k][1] < average
    return is_sure and clean["worst"] < HALF * average


def _doubts(found: Findings, classes: Sequence[str]) -> list[str]:
    robust, hard, labels, out = found.robust, found.hard, found.soft_labels, []
    if robust["interval"]["worst"][1] < HALF * robust["average"]:
        out.append(
            f"it is uneven: class {classes[robust['worst_class']]} holds {robust['worst']:.1%} under attack, the "
            f"average {robust['average']:.1%}, and students inherit that; take a method for fairness"
        )
    if hard.images >= FEW and hard.share < ENTROPY:
        out.append(
            f"it is sure of images that are lost under attack (entropy {hard.entropy:.2f}, {hard.share:.0%} of the "
            "most there can be): students learn these by heart; soften its labels by a temperature, or take another one"
        )
    for student in found.students:
        if student.fooled >= FEW and student.transfer < TRANSFER:
            out.append(
                f"attacks on {student.network} hardly move it ({student.transfer:.0%} of the images that fool the "
                "student fool it too): expect less of it than its own robustness promises"
            )
    if labels.temperature > TEMPERATURE:
        out.append(
            f"it is surer than it is right: its soft labels fit best at a temperature of {labels.temperature:.1f}; "
            "take a method with a temperature"
        )
    return out


def _reassurance(found: Findings) -> str:
    hard, robust = found.hard, found.robust
    said = f"it holds {robust['average']:.1%} under attack, {robust['worst']:.1%} of its weakest class"
    if hard.images >= FEW and math.isfinite(hard.entropy):
        said += f", and is unsure where images are lost (entropy {hard.entropy:.2f}, {hard.share:.0%} of the most)"
    return said
