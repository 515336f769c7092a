"""IAD-I and IAD-II: losses and gradients by their formulas in float64, and when the student begins to trust itself."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import EpochStats, Forwards, Recipe, Targets
from retemper.recipes.adaiad import AdaIad
from retemper.recipes.ard import AUTHORS
from retemper.recipes.fair_iad import FairIad
from retemper.recipes.iad import SETTINGS, Iad, Iad2, Trust

LABEL = torch.arange(7) % 5


def logits_of(*names: str) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    values = {n: 3 * torch.randn(7, 5, generator=gen, dtype=torch.float64) for n in ("adv", "clean", "t", "ta", "ca")}
    return {name: values[name].requires_grad_(name in ("adv", "clean")) for name in names}


def targets(begun: float) -> Targets:
    given = logits_of("t", "ta", "ca")
    return Targets(
        label_B=LABEL,
        teacher_BK=given["t"],
        teacher_adv_BK=given["ta"],
        clean_teacher_adv_BK=given["ca"],
        state={"begun": torch.tensor([begun])},
    )


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of two softmaxes, (B,), written out."""
    return (p.softmax(1) * (p.softmax(1).log() - q.softmax(1).log())).sum(1)


def first(at: Mapping[str, Tensor], begun: float) -> Tensor:
    """Return the loss of IAD-I as the authors' code has it at temperature 1."""
    trust = logits_of("ta")["ta"].softmax(1)[torch.arange(7), LABEL] ** 0.1
    return (kl(logits_of("t")["t"], at["adv"]) + begun * (1 - trust) * kl(at["clean"], at["adv"])).sum() / 7


def second(at: Mapping[str, Tensor], begun: float) -> Tensor:
    """Return the loss of IAD-II as the authors' code has it at temperature 1."""
    given = logits_of("ta", "ca")
    trust = given["ta"].softmax(1)[torch.arange(7), LABEL] ** 0.1 if begun else torch.ones(7)
    guided = trust * kl(given["ta"], at["adv"]) + (1 - trust) * kl(at["clean"], at["adv"])
    hard = F.cross_entropy(at["adv"], LABEL, reduction="none")
    return (0.25 * hard + 0.5 * guided + 0.25 * kl(given["ca"], at["adv"])).sum() / 7


@pytest.mark.parametrize("begun", [0.0, 1.0])
@pytest.mark.parametrize(("method", "formula"), [(Iad, first), (Iad2, second)])
def test_losses_and_gradients_are_the_formulas(method: type[Iad], formula, begun: float) -> None:
    ours, theirs = logits_of("adv", "clean"), logits_of("adv", "clean")
    loss, expected = method().loss(ours, targets(begun)), formula(theirs, begun)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    loss.backward()
    expected.backward()
    for name, value in theirs.items():
        grad = torch.zeros_like(value) if value.grad is None else value.grad
        torch.testing.assert_close(ours[name].grad, grad, rtol=1e-10, atol=1e-14)
    clean = ours["clean"].grad
    assert clean is not None and bool(clean.any()) == bool(begun)  # the student's own answer is not detached


@pytest.mark.parametrize(
    ("method", "first", "then"),
    [
        (Iad, ("adv", "adv", "clean"), ("adv", "adv", "clean", "clean")),
        (Iad2, ("adv",), ("adv", "clean")),
        (AdaIad, ("clean", "adv", "clean"), ("clean", "adv", "clean", "clean")),
        (FairIad, ("adv", "clean", "adv"), ("adv", "clean", "adv")),
    ],
)
def test_the_released_forwards_change_when_the_student_begins_to_trust_itself(
    method: type[Trust], first: tuple[str, ...], then: tuple[str, ...]
) -> None:
    paper = Recipe.of(method, dataset="digits", student="tiny_resnet", epochs=10, begin=0.3)
    released = paper.as_variant("released")
    for epoch in range(1, 11):
        expected = first if epoch <= 3 else then
        assert released.method.forwards_in(epoch, released) == Forwards(expected)
        assert paper.method.forwards_in(epoch, paper) == Forwards(method.forwards)


def test_iad_ii_needs_no_clean_answer_before_it_begins() -> None:
    at = logits_of("adv", "clean")
    torch.testing.assert_close(Iad2().loss({"adv": at["adv"]}, targets(0)), Iad2().loss(at, targets(0)), rtol=0, atol=0)


@pytest.mark.parametrize(("method", "begin"), [(Iad, 60), (Iad2, 40)])
def test_the_teacher_is_trusted_in_full_until_the_authors_epoch(method: type[Iad], begin: int) -> None:
    recipe = Recipe.of(method, **AUTHORS, dataset="digits", student="tiny_resnet")
    state = recipe.method.class_state(5, recipe)
    assert state["begun"].tolist() == [0]
    for epoch in range(1, begin + 2):
        state = recipe.method.next_class_state(state, EpochStats(), epoch, recipe)
        assert state["begun"].tolist() == [epoch >= begin]  # it holds for the epoch after
    short, at_once = recipe.replace(epochs=10), recipe.replace(begin=0.0)
    assert [method().begun_after(epoch, short) for epoch in (begin // 20 - 1, begin // 20)] == [0, 1]
    assert at_once.method.class_state(5, at_once)["begun"].tolist() == [1]
    with pytest.raises(ValueError, match="share"):
        recipe.replace(begin=60.0)


def test_variants_differ_in_the_schedule_the_choice_and_the_forwards() -> None:
    paper, released = SETTINGS["cifar10_resnet18"].recipe, SETTINGS["cifar10_resnet18"].recipe.as_variant("released")
    assert [round(r.optim.lr_at(200), 9) for r in (paper, released)] == [0.001, 0.01]
    assert [r.selection.select_on for r in (paper, released)] == ["holdout", "test"]
    assert (released.selection.select_by, released.selection.select_steps) == ("robust", 10)
    assert all(released.selection.is_due(epoch, 200) for epoch in range(1, 201))
    losses = [recipe.method.loss(logits_of("adv", "clean"), targets(1)) for recipe in (paper, released)]
    assert torch.equal(*losses)


def test_the_full_settings_are_the_authors() -> None:
    for name in ("cifar10_resnet18", "cifar10_resnet18_ii"):
        recipe = SETTINGS[name].recipe
        method = recipe.method
        assert isinstance(method, Iad)
        assert (recipe.optim.epochs, recipe.optim.lr_drops) == (200, (100, 150))
        assert (recipe.optim.batch_size, recipe.optim.weight_decay) == (128, 2e-4)
        assert (recipe.attack.bn_mode, recipe.attack.start, recipe.optim.nesterov) == ("train", "uniform", False)
        assert (method.temperature, method.kl_scale, method.trust_power) == (1, 1, 0.1)
    assert SETTINGS["cifar10_resnet18"].recipe.networks.clean_teacher_model is None
    assert SETTINGS["cifar10_resnet18_ii"].recipe.networks.clean_teacher_model == "resnet56"
