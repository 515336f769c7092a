"""The harness itself: a run in float64 is one throughout, and RSLAD's formula as it stands repeats it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from driver import assert_same, free_run
from torch.nn import functional as F


@pytest.mark.parametrize("broken", [False, True])
def test_a_loop_of_plain_pytorch_repeats_rslad(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("rslad:cifar10_resnet18", tmp_path, monkeypatch, variant="paper")
    attack, optim = run.recipe.attack, run.recipe.optim
    student, teacher = run.student0, run.teacher
    assert teacher is not None and [len(epoch) for epoch in run.batches] == [20, 20]
    sgd = torch.optim.SGD(student.parameters(), lr=optim.lr, momentum=0.9, weight_decay=2e-4)
    for epoch, batches in enumerate(run.batches):
        for group in sgd.param_groups:
            group["lr"] = optim.lr * 0.1**epoch
        for batch in batches:
            target = teacher(batch.image).softmax(1)
            student.eval()
            adv = run.start(batch.image, attack.eps, batch.seed, "normal", clip=False)
            for _ in range(attack.steps):
                adv.requires_grad_()
                loss = F.kl_div(student(adv).log_softmax(1), target, reduction="sum")
                (grad,) = torch.autograd.grad(loss, adv)
                adv = adv.detach() + attack.step * grad.sign()
                adv = torch.min(torch.max(adv, batch.image - attack.eps), batch.image + attack.eps).clamp(0, 1)
            student.train()
            order = (batch.image, adv) if broken else (adv, batch.image)
            first, second = (F.kl_div(student(x).log_softmax(1), target, reduction="batchmean") for x in order)
            loss = 0.1 * (5 / 6 * (second if broken else first) + 1 / 6 * (first if broken else second))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    if broken:
        with pytest.raises(AssertionError, match="running_mean"):
            assert_same(run, student)
        return
    assert assert_same(run, student, lr=[0.1] * 20 + [0.01] * 20) < 1e-12


def test_the_rate_of_a_run_falls_in_the_last_step_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(lr_drop_early=True, attack_steps=1, images_per_class=4, holdout_per_class=0)
    run = free_run("rslad:cifar10_resnet18", tmp_path, monkeypatch, variant="paper", **options)
    assert run.lr == pytest.approx([0.1] * 4 + [0.01] * 6)
