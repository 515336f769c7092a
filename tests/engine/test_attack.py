"""The attack: it is the papers' loop, and it leaves the model as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retemper.engine import create_model, cross_entropy_objective, cw_objective, pgd
from retemper.kernels import random_start_

STEP, EPS = 2 / 255, 8 / 255


@pytest.fixture
def model(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return create_model("tiny_resnet", 10).to(device).eval()


@pytest.fixture
def clean(device: torch.device) -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def label(device: torch.device) -> Tensor:
    return torch.arange(6, device=device)


def by_hand(model: nn.Module, clean: Tensor, adv: Tensor, label: Tensor, steps: int) -> Tensor:
    """The loop of the released codes, written out."""
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(adv), label, reduction="sum")
        (grad,) = torch.autograd.grad(loss, adv)
        adv = adv.detach() + STEP * grad.sign()
        adv = torch.min(torch.max(adv, clean - EPS), clean + EPS).clamp(0, 1)
    return adv.detach()


@pytest.mark.parametrize("noise", ["uniform", "normal", "none"])
def test_is_the_released_loop_bit_for_bit(noise: str, model: nn.Module, clean: Tensor, label: Tensor) -> None:
    start = clean.clone()
    if noise != "none":
        random_start_(start, clean, EPS, noise=noise, seed=5, clip=False)
    expected = by_hand(model, clean, start, label, steps=4)
    objective = cross_entropy_objective(label)
    settings: dict[str, Any] = dict(steps=4, step=STEP, eps=EPS, seed=5, clip_start=False)
    adv = pgd(model, clean, objective=objective, start=noise, **settings)
    assert torch.equal(adv, expected)
    assert torch.equal(pgd(model, clean, objective=objective, start=start, **settings), expected)


def test_raises_the_objective_inside_the_ball(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    objective = cross_entropy_objective(label)
    adv = pgd(model, clean, objective=objective, steps=10, step=STEP, eps=EPS, seed=0)
    assert objective(model(adv)) > objective(model(clean))
    assert (adv - clean).abs().max() <= EPS + 1e-6
    assert 0 <= adv.min() and adv.max() <= 1


def test_a_radius_per_image_holds_per_image(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    eps = torch.linspace(0, 0.1, 6, device=clean.device)
    adv = pgd(model, clean, objective=cross_entropy_objective(label), steps=5, step=eps / 2, eps=eps, seed=0)
    reached = (adv - clean).abs().flatten(1).amax(1)
    assert (reached <= eps + 1e-6).all()
    assert reached[0] == 0 and reached[-1] > 0.09


def test_leaves_modes_parameters_and_statistics_alone(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    model.train()
    model.get_submodule("bn1").eval()  # a mixed model comes back mixed
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pgd(model, clean, objective=cross_entropy_objective(label), steps=2, step=STEP, eps=EPS, seed=0)
    assert model.training and not model.get_submodule("bn1").training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_train_mode_moves_the_statistics_once_a_step(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    pgd(model, clean, objective=cross_entropy_objective(label), steps=3, step=STEP, eps=EPS, bn_mode="train", seed=0)
    assert model.get_submodule("bn1").num_batches_tracked == 3
    assert not model.training


def test_computes_no_weight_gradients(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    masks = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # pyright: ignore[reportAttributeAccessIssue]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN
            if func is torch.ops.aten.convolution_backward.default:
                masks.append(list(args[-1]))
            return func(*args, **(kwargs or {}))

    with Watch():
        pgd(model, clean, objective=cross_entropy_objective(label), steps=1, step=STEP, eps=EPS, seed=0)
    assert masks and all(mask == [True, False, False] for mask in masks)


def test_keeps_the_memory_format(device: torch.device, label: Tensor) -> None:
    model = create_model("resnet18", 10).to(device)
    clean = torch.rand(2, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    adv = pgd(model, clean, objective=cross_entropy_objective(label[:2]), steps=1, step=STEP, eps=EPS, seed=0)
    assert adv.is_contiguous(memory_format=torch.channels_last)


def test_is_drawn_from_torchs_generator_without_a_seed(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    def attack() -> Tensor:
        return pgd(model, clean, objective=cross_entropy_objective(label), steps=0, step=STEP, eps=EPS)

    torch.manual_seed(3)
    first, second = attack(), attack()
    torch.manual_seed(3)
    assert torch.equal(attack(), first) and not torch.equal(first, second)


def test_refuses_what_it_does_not_know(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    settings: dict[str, Any] = dict(objective=cross_entropy_objective(label), steps=1, step=STEP, eps=EPS)
    with pytest.raises(ValueError, match="bn_mode"):
        pgd(model, clean, bn_mode="both", **settings)
    with pytest.raises(ValueError, match="start"):
        pgd(model, clean, start="gaussian", **settings)
    with pytest.raises(ValueError, match="start has shape"):
        pgd(model, clean, start=clean[:1], **settings)


def test_the_margin_is_the_formula() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 100.0]])
    label = torch.tensor([0, 1])
    assert cw_objective(label)(logits).item() == -((3 - 2 + 50) + 0)  # the second is beaten by more than 50
