"""CFA, WAT, BAT and DAFA as their authors' scripts go, written out from the facts and held to runs of `released`.

Each is broken once, and must then be told from the run. Dimension key: B batch, K classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Batch, Run, assert_same, free_run
from reference import climb
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
LEARNS: dict[str, Any] = dict(padding=0, flip=False)  # or 40 steps end in classes that are never right
CFA: dict[str, Any] = LEARNS | dict(calibrate_from=1, holdout_per_class=8, epochs=3, lr_drops=(2,))
FAR = 2**62  # from the noise seed of BAT's first attack to that of its second


def optimizer_of(student: nn.Module, weight_decay: float, *, nesterov: bool = False) -> torch.optim.SGD:
    return torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov)


def set_rate(optimizer: torch.optim.SGD, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def take_step(optimizer: torch.optim.SGD, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def kl(adv_BK: Tensor, clean_BK: Tensor) -> Tensor:
    """Return KL(clean || attacked) of each image, (B,)."""
    return F.kl_div(adv_BK.log_softmax(1), clean_BK.softmax(1), reduction="none").sum(1)


def away_from_itself(
    run: Run, student: nn.Module, batch: Batch, eps: Tensor | None = None, step: Tensor | None = None
) -> Tensor:
    """Return TRADES' attack on a batch; the student is left in eval mode."""
    student.eval()
    attack = run.recipe.attack
    radius, length = attack.eps if eps is None else eps, attack.step if step is None else step
    start = run.start(batch.image, radius, batch.seed, "normal", clip=False)
    own_BK = student(batch.image).detach()
    value = lambda adv: kl(student(adv), own_BK).sum()  # noqa: E731
    return climb(batch.image, start, value, eps=radius, step=length, steps=attack.steps)


def held_batch(run: Run) -> Batch:
    """Return the held-out images as one batch, with the seed that the engine's attacks on them begin with."""
    assert run.held is not None and len(run.held[1]) <= 256
    return Batch(*run.held, seed=torch.zeros(1, dtype=torch.int64))


def traded(mean_KK: Tensor) -> Tensor:
    """Return DAFA's weights of the classes, pair by pair."""
    weight_K = torch.ones(CLASSES, dtype=torch.float64)
    for i in range(CLASSES):
        for j in range(CLASSES):
            if i != j and mean_KK[i, i] < mean_KK[j, j]:
                weight_K[i] += mean_KK[i, j] * mean_KK[j, j]
            elif i != j:
                weight_K[i] -= mean_KK[j, i] * mean_KK[i, i]
    return weight_K


@pytest.mark.parametrize("broken", [False, True])
def test_dafa(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("dafa:cifar10_resnet18", tmp_path, monkeypatch, warm_up=1, **LEARNS)
    attack, student, rates = run.recipe.attack, run.student0, []
    optimizer = optimizer_of(student, 5e-4, nesterov=not broken)
    weight_K = torch.ones(CLASSES, dtype=torch.float64)
    for epoch, batches in enumerate(run.batches, 1):
        set_rate(optimizer, 0.1 if epoch < 2 else 0.01)
        seen: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            weight_B = weight_K[batch.label]
            adv = away_from_itself(run, student, batch, attack.eps * weight_B, attack.step * weight_B)
            student.train()
            adv_BK, clean_BK = student(adv), student(batch.image)
            clean = (weight_B * F.cross_entropy(clean_BK, batch.label, reduction="none")).mean()
            take_step(optimizer, clean + 6 * kl(adv_BK, clean_BK).mean())
            seen.append((adv_BK.detach().softmax(1), batch.label))
            rates.append(optimizer.param_groups[0]["lr"])
        if epoch == 1:
            p_BK, label_B = (torch.cat(found) for found in zip(*seen, strict=True))
            weight_K = traded(torch.stack([p_BK[label_B == k].mean(0) for k in range(CLASSES)]))
    compare(run, student, rates, broken, class_weight=weight_K)


def compare(
    run: Run,
    student: nn.Module,
    rates: Sequence[float],
    broken: bool,
    *,
    kept: dict[str, Tensor] | None = None,
    **class_state: Tensor,
) -> None:
    """Hold the run to its reference, from which one that is broken must differ."""
    if broken:
        with pytest.raises(AssertionError, match=r"conv1|num_batches"):
            assert_same(run, student)
        return
    assert assert_same(run, student, kept=kept, class_state=class_state or None, lr=rates) < 1e-12


def wat_costs(run: Run, student: nn.Module, *, padded: bool) -> Tensor:
    """Return what WAT's held-out images cost, by class and in their mean: (K + 1,).

    The sums are divided by batches of the script's size, as if the last one were full.
    """
    batch, size = held_batch(run), run.recipe.optim.batch_size
    adv = away_from_itself(run, student, batch)
    with torch.no_grad():
        clean_BK, adv_BK = student(batch.image), student(adv)
    cost_B = F.cross_entropy(clean_BK, batch.label, reduction="none") + 6 * kl(adv_BK, clean_BK)
    cost = torch.zeros(CLASSES + 1, dtype=torch.float64)
    for k in range(CLASSES):
        cost[k] = cost_B[batch.label == k].sum()
    cost[CLASSES] = cost_B.sum() / CLASSES
    images = math.ceil(len(cost_B) / size) * size if padded else len(cost_B)
    return cost / images * CLASSES


@pytest.mark.parametrize("broken", [False, True])
def test_wat(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("wat:cifar10_resnet18", tmp_path, monkeypatch, holdout_per_class=5, **LEARNS)
    student, rates = run.student0, []
    optimizer = optimizer_of(student, 2e-4)
    weight, costs = torch.ones(CLASSES + 1, dtype=torch.float64), torch.zeros(CLASSES + 1, dtype=torch.float64)
    for epoch, batches in enumerate(run.batches, 1):
        set_rate(optimizer, 0.1 if epoch < 2 else 0.01)
        for batch in batches:
            adv = away_from_itself(run, student, batch)
            student.train()
            clean_BK, adv_BK = student(batch.image), student(adv)
            clean_B, robust_B = F.cross_entropy(clean_BK, batch.label, reduction="none"), kl(adv_BK, clean_BK)
            own = sum((clean_B + 6 * robust_B)[batch.label == k].sum() * weight[k] for k in range(CLASSES))
            mean = clean_B.mean() + 6 * robust_B.mean()
            take_step(optimizer, own / len(batch.label) + weight[CLASSES] * mean)
            rates.append(optimizer.param_groups[0]["lr"])
        costs = costs + wat_costs(run, student, padded=not broken)
        factor = (0.1 * costs).exp()
        weight = CLASSES * factor / factor.sum()
    mean, own = weight[-1:], weight[:-1]
    compare(run, student, rates, broken, loss_so_far=costs[:-1], class_weight=own, mean_weight=mean)


def last_right(run: Run, student: nn.Module, batch: Batch) -> Tensor:
    """Return BAT's last iterates before the first that is wrong, of an attack of its own."""
    attack, found = run.recipe.attack, batch.image.clone()
    iterates, wrong = bat_attack(run, student, batch, batch.seed)
    for row in range(len(found)):
        first = next((n for n in range(attack.steps) if wrong[n][row]), None)
        at = attack.steps if first is None else max(first - 1, 0)
        found[row] = iterates[at][row]
    return found


def second_wrong(run: Run, student: nn.Module, batch: Batch, seed: Tensor) -> Tensor:
    """Return BAT's iterates that are wrong for the second time, of an attack of its own."""
    attack, found = run.recipe.attack, batch.image.clone()
    iterates, wrong = bat_attack(run, student, batch, seed)
    for row in range(len(found)):
        times = [n for n in range(attack.steps) if wrong[n][row]]
        found[row] = iterates[times[1] if len(times) > 1 else attack.steps][row]
    return found


def bat_attack(run: Run, student: nn.Module, batch: Batch, seed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return every iterate of an attack as TRADES', the start first, and which images are wrong at each."""
    student.eval()
    attack, image = run.recipe.attack, batch.image
    iterates = [run.start(image, attack.eps, seed, "normal", clip=True)]
    own_BK, wrong = student(image).detach(), []
    for _ in range(attack.steps):
        at = iterates[-1].clone().requires_grad_()
        logits_BK = student(at)
        wrong.append(logits_BK.argmax(1) != batch.label)
        (grad,) = torch.autograd.grad(kl(logits_BK, own_BK).sum(), at)
        moved = at.detach() + attack.step * grad.sign()
        iterates.append(torch.min(torch.max(moved, image - attack.eps), image + attack.eps).clamp(0, 1))
    return iterates, wrong


@pytest.mark.parametrize("broken", [False, True])
def test_bat(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("bat:cifar10_resnet18", tmp_path, monkeypatch, **LEARNS)
    student, rates = run.student0, []
    optimizer = optimizer_of(student, 2e-4)
    uniform_BK = torch.full((8, CLASSES), 0.1, dtype=torch.float64)
    for epoch, batches in enumerate(run.batches, 1):
        set_rate(optimizer, 0.1 if epoch < 2 else 0.01)
        for batch in batches:
            last_clean = last_right(run, student, batch)
            first_adv = second_wrong(run, student, batch, batch.seed if broken else batch.seed + FAR)
            student.train()
            last_BK, adv_BK, clean_BK = student(last_clean), student(first_adv), student(batch.image)
            unsure = kl(uniform_BK, last_BK).mean() + kl(uniform_BK, adv_BK).mean()
            loss = 6 * kl(adv_BK, clean_BK).mean() + F.cross_entropy(last_BK, batch.label) + unsure
            take_step(optimizer, loss)
            rates.append(optimizer.param_groups[0]["lr"])
    compare(run, student, rates, broken)


class CfaAverage:
    """CFA's average of the epochs whose worst class withstands on held-out images, the first of them as it is."""

    def __init__(self, run: Run) -> None:
        self.run, self.values, self.taken = run, {}, []

    def look(self, student: nn.Module) -> None:
        """Take the student in, weights and statistics, or leave it out."""
        run, batch = self.run, held_batch(self.run)
        student.eval()
        attack = run.recipe.replace(attack_steps=10, attack_step=run.recipe.attack.eps / 4).attack
        start = run.start(batch.image, attack.eps, batch.seed, "uniform", clip=True)
        value = lambda at: F.cross_entropy(student(at), batch.label)  # noqa: E731
        adv = climb(batch.image, start, value, eps=attack.eps, step=attack.step, steps=attack.steps)
        right_B = (student(adv).argmax(1) == batch.label).double()
        worst = min(float(right_B[batch.label == k].mean()) for k in range(CLASSES))
        self.taken.append(worst >= run.recipe.optim.average_above)
        if not self.taken[-1]:
            return
        for name, value in student.state_dict().items():
            old = self.values.get(name, value)  # counts of batches are of no use: they are the newest
            self.values[name] = 0.88 * old + 0.12 * value if value.is_floating_point() else value.clone()


def withstood(adv_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return how many of each class's attacked images are right, (K,)."""
    return torch.bincount(label_B[adv_BK.argmax(1) == label_B], minlength=CLASSES).double()


@pytest.mark.parametrize("broken", [False, True])
def test_cfa_of_trades(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("cfa:cifar10_preact_resnet18", tmp_path, monkeypatch, eps=0.04, average_above=0.2, **CFA)
    attack, student, rates, average = run.recipe.attack, run.student0, [], CfaAverage(run)
    optimizer = optimizer_of(student, 5e-4)
    eps_K, share_K = (
        torch.full((CLASSES,), attack.eps, dtype=torch.float64),
        torch.full((CLASSES,), 6 / 7, dtype=torch.float64),
    )
    for epoch, batches in enumerate(run.batches, 1):
        set_rate(optimizer, 0.1 if epoch < 3 else 0.01)
        right_K = torch.zeros(CLASSES, dtype=torch.float64)
        for batch in batches:
            adv = away_from_itself(run, student, batch, eps_K[batch.label])
            student.train()
            clean_B = F.cross_entropy(student(batch.image), batch.label, reduction="none")
            adv_BK, share_B = student(adv), share_K[batch.label]
            again_BK = student(batch.image)
            take_step(optimizer, ((1 - share_B) * clean_B + share_B * kl(adv_BK, again_BK)).mean())
            right_K += withstood(adv_BK, batch.label)
            if not broken:
                student(batch.image)
            rates.append(optimizer.param_groups[0]["lr"])
        robust_K = right_K * CLASSES / sum(len(batch.label) for batch in batches)
        beta_K = (0.5 + robust_K) * 6
        eps_K, share_K = (0.5 + robust_K) * attack.eps, beta_K / (1 + beta_K)
        average.look(student)
    assert broken or average.taken == [False, True, True]
    values, ce_K = average.values, 1 - share_K
    compare(run, student, rates, broken, kept=values, margin=eps_K, ce_weight=ce_K, kl_weight=share_K)


@pytest.mark.parametrize("broken", [False, True])
def test_cfa_of_adversarial_training(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("cfa:cifar10_preact_resnet18_at", tmp_path, monkeypatch, eps=0.03, average_above=0.3, **CFA)
    attack, student, rates, average = run.recipe.attack, run.student0, [], CfaAverage(run)
    optimizer = optimizer_of(student, 5e-4)
    eps_K = torch.full((CLASSES,), attack.eps, dtype=torch.float64)
    for epoch, batches in enumerate(run.batches, 1):
        set_rate(optimizer, 0.1 if epoch < 3 else 0.01)
        right_K = torch.zeros(CLASSES, dtype=torch.float64)
        for batch in batches:
            student.train(not broken)  # the attack too moves the statistics
            eps_B = eps_K[batch.label]
            start = run.start(batch.image, eps_B, batch.seed, "uniform", clip=True)
            value = lambda at, label=batch.label: F.cross_entropy(student(at), label)  # noqa: E731
            adv = climb(batch.image, start, value, eps=eps_B, step=attack.step, steps=attack.steps)
            student.train()
            adv_BK = student(adv)
            take_step(optimizer, F.cross_entropy(adv_BK, batch.label))
            right_K += withstood(adv_BK, batch.label)
            student(batch.image)
            rates.append(optimizer.param_groups[0]["lr"])
        eps_K = (0.5 + right_K * CLASSES / sum(len(batch.label) for batch in batches)) * attack.eps
        average.look(student)
    assert broken or average.taken == [False, True, False]
    compare(run, student, rates, broken, kept=average.values, margin=eps_K)
