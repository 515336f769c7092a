"""GKL and IKL: the loss as the authors write it, in float64, the table, the radius and the steps of each epoch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import ClassMeans, EpochStats, Recipe, Targets
from retemper.engine.state import attack_in
from retemper.recipes.gkl import AUTHORS, SETTINGS, Gkl


def gkl(**options: Any) -> Recipe:
    return Recipe.of(Gkl, **AUTHORS | dict(dataset="digits", student="tiny_resnet") | options)


def problem(classes: int = 5) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return logits, labels, and a table whose rows do not add up to 1."""
    gen = torch.Generator().manual_seed(0)
    clean, adv = 2 * torch.randn(2, 8, classes, generator=gen, dtype=torch.float64)
    table = torch.randn(classes, classes, generator=gen, dtype=torch.float64).softmax(1) ** 0.2
    return {"clean": clean, "adv": adv}, torch.arange(8) % classes, table


def targets(label: Tensor, table: Tensor, **others: Any) -> Targets:
    return Targets(label_B=label, state={"pair_weight": table, "radius_share": torch.tensor(0.25)}, **others)


def square(clean: Tensor, adv: Tensor, own: Tensor) -> Tensor:
    """The weighted square as the authors write it: (B, K, K) tensors, and a mean over all weights of the batch."""
    apart = (clean[:, :, None] - clean[:, None]) - (adv[:, :, None] - adv[:, None])
    weight = own[:, :, None] * own[:, None]
    return 0.25 * (apart**2 * weight).sum() / weight.sum()


def test_loss_and_gradients_are_the_authors() -> None:
    logits, label, table = problem()
    ours, theirs = ({name: x.clone().requires_grad_() for name, x in logits.items()} for _ in range(2))
    loss = Gkl().loss(ours, targets(label, table))
    clean, adv = theirs["clean"], theirs["adv"]
    p = clean.softmax(1).detach()
    soft = -(p * adv.log_softmax(1)).sum(1).mean()
    expected = F.cross_entropy(clean, label) + 4 * soft + 20 * square(clean, adv, table[label])
    entropy = -(p * p.log()).sum(1).mean()  # a constant, which the KL divergence has and their loss lacks
    torch.testing.assert_close(loss, expected - 4 * entropy, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-10, atol=1e-14)


def test_labels_may_be_smoothed() -> None:
    logits, label, table = problem()
    plain, smoothed = (Gkl().loss(logits, targets(label, table, label_smoothing=s)) for s in (0.0, 0.3))
    apart = F.cross_entropy(logits["clean"], label, label_smoothing=0.3) - F.cross_entropy(logits["clean"], label)
    torch.testing.assert_close(smoothed - plain, apart)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_attack_leaves_the_students_own_prediction(beta: float) -> None:
    logits, label, table = problem()
    clean, adv = logits["clean"], logits["adv"].requires_grad_()
    value = Gkl(attack_beta=beta).objective(targets(label, table, own_BK=clean))(adv)
    p = clean.softmax(1)
    kl = (p * (p.log() - adv.log_softmax(1))).sum()
    torch.testing.assert_close(value, kl + beta * 8 * square(clean, adv, table[label]))
    assert SETTINGS["cifar100_wrn34_10"].recipe.method.attack_beta == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert SETTINGS["cifar10_wrn34_10"].recipe.method.attack_beta == 0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("variant", "temperature", "power"), [("paper", 1, 0.2), ("ikl", 4, 1.0)])
def test_the_table_is_of_the_last_epoch(variant: str, temperature: float, power: float) -> None:
    logits, label, _ = problem()
    recipe = gkl().as_variant(variant)
    method = recipe.method
    first = method.class_state(5, recipe)
    torch.testing.assert_close(first["pair_weight"], torch.full((5, 5), 0.2**power, dtype=torch.float64))
    label = label.clamp(max=3)  # no image of class 4
    means = ClassMeans.zeros(5, 5, torch.device("cpu"), torch.float64)
    for rows in (slice(0, 3), slice(3, 8)):
        part = {name: value[rows] for name, value in logits.items()}
        means.add(method.measured(part, targets(label[rows], first["pair_weight"]))["prediction"], label[rows])
    state = method.next_class_state(first, EpochStats(measured={"prediction": means}), 1, recipe)
    sums = F.one_hot(label, 5).double().T @ (logits["clean"] / temperature).softmax(1)
    expected = (sums / sums.sum(1, keepdim=True)) ** power
    torch.testing.assert_close(state["pair_weight"][:4], expected[:4])
    assert torch.equal(state["pair_weight"][4], first["pair_weight"][4])


def test_the_radius_grows_and_the_steps_do_with_the_quarters() -> None:
    recipe = gkl()
    method, label = recipe.method, torch.zeros(3, dtype=torch.int64)
    state = method.class_state(5, recipe)
    stats = EpochStats(measured={"prediction": ClassMeans.zeros(5, 5, torch.device("cpu"))})
    for epoch in range(1, 201):
        attack = attack_in(epoch, recipe) or recipe.attack
        eps, step = method.margins(Targets(label_B=label, state=state), attack)
        radius = 8 / 255 * epoch / 200
        steps, size = [(2, radius), (3, 2 * radius / 3), (4, radius / 2), (5, radius / 2)][(epoch - 1) // 50]
        assert attack.steps == steps
        torch.testing.assert_close(eps, torch.full((3,), radius))
        torch.testing.assert_close(step, torch.full((3,), size))
        state = method.next_class_state(state, stats, epoch, recipe)
    assert state["radius_share"] == 1


def test_released_has_the_last_quarters_steps_throughout_and_keeps_what_the_script_does() -> None:
    paper = SETTINGS["cifar10_wrn34_10"].recipe
    released = paper.as_variant("released")
    assert [attack_in(epoch, released) for epoch in (1, 50, 100, 150, 200)] == [None] * 5
    assert (released.attack.steps, released.attack.step, released.attack.eps) == (5, 4 / 255, 8 / 255)
    one, other = paper.flat(), released.flat()
    changed = {name: (one[name], other[name]) for name in one if one[name] != other[name]}
    assert changed == {
        "variant": ("paper", "released"),
        "average_every": ("step", "epoch"),
        "average_from": (151, 1),
        "ema_decay": (0.9996, 0.9),
        "awp_decay": ("own", "perturbed"),
        "holdout_per_class": (100, 0),
        "precision": ("auto", "fp32"),
    }
    assert (paper.optim.lr, paper.optim.weight_decay, paper.optim.epochs) == (0.2, 5e-4, 200)
    assert (paper.optim.awp_gamma, paper.optim.awp_from, paper.optim.average) == (0.005, 10, "ema")
