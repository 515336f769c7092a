"""The cases of the kernels on logits: the KL, its gradient, the Jensen-Shannon divergence, class pairs, class sums."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.bench.case import Case, Contender, equal_to, near_to
from retemper.bench.kernel_cases import CHECKED, OURS, KernelSize, bytes_of
from retemper.bench.peers import library, missing
from retemper.kernels import (
    class_pair,
    class_pair_reference,
    class_sums,
    class_temperature_js,
    class_temperature_js_reference,
    class_temperature_kl,
    class_temperature_kl_grad_,
    class_temperature_kl_grad_reference,
    class_temperature_kl_reference,
)

SUM_TOLERANCE = 1e-3  # of a sum over millions of rows in float32, which an eager chain adds up one by one


def eager_kl(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    tempered = teacher.float() / temperature[label][:, None]
    return F.kl_div(student.float().log_softmax(1), tempered.softmax(1), reduction="batchmean")


def kl_case(size: KernelSize) -> Case:
    """Return the case of the KL, or with the form "backward" of its gradient.

    Liger's KL knows no class temperatures and wants (log-)probabilities. The teacher's, tempered, are given to it ready
    made, and so cost it nothing; the student's log-softmax is in its time.
    """
    student, teacher, label, temperature = given = size.logits()
    backward = size.form == "backward"
    student.requires_grad_(backward)
    tempered = (teacher.float() / temperature[label][:, None]).softmax(1)
    truth = kl_gradient_of_first(given) / size.batch if backward else kl_of_rows(given).mean()
    check = size.near(truth) if backward else near_to(truth, size.tolerance)

    def whole(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return (lambda: torch.autograd.grad(loss(), student)[0]) if backward else loss

    def liger() -> Tensor:
        kl = library("liger_kernel.ops.kl_div").LigerKLDivLossFunction
        return kl.apply(student.float().log_softmax(1), tempered, "batchmean")

    call = whole(lambda: class_temperature_kl(student, teacher, label, temperature))
    ours = Contender(name=OURS, call=call, exactness="rounding", check=check)
    reason = missing("liger_kernel") if size.request.on_gpu else "needs a GPU: it has no path for a CPU"
    call = None if reason else whole(liger)
    peer = Contender(name="Liger, teacher tempered beforehand", call=call, check=check, reason=reason)
    must_move = (3 if backward else 2) * bytes_of(student) + 12 * size.batch
    return size.case(ours, eager_kl, given, check, must_move, peer, wrap=whole)


def kl_of_rows(given: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the KL of each row, (B,) in float64."""
    student, teacher, label, temperature = given
    return class_temperature_kl_reference(student.detach().double(), teacher, label, temperature)


def kl_gradient_of_first(given: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the gradient of the KL of each of the first rows, in float64."""
    student, teacher, label = (part[:CHECKED] for part in given[:3])
    return class_temperature_kl_grad_reference(student.detach().double(), teacher, label, given[3])


def eager_kl_grad(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    tempered = teacher.float() / temperature[label][:, None]
    return (student.float().softmax(1) - tempered.softmax(1)).to(student.dtype)


def kl_grad_case(size: KernelSize) -> Case:
    """Return the case of the KL's gradient. Ours overwrites its logits: later calls work on gradients, as fast."""
    student, teacher, label, temperature = given = size.logits()
    own, check = student.clone(), size.near(kl_gradient_of_first(given))
    ours = Contender(
        name=OURS,
        call=lambda: class_temperature_kl_grad_(own, teacher, label, temperature),
        exactness="rounding",
        check=check,
        prepare=lambda: own.copy_(student),
    )
    return size.case(ours, eager_kl_grad, given, check, 3 * bytes_of(student) + 8 * size.batch)


def eager_js(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    log_q = student.float().log_softmax(1)
    log_p = (teacher.float() / temperature[label][:, None]).log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    of_teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return 0.5 * of_teacher + 0.5 * F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)


def js_case(size: KernelSize) -> Case:
    """Return the case of the Jensen-Shannon divergence, or with the form "backward" of the student's gradient."""
    student, teacher, label, temperature = given = size.logits()
    backward = size.form == "backward"
    few = student[:CHECKED].double().requires_grad_(backward), teacher[:CHECKED], label[:CHECKED], temperature
    tolerance = max(size.tolerance, 1e-4)  # the gradient is a difference of logarithms
    if backward:
        truth = torch.autograd.grad(class_temperature_js_reference(*few).sum(), few[0])[0] / size.batch
        check = near_to(truth, tolerance, lambda result: result[:CHECKED])
    else:
        check = near_to(class_temperature_js_reference(student.double(), *given[1:]).mean(), tolerance)
    student.requires_grad_(backward)

    def whole(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return (lambda: torch.autograd.grad(loss(), student)[0]) if backward else loss

    call = whole(lambda: class_temperature_js(*given))
    ours = Contender(name=OURS, call=call, exactness="rounding", check=check)
    must_move = (3 if backward else 2) * bytes_of(student) + 12 * size.batch
    return size.case(ours, eager_js, given, check, must_move, wrap=whole)


def eager_pair(clean: Tensor, adv: Tensor, weight: Tensor) -> Tensor:
    apart = clean.float() - adv.float()
    apart = apart - apart[:, :1]
    total = weight.sum(1, keepdim=True)
    apart = apart - (weight * apart).sum(1, keepdim=True) / total
    return (2 * total * (weight * apart**2).sum(1, keepdim=True)).mean()


def pair_case(size: KernelSize) -> Case:
    """Return the case of the class-pair term, or with the form "backward" of its gradient at both sides.

    Each row has weights of its own, since 32,000 classes have no table. The chain keeps the digits that ours does.
    """
    clean, adv, *_ = size.logits()
    weight, backward = torch.rand(size.batch, size.classes).softmax(1).to(clean.device), size.form == "backward"
    few = clean[:CHECKED].double().requires_grad_(backward), adv[:CHECKED], weight[:CHECKED]
    if backward:
        truth = torch.autograd.grad(class_pair_reference(*few).sum(), few[0])[0] / size.batch
        check = near_to(truth, size.tolerance, lambda result: result[0][:CHECKED])
    else:
        check = near_to(class_pair_reference(clean.double(), adv, weight).mean(), size.tolerance)
    leaves = [clean.requires_grad_(backward), adv.requires_grad_(backward)]

    def whole(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return (lambda: torch.autograd.grad(loss(), leaves)) if backward else loss

    given = clean, adv, weight
    ours = Contender(name=OURS, call=whole(lambda: class_pair(*given)), exactness="rounding", check=check)
    must_move = (4 if backward else 2) * bytes_of(clean) + bytes_of(weight)
    return size.case(ours, eager_pair, given, check, must_move, wrap=whole)


def eager_sums(student: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    loss = F.cross_entropy(student.float(), label, reduction="none")
    hit = (student.argmax(1) == label).long()
    none = torch.zeros(classes, dtype=torch.int64, device=label.device)
    sums = torch.zeros(classes, device=label.device).index_add_(0, label, loss)
    return sums, none.index_add(0, label, hit), none.index_add(0, label, torch.ones_like(label))


def sums_case(size: KernelSize) -> Case:
    """Return the case of the sums by class: cross-entropies, hits, images."""
    student, _, label, _ = size.logits()
    logits, labels = student.double().cpu(), label.cpu()
    loss_B = F.cross_entropy(logits, labels, reduction="none")
    loss = torch.zeros(size.classes, dtype=torch.float64).index_add_(0, labels, loss_B)
    correct = labels[logits.argmax(1) == labels].bincount(minlength=size.classes)
    count = labels.bincount(minlength=size.classes)
    checks = [
        near_to(loss, SUM_TOLERANCE, lambda result: result[0]),
        equal_to(correct, lambda result: result[1]),
        equal_to(count, lambda result: result[2]),
    ]

    def check(result: Any) -> str | None:
        return next((wrong for each in checks if (wrong := each(result))), None)

    ours = Contender(
        name=OURS, call=lambda: class_sums(student, label, size.classes), exactness="rounding", check=check
    )
    return size.case(ours, eager_sums, (student, label, size.classes), check, bytes_of(student) + 8 * size.batch)
