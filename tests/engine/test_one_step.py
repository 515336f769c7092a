"""Attacks in one step: they are the papers' formulas, whatever the method's objective and radii."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retemper.engine import Recipe, State, create_model, pgd, train_step
from retemper.engine.catalogue import find_setting
from retemper.engine.losses import cross_entropy_objective
from retemper.engine.maximise import attack
from retemper.engine.step import observe
from retemper.errors import UsageError
from retemper.kernels import random_start_

EPS = 0.1


def made(method: str, device: torch.device, **options: Any) -> tuple[State, Recipe]:
    """Return a recipe on digits and its state, in float64 and without folding, so that a formula can be held to it."""
    torch.manual_seed(0)
    recipe = find_setting(f"{method}:digits")[2].recipe.replace(eps=EPS, fold=False, attack_bn="eval", **options)
    student = create_model("tiny_resnet", 10).double()
    teacher = create_model("tiny_resnet", 10).double().to(device).eval().requires_grad_(False)
    return State(recipe, student, teacher if recipe.networks.teacher_model else None, 10, device), recipe


def batch(device: torch.device, size: int = 12) -> tuple[Tensor, Tensor]:
    clean = torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return clean.to(device), (torch.arange(size) % 10).to(device)


def attacked(state: State, recipe: Recipe, clean: Tensor, label: Tensor) -> Tensor:
    """Return the images of the training attack."""
    network = state.attacked()
    return attack(state, recipe, network, clean, observe(state, recipe, network, clean, label, None))


def input_gradient(network: nn.Module, image: Tensor, loss: Any) -> Tensor:
    image = image.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(network.eval()(image)), image)
    return grad


def raised(method: str, state: State, clean: Tensor, label: Tensor) -> Any:
    """Return what the attack of a method raises, as its paper writes it."""
    if method == "sat":
        return lambda logits: nn.functional.cross_entropy(logits, label, reduction="sum")
    network = state.teacher if method == "rslad" else state.student.eval()
    assert network is not None
    wanted = network(clean).log_softmax(1).detach()
    return lambda logits: (wanted.exp() * (wanted - logits.log_softmax(1))).sum()


@pytest.mark.parametrize("method", ["rslad", "sat", "trades"])
def test_nfgsm_is_the_papers_formula(method: str, device: torch.device) -> None:
    state, recipe = made(method, device, attack="nfgsm")
    clean, label = batch(device)
    start = torch.empty_like(clean)
    random_start_(start, clean, 2 * EPS, seed=state.noise_seed)
    noise = start - clean
    assert noise.abs().max() > 1.9 * EPS and noise.abs().max() <= 2 * EPS + 1e-9
    expected = start + EPS * input_gradient(state.student, start, raised(method, state, clean, label)).sign()
    adv = attacked(state, recipe, clean, label)
    torch.testing.assert_close(adv, expected.clamp(0, 1), rtol=0, atol=1e-12)
    assert (adv - clean).abs().max() > 2 * EPS  # no projection


def test_each_class_has_the_step_and_the_noise_of_its_own_radius(device: torch.device) -> None:
    state, recipe = made("cfa", device, attack="nfgsm")
    clean, label = batch(device)
    radius_B = torch.linspace(0.02, 0.11, 10, dtype=torch.float64, device=device)[label]
    state.class_state["margin"].copy_(radius_B[:10])
    start = torch.empty_like(clean)
    random_start_(start, clean, 2 * radius_B, seed=state.noise_seed)
    moved = (attacked(state, recipe, clean, label) - start).abs().flatten(1).amax(1)
    torch.testing.assert_close(moved, radius_B, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["nfgsm", "pgd3"])
def test_a_method_that_goes_down_its_objective_still_does(kind: str, device: torch.device) -> None:
    state, recipe = made("fair_tat", device, attack=kind)
    clean, label = batch(device)
    targets = observe(state, recipe, state.attacked(), clean, label, None)
    adv = attacked(state, recipe, clean, label)
    objective = recipe.method.objective(targets)
    assert objective(state.student.eval()(adv)) < objective(state.student(clean))


@pytest.mark.parametrize(("name", "steps"), [("pgd2", 2), ("pgd3", 3), ("pgd10", 10)])
def test_few_steps_cross_the_ball(name: str, steps: int, device: torch.device) -> None:
    state, recipe = made("sat", device, attack=name, attack_steps=7)
    clean, label = batch(device)
    chosen: dict[str, Any] = dict(steps=steps, step=2 * EPS / steps, eps=EPS, start="uniform", clip_start=True)
    objective = cross_entropy_objective(label)
    expected = pgd(state.student, clean, objective=objective, seed=state.noise_seed, **chosen)
    torch.testing.assert_close(attacked(state, recipe, clean, label), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["rslad", "absld", "fair_rslad", "label_trust", "sat", "trades"])
def test_a_step_is_one_pass_for_the_attack(method: str, device: torch.device) -> None:
    state, recipe = made(method, device, attack="nfgsm")
    seen: list[int] = []
    state.student.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    clean, label = batch(device)
    assert train_step(state, recipe, clean, label).isfinite()
    own = int(recipe.method.needs_own_prediction)
    assert sum(seen) == len(clean) * (own + 1 + len(state.forwards.before))


def test_what_one_step_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eps = 0\.6: attack = 'nfgsm' draws noise of twice that"):
        find_setting("sat:digits")[2].recipe.replace(attack="nfgsm", eps=0.6)
    with pytest.raises(ValueError, match=r"attack = 'nfgsm': this method looks for .* take pgd, pgd10 or pgd3"):
        find_setting("bat:digits")[2].recipe.replace(attack="nfgsm")
    with pytest.raises((ValueError, UsageError), match="attack = 'fgsm'"):
        find_setting("sat:digits")[2].recipe.replace(attack="fgsm")
