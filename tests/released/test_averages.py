"""ADR and ReBAT: free steps of the variant `released` end where the authors' scripts end, average and all.

The scripts are src/advTrainer.py, adr.py and util/ of yuyuwu5/ADR, and train_cifar_wa.py of PKU-ML/ReBAT. Each
reference is one step of theirs, in the order of their lines, but for the first that an average takes in: it is the
student after that step here, and what lies between the two there. Dimension key: B batch, K classes.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Batch, Run, assert_same, free_run
from reference import climb
from torch import Tensor, nn
from torch.nn import functional as F

# drops after half and 3/4 of the way; few images are judged
SHORT: dict[str, Any] = dict(epochs=4, images_per_class=8, lr_drops=(2, 3), select_on="holdout")


@torch.no_grad()
def follow(average: nn.Module, student: nn.Module, decay: float) -> None:
    """Move an average of weights and statistics; counts of batches are copied."""
    for kept, now in zip(average.state_dict().values(), student.state_dict().values(), strict=True):
        kept.copy_(decay * kept + (1 - decay) * now if now.is_floating_point() else now)


def rectified(average: nn.Module, batch: Batch, done: float) -> Tensor:
    """Return ADR's labels, (B, K), at a share `done` of all steps, by the constants for CIFAR-10."""
    ramp = 0.5 * (1 + math.cos(math.pi * done))
    with torch.no_grad():
        p_BK = (average(batch.image) / (2.0 + 0.5 * ramp)).softmax(1)
        own_B = p_BK.gather(1, batch.label[:, None])[:, 0]
        share_B = ((0.95 - 0.25 * ramp) - (p_BK.amax(1) - own_B)).clamp(0, 1)[:, None]
        return share_B * p_BK + (1 - share_B) * F.one_hot(batch.label, 10)


def started(run: Run, batch: Batch) -> Tensor:
    attack = run.recipe.attack
    return run.start(batch.image, attack.eps, batch.seed, attack.start, attack.clip_start)


def pull(adv_BK: Tensor, target_BK: Tensor) -> Tensor:
    return F.kl_div(adv_BK.log_softmax(1), target_BK.softmax(1), reduction="batchmean")


@pytest.mark.parametrize("trades", [False, True])
def test_adr_labels_by_its_average(trades: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run(f"adr:cifar10_resnet18{'_trades' if trades else ''}", tmp_path, monkeypatch, **SHORT)
    student, own, rates = run.student0, run.recipe.attack, []
    average = copy.deepcopy(student).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    total = sum(map(len, run.batches))
    for epoch, batches in enumerate(run.batches, 1):
        for batch in batches:
            optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** sum(epoch > drop for drop in (2, 3))
            label = rectified(average, batch, len(rates) / total)
            student.train()  # in the attack too
            target = student(batch.image).detach() if trades else label

            def value(adv: Tensor, target: Tensor = target) -> Tensor:
                return pull(student(adv), target) if trades else F.cross_entropy(student(adv), target)

            adv = climb(batch.image, started(run, batch), value, eps=own.eps, step=own.step, steps=own.steps)
            if trades:
                clean_BK, adv_BK = student(torch.cat([batch.image, adv])).chunk(2)
                loss = F.cross_entropy(clean_BK, label) + 6.0 * pull(adv_BK, clean_BK)
            else:
                loss = F.cross_entropy(student(adv), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
            follow(average, student, 0.995 if len(rates) > 1 else 0.0)
    assert len(rates) == 40 and assert_same(run, student, kept=average, lr=rates) < 1e-10


@pytest.mark.parametrize("name", ["", "_plus_plus"])
def test_rebat_is_pulled_to_its_average(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = SHORT | dict(average_from=4, ema_decay=0.9)
    run = free_run(f"rebat:cifar10_preact_resnet18{name}", tmp_path, monkeypatch, **options)
    student, own, factor, rates = run.student0, run.recipe.attack, 1.7 if name else 1.5, []
    average = copy.deepcopy(student).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch, batches in enumerate(run.batches):
        eps, steps = (own.eps * 10 / 8, own.steps + 2) if name and epoch >= 2 else (own.eps, own.steps)
        for number, batch in enumerate(batches, 1):
            passed = epoch + number / len(batches)
            rates.append(0.1 if passed < 2 else 0.1 / factor if passed < 3 else 0.1 / factor**2)
            optimizer.param_groups[0]["lr"] = rates[-1]
            student.train()  # in the attack too
            start = run.start(batch.image, eps, batch.seed, own.start, own.clip_start)

            def value(adv: Tensor, label: Tensor = batch.label) -> Tensor:
                return F.cross_entropy(student(adv), label)

            adv = climb(batch.image, start, value, eps=eps, step=own.step, steps=steps)
            student(adv)  # the attack's last look, at what it keeps
            adv_BK = student(adv)
            loss = F.cross_entropy(adv_BK, batch.label)
            if epoch >= 3:
                with torch.no_grad():
                    average_BK = average(adv)
                loss = loss + 1.0 * pull(adv_BK, average_BK)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            student(batch.image)  # for the log
            follow(average, student, 0.9 if epoch >= 3 and len(rates) > 31 else 0.0)
    assert len(rates) == 40 and assert_same(run, student, kept=average, lr=rates) < 1e-10
