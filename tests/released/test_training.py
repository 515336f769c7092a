"""SAT, TRADES, MART, FRL and FAAL: free steps of the variant `released` end where the authors' scripts end.

The scripts are train_cifar.py of locuslab/robust_overfitting, trades.py and train_trades_cifar10.py of TRADES (by
yaodongyu), train_trades_cifar.py of csdongxian/AWP (trades_AWP), mart.py of YisenWang/MART, frlrmrw.py, frlrw.py and
utils_frl2.py of hannxu123/fair_robust, ft_prn.py, FAAL.py and utils_awp.py of TrustAI/FAAL. Each reference is one step
of theirs, in the order of their lines. Dimension key: B batch, K classes.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driver import Batch, Run, assert_same, free_run
from reference import climb
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F

Attack = Callable[[nn.Module, Batch], Tensor]  # (student, batch) to the attacked images
Loss = Callable[[nn.Module, Batch, Tensor], Tensor]  # (network in training mode, batch, attacked images) to a scalar


def on_label(run: Run) -> Attack:
    """Return the attack on the cross-entropy, from the start that the run draws; the student's mode is left alone."""
    own = run.recipe.attack

    def attack(student: nn.Module, batch: Batch) -> Tensor:
        value = partial(cross_entropy, student, batch)
        return climb(batch.image, started(run, batch), value, eps=own.eps, step=own.step, steps=own.steps)

    return attack


def on_prediction(run: Run) -> Attack:
    """Return the attack on the divergence from the student's prediction, as `on_label`."""
    own = run.recipe.attack

    def attack(student: nn.Module, batch: Batch) -> Tensor:
        value = partial(away, student, batch)
        return climb(batch.image, started(run, batch), value, eps=own.eps, step=own.step, steps=own.steps)

    return attack


def cross_entropy(student: nn.Module, batch: Batch, adv: Tensor) -> Tensor:
    """Return the mean cross-entropy of attacked images."""
    return F.cross_entropy(student(adv), batch.label)


def away(student: nn.Module, batch: Batch, adv: Tensor) -> Tensor:
    """Return how far the student's answers to attacked images lie from those to the clean ones, summed."""
    return divergence(student(adv), student(batch.image))


def started(run: Run, batch: Batch) -> Tensor:
    attack = run.recipe.attack
    return run.start(batch.image, attack.eps, batch.seed, attack.start, attack.clip_start)


def divergence(adv_BK: Tensor, clean_BK: Tensor, reduction: str = "sum") -> Tensor:
    """Return KL(softmax(clean) || softmax(adv))."""
    return F.kl_div(adv_BK.log_softmax(1), clean_BK.softmax(1), reduction=reduction)


def replay(
    run: Run,
    attack: Attack,
    loss: Loss,
    *,
    uphill: Loss | None = None,
    around: Callable[[int, nn.Module], None] = lambda epoch, student: None,
) -> tuple[nn.Module, list[float]]:
    """Train as the scripts do whose rate falls between epochs; return the student and the rate of each step.

    Args:
        uphill: the loss that AWP climbs, where it is taken.
        around: is called before each epoch, with its number from 1, and after the last.
    """
    optim, student, rates = run.recipe.optim, run.student0, []
    optimizer = torch.optim.SGD(student.parameters(), lr=optim.lr, momentum=0.9, weight_decay=optim.weight_decay)
    for epoch, batches in enumerate(run.batches, 1):
        optimizer.param_groups[0]["lr"] = optim.lr * 0.1 ** sum(epoch > drop for drop in optim.lr_drops)
        around(epoch, student)
        for batch in batches:
            student.eval()
            adv = attack(student, batch)
            student.train()
            moves: list[Tensor] = []
            if uphill is not None and epoch >= optim.awp_from:
                moves = weight_moves(student, optim.awp_gamma, lambda net, b=batch, x=adv: uphill(net, b, x))
            shift(student, moves, 1)
            optimizer.zero_grad()
            loss(student, batch, adv).backward()
            optimizer.step()
            shift(student, moves, -1)
            rates.append(optimizer.param_groups[0]["lr"])
    around(len(run.batches) + 1, student)
    return student, rates


def weight_moves(student: nn.Module, gamma: float, loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """Return what AWP adds to each parameter: the way of one SGD step uphill of a copy, as long as gamma says."""
    proxy, moves = copy.deepcopy(student).train(), []
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.1)
    optimizer.zero_grad()
    (-loss(proxy)).backward()
    optimizer.step()
    for old, new in zip(student.parameters(), proxy.parameters(), strict=True):
        way = (new - old).detach()
        moves.append(gamma * old.detach().norm() / (way.norm() + 1e-20) * way if old.dim() > 1 else 0 * way)
    return moves


@torch.no_grad()
def shift(student: nn.Module, moves: list[Tensor], sign: int) -> None:
    """Add the moves to the parameters, or take them away; of no moves, neither."""
    for parameter, move in zip(student.parameters(), moves, strict=False):
        parameter.add_(sign * move)


def test_sat_is_rices_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, short = "sat:cifar10_preact_resnet18", dict[str, Any](epochs=4, images_per_class=8)
    run = free_run(name, tmp_path, monkeypatch, lr_drops=(2, 3), **short)  # half and 3/4 of the way, as 100 and 150
    student, attack, rates, best, accuracy = run.student0, on_label(run), [], 0, 0.0
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch, batches in enumerate(run.batches):
        student.train()  # in the attack too
        for number, batch in enumerate(batches, 1):
            passed = (epoch + number / len(batches)) / len(run.batches)
            rates.append(0.1 if passed < 0.5 else 0.01 if passed < 0.75 else 0.001)
            optimizer.param_groups[0]["lr"] = rates[-1]
            adv = attack(student, batch)
            student(adv)  # the attack's last look, at what it keeps
            loss = F.cross_entropy(student(adv), batch.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            student(batch.image)  # for the log
        student.eval()
        if (found := robust_accuracy(run, student)) > accuracy:
            best, accuracy = epoch + 1, found
    assert len(rates) == 40 and assert_same(run, student, lr=rates) < 1e-10
    assert run.best_epoch == best


def robust_accuracy(run: Run, student: nn.Module) -> float:
    """Return the share of the test images that are right under PGD-10, from the starts that the run draws."""
    assert run.judged is not None
    attack, right = run.recipe.attack, 0
    for first in range(0, len(run.judged[1]), 256):
        image, label = (whole[first : first + 256] for whole in run.judged)
        batch = Batch(image, label, torch.tensor([first]))
        start = run.start(batch.image, attack.eps, batch.seed, "uniform", True)
        value = partial(cross_entropy, student, batch)
        adv = climb(batch.image, start, value, eps=attack.eps, step=2 / 255, steps=10)
        right += int((student(adv).argmax(1) == batch.label).sum())
    return right / len(run.judged[1])


def test_trades_looks_at_the_clean_images_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("trades:cifar10_wrn34_10", tmp_path, monkeypatch)

    def loss(student: nn.Module, batch: Batch, adv: Tensor) -> Tensor:
        natural = F.cross_entropy(student(batch.image), batch.label)
        return natural + 6.0 * divergence(student(adv), student(batch.image)) / len(adv)

    student, rates = replay(run, on_prediction(run), loss)
    assert run.best_epoch == 2  # the last
    assert assert_same(run, student, kept=student, lr=rates) < 1e-10


@pytest.mark.parametrize("begins", [1, 2])
def test_trades_awp_steps_from_the_perturbed_weights(
    begins: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = free_run("trades:cifar10_wrn34_10_awp", tmp_path, monkeypatch, awp_from=begins)

    def loss(student: nn.Module, batch: Batch, adv: Tensor) -> Tensor:
        robust = divergence(student(adv), student(batch.image), "batchmean")
        return F.cross_entropy(student(batch.image), batch.label) + 6.0 * robust

    student, rates = replay(run, on_prediction(run), loss, uphill=loss)
    assert run.best_epoch == 2
    assert assert_same(run, student, kept=student, lr=rates) < 1e-10


@pytest.mark.parametrize(("setting", "beta"), [("cifar10_resnet18", 5.0), ("cifar10_wrn34_10", 6.0)])
def test_mart(setting: str, beta: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run(f"mart:{setting}", tmp_path, monkeypatch)

    def loss(student: nn.Module, batch: Batch, adv: Tensor) -> Tensor:
        label = batch.label
        clean_BK, adv_BK = student(batch.image), student(adv)
        prob_BK, order = adv_BK.softmax(1), adv_BK.softmax(1).argsort(1)
        other = torch.where(order[:, -1] == label, order[:, -2], order[:, -1])
        boosted = F.cross_entropy(adv_BK, label) + F.nll_loss((1.0001 - prob_BK + 1e-12).log(), other)
        own_BK = clean_BK.softmax(1)
        each = F.kl_div((prob_BK + 1e-12).log(), own_BK, reduction="none").sum(1)
        robust = (each * (1.0000001 - own_BK[range(len(label)), label])).sum() / len(label)
        return boosted + beta * robust

    student, rates = replay(run, on_label(run), loss)
    assert run.best_epoch == 2
    assert assert_same(run, student, kept=student, lr=rates) < 1e-10


class Frl:
    """The multipliers of FRL and how they move, as frl_train has them; margins only where `rate2` says so."""

    def __init__(self, run: Run, delta: float, rate2: float) -> None:
        self.run, self.delta, self.rate1, self.rate2 = run, delta, 0.05, rate2
        self.halves_every = run.recipe.flat()["rate_halves_every"]
        self.lam0, self.lam1, self.lam2 = torch.zeros(3, 10, dtype=torch.float64)

    def move(self, epoch: int, student: nn.Module) -> None:
        """Move them before an epoch by the student's errors on held-out images."""
        if epoch % self.halves_every == 0:
            self.rate1 /= 2
        clean, robust = self.accuracies(student)
        gamma0 = (1 - clean) - (1 - clean.mean()) - self.delta
        gamma1 = (clean - robust) - (clean.mean() - robust.mean()) - self.delta
        self.lam0 = self.simplex(self.lam0 + self.rate1 * gamma0)
        self.lam1 = self.simplex(self.lam1 + self.rate1 * 2 * gamma1)
        self.lam2 = self.lam2 + self.rate2 * gamma1

    def accuracies(self, student: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the share of each class's held-out images that is right, clean and under PGD-20."""
        (image, label), eps = self.run.held or (None, None), self.run.recipe.attack.eps
        assert image is not None and label is not None
        student.eval()
        start = self.run.start(image, eps, torch.tensor([0]), "uniform", True)
        value = partial(cross_entropy, student, Batch(image, label, torch.tensor([0])))
        adv = climb(image, start, value, eps=eps, step=eps / 4, steps=20)
        right = [(student(x).argmax(1) == label).double() for x in (image, adv)]
        clean, robust = (torch.stack([one[label == k].mean() for k in range(10)]) for one in right)
        return clean, robust

    @staticmethod
    def simplex(lam: Tensor) -> Tensor:
        lam = lam.clamp(min=0)
        return 0.5 * lam / lam.sum() if lam.sum() > 0.5 else lam

    @staticmethod
    def weight(lam: Tensor) -> Tensor:
        return torch.stack([0.1 + 0.9 * lam[k] - 0.1 * (lam.sum() - lam[k]) for k in range(10)])

    def attack(self, student: nn.Module, batch: Batch) -> Tensor:
        own, factor_K = self.run.recipe.attack, (2 * self.lam2).exp().clamp(0.98, 3)
        eps = own.eps * factor_K[batch.label]
        value = partial(away, student, batch)
        return climb(batch.image, started(self.run, batch), value, eps=eps, step=eps.max() / 4, steps=own.steps)

    def loss(self, student: nn.Module, batch: Batch, adv: Tensor) -> Tensor:
        label = batch.label
        w0, w1 = self.weight(self.lam0)[label], self.weight(self.lam1)[label]
        natural = F.cross_entropy(student(batch.image), label, reduction="none")
        boundary = divergence(student(adv), student(batch.image), "none").sum(1)
        return (natural * w0).sum() / w0.sum() + 1.5 * (boundary * w1).sum() / w1.sum()


@pytest.mark.parametrize(("variant", "delta", "rate2"), [("released", 0.07, 0.2), ("released-reweight", 0.1, 0.0)])
def test_frl(variant: str, delta: float, rate2: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short: dict[str, Any] = dict(lr=0.01, rate_halves_every=2, select_from=10_000)
    run = free_run("frl:cifar10_preact_resnet18", tmp_path, monkeypatch, variant, **short)
    theirs = Frl(run, delta, rate2)
    student, rates = replay(run, theirs.attack, theirs.loss, around=theirs.move)
    assert run.best_epoch == 2
    moved = {"clean": theirs.lam0, "boundary": theirs.lam1, "margin": theirs.lam2}
    state = {f"multiplier_{name}": value for name, value in moved.items()}
    assert state["multiplier_clean"].max() > 0 and (rate2 == 0 or state["multiplier_margin"].abs().max() > 0)
    assert assert_same(run, student, kept=student, class_state=state, lr=rates) < 1e-10


def worst_distribution(value_K: np.ndarray, radius: float) -> np.ndarray:
    """Return the p that makes p . value largest with KL(U || p) <= radius, by the conditions of Karush, Kuhn, Tucker.

    They say that p[k] is in proportion to 1 / (nu - value[k]), and the KL is the radius.
    """
    gap_K = value_K.max() - value_K
    if not gap_K.any():
        return np.full(len(gap_K), 1 / len(gap_K))

    def distribution(log_nu: float) -> np.ndarray:
        p_K = 1 / (np.exp(log_nu) + gap_K)
        return p_K / p_K.sum()

    def excess(log_nu: float) -> float:
        return -np.log(len(gap_K) * distribution(log_nu)).mean() - radius

    return distribution(brentq(excess, -60.0, 40.0, xtol=1e-15, rtol=1e-15))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("gamma", [0.0, 0.005])
def test_faal(gamma: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = free_run("faal:cifar10_preact_resnet18", tmp_path, monkeypatch, awp_gamma=gamma)

    def loss(student: nn.Module, batch: Batch, adv: Tensor) -> Tensor:
        adv_BK, label = student(adv), batch.label
        student(batch.image)  # for the script's TRADES and MART losses
        weight_K = torch.from_numpy(worst_distribution(class_values(adv_BK.detach(), label), 0.5))
        return (F.cross_entropy(adv_BK, label, reduction="none") * weight_K[label]).sum() * 10 / len(label)

    student, rates = replay(run, on_label(run), loss, uphill=cross_entropy if gamma else None)
    assert assert_same(run, student, lr=rates) < 1e-10


def class_values(logits_BK: Tensor, label_B: Tensor) -> np.ndarray:
    """Return what the script's objective multiplies each p[k] by: the mean margin of class k, once for each image."""
    prob_BK = logits_BK.softmax(1)
    total = np.zeros(10)
    for k in range(10):
        own = prob_BK[label_B == k]
        margins = [float(max(row[j] for j in range(10) if j != k) - row[k]) for row in own]
        total[k] = len(margins) * np.mean(margins) if margins else 0.0
    return total
