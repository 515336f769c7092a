"""MART: the loss written out in float64, what is boosted in it, and the authors' constants."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import Targets
from retemper.recipes.mart import SETTINGS, Mart, boosted_cross_entropy


def random_logits(rows: int = 9, classes: int = 6) -> tuple[dict[str, Tensor], Tensor]:
    gen = torch.Generator().manual_seed(0)
    logits = {name: 2 * torch.randn(rows, classes, generator=gen, dtype=torch.float64) for name in ("clean", "adv")}
    return logits, torch.arange(rows) % classes


def targets(label: Tensor) -> Targets:
    return Targets(label_B=label, state={})


def test_loss_is_the_formula_image_by_image() -> None:
    logits, label = random_logits()
    p, q = logits["clean"].softmax(1), logits["adv"].softmax(1)
    rows = []
    for i, y in enumerate(label.tolist()):
        runner_up = max(float(q[i, k]) for k in range(6) if k != y)
        bce = -q[i, y].log() - torch.log(torch.tensor(1.0001 - runner_up))
        rows.append(bce + 5 * (1 - p[i, y]) * (p[i] * (p[i] / q[i]).log()).sum())
    loss = Mart().loss(logits, targets(label))
    torch.testing.assert_close(loss.double(), torch.stack(rows).mean(), rtol=1e-5, atol=0)


def test_gradient_reaches_both_predictions() -> None:
    logits, label = random_logits()
    ours = {name: value.clone().requires_grad_() for name, value in logits.items()}
    Mart().loss(ours, targets(label)).backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in ours.values())


def test_a_certain_runner_up_costs_much_and_finitely() -> None:
    cost = boosted_cross_entropy(torch.tensor([[0.0, 200.0], [200.0, 0.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(cost, torch.tensor([200 + 9.2103, -0.0001]), rtol=1e-3, atol=1e-5)


def test_the_attack_raises_the_cross_entropy() -> None:
    logits, label = random_logits()
    raised = Mart().objective(targets(label))(logits["adv"])
    torch.testing.assert_close(raised, F.cross_entropy(logits["adv"], label, reduction="sum"))


def test_the_wide_network_has_the_constants_of_its_own_script() -> None:
    recipe = SETTINGS["cifar10_wrn34_10"].recipe
    assert (recipe.optim.weight_decay, recipe.optim.epochs, recipe.flat()["beta"]) == (7e-4, 90, 6.0)
    assert [recipe.optim.lr_at(epoch) for epoch in (74, 75, 90)] == pytest.approx([0.1, 0.01, 0.001])


def test_the_full_setting_is_the_authors() -> None:
    recipe = SETTINGS["cifar10_resnet18"].recipe
    assert (recipe.attack.eps, recipe.attack.step) == (0.031, 0.007)
    assert (recipe.attack.steps, recipe.attack.start) == (10, "normal")
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.epochs) == (0.01, 3.5e-3, 120)
    assert [round(recipe.optim.lr_at(epoch), 9) for epoch in (74, 75, 90, 100, 120)] == [0.01, 1e-3, 1e-4, 1e-5, 1e-5]
    assert recipe.method.forwards == ("clean", "adv")
