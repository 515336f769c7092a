"""AdaAD and AdaIAD: the attack through both networks, and the losses by their formulas in float64."""

import pytest
import torch
from torch import Tensor, nn

from retemper.engine import Targets, pgd
from retemper.engine.maximise import Beside
from retemper.recipes import adaad, adaiad
from retemper.recipes.adaad import AdaAd
from retemper.recipes.adaiad import AdaIad

LABEL = torch.arange(7) % 5


def drawn() -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [3 * torch.randn(7, 5, generator=gen, dtype=torch.float64) for _ in range(4)]


TEACHER, TEACHER_ADV, _, _ = drawn()


def targets(begun: float = 1.0) -> Targets:
    return Targets(
        label_B=LABEL,
        teacher_BK=TEACHER,
        teacher_adv_BK=TEACHER_ADV,
        state={"begun": torch.tensor([begun])},
    )


def student() -> dict[str, Tensor]:
    return {name: value.requires_grad_() for name, value in zip(("adv", "clean"), drawn()[2:], strict=True)}


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of two softmaxes, (B,), written out."""
    return (p.softmax(1) * (p.softmax(1).log() - q.softmax(1).log())).sum(1)


@pytest.mark.parametrize("method", [AdaAd, AdaIad])
def test_the_attack_raises_the_difference_through_both_networks(method: type[AdaAd]) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(6, 5)).double() for _ in range(2)]
    image = torch.rand(7, 1, 2, 3, dtype=torch.float64) * 0.5 + 0.25
    objective = method().objective(targets())
    at = image.clone().requires_grad_()
    value = objective(Beside(*nets)(at))
    torch.testing.assert_close(value, kl(nets[1](image), nets[0](image)).sum(), rtol=1e-10, atol=0)
    (ours,) = torch.autograd.grad(value, at)
    (both,) = torch.autograd.grad(kl(nets[1](at), nets[0](at)).sum(), at)
    (through_student,) = torch.autograd.grad(kl(nets[1](at).detach(), nets[0](at)).sum(), at)
    torch.testing.assert_close(ours, both, rtol=1e-10, atol=1e-14)
    assert (ours.sign() != through_student.sign()).any()
    before = objective(Beside(*nets)(image))
    with torch.no_grad():
        assert (
            objective(Beside(*nets)(pgd(Beside(*nets), image, objective=objective, steps=3, step=0.01, eps=0.03)))
            > before
        )


def test_adaads_loss_is_the_formula() -> None:
    at = student()
    for weight in (1.0, 0.75):
        method = AdaAd(adv_weight=weight)
        expected = weight * kl(TEACHER_ADV, at["adv"]).sum() + (1 - weight) * kl(TEACHER, at["clean"]).sum()
        torch.testing.assert_close(method.loss(at, targets()), expected / 7 / 10, rtol=1e-10, atol=0)


@pytest.mark.parametrize("begun", [0.0, 1.0])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_adaiads_loss_and_gradients_are_the_formula(begun: float, weight: float) -> None:
    def formula(at: dict[str, Tensor]) -> Tensor:
        trust = TEACHER_ADV.softmax(1)[torch.arange(7), LABEL] ** 0.1
        own = begun * (1 - trust) * kl(at["clean"], at["adv"])
        hard = -at["clean"].log_softmax(1)[torch.arange(7), LABEL]
        return (weight * (900 * kl(TEACHER_ADV / 30, at["adv"] / 30) + own) + (1 - weight) * hard).sum() / 7

    ours, theirs = student(), student()
    loss = AdaIad(adv_weight=weight).loss(ours, targets(begun))
    expected = formula(theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    loss.backward()
    expected.backward()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].grad, value.grad, rtol=1e-10, atol=1e-14)


def test_the_full_settings_are_the_authors() -> None:
    for module in (adaad, adaiad):
        recipe = module.SETTINGS["cifar10_resnet18"].recipe
        assert (recipe.optim.epochs, recipe.optim.lr_drops, recipe.optim.batch_size) == (200, (100, 150), 128)
        assert (recipe.optim.weight_decay, recipe.optim.nesterov) == (5e-4, False)
        assert [round(recipe.optim.lr_at(epoch), 9) for epoch in (100, 101, 151)] == [0.1, 0.01, 0.001]
        assert (recipe.attack.eps, recipe.attack.step, recipe.attack.steps) == (8 / 255, 2 / 255, 10)
        assert (recipe.attack.start, recipe.attack.bn_mode, recipe.method.attacks_teacher) == ("normal", "eval", True)
        assert recipe.method.forwards == ("clean", "adv")
    recipe = adaiad.SETTINGS["cifar10_resnet18"].recipe
    assert recipe.method.class_state(10, recipe)["begun"].tolist() == [0]
    first, second = (adaad.SETTINGS[f"{name}_resnet18"].recipe.method for name in ("cifar10", "cifar100"))
    assert isinstance(first, AdaAd) and isinstance(second, AdaAd)
    assert (first.kl_scale, second.kl_scale) == (0.1, 1)  # the authors': a mean over ten classes, and a sum
