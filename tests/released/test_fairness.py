"""CFA, WAT, BAT and DAFA as their authors' scripts go, written out from the facts and held to runs of `released`.

Each reference is also broken in one place, and must then be told from the run. Dimension key: B batch, K classes.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Batch, Run, assert_same, free_run
from reference import climb
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
FAR = 2**62  # from the noise seed of BAT's first attack to that of its second
WHOLE: dict[str, Any] = dict(
    padding=0, flip=False
)  # digits that are cropped as CIFAR-10 is are not learned in 40 steps
CFA: dict[str, Any] = WHOLE | dict(calibrate_from=1, holdout_per_class=8, epochs=3, lr_drops=(2,))


@dataclass
class Script:
    """A script in the middle of its run: its student, its optimizer, and the learning rate of each step so far."""

    run: Run
    weight_decay: float
    nesterov: bool = False
    rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.student = deepcopy(self.run.student0)
        options: dict[str, Any] = dict(momentum=0.9, weight_decay=self.weight_decay, nesterov=self.nesterov)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1, **options)

    def epochs(self) -> Iterator[tuple[int, list[Batch]]]:
        """Yield the number of each epoch, from 1, and its batches; the rate falls once."""
        (last,) = self.run.recipe.optim.lr_drops
        for epoch, batches in enumerate(self.run.batches, 1):
            self.optimizer.param_groups[0]["lr"] = 0.1 if epoch <= last else 0.01
            yield epoch, batches

    def step(self, loss: Tensor) -> None:
        """Descend."""
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def trades_attack(self, batch: Batch, eps: Tensor | None = None, step: Tensor | None = None) -> Tensor:
        """Return the images that TRADES' attack finds; the student is left in eval mode."""
        self.student.eval()
        attack = self.run.recipe.attack
        radius, length = attack.eps if eps is None else eps, attack.step if step is None else step
        start = self.run.start(batch.image, radius, batch.seed, "normal", clip=False)
        own_BK = self.student(batch.image).detach()

        def value(adv: Tensor) -> Tensor:
            return kl(self.student(adv), own_BK).sum()

        return climb(batch.image, start, value, eps=radius, step=length, steps=attack.steps)


@dataclass
class End:
    """What a script has come to: its student, the class state by the names of ours, and what it keeps."""

    script: Script
    state: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] | None = None


def hold(run: Run, end: End, broken: End) -> None:
    """Hold the run to the end of its reference, and tell it from that of one with a mistake."""
    options: dict[str, Any] = dict(kept=end.kept, class_state=end.state or None, lr=end.script.rates)
    assert assert_same(run, end.script.student, **options) < 1e-12
    with pytest.raises(AssertionError, match=r"conv1|num_batches"):
        assert_same(run, broken.script.student)


def kl(adv_BK: Tensor, clean_BK: Tensor) -> Tensor:
    """Return KL(clean || attacked) of each image, (B,)."""
    return F.kl_div(adv_BK.log_softmax(1), clean_BK.softmax(1), reduction="none").sum(1)


def pgd(student: nn.Module, start: Tensor, image: Tensor, label_B: Tensor, **lengths: Any) -> Tensor:
    """Return where PGD on the cross-entropy leads, the student in the mode in which it is."""
    return climb(image, start, lambda at: F.cross_entropy(student(at), label_B), **lengths)


def of_each_class(value: float) -> Tensor:
    return torch.full((CLASSES,), value, dtype=torch.float64)


def held_batch(run: Run) -> Batch:
    """Return the held-out images as one batch, with the seed that the engine's attacks on them begin with."""
    assert run.held is not None and len(run.held[1]) <= 256
    return Batch(*run.held, seed=torch.zeros(1, dtype=torch.int64))


def traded(mean_KK: Tensor) -> Tensor:
    """Return DAFA's weights of the classes, pair by pair."""
    weight_K = of_each_class(1.0)
    for i in range(CLASSES):
        for j in range(CLASSES):
            if i != j and mean_KK[i, i] < mean_KK[j, j]:
                weight_K[i] += mean_KK[i, j] * mean_KK[j, j]
            elif i != j:
                weight_K[i] -= mean_KK[j, i] * mean_KK[i, i]
    return weight_K


def dafa(run: Run, *, nesterov: bool = True) -> End:
    script, attack, weight_K = Script(run, 5e-4, nesterov), run.recipe.attack, of_each_class(1.0)
    for epoch, batches in script.epochs():
        seen: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            weight_B = weight_K[batch.label]
            adv = script.trades_attack(batch, attack.eps * weight_B, attack.step * weight_B)
            script.student.train()
            adv_BK, clean_BK = script.student(adv), script.student(batch.image)
            clean_B = weight_B * F.cross_entropy(clean_BK, batch.label, reduction="none")
            script.step(clean_B.mean() + 6 * kl(adv_BK, clean_BK).mean())
            seen.append((adv_BK.detach().softmax(1), batch.label))
        if epoch == 1:
            p_BK, label_B = (torch.cat(found) for found in zip(*seen, strict=True))
            weight_K = traded(torch.stack([p_BK[label_B == k].mean(0) for k in range(CLASSES)]))
    return End(script, {"class_weight": weight_K})


def test_dafa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("dafa:cifar10_resnet18", tmp_path, monkeypatch, warm_up=1, **WHOLE)
    assert run.held is None
    hold(run, dafa(run), broken=dafa(run, nesterov=False))


def wat_costs(script: Script, *, full_batches: bool) -> Tensor:
    """Return what the held-out images cost, by class and in their mean: (K + 1,).

    WAT divides the sums by batches of the script's size, as if the last one were full.
    """
    batch, size = held_batch(script.run), script.run.recipe.optim.batch_size
    adv = script.trades_attack(batch)
    with torch.no_grad():
        clean_BK, adv_BK = script.student(batch.image), script.student(adv)
    cost_B = F.cross_entropy(clean_BK, batch.label, reduction="none") + 6 * kl(adv_BK, clean_BK)
    sums = [cost_B[batch.label == k].sum() for k in range(CLASSES)]
    images = math.ceil(len(cost_B) / size) * size if full_batches else len(cost_B)
    return torch.stack([*sums, cost_B.sum() / CLASSES]) / images * CLASSES


def wat(run: Run, *, full_batches: bool = True) -> End:
    script, costs = Script(run, 2e-4), torch.zeros(CLASSES + 1, dtype=torch.float64)
    weight = torch.ones_like(costs)
    for _, batches in script.epochs():
        for batch in batches:
            adv = script.trades_attack(batch)
            script.student.train()
            clean_BK, adv_BK = script.student(batch.image), script.student(adv)
            clean_B, robust_B = F.cross_entropy(clean_BK, batch.label, reduction="none"), kl(adv_BK, clean_BK)
            own = sum((clean_B + 6 * robust_B)[batch.label == k].sum() * weight[k] for k in range(CLASSES))
            mean = clean_B.mean() + 6 * robust_B.mean()
            script.step(own / len(batch.label) + weight[CLASSES] * mean)
        costs = costs + wat_costs(script, full_batches=full_batches)
        factor = (0.1 * costs).exp()
        weight = CLASSES * factor / factor.sum()
    return End(script, {"loss_so_far": costs[:-1], "class_weight": weight[:-1], "mean_weight": weight[-1:]})


def test_wat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("wat:cifar10_resnet18", tmp_path, monkeypatch, holdout_per_class=5, **WHOLE)
    hold(run, wat(run), broken=wat(run, full_batches=False))


def bat_attack(script: Script, batch: Batch, seed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return every iterate of an attack as TRADES', the start first, and which images are wrong at each."""
    script.student.eval()
    attack, image = script.run.recipe.attack, batch.image
    iterates = [script.run.start(image, attack.eps, seed, "normal", clip=True)]
    own_BK, wrong = script.student(image).detach(), []
    for _ in range(attack.steps):
        at = iterates[-1].clone().requires_grad_()
        logits_BK = script.student(at)
        wrong.append(logits_BK.argmax(1) != batch.label)
        (grad,) = torch.autograd.grad(kl(logits_BK, own_BK).sum(), at)
        moved = at.detach() + attack.step * grad.sign()
        iterates.append(torch.min(torch.max(moved, image - attack.eps), image + attack.eps).clamp(0, 1))
    return iterates, wrong


def last_right(iterates: list[Tensor], wrong: list[Tensor]) -> Tensor:
    """Return the iterate of each image before the first that is wrong; the start, or the last, where there is none."""
    found = iterates[-1].clone()
    for row in range(len(found)):
        times = [n for n, wrong_B in enumerate(wrong) if wrong_B[row]]
        if times:
            found[row] = iterates[max(times[0] - 1, 0)][row]
    return found


def second_wrong(iterates: list[Tensor], wrong: list[Tensor]) -> Tensor:
    """Return the second iterate of each image that is wrong; the last, where there is none."""
    found = iterates[-1].clone()
    for row in range(len(found)):
        times = [n for n, wrong_B in enumerate(wrong) if wrong_B[row]]
        if len(times) > 1:
            found[row] = iterates[times[1]][row]
    return found


def bat(run: Run, *, apart: int = FAR) -> End:
    script = Script(run, 2e-4)
    for _, batches in script.epochs():
        for batch in batches:
            last_clean = last_right(*bat_attack(script, batch, batch.seed))
            first_adv = second_wrong(*bat_attack(script, batch, batch.seed + apart))
            script.student.train()
            last_BK, adv_BK, clean_BK = (script.student(image) for image in (last_clean, first_adv, batch.image))
            uniform_BK = torch.full_like(last_BK, 0.1)
            unsure = kl(uniform_BK, last_BK).mean() + kl(uniform_BK, adv_BK).mean()
            script.step(6 * kl(adv_BK, clean_BK).mean() + F.cross_entropy(last_BK, batch.label) + unsure)
    return End(script)


def test_bat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("bat:cifar10_resnet18", tmp_path, monkeypatch, **WHOLE)
    assert run.held is None
    hold(run, bat(run), broken=bat(run, apart=0))


class CfaAverage:
    """CFA's average of the epochs whose worst class withstands on held-out images, the first of them as it is."""

    def __init__(self, run: Run) -> None:
        self.run, self.values, self.worst = run, {}, []

    def look(self, student: nn.Module) -> None:
        """Take the student in, weights and statistics, or leave it out."""
        run, batch = self.run, held_batch(self.run)
        student.eval()
        eps = run.recipe.attack.eps
        start = run.start(batch.image, eps, batch.seed, "uniform", clip=True)
        adv = pgd(student, start, batch.image, batch.label, eps=eps, step=eps / 4, steps=10)
        right_K = withstood(student(adv), batch.label) / torch.bincount(batch.label, minlength=CLASSES)
        self.worst.append(float(right_K.min()))
        if self.worst[-1] < run.recipe.optim.average_above:
            return
        for name, value in student.state_dict().items():
            old = self.values.get(name, value)  # counts of batches are of no use: they are the newest
            self.values[name] = 0.88 * old + 0.12 * value if value.is_floating_point() else value.clone()


def withstood(adv_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return how many of each class's attacked images are right, (K,)."""
    return torch.bincount(label_B[adv_BK.argmax(1) == label_B], minlength=CLASSES).double()


def cfa_of_trades(run: Run, average: CfaAverage, *, after: bool = True) -> End:
    script, eps = Script(run, 5e-4), run.recipe.attack.eps
    eps_K, share_K = of_each_class(eps), of_each_class(6 / 7)
    for _, batches in script.epochs():
        right_K = of_each_class(0.0)
        for batch in batches:
            adv = script.trades_attack(batch, eps_K[batch.label])
            script.student.train()
            clean_B = F.cross_entropy(script.student(batch.image), batch.label, reduction="none")
            adv_BK, share_B = script.student(adv), share_K[batch.label]
            robust_B = kl(adv_BK, script.student(batch.image))
            script.step(((1 - share_B) * clean_B + share_B * robust_B).mean())
            right_K += withstood(adv_BK, batch.label)
            if after:
                script.student(batch.image)
        robust_K = right_K * CLASSES / sum(len(batch.label) for batch in batches)
        beta_K = (0.5 + robust_K) * 6
        eps_K, share_K = (0.5 + robust_K) * eps, beta_K / (1 + beta_K)
        average.look(script.student)
    state = {"margin": eps_K, "ce_weight": 1 - share_K, "kl_weight": share_K}
    return End(script, state, average.values or script.student.state_dict())


def run_that_skips(name: str, script: Callable[..., End], out: Path, patch: pytest.MonkeyPatch, **options: Any) -> Run:
    """Return a run whose average skips some epochs: its bound lies between those of the least and the best protected.

    The bound is measured, in a run that is the same but for it: how fast a class is learned depends on the processor.
    """
    with patch.context() as once:
        probe = free_run(name, out / "probe", once, average_above=1e-9, **options)
    average = CfaAverage(probe)
    script(probe, average)
    return free_run(name, out, patch, average_above=(min(average.worst) + max(average.worst)) / 2, **options)


def test_cfa_of_trades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "cfa:cifar10_preact_resnet18"
    run = run_that_skips(name, cfa_of_trades, tmp_path, monkeypatch, eps=0.04, **CFA)
    hold(run, cfa_of_trades(run, CfaAverage(run)), broken=cfa_of_trades(run, CfaAverage(run), after=False))


def cfa_of_at(run: Run, average: CfaAverage, *, attack_in_training: bool = True) -> End:
    script, attack, eps_K = Script(run, 5e-4), run.recipe.attack, of_each_class(run.recipe.attack.eps)
    student = script.student
    for _, batches in script.epochs():
        right_K = of_each_class(0.0)
        for image, label, seed in ((batch.image, batch.label, batch.seed) for batch in batches):
            student.train(attack_in_training)  # there, the attack too moves the statistics
            start = run.start(image, eps_K[label], seed, "uniform", clip=True)
            adv = pgd(student, start, image, label, eps=eps_K[label], step=attack.step, steps=attack.steps)
            student.train()
            adv_BK = student(adv)
            script.step(F.cross_entropy(adv_BK, label))
            right_K += withstood(adv_BK, label)
            student(image)
        eps_K = (0.5 + right_K * CLASSES / sum(len(batch.label) for batch in batches)) * attack.eps
        average.look(student)
    return End(script, {"margin": eps_K}, average.values or student.state_dict())


def test_cfa_of_adversarial_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "cfa:cifar10_preact_resnet18_at"
    run = run_that_skips(name, cfa_of_at, tmp_path, monkeypatch, eps=0.03, **CFA)
    hold(run, cfa_of_at(run, CfaAverage(run)), broken=cfa_of_at(run, CfaAverage(run), attack_in_training=False))
