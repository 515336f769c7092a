"""FAAL: the worst distribution against a general solver and its own conditions, margins, loss, and the variants."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from retemper.engine import Targets
from retemper.recipes.faal import SETTINGS, Faal, class_margin, worst_distribution


def divergence(p: torch.Tensor) -> float:
    """Return KL(U || p)."""
    return float(-(len(p) * p.double()).log().mean())


def solved(margin: np.ndarray, radius: float) -> np.ndarray:
    """Return max p . margin on the simplex with KL(U || p) <= radius, by sequential quadratic programming."""
    size = len(margin)
    found = minimize(
        lambda p: -p @ margin,
        np.full(size, 1 / size),
        jac=lambda p: -margin,
        bounds=[(1e-6, 1)] * size,
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1},
            {"type": "ineq", "fun": lambda p: radius + np.log(size * p).mean()},
        ],
        options={"ftol": 1e-10, "maxiter": 500},
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("radius", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("classes", [3, 10])
def test_the_distribution_is_the_one_a_solver_finds(classes: int, radius: float) -> None:
    margin = np.random.default_rng(classes).uniform(-1, 1, classes)
    ours = worst_distribution(torch.tensor(margin), radius)
    np.testing.assert_allclose(ours.numpy(), solved(margin, radius), atol=2e-4)


@pytest.mark.parametrize("radius", [0.01, 0.5, 3.0])
def test_in_float64_the_radius_is_met_to_rounding(radius: float) -> None:
    margin = torch.randn(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert divergence(worst_distribution(margin, radius)) == pytest.approx(radius, abs=1e-12)


@pytest.mark.parametrize("radius", [1e-3, 0.5, 3.0])
@pytest.mark.parametrize("classes", [2, 10, 200])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_it_uses_the_whole_radius_and_prefers_the_worst(classes: int, radius: float, scale: float) -> None:
    margin = scale * torch.randn(classes, generator=torch.Generator().manual_seed(classes))
    p = worst_distribution(margin, radius)
    assert p.dtype is torch.float32 and float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert divergence(p) == pytest.approx(radius, rel=1e-3)
    assert torch.equal(p.argsort(), margin.argsort())


def test_equal_margins_leave_the_uniform_and_equal_worst_ones_share() -> None:
    torch.testing.assert_close(worst_distribution(torch.full((4,), -0.3), 0.5), torch.full((4,), 0.25))
    p = worst_distribution(torch.tensor([0.2, 0.2, -1.0, -1.0]), 0.5)
    torch.testing.assert_close(p[0], p[1])
    torch.testing.assert_close(p[2], p[3])
    assert p[0] > p[2] and divergence(p) == pytest.approx(0.5, rel=1e-3)


def test_margins_are_means_over_each_classs_images() -> None:
    prob = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.1, 0.3, 0.6, 0.0], [0.2, 0.5, 0.3, 0.0]], dtype=torch.float64)
    margin, count = class_margin(prob.clamp(min=1e-30).log(), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(margin.double(), torch.tensor([0, -0.2, -1, -1], dtype=torch.float64))
    assert count.tolist() == [2, 1, 0, 0]  # -0.5 and 0.5 of the first class


def case(**constants: Any) -> tuple[Faal, torch.Tensor, Targets]:
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 4, generator=gen, dtype=torch.float64)
    label = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    method = Faal(**constants)
    return method, logits, Targets(label_B=label, state={})


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_loss_is_the_formula_and_the_weights_are_constants_in_it(variant: str) -> None:
    method, logits, targets = case(variant=variant)
    prob, label = logits.softmax(1), targets.label_B
    worst = torch.stack([max(prob[i, k] for k in range(4) if k != y) - prob[i, y] for i, y in enumerate(label)])
    margin = torch.stack(
        [worst[label == k].mean() if variant == "paper" else worst[label == k].sum() for k in range(4)]
    )
    weight = torch.tensor(solved(margin.numpy(), 0.5))
    ce = -prob.log()[torch.arange(11), label]
    expected = 4 * (weight[label] * ce).mean()
    loss = method.loss({"adv": logits}, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    moving = logits.clone().requires_grad_()
    method.loss({"adv": moving}, targets).backward()
    gradient = 4 / 11 * weight[label, None] * (prob - torch.nn.functional.one_hot(label, 4))
    assert moving.grad is not None
    torch.testing.assert_close(moving.grad, gradient, rtol=5e-3, atol=1e-5)


def test_weights_are_perturbed_along_the_plain_cross_entropy() -> None:
    method, logits, targets = case()
    plain = torch.nn.functional.cross_entropy(logits, targets.label_B)
    torch.testing.assert_close(method.perturbing_loss({"adv": logits}, targets), plain)


def test_variants_differ_where_classes_differ_in_number() -> None:
    (paper, logits, targets), (released, *_) = case(), case(variant="released")
    assert paper.loss({"adv": logits}, targets) != released.loss({"adv": logits}, targets)
    even = Targets(label_B=torch.arange(8) % 4, state={})
    losses = [method.loss({"adv": logits[:8]}, even) for method in (paper, released)]
    torch.testing.assert_close(*losses)


def test_the_full_setting_is_the_authors() -> None:
    recipe = SETTINGS["cifar10_preact_resnet18"].recipe
    assert [recipe.optim.lr_at(epoch) for epoch in (1, 2)] == [0.01, 0.001] and recipe.optim.epochs == 2
    assert (recipe.attack.eps, recipe.attack.step, recipe.attack.steps, recipe.attack.start) == (
        8 / 255,
        2 / 255,
        10,
        "uniform",
    )
    assert (recipe.networks.start_recipe, recipe.optim.weight_decay) == ("sat:cifar10_preact_resnet18", 5e-4)
