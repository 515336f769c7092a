"""IGDM, SAAD and DGAD: free steps end where the authors' scripts end, but for what their recipes say is left out.

The scripts are rslad_IGDM_cifar100.py of the supplement of IGDM, saad.py and attacks.py of HongsinLee/saad, and main.py
of kunsaram01/DGAD. Of the first a second forward of the attacked images is left out; of the second that the averaged
network's statistics are measured anew. Dimension key: B batch, K classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Batch, Run, assert_same, free_run, trained
from reference import climb
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Run, int, nn.Module, Batch], Tensor]  # of a step of an epoch, from 1; the student is in training mode


def attacked(run: Run, student: nn.Module, batch: Batch, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Return where the attack in eval mode leads that raises `value`, a scalar of the images."""
    own = run.recipe.attack
    student.eval()
    start = run.start(batch.image, own.eps, batch.seed, "normal", clip=False)
    adv = climb(batch.image, start, value, eps=own.eps, step=own.step, steps=own.steps)
    student.train()
    return adv


def taught(run: Run, image: Tensor) -> Tensor:
    """Return the teacher's logits."""
    assert run.teacher is not None
    with torch.no_grad():
        return run.teacher(image)


def kl_B(student_BK: Tensor, target_BK: Tensor) -> Tensor:
    """Return the divergence of each row from the softmax of the target."""
    return F.kl_div(student_BK.log_softmax(1), target_BK.softmax(1), reduction="none").sum(1)


def rslad_with_igdm(run: Run, epoch: int, student: nn.Module, batch: Batch) -> Tensor:
    """The host's means over the classes, and alpha = 3 of the term."""
    image, clean_teacher_BK = batch.image, taught(run, batch.image)
    adv = attacked(run, student, batch, lambda at: kl_B(student(at), clean_teacher_BK).sum())
    delta = adv - image
    plus_BK, clean_BK, minus_BK = student(image + delta), student(image), student(image - delta)
    turn_BK = taught(run, image + delta) - taught(run, image - delta)
    term = F.kl_div((plus_BK - minus_BK).log_softmax(1), turn_BK.softmax(1), reduction="batchmean")
    host = [(kl_B(of, clean_teacher_BK) / 10).mean() for of in (plus_BK, clean_BK)]
    return 5 / 6 * host[0] + 1 / 6 * host[1] + 3 * (epoch / 2) * term


def saad(run: Run, epoch: int, student: nn.Module, batch: Batch) -> Tensor:
    """The weights of the images, with alpha = 2 and b = 0.5."""
    image, rows = batch.image, torch.arange(len(batch.label))
    at = image.clone().requires_grad_()
    assert run.teacher is not None
    teacher_BK = run.teacher(at)
    (slope,) = torch.autograd.grad(teacher_BK[rows, batch.label].sum(), at)
    teacher_BK = teacher_BK.detach()

    def value(moved: Tensor) -> Tensor:
        foreseen_BK = teacher_BK.clone()
        foreseen_BK[rows, batch.label] += torch.einsum("bchw,bchw->b", slope, moved - image)
        return F.kl_div(student(moved).log_softmax(1), foreseen_BK.softmax(1), reduction="sum")

    adv = attacked(run, student, batch, value)
    delta = adv - image
    plus_teacher_BK, minus_teacher_BK = taught(run, adv), taught(run, image - delta)
    plus_BK, minus_BK, clean_BK = student(adv), student(image - delta), student(image)
    p_BK = plus_teacher_BK.softmax(1)
    entropy_B = -(p_BK * p_BK.log()).sum(1)
    w_B = 5 * (entropy_B - entropy_B.min())
    share_B = (w_B - w_B.min()) / (w_B.max() - w_B.min() + 1e-8)
    term_B = 2 * (epoch / 2) * kl_B(plus_BK - minus_BK, plus_teacher_BK - minus_teacher_BK)
    loss_B = w_B * (kl_B(plus_BK, plus_teacher_BK) + term_B) + 0.5 * (1 - share_B) * kl_B(clean_BK, teacher_BK)
    return loss_B.mean()


def dgad(run: Run, epoch: int, student: nn.Module, batch: Batch) -> Tensor:
    """The labels are swapped row by row; the weight of the consistency is 1."""
    image, label, size = batch.image, batch.label, len(batch.label)
    assert run.teacher is not None
    teacher = run.teacher
    adv = attacked(run, student, batch, lambda at: kl_B(student(at), teacher(at)).sum())
    clean_BK, adv_BK = student(image), student(adv)
    answers = {"clean": taught(run, image).clone(), "adv": taught(run, adv).clone()}
    wrong = (answers["clean"].argmax(1) != label).tolist()
    for name, answer_BK in answers.items():
        for row, (own, is_wrong) in enumerate(zip(label.tolist(), wrong, strict=True)):
            others = answer_BK[row].clone()
            others[own] = -torch.inf
            largest = int(others.argmax())
            if is_wrong if name == "clean" else answer_BK[row, own] < others[largest]:
                answer_BK[row, [own, largest]] = answer_BK[row, [largest, own]]
    chosen = torch.tensor(wrong)
    losses = [kl_B(clean_BK, answers["clean"])[chosen], kl_B(adv_BK, answers["adv"])[~chosen]]
    guided = sum(len(loss_B) / size * loss_B.mean() for loss_B in losses if len(loss_B))
    return guided + F.mse_loss(adv_BK.softmax(1), clean_BK.softmax(1))


CASES: dict[str, tuple[Loss, str, dict[str, Any]]] = {
    "igdm": (rslad_with_igdm, "rslad", dict(igdm=3.0)),
    "saad": (saad, "saad", dict(igdm=2.0, clean_weight=0.5, average_from=1)),
    "dgad": (dgad, "dgad", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_free_steps_end_where_the_script_ends(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, method, options = CASES[name]
    small: dict[str, Any] = dict(eps=0.2, attack_step=0.1, padding=1, flip=False)
    run = free_run(f"{method}:cifar10_resnet18", tmp_path, monkeypatch, make=trained, **small, **options)
    student, optim, epochs = run.student0, run.recipe.optim, []
    sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=optim.weight_decay)
    for epoch, batches in enumerate(run.batches, 1):
        for batch in batches:
            sgd.zero_grad()
            loss(run, epoch, student, batch).backward()
            sgd.step()
        sgd.param_groups[0]["lr"] *= 0.1  # after the first of two epochs
        epochs.append({key: value.clone() for key, value in student.state_dict().items()})
    mean = {
        key: (one + epochs[1][key]) / 2 if one.is_floating_point() else epochs[1][key] for key, one in epochs[0].items()
    }
    kept = mean if optim.average == "swa" else student
    assert_same(run, student, kept=kept)
    assert optim.weight_decay == (5e-4 if name == "dgad" else 2e-4)
