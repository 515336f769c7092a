"""ARD, IAD, AdaAD and their relatives: free steps of the variant `released` end where the authors' scripts end.

The scripts are main.py of goldblum/AdversariallyRobustDistillation, IAD-I.py and IAD-II.py of ZFancy/IAD, main.py of
boyellow/AdaAD, and Fair-ARD.py and Fair-IAD.py of NISP-official/Fair-ARD. Each function below is one step of one of
them, in the order of its lines: every forward of the student moves its batch-norm statistics, used or not.
Dimension key: B batch, K classes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Batch, Run, assert_same, free_run
from reference import climb
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[int, nn.Module, Batch], Tensor]  # (epoch from 0, the student in training mode, batch) to the loss


def replay(
    run: Run,
    step: Step,
    *,
    weight_decay: float = 2e-4,
    nesterov: bool = False,
    drops_multiply_first: bool = True,
    after_epoch: Callable[[], None] = lambda: None,
) -> tuple[nn.Module, list[float]]:
    """Train as the scripts do; return the student, and the learning rate of each step."""
    student, rate, rates = run.student0, 0.1, []
    optimizer = torch.optim.SGD(
        student.parameters(), lr=rate, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov
    )
    for epoch, batches in enumerate(run.batches):
        if epoch in run.recipe.optim.lr_drops:
            rate = 0.1 * (0.1 if drops_multiply_first else rate)
            optimizer.param_groups[0]["lr"] = rate
        student.train()
        for batch in batches:
            optimizer.zero_grad()
            step(epoch, student, batch).backward()
            optimizer.step()
            rates.append(rate)
        after_epoch()
    return student, rates


def asked(teacher: nn.Module | None, image: Tensor) -> Tensor:
    """Return a teacher's logits on images, (B, K)."""
    assert teacher is not None
    return teacher(image)


def kl_BK(taught_BK: Tensor, student_BK: Tensor, t: float = 1.0) -> Tensor:
    """Return the terms of KL(taught || student) of two softmaxes at temperature t."""
    return F.kl_div((student_BK / t).log_softmax(1), (taught_BK / t).softmax(1), reduction="none")


def label_attack(run: Run, student: nn.Module, batch: Batch, seen: Callable[[Tensor], None] | None = None) -> Tensor:
    """Return the attacked images of ARD and its relatives; each iterate is shown to the student in training mode."""

    def value(at: Tensor) -> Tensor:
        logits_BK = student(at)
        if seen is not None:
            seen(logits_BK)
        return F.cross_entropy(logits_BK, batch.label, reduction="sum")

    attack = run.recipe.attack
    start = run.start(batch.image, attack.eps, batch.seed, "uniform", False)
    return climb(batch.image, start, value, eps=attack.eps, step=attack.step, steps=attack.steps)


def trust(teacher_BK: Tensor, label: Tensor) -> Tensor:
    """Return how far IAD trusts its teacher on each image, (B,)."""
    return teacher_BK.softmax(1).gather(1, label[:, None]).squeeze(1) ** 0.1


def ard(run: Run, epoch: int, student: nn.Module, batch: Batch) -> Tensor:
    """Take the forwards of a step of ARD's main.py; return its loss."""
    attacked = label_attack(run, student, batch)
    adv_BK = student(attacked)
    taught_BK = asked(run.teacher, batch.image)
    clean_BK = student(batch.image)
    return 30 * 30 * kl_BK(taught_BK, adv_BK, 30).mean() + 0.0 * F.cross_entropy(clean_BK, batch.label)


def iad(run: Run, epoch: int, student: nn.Module, batch: Batch) -> Tensor:
    """Take the forwards of a step of IAD-I.py; return its loss."""
    taught_BK = asked(run.teacher, batch.image)
    attacked = label_attack(run, student, batch)
    adv_BK = student(attacked)
    student(attacked)  # "basicop"
    guide_BK = asked(run.teacher, attacked)
    loss = kl_BK(taught_BK, adv_BK).sum() / len(adv_BK)
    if epoch >= 1:
        own_B = kl_BK(student(batch.image), adv_BK).sum(1)
        loss = loss + (own_B * (1 - trust(guide_BK, batch.label))).sum() / len(adv_BK)
    return loss + 0.0 * F.cross_entropy(student(batch.image), batch.label)


def iad_ii(run: Run, epoch: int, student: nn.Module, batch: Batch) -> Tensor:
    """Take the forwards of a step of IAD-II.py; return its loss."""
    attacked = label_attack(run, student, batch)
    adv_BK = student(attacked)
    robust_B = kl_BK(asked(run.teacher, attacked), adv_BK).sum(1)
    clean_B = kl_BK(asked(run.clean_teacher, attacked), adv_BK).sum(1)
    if epoch >= 1:
        trust_B = trust(asked(run.teacher, attacked), batch.label)
        own_B = kl_BK(student(batch.image), adv_BK).sum(1)
        robust_B = robust_B * trust_B + own_B * (1 - trust_B)
    return 0.25 * F.cross_entropy(adv_BK, batch.label) + 0.5 * robust_B.mean() + 0.25 * clean_B.mean()


def disagreement_attack(run: Run, student: nn.Module, batch: Batch) -> Tensor:
    """Return the attacked images of AdaAD, whose gradient flows through both networks."""
    student.eval()
    attack = run.recipe.attack
    start = run.start(batch.image, attack.eps, batch.seed, "normal", False)
    attacked = climb(
        batch.image,
        start,
        lambda at: kl_BK(asked(run.teacher, at), student(at)).sum(),
        eps=attack.eps,
        step=attack.step,
        steps=attack.steps,
    )
    student.train()
    return attacked


def adaad(run: Run, epoch: int, student: nn.Module, batch: Batch) -> Tensor:
    """Take the forwards of a step of AdaAD in its main.py; return its loss."""
    attacked = disagreement_attack(run, student, batch)
    clean_BK = student(batch.image)
    adv_BK = student(attacked)
    adv = kl_BK(asked(run.teacher, attacked), adv_BK).mean()
    clean = kl_BK(asked(run.teacher, batch.image), clean_BK).mean()
    return 1.0 * adv + 0.0 * clean


def adaiad(run: Run, epoch: int, student: nn.Module, batch: Batch) -> Tensor:
    """Take the forwards of a step of AdaIAD in AdaAD's main.py; return its loss."""
    attacked = disagreement_attack(run, student, batch)
    student(batch.image)  # for a number that the script prints
    adv_BK = student(attacked)
    guide_BK = asked(run.teacher, attacked)
    loss = 30 * 30 * kl_BK(guide_BK, adv_BK, 30).sum() / len(adv_BK)
    if epoch >= 1:
        own_B = kl_BK(student(batch.image), adv_BK).sum(1)
        loss = loss + (own_B * (1 - trust(guide_BK, batch.label))).sum() / len(adv_BK)
    return loss + 0.0 * F.cross_entropy(student(batch.image), batch.label)


class Reweighting:
    """The class weights of Fair-ARD.py: what the epoch adds to, and what its end makes of it."""

    def __init__(self, run: Run, num_classes: int = 10) -> None:
        self.num_images = sum(len(batch.label) for batch in run.batches[0])
        self.kappa_K, self.weight_K = torch.zeros(num_classes), torch.ones(num_classes, dtype=torch.float64)
        self.weights = [self.weight_K]

    def see(self, label: Tensor) -> Callable[[Tensor], None]:
        """Return what counts the iterates that are still classified correctly."""

        def seen(logits_BK: Tensor) -> None:
            for hit, k in zip(logits_BK.argmax(1) == label, label, strict=True):
                self.kappa_K[k] += float(hit)

        return seen

    def after_epoch(self) -> None:
        """Weigh the classes for the next epoch."""
        K = len(self.kappa_K)
        raw_K = (1 / (self.kappa_K.double() / (self.num_images / K) + 1e-5)) ** 2
        self.weight_K = (raw_K * (K / raw_K.sum())).clamp(5 / 6, 5 / 2)
        self.weights.append(self.weight_K)
        self.kappa_K.zero_()


def fair_ard(weights: Reweighting, run: Run, epoch: int, student: nn.Module, batch: Batch) -> Tensor:
    """Take the forwards of a step of Fair-ARD.py; return its loss."""
    attacked = label_attack(run, student, batch, weights.see(batch.label))
    adv_BK = student(attacked)
    taught_BK = asked(run.teacher, batch.image)
    clean_BK = student(batch.image)
    weight_B = weights.weight_K[batch.label]
    soft_B = kl_BK(taught_BK, adv_BK, 30).mean(1)
    hard_B = F.cross_entropy(clean_BK, batch.label, reduction="none")
    return 30 * 30 * (weight_B * soft_B).sum() / len(adv_BK) + 0.0 * (weight_B * hard_B).sum() / len(adv_BK)


def fair_iad(weights: Reweighting, run: Run, epoch: int, student: nn.Module, batch: Batch) -> Tensor:
    """Take the forwards of a step of Fair-IAD.py; return its loss."""
    taught_BK = asked(run.teacher, batch.image)
    attacked = label_attack(run, student, batch, weights.see(batch.label))
    adv_BK = student(attacked)
    clean_BK = student(batch.image)
    student(attacked)  # "basicop"
    guide_BK = asked(run.teacher, attacked)
    weight_B = weights.weight_K[batch.label]
    loss = (weight_B * kl_BK(taught_BK, adv_BK).sum(1)).sum() / len(adv_BK)
    if epoch >= 1:
        own_B = kl_BK(clean_BK, adv_BK).sum(1) * (1 - trust(guide_BK, batch.label))
        loss = loss + (weight_B * own_B).sum() / len(adv_BK)
    return loss


ADAAD: dict[str, Any] = {"weight_decay": 5e-4, "drops_multiply_first": False}
BEGUN = {"begun": torch.ones(1)}
IN_THE_SECOND_EPOCH = {"begin": 0.5}  # of two


@pytest.mark.parametrize(
    ("setting", "step", "options", "optimiser", "class_state"),
    [
        ("ard:cifar10_resnet18", ard, {"epochs": 3, "lr_drops": (1, 2)}, {}, {}),
        ("iad:cifar10_resnet18", iad, IN_THE_SECOND_EPOCH, {}, BEGUN),
        ("iad:cifar10_resnet18_ii", iad_ii, IN_THE_SECOND_EPOCH, {}, BEGUN),
        ("adaad:cifar10_resnet18", adaad, {"epochs": 3, "lr_drops": (1, 2)}, ADAAD, {}),
        ("adaiad:cifar10_resnet18", adaiad, IN_THE_SECOND_EPOCH, ADAAD, BEGUN),
    ],
    ids=["ard", "iad", "iad_ii", "adaad", "adaiad"],
)
def test_free_steps_end_where_the_script_ends(
    setting: str,
    step: Callable[[Run, int, nn.Module, Batch], Tensor],
    options: dict[str, Any],
    optimiser: dict[str, Any],
    class_state: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = free_run(setting, tmp_path, monkeypatch, **options)
    student, rates = replay(run, partial(step, run), **optimiser)
    assert_same(run, student, class_state=class_state or None, lr=rates)
    assert run.held is None  # all images are trained on
    assert setting != "ard:cifar10_resnet18" or run.best_epoch == 3  # nothing is chosen


@pytest.mark.parametrize(("setting", "step"), [("fair_ard", fair_ard), ("fair_iad", fair_iad)])
def test_free_steps_with_class_weights_end_where_the_script_ends(
    setting: str,
    step: Callable[[Reweighting, Run, int, nn.Module, Batch], Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin: dict[str, Any] = IN_THE_SECOND_EPOCH if setting == "fair_iad" else {}
    run = free_run(f"{setting}:cifar10_resnet18", tmp_path, monkeypatch, images_per_class=17, **begin)
    assert [len(batch.label) for batch in run.batches[0]] == [8] * 21 + [2]  # the scripts keep the last, short batch
    weights = Reweighting(run)
    student, rates = replay(run, partial(step, weights, run), nesterov=True, after_epoch=weights.after_epoch)
    state = {"class_weight": weights.weight_K} | (BEGUN if begin else {})
    assert_same(run, student, class_state=state, lr=rates)
    assert (run.held, run.best_epoch) == (None, 2)  # all images are trained on, nothing is chosen
    for ours, theirs in zip(run.class_state, weights.weights, strict=True):
        torch.testing.assert_close(ours["class_weight"], theirs, rtol=0, atol=1e-10)
