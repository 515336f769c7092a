"""The races of the kernels that work on logits: the KL at class temperatures, its gradients, and the sums by class."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine.bench.peers import liger_kl, missing
from retemper.engine.bench.plan import CHECKED, EAGER, OURS, TOLERANCE, Request, bytes_of, compiled, race
from retemper.engine.bench.timing import Check, Contestant, Race, equal_to, near_to
from retemper.engine.device import DTYPES
from retemper.kernels import (
    class_sums,
    class_temperature_kl,
    class_temperature_kl_grad_,
    class_temperature_kl_grad_reference,
    class_temperature_kl_reference,
)

SUM_TOLERANCE = 1e-3  # of a sum over millions of rows in float32, which an eager chain adds up one by one
CHUNK = 2**16  # rows that the float64 truth of a sum takes at a time


def logits(request: Request, precision: str, batch: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher (B, K), labels (B,), temperatures (K,)."""
    student, teacher = (
        3 * torch.randn(batch, classes, device=request.device, dtype=DTYPES[precision]) for _ in range(2)
    )
    label = torch.randint(classes, (batch,), device=request.device)
    return student, teacher, label, torch.linspace(0.5, 5, classes, device=request.device)


def eager_kl(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    tempered = teacher.float() / temperature[label][:, None]
    return F.kl_div(student.float().log_softmax(1), tempered.softmax(1), reduction="batchmean")


def eager_kl_grad(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    tempered = teacher.float() / temperature[label][:, None]
    return (student.float().softmax(1) - tempered.softmax(1)).to(student.dtype)


def liger(run: Callable[[Any], Any], request: Request, check: Check) -> Contestant:
    """Liger's KL knows no class temperatures and wants (log-)probabilities: the teacher's, tempered, are given to it
    ready made, and so cost it nothing; the student's log-softmax is in its time."""
    name = "Liger, teacher tempered beforehand"
    reason = missing("liger_kernel") if request.on_gpu else "needs a GPU: it has no path for a CPU"
    return Contestant(name=name, run=None if reason else lambda: run(liger_kl()), check=check, reason=reason)


def kl_race(title: str, request: Request, precision: str, batch: int, classes: int, backward: bool) -> Race:
    student, teacher, label, temperature = logits(request, precision, batch, classes)
    student.requires_grad_(backward)
    tempered = (teacher.float() / temperature[label][:, None]).softmax(1)
    check = (
        grad_check(student, teacher, label, temperature, precision, batch)
        if backward
        else near_to(kl_truth(student, teacher, label, temperature), TOLERANCE[precision])
    )

    def whole(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return (lambda: torch.autograd.grad(loss(), student)[0]) if backward else loss

    def liger_loss(function: Any) -> Any:
        return whole(lambda: function.apply(student.float().log_softmax(1), tempered, "batchmean"))()

    contestants = [
        Contestant(
            name=OURS,
            run=whole(lambda: class_temperature_kl(student, teacher, label, temperature)),
            exactness="rounding",
            check=check,
        ),
        Contestant(name=EAGER, run=whole(lambda: eager_kl(student, teacher, label, temperature)), check=check),
        compiled(request, eager_kl, lambda f: whole(lambda: f(student, teacher, label, temperature))(), check),
        liger(liger_loss, request, check),
    ]
    return race(title, precision, contestants, (3 if backward else 2) * bytes_of(student) + 12 * batch)


def kl_grad_race(title: str, request: Request, precision: str, batch: int, classes: int) -> Race:
    """Ours overwrites its logits, so that from the second call on it works on gradients: the same work."""
    student, teacher, label, temperature = logits(request, precision, batch, classes)
    own = student.clone()
    check = grad_check(student, teacher, label, temperature, precision, 1)
    contestants = [
        Contestant(
            name=OURS,
            run=lambda: class_temperature_kl_grad_(own, teacher, label, temperature),
            exactness="rounding",
            check=check,
            prepare=lambda: own.copy_(student),
        ),
        Contestant(name=EAGER, run=lambda: eager_kl_grad(student, teacher, label, temperature), check=check),
        compiled(request, eager_kl_grad, lambda f: f(student, teacher, label, temperature), check),
    ]
    return race(title, precision, contestants, 3 * bytes_of(student) + 8 * batch)


def kl_truth(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    """The mean over all rows, in float64, some rows at a time."""
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for at in range(0, len(label), CHUNK):
        rows = slice(at, at + CHUNK)
        total += class_temperature_kl_reference(
            student.detach()[rows].double(), teacher[rows], label[rows], temperature
        ).sum()
    return total / len(label)


def grad_check(
    student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor, precision: str, rows: int
) -> Check:
    """The gradient of the first rows; a mean over so many `rows` divides it."""
    few = slice(0, CHECKED)
    expected = class_temperature_kl_grad_reference(
        student.detach()[few].double(), teacher[few], label[few], temperature
    )
    return near_to(expected / rows, TOLERANCE[precision], lambda result: result[few])


def eager_sums(student: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    loss = F.cross_entropy(student.float(), label, reduction="none")
    hit = (student.argmax(1) == label).long()
    none = torch.zeros(classes, dtype=torch.int64, device=label.device)
    sums = torch.zeros(classes, device=label.device).index_add_(0, label, loss)
    return sums, none.index_add(0, label, hit), none.index_add(0, label, torch.ones_like(label))


def sums_race(title: str, request: Request, precision: str, batch: int, classes: int) -> Race:
    student, _, label, _ = logits(request, precision, batch, classes)
    loss = torch.zeros(classes, dtype=torch.float64, device=request.device)
    correct, count = (torch.zeros(classes, dtype=torch.int64, device=request.device) for _ in range(2))
    for at in range(0, batch, CHUNK):
        part, own = student[at : at + CHUNK].double(), label[at : at + CHUNK]
        loss.index_add_(0, own, F.cross_entropy(part, own, reduction="none"))
        correct.index_add_(0, own, (part.argmax(1) == own).long())
        count.index_add_(0, own, torch.ones_like(own))
    checks = [
        near_to(loss, SUM_TOLERANCE, lambda r: r[0]),
        equal_to(correct, lambda r: r[1]),
        equal_to(count, lambda r: r[2]),
    ]

    def check(result: Any) -> str | None:
        return next((wrong for each in checks if (wrong := each(result))), None)

    contestants = [
        Contestant(name=OURS, run=lambda: class_sums(student, label, classes), exactness="rounding", check=check),
        Contestant(name=EAGER, run=lambda: eager_sums(student, label, classes), check=check),
        compiled(request, eager_sums, lambda f: f(student, label, classes), check),
    ]
    return race(title, precision, contestants, bytes_of(student) + 8 * batch)


LOGIT_RACES: dict[str, Callable[..., Race]] = {
    "class_temperature_kl forward": partial(kl_race, backward=False),
    "class_temperature_kl forward and backward": partial(kl_race, backward=True),
    "class_temperature_kl_grad_": kl_grad_race,
    "class_sums": sums_race,
}
