"""ADR: corrected labels, ramps and both losses in float64, the attack's gradient, and the authors' constants."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import KlObjective, Recipe, Targets
from retemper.recipes.adr import AUTHORS, SETTINGS, Adr, AdrTrades, annealed, trust_in_label
from retemper.recipes.sat import ATTACK


def of(kind: type, **options: Any) -> Recipe:
    return Recipe.of(kind, **AUTHORS, dataset="digits", student="tiny_resnet", **options)


def batch(progress: float) -> tuple[dict[str, Tensor], Targets]:
    gen = torch.Generator().manual_seed(0)
    clean, adv, average, own = 3 * torch.randn(4, 40, 5, generator=gen, dtype=torch.float64)
    average[0] = torch.tensor([90, -90, 0, 0, 0])  # certain, of another class than the label: l is 0
    label = torch.randint(5, (40,), generator=gen)
    label[0], share = 1, torch.tensor(progress, dtype=torch.float64)
    logits = {"clean": clean.requires_grad_(), "adv": adv.requires_grad_()}
    return logits, Targets(label_B=label, average_BK=average, own_BK=own, progress=share, state={})


def corrected(targets: Targets) -> Tensor:
    """The labels by the formula, of the constants for CIFAR-10, a row at a time."""
    assert targets.average_BK is not None and targets.progress is not None
    ramp = (1 + math.cos(math.pi * float(targets.progress))) / 2
    tau, mixing = 2.0 + 0.5 * ramp, 0.95 - 0.25 * ramp
    rows = []
    for logits, label in zip(targets.average_BK, targets.label_B.tolist(), strict=True):
        p = (logits / tau).exp() / (logits / tau).exp().sum()
        share = min(1.0, max(0.0, mixing - float(p.max() - p[label])))
        rows.append(share * p + (1 - share) * F.one_hot(torch.tensor(label), 5))
    return torch.stack(rows)


def test_the_ramps_are_half_a_cosine() -> None:
    for progress, expected in ((0.0, 2.5), (1 / 3, 2.375), (0.5, 2.25), (1.0, 2.0)):
        found = annealed(2.5, 2.0, torch.tensor(progress, dtype=torch.float64))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_label_is_trusted_where_the_average_is_wrong() -> None:
    average = torch.tensor([[2.0, 2.0, -40.0], [40.0, 0.0, 0.0], [1.0, 0.0, -90.0]]).double()
    tau, mixing = torch.tensor(1.0).double(), torch.tensor(0.9).double()
    found = trust_in_label(average, torch.tensor([1, 1, 1]), tau, mixing)
    p = 1 / (1 + math.e)  # of the label in the last row
    torch.testing.assert_close(found, torch.tensor([0.1, 1.0, 0.1 + (1 - p) - p]).double())
    assert (trust_in_label(average, torch.tensor([0, 0, 0]), tau, torch.tensor(1.5).double()) == 0).all()


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.999])
def test_the_loss_is_the_cross_entropy_of_the_corrected_labels_but_for_their_entropy(progress: float) -> None:
    logits, targets = batch(progress)
    rho = corrected(targets)
    expected = -(rho * logits["adv"].log_softmax(1)).sum(1).mean()
    loss = of(Adr).method.loss(logits, targets)
    torch.testing.assert_close(loss, expected + torch.xlogy(rho, rho).sum(1).mean())
    found, wanted = (torch.autograd.grad(one, logits["adv"])[0] for one in (loss, expected))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(rho[0], F.one_hot(torch.tensor(1), 5))


def test_the_attack_raises_that_cross_entropy() -> None:
    logits, targets = batch(0.3)
    objective = of(Adr).method.objective(targets)
    assert isinstance(objective, KlObjective) and not objective.claims(logits["adv"])[-1][0].logical_not()
    expected = -(corrected(targets) * logits["adv"].log_softmax(1)).sum()
    (wanted,) = torch.autograd.grad(expected, logits["adv"])
    torch.testing.assert_close(objective.gradient(logits["adv"].detach()), wanted)
    torch.testing.assert_close(torch.autograd.grad(objective(logits["adv"]), logits["adv"])[0], wanted)


def test_with_trades_the_clean_cross_entropy_alone_is_corrected() -> None:
    logits, targets = batch(0.6)
    rho, log_p, log_q = corrected(targets), logits["clean"].log_softmax(1), logits["adv"].log_softmax(1)
    pull = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    expected = -(rho * log_p).sum(1).mean() + 6 * pull
    method = of(AdrTrades).method
    loss = method.loss(logits, targets)
    torch.testing.assert_close(loss, expected + torch.xlogy(rho, rho).sum(1).mean())
    leaves = [logits["clean"], logits["adv"]]
    for found, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, wanted)
    objective = method.objective(targets)
    assert isinstance(objective, KlObjective) and targets.own_BK is not None
    assert torch.equal(objective.teacher, targets.own_BK) and objective.row_trust is None


def test_the_full_settings_are_the_authors() -> None:
    recipe = SETTINGS["cifar10_resnet18"].recipe
    optim, attack = recipe.optim, recipe.attack
    assert (optim.average, optim.average_every, optim.ema_decay, optim.average_from) == ("ema", "step", 0.995, 1)
    assert (optim.epochs, optim.lr, optim.lr_drops, optim.lr_factor) == (200, 0.1, (100, 150), 0.1)
    assert (optim.nesterov, optim.momentum, optim.weight_decay, optim.awp_gamma) == (True, 0.9, 5e-4, 0)
    assert (attack.eps, attack.step, attack.steps) == (8 / 255, 2 / 255, 10)
    assert {name: getattr(attack, name) for name in ("start", "clip_start", "bn_mode")} == {
        "start": ATTACK["attack_start"], "clip_start": ATTACK["clip_start"], "bn_mode": ATTACK["attack_bn"]
    }  # fmt: skip
    constants = {
        "cifar10_resnet18": (2.5, 2.0, 0.7, 0.95),
        "cifar10_resnet18_trades": (2.5, 2.0, 0.7, 0.95),
        "cifar100_resnet18": (1.5, 1.0, 0.7, 0.95),
        "tiny_imagenet_preact_resnet18": (2.0, 1.5, 0.5, 0.9),
        "cifar10_resnet18_awp": (2.5, 1.5, 0.7, 0.85),
        "cifar100_resnet18_awp": (2.0, 1.0, 0.7, 0.85),
    }
    for name, expected in constants.items():
        method: Any = SETTINGS[name].recipe.method
        ends = (method.temperature_start, method.temperature_end, method.mixing_start, method.mixing_end)
        assert ends == expected, name
    perturbed = SETTINGS["cifar10_resnet18_awp"].recipe.optim
    assert (perturbed.awp_gamma, perturbed.nesterov, perturbed.awp_decay) == (0.005, False, "own")


SCRIPT = {"variant": "released", "normalise": True, "select_on": "test", "select_by": "robust", "select_steps": 10}
SCRIPT |= {"select_every": 1, "precision": "fp32"}


@pytest.mark.parametrize(("name", "more"), [("", {}), ("_trades", {"joint": True, "attack_bn": "train"})])
def test_variants_differ_as_stated(name: str, more: dict[str, Any]) -> None:
    paper = SETTINGS[f"cifar10_resnet18{name}"].recipe
    one, other = paper.flat(), paper.as_variant("released").flat()
    assert {name: other[name] for name in one if one[name] != other[name]} == SCRIPT | more
