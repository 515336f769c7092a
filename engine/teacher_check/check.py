"""`retemper teacher NETWORK`: a teacher is checked, and teacher.json, teacher.md and teacher.html are written."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retemper.console import say
from retemper.engine.checkpoints.find import Network, find_network
from retemper.engine.checkpoints.header import Facts, fitting_models, is_run, require_same_images
from retemper.engine.evaluation.evaluate import images_for
from retemper.engine.evaluation.places import UNSAFE, label
from retemper.engine.evaluation.preflight import require_room
from retemper.engine.evaluation.protocols import radius
from retemper.engine.predict import balanced_order
from retemper.engine.run.job import default_cache
from retemper.engine.teacher_check.advice import advice, remarks
from retemper.engine.teacher_check.measure import ATTACK, Images, measure
from retemper.engine.teacher_check.page import as_text, pages
from retemper.errors import UsageError
from retemper.files import finite, json_bytes, write_atomically
from retemper.provenance import versions


@dataclass(frozen=True, kw_only=True)
class TeacherRequest:
    """The request of `retemper teacher`.

    Attributes:
        target, students: networks by name (checkpoints/find.py).
        split: "test", or "train" for the training images.
        out: the folder of the files; None for the run's, or teachers/NAME.
        eps: the radius in pixel units; "trained" for that of the teacher's training, None for the data set's usual one.
        limit: how many images, balanced over the classes; None for all.
        facts: what the user says about a bare checkpoint.
    """

    target: str | Path
    students: tuple[str, ...] = ()
    split: str = "test"
    out: Path | None = None
    eps: float | str | None = None
    data_root: Path | None = None
    limit: int | None = None
    batch_size: int = 256
    seed: int = 0
    device: torch.device
    facts: Facts


def check_teacher(request: TeacherRequest) -> tuple[Path, str]:
    """Check a teacher and write its files.

    Returns:
        The path of teacher.html, and what to tell the user.
    Raises:
        DataError, UsageError: a network or the images cannot be used, or the files cannot be written.
    """
    network = find_network(request.target, dataset=request.facts.dataset)
    facts, split, _ = images_for(network, request.facts, request.data_root, verb="teacher", which=request.split)
    others = [find_network(name, dataset=split.name) for name in request.students]
    known = [_student_facts(other, facts, len(split.classes), split.shape[2]) for other in others]
    images = Images(
        split=split,
        order=balanced_order(split.labels, request.limit),
        eps=radius(request.eps, split.name, facts.eps, network.name),
        device=request.device,
        batch_size=request.batch_size,
        seed=request.seed,
    )
    out = request.out or _default_out(network)
    require_room(out, 0, [out / f"teacher.{kind}" for kind in ("json", "md", "html")])

    def load(one: Network, of_one: Facts) -> tuple[nn.Module, str]:
        model, source = one.load(of_one, split.shape, request.device, default_cache())
        return model, source["sha256"]

    teacher, digest = load(network, facts)
    models = [load(other, of_other)[0] for other, of_other in zip(others, known, strict=True)]
    found = measure(teacher, label(network), [*zip(_labels(others), models, strict=True)], images)
    content: dict[str, Any] = finite(
        {
            "network": label(network),
            "weights_sha256": digest,
            "dataset": split.name,
            "split": split.split,
            "images": len(images.order),
            "image_size": split.shape[0],
            "eps": images.eps,
            "attack": ATTACK,
            "seed": request.seed,
            "classes": list(split.classes),
            "advice": advice(found, split.classes),
            "remarks": remarks(found),
            **asdict(found),
            "versions": versions(),
        }
    )
    for name, data in ({"teacher.json": json_bytes(content)} | pages(content)).items():
        write_atomically(out / name, data)
    return out / "teacher.html", as_text(content)


def _student_facts(student: Network, teacher: Facts, classes: int, channels: int) -> Facts:
    """Return what is known of a student. Raises DataError or UsageError where it does not fit the teacher's images."""
    whose, facts = f"--student {student.name}", student.facts
    require_same_images(whose, facts, classes, channels)
    if facts.dataset not in (None, teacher.dataset):
        say(f"note: {whose} was trained on {facts.dataset}, it is attacked on {teacher.dataset}")
    if student.weights is not None and facts.model is None:
        fitting = fitting_models(student.weights)
        if len(fitting) != 1:
            raise UsageError(f"{whose} does not say its architecture: name a run's folder, or net.py:build")
        facts = facts.or_else(Facts(model=fitting[0]))
    return facts.or_else(Facts(num_classes=classes, channels=channels))


def _labels(networks: list[Network]) -> list[str]:
    """Return short names of networks; as the user wrote them, where two of the short ones are the same."""
    short = [label(one) for one in networks]
    return short if len(set(short)) == len(short) else [one.name for one in networks]


def _default_out(network: Network) -> Path:
    """Return the folder of the run whose weights these are, or teachers/NAME."""
    if network.weights is not None and is_run(network.weights.parent):
        return network.weights.parent
    return Path("teachers") / re.sub(UNSAFE, "-", label(network))
