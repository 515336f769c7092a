"""TRADES: the loss by PyTorch's own terms, and its gradient through both predictions."""

import pytest
import torch
from torch.nn import functional as F

from retemper.engine import Targets
from retemper.recipes.trades import SETTINGS, Trades


def test_loss_and_gradients_are_the_authors() -> None:
    gen = torch.Generator().manual_seed(0)
    ours = {name: torch.randn(6, 5, generator=gen, requires_grad=True) for name in ("adv", "clean")}
    theirs = {name: value.detach().clone().requires_grad_() for name, value in ours.items()}
    label = torch.arange(6) % 5
    targets = Targets(label_B=label, own_BK=torch.zeros(6, 5), state={})
    loss = Trades().loss(ours, targets)
    robust = kl(theirs["adv"], theirs["clean"])
    expected = F.cross_entropy(theirs["clean"], label) + 6.0 * robust / 6
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


def kl(adv: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) = sum p (log p - log q), written out."""
    p = clean.softmax(1)
    return (p * (p.log() - adv.softmax(1).log())).sum()


def test_the_attack_leaves_the_students_own_prediction() -> None:
    own, adv = torch.randn(4, 5), torch.randn(4, 5)
    targets = Targets(label_B=torch.zeros(4, dtype=torch.int64), own_BK=own, state={})
    method = Trades()
    torch.testing.assert_close(method.objective(targets)(adv), kl(adv, own), rtol=1e-5, atol=1e-6)
    assert method.objective(targets)(own) < 1e-6


def test_the_full_setting_is_the_authors() -> None:
    recipe = SETTINGS["cifar10_wrn34_10"].recipe
    assert (recipe.attack.eps, recipe.attack.step, recipe.attack.steps) == (0.031, 0.007, 10)
    assert recipe.optim.epochs == 76
    assert recipe.method.forwards == ("clean", "adv")
    awp = SETTINGS["cifar10_wrn34_10_awp"].recipe
    assert (awp.attack.eps, awp.attack.step, awp.optim.weight_decay) == (8 / 255, 2 / 255, 5e-4)
    assert (awp.optim.awp_gamma, awp.optim.awp_from, awp.optim.epochs) == (0.005, 10, 200)
    assert [awp.optim.lr_at(epoch) for epoch in (99, 100, 150)] == pytest.approx([0.1, 0.01, 0.001])
