"""The attack: it is the papers' loop, and it leaves the model as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retemper.engine import KlObjective, create_model, cross_entropy_objective, cw_objective, pgd
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
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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


def attacked(model: Any, clean: Tensor, label: Tensor, **options: Any) -> Tensor:
    """Three steps from the clean images."""
    given: dict[str, Any] = dict(objective=cross_entropy_objective(label), steps=3, step=STEP, eps=EPS, start="none")
    return pgd(model, clean, **given | options)


def test_a_range_of_pixels_is_kept_and_outside_it_images_are_refused(
    model: nn.Module, clean: Tensor, label: Tensor
) -> None:
    wide = clean * 4 - 2  # as normalised images have
    for images in (wide, clean * 255, clean * torch.nan, clean - 0.1):
        for steps in (0, 3):
            with pytest.raises(ValueError, match=r"clean: pixels outside \[0.0, 1.0\]"):
                attacked(model, images, label, steps=steps)
    settings: dict[str, Any] = dict(lower=-2.0, upper=2.0, eps=0.03, step=0.01)
    for start in ("none", "uniform", "normal"):
        adv = attacked(model, wide, label, start=start, **settings)
        assert 0 < (adv - wide).abs().max() <= 0.03 + 1e-6 and adv.min() >= -2 and adv.max() <= 2
    assert attacked(model, wide, label, steps=0, start="uniform", **settings).min() < 0
    rounded = clean.clone().clamp_(0, 1 + 1e-7)
    rounded[0, 0, 0, 0] = 1 + 1e-7  # a resized image ends there
    assert attacked(model, rounded, label).max() <= 1


@pytest.mark.parametrize("name", ["eps", "step"])
def test_lengths_that_are_not_in_pixel_units_are_refused(
    name: str, model: nn.Module, clean: Tensor, label: Tensor
) -> None:
    each = torch.full((6,), EPS, device=clean.device)
    for value in (8, float("nan"), 8 * each * 255, each * torch.nan, *([-0.1, -each] if name == "eps" else [-8])):
        with pytest.raises(ValueError, match=rf"{name}: .*8/255, not 8"):
            attacked(model, clean, label, **{name: value})
    attacked(model, clean * 255, label, **{name: 8}, upper=255.0)
    attacked(model, clean, label, **{name: each * 64}, norm="l2")  # an image of 64 pixels is 8 wide
    with pytest.raises(ValueError, match=rf"{name}: .*8/255, not 8"):
        attacked(model, clean, label, **{name: 8.1}, norm="l2")
    with pytest.raises(ValueError, match=rf"{name}: .* shape \(2,\)"):
        attacked(model, clean, label, **{name: each[:2]})
    with pytest.raises(ValueError, match="the range of a pixel is empty"):
        attacked(model, clean, label, lower=1.0, upper=0.0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_any_callable_is_attacked_as_the_network_in_it(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    expected = attacked(model, clean, label)
    model.train()  # what is inside runs in eval mode all the same
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for one in (lambda image: model(image), model.forward, torch.jit.trace(model.eval(), clean)):
        model.train()
        assert torch.equal(attacked(one, clean, label), expected)
        assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    attacked(lambda image: model(image), clean, label, bn_mode="keep")
    assert model.get_submodule("bn1").num_batches_tracked == 3
    with pytest.raises(RuntimeError, match="broken"):
        attacked(lambda image: broken(model(image)), clean, label)
    assert all(module.training for module in model.modules())


def broken(image: Tensor) -> Tensor:
    raise RuntimeError("broken")


def test_the_network_is_as_it_was_after_an_error(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    model.train()
    needs = [
        (parameter.requires_grad_(number % 2 == 0), number % 2 == 0)
        for number, parameter in enumerate(model.parameters())
    ]
    model.register_forward_hook(lambda *_: broken(clean))
    with pytest.raises(RuntimeError, match="broken"):
        attacked(model, clean, label)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad is need and parameter.grad is None for parameter, need in needs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_takes_any_float_and_any_layout(dtype: torch.dtype, model: nn.Module, clean: Tensor, label: Tensor) -> None:
    model = model.to(dtype)
    wide = torch.rand(8, 12, 1, 6, generator=torch.Generator().manual_seed(2)).to(clean.device, dtype)
    for images in (
        wide.permute(3, 2, 0, 1),
        wide.permute(3, 2, 0, 1)[:, :, :, ::2],
        wide[:, :, :, :1].permute(3, 2, 0, 1).expand(6, -1, -1, -1),
    ):
        adv = attacked(model, images, label)
        assert adv.dtype is dtype and torch.equal(adv, attacked(model, images.contiguous(), label))
        assert 0 < (adv - images).abs().max() < EPS + 0.01


def test_works_inside_no_grad_and_inference_mode_and_on_frozen_weights(
    model: nn.Module, clean: Tensor, label: Tensor
) -> None:
    expected = attacked(model, clean, label)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(attacked(model, clean, label), expected)
            assert torch.equal(attacked(model, clean.clone(), label.clone()), expected)
    assert torch.equal(attacked(model.requires_grad_(False), clean.requires_grad_(), label), expected)
    nothing_to_train = nn.Sequential(nn.Flatten(), nn.Softmax(1))
    assert (attacked(nothing_to_train, clean, label) != clean).any()


def test_an_empty_batch_asks_the_network_for_nothing(clean: Tensor, label: Tensor) -> None:
    for start in ("none", "uniform"):
        assert attacked(broken, clean[:0], label[:0], start=start).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "make",
    [cross_entropy_objective, cw_objective, lambda label: KlObjective(torch.eye(10)[:6].to(label.device), label)],
)
def test_labels_of_any_whole_numbers_are_taken(
    make: Any, dtype: torch.dtype, model: nn.Module, clean: Tensor, label: Tensor
) -> None:
    expected = attacked(model, clean, label, objective=make(label))
    assert torch.equal(attacked(model, clean, label, objective=make(label.to(dtype))), expected)


@pytest.mark.parametrize(
    "make", [cross_entropy_objective, cw_objective, lambda label: KlObjective(torch.ones(6, 10), label)]
)
def test_labels_that_cannot_be_are_refused(make: Any, model: nn.Module, clean: Tensor, label: Tensor) -> None:
    clean, label, model = clean.cpu(), label.cpu(), model.cpu()
    for wrong in (label.float(), label[:, None], label > 2, torch.eye(10)[:6]):
        with pytest.raises(ValueError, match=r"label: .*; needs whole numbers"):
            make(wrong)
    with pytest.raises(TypeError, match="label: it is a list"):
        make(label.tolist())
    for wrong in (label + 5, label - 1, label * 0 - 100):  # PyTorch leaves -100 out without a word
        with pytest.raises(ValueError, match=r"label: it must lie in 0 .. 9"):
            attacked(model, clean, label, objective=make(wrong))
    with pytest.raises(ValueError, match=r"label: shape \(5,\), but logits has \(6, 10\)"):
        attacked(model, clean, label, objective=make(label[:5]))
    with pytest.raises(ValueError, match="label: on meta, but logits is on cpu"):
        attacked(model, clean, label, objective=make(label.to("meta")))


def test_a_kl_objective_that_cannot_be_is_refused(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    teacher, K = torch.randn(6, 10, device=clean.device), torch.ones(10, device=clean.device)

    def refused(match: str, *given: Any, **more: Any) -> None:
        with pytest.raises(ValueError, match=match):
            attacked(model, clean, label, objective=KlObjective(*given, **more))

    refused(r"teacher: shape \(6, 5\), but student has \(6, 10\)", teacher[:, :5], label)
    refused(r"teacher: shape \(1, 10\), but student has \(6, 10\)", teacher[:1], label)
    refused("teacher: not finite", teacher * torch.nan, label)
    refused(r"temperature: shape \(9,\); needs \(10,\)", teacher, label, K[:9])
    for wrong in (0.0, -1.0, float("nan")):
        refused("temperature: .* above 0", teacher, label, wrong)
        refused("temperature: .* above 0", teacher, label, K * wrong)
    refused(r"label_trust: it must lie in \[0, 1\] for every class", teacher, label, label_trust=K * 2)
    refused(r"row_trust: it must lie in \[0, 1\] for every row", teacher, label, row_trust=-K[:6])


def test_objectives_and_models_that_cannot_be_are_refused(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    each = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(ValueError, match=r"objective: it returns shape \(6,\); needs a scalar"):
        attacked(model, clean, label, objective=lambda logits: each(logits, label))
    with pytest.raises(TypeError, match="objective: it returns a float"):
        attacked(model, clean, label, objective=lambda logits: 1.0)
    with pytest.raises(TypeError, match="logits: it is a tuple"):
        attacked(lambda image: (model(image), image), clean, label)
    for detached in (lambda logits: torch.ones((), requires_grad=True), lambda logits: logits.detach().sum()):
        with pytest.raises(ValueError, match="no gradient reaches the input"):
            attacked(model, clean, label, objective=detached)
    with pytest.raises(ValueError, match="the model's logits: not finite"):
        attacked(lambda image: model(image) * torch.nan, clean, label)
    with pytest.raises(ValueError, match=r"clean: torch.uint8 .* needs floats"):
        attacked(model, (clean * 255).byte(), label)
    with pytest.raises(TypeError, match="clean: it is a ndarray"):
        attacked(model, clean.cpu().numpy(), label)  # pyright: ignore[reportArgumentType]
    for start, word in ((clean.double(), "torch.float64"), (clean * torch.nan, "start: not finite")):
        with pytest.raises(ValueError, match=word):
            attacked(model, clean, label, start=start)
    with pytest.raises(ValueError, match="steps = -1"):
        attacked(model, clean, label, steps=-1)
    with pytest.raises(ValueError, match="norm: 'l1'"):
        attacked(model, clean, label, norm="l1", steps=0)


def test_a_model_that_answers_no_tensor_is_attacked_by_an_objective_that_knows(
    model: nn.Module, clean: Tensor, label: Tensor
) -> None:
    adv = attacked(
        lambda image: {"logits": model(image)},
        clean,
        label,
        objective=lambda out: cross_entropy_objective(label)(out["logits"]),
    )
    assert torch.equal(adv, attacked(model, clean, label))


def test_a_random_start_in_l2_may_be_longer_than_the_range_of_a_pixel() -> None:
    clean, label = torch.full((3, 1, 8, 8), 0.5), torch.tensor([0, 1, 2])
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    adv = pgd(net, clean, objective=cross_entropy_objective(label), steps=0, step=0.5, eps=2.0, norm="l2", seed=1)
    lengths = (adv - clean).flatten(1).norm(dim=1)
    assert (lengths > 1).all() and (lengths <= 2 + 1e-5).all()


def test_a_model_that_overwrites_its_images_is_told_plainly() -> None:
    clean, label = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    options: dict[str, Any] = dict(objective=cross_entropy_objective(label), steps=1, step=0.1, eps=0.1, start="none")
    with pytest.raises(ValueError, match=r"image\.clone"):
        pgd(lambda image: image.sub_(0.5).flatten(1)[:, :3], clean, **options)
