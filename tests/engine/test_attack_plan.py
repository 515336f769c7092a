"""The choices of an attack: each against the same written out by hand."""

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retemper.engine import KlObjective, RowsObjective, create_model, cross_entropy_objective, cw_objective, pgd
from retemper.engine.attack_plan import Plan
from retemper.kernels import random_start_

STEP, EPS = 0.05, 0.1


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


def attacked(model: Any, clean: Tensor, label: Tensor, **options: Any) -> Tensor:
    """Four steps from a random start."""
    given: dict[str, Any] = dict(objective=cross_entropy_objective(label), steps=4, step=STEP, eps=EPS, seed=3)
    return pgd(model, clean, **given | options)


def chosen(model: Any, objective: Any, candidates: list[Tensor], sign: float = 1.0) -> Tensor:
    """Return of each image the candidate with the highest objective, the first of equals."""
    with torch.no_grad():
        value = torch.stack([sign * objective.rows(model(one)) for one in candidates])
    return torch.stack([candidates[int(place)][image] for image, place in enumerate(value.argmax(0))])


def iterates(model: Any, clean: Tensor, label: Tensor, **options: Any) -> list[Tensor]:
    """Return the start, and what follows each step."""
    seen: list[Tensor] = []
    last = attacked(model, clean, label, watch=lambda adv, _: seen.append(adv.clone()), **options)
    return [*seen, last]


def test_the_plan_has_the_choices_of_the_attack() -> None:
    given = inspect.signature(pgd).parameters
    planned = {field.name: field for field in fields(Plan)}
    assert set(given) - set(planned) == {"model", "clean", "objective", "watch"} and set(planned) <= set(given)
    for name in set(planned) - {"steps", "step", "eps"}:
        assert given[name].default == planned[name].default, name


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_negative_step_lowers_the_objective(norm: str, model: nn.Module, clean: Tensor, label: Tensor) -> None:
    target = (label + 1) % 10
    towards = cross_entropy_objective(target)
    options: dict[str, Any] = dict(norm=norm, eps=0.8 if norm == "l2" else EPS, step=0.25 if norm == "l2" else 0.0625)
    expected = attacked(model, clean, label, objective=lambda logits: -towards(logits), **options)
    options["step"] = -options["step"]
    adv = attacked(model, clean, label, objective=towards, **options)
    assert torch.equal(adv, expected)
    assert towards(model(adv)) < towards(model(clean))
    each = torch.full((6,), options["step"], device=clean.device)
    assert torch.equal(attacked(model, clean, label, objective=towards, **options | {"step": each}), expected)


def objectives(label: Tensor) -> list[Any]:
    teacher = torch.randn(6, 10, generator=torch.Generator().manual_seed(4)).to(label.device)
    rows = RowsObjective(lambda logits: nn.functional.cross_entropy(logits, label, reduction="none"))
    return [cross_entropy_objective(label), cw_objective(label, 0.1), KlObjective(teacher, label), rows]


@pytest.mark.parametrize("which", range(4))
def test_the_best_iterate_is_kept_of_each_image(which: int, model: nn.Module, clean: Tensor, label: Tensor) -> None:
    def waves(image: Tensor) -> Tensor:
        return model((30 * image).sin())  # so steep that the last iterate is not the best of every image

    objective = objectives(label)[which]
    for step in (STEP, -STEP, torch.tensor([STEP, -STEP] * 3, device=clean.device)):
        options: dict[str, Any] = dict(objective=objective, step=step, start="uniform")
        sign: Any = step.sign() if isinstance(step, Tensor) else step / STEP
        every = iterates(waves, clean, label, **options)
        best = attacked(waves, clean, label, keep="best", **options)
        assert torch.equal(best, chosen(waves, objective, every, sign))
        assert not torch.equal(best, every[-1])


@pytest.mark.parametrize("keep", ["last", "best"])
def test_each_restart_draws_anew_and_the_best_is_returned(
    keep: str, model: nn.Module, clean: Tensor, label: Tensor
) -> None:
    objective = cross_entropy_objective(label)
    each = [attacked(model, clean, label, keep=keep, seed=3 + restart) for restart in range(3)]
    expected = chosen(model, objective, each)
    assert all(not torch.equal(expected, one) for one in each)
    for seed in (3, torch.tensor([3], device=clean.device)):
        assert torch.equal(attacked(model, clean, label, keep=keep, restarts=3, seed=seed), expected)
    drawn = attacked(model, clean, label, keep=keep, restarts=3, seed=None)
    assert not torch.equal(drawn, expected)
    last = attacked(model, clean, label, keep=keep, restarts=2, seed=2**63 - 1)  # the second wraps around
    pair = [attacked(model, clean, label, keep=keep, seed=seed) for seed in (2**63 - 1, -(2**63))]
    assert torch.equal(last, chosen(model, objective, pair))


def test_choosing_takes_one_forward_more_and_keeps_the_rest(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    counted = model.get_submodule("bn1")
    for options, forwards in (({}, 4), ({"keep": "best"}, 5), ({"restarts": 3}, 15)):
        counted.num_batches_tracked.zero_()  # pyright: ignore
        attacked(model, clean, label, bn_mode="train", **options)
        assert counted.num_batches_tracked == forwards
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    net = create_model("resnet18", 10).to(clean.device)
    images = torch.rand(2, 3, 32, 32, device=clean.device).to(memory_format=torch.channels_last)
    adv = attacked(net, images, label[:2], keep="best", restarts=2, steps=1)
    assert adv.is_contiguous(memory_format=torch.channels_last) and not adv.requires_grad
    none: dict[str, Any] = dict(start="none", steps=0)
    assert torch.equal(attacked(model, clean, label, keep="best", **none), clean)
    assert attacked(model, clean[:0], label[:0], keep="best", restarts=2).shape == (0, 1, 8, 8)


def test_a_value_that_is_nan_is_never_the_best(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    calls: list[int] = []

    def rows(logits: Tensor) -> Tensor:
        calls.append(1)
        value = nn.functional.cross_entropy(logits, label, reduction="none")
        first_or_last = len(calls) in (1, 9)  # a step asks twice, for the values and for the gradient
        return value * torch.nan if first_or_last else value

    every = iterates(model, clean, label)
    best = attacked(model, clean, label, objective=RowsObjective(rows), keep="best")
    assert torch.equal(best, chosen(model, cross_entropy_objective(label), every[1:-1]))


def test_choices_that_cannot_be_are_refused(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    def plain(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, label, reduction="sum")

    for options in ({"keep": "best"}, {"restarts": 2}):
        with pytest.raises(ValueError, match=r"objective: .*rows.*RowsObjective"):
            attacked(model, clean, label, objective=plain, **options)
        with pytest.raises(ValueError, match=r"objective: its rows have shape \(6, 10\)"):
            attacked(model, clean, label, objective=RowsObjective(lambda logits: logits), **options)
    for start in ("none", clean):
        with pytest.raises(ValueError, match="restarts = 2: each would be the same"):
            attacked(model, clean, label, restarts=2, start=start)
    for name, value in (("restarts", 0), ("keep", "worst"), ("momentum", -1.0), ("momentum", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} = {value!r}"):
            attacked(model, clean, label, **{name: value})
    for value in (10, -1):
        with pytest.raises(ValueError, match=r"label: it must lie in 0 \.\. 9"):
            attacked(model, clean, label, objective=cross_entropy_objective(label * 0 + value), keep="best", steps=0)


def test_lengths_of_any_shape_are_one_for_all_or_for_each_image(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    whole = attacked(model, clean, label)
    for one in (torch.tensor(EPS), torch.full((1,), EPS), torch.full((6, 1, 1, 1), EPS)):
        one = one.to(clean.device)
        assert torch.equal(attacked(model, clean, label, eps=one, step=one / 2), whole)


def test_momentum_is_that_of_the_paper(model: nn.Module, clean: Tensor, label: Tensor) -> None:
    adv, momentum = clean.clone(), torch.zeros_like(clean)
    for _ in range(4):
        adv = adv.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(adv), label, reduction="sum")
        (grad,) = torch.autograd.grad(loss, adv)
        momentum = 0.75 * momentum + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        adv = adv.detach() + STEP * momentum.sign()
        adv = torch.min(torch.max(adv, clean - EPS), clean + EPS).clamp(0, 1)
    found = attacked(model, clean, label, start="none", momentum=0.75)
    assert torch.equal(found, adv)
    assert not torch.equal(found, attacked(model, clean, label, start="none"))
    without = attacked(model, clean, label, start="none", momentum=0.0)
    assert torch.equal(without, attacked(model, clean, label, start="none"))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["none", "uniform", "normal"])
def test_a_mask_keeps_pixels(norm: str, start: str, model: nn.Module, clean: Tensor, label: Tensor) -> None:
    options: dict[str, Any] = dict(norm=norm, start=start)
    left = torch.arange(8, device=clean.device) < 4
    adv = attacked(model, clean, label, mask=left, **options)
    assert torch.equal(adv[..., 4:], clean[..., 4:]) and (adv[..., :4] != clean[..., :4]).float().mean() > 0.8
    some = label % 2 == 0
    adv = attacked(model, clean, label, mask=some, **options)
    assert torch.equal(adv[~some], clean[~some])
    assert torch.equal(adv[some], attacked(model, clean, label, **options)[some])
    again = attacked(model, clean, label, mask=some, **options | {"start": attacked(model, clean, label)})
    assert torch.equal(again[~some], clean[~some])


def test_each_channel_has_its_range_and_radius(device: torch.device) -> None:
    torch.manual_seed(0)
    mean, deviation = (torch.tensor(one, device=device).view(3, 1, 1) for one in ((0.5, 0.4, 0.3), (0.25, 0.2, 0.5)))
    pixel, label = torch.rand(4, 3, 8, 8, device=device), torch.arange(4, device=device)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).to(device)
    options: dict[str, Any] = dict(objective=cross_entropy_objective(label), steps=5, start="none")
    expected = pgd(lambda image: net((image - mean) / deviation), pixel, step=0.02, eps=0.05, **options)
    ends: dict[str, Any] = dict(lower=(0 - mean) / deviation, upper=((1 - mean) / deviation).flatten())
    lengths: dict[str, Any] = dict(step=0.02 / deviation, eps=0.05 / deviation)
    adv = pgd(net, (pixel - mean) / deviation, **lengths, **ends, **options)
    torch.testing.assert_close(adv * deviation + mean, expected, rtol=0, atol=1e-5)
    drawn: dict[str, Any] = dict(start="uniform", steps=0, seed=1)
    start = pgd(net, (pixel - mean) / deviation, **lengths, **ends, **options | drawn)
    moved = (start * deviation + mean - pixel).abs().amax((0, 2, 3))
    assert (moved <= 0.05 + 1e-6).all() and (moved > 0.045).all()
    with pytest.raises(ValueError, match=r"clean: pixels outside \[lower, upper\]"):
        pgd(net, pixel * 255, **lengths, **ends, **options)
    with pytest.raises(ValueError, match=r"eps: .*8/255, not 8"):
        pgd(net, (pixel - mean) / deviation, **lengths | {"eps": 8.0}, **ends, **options)
    with pytest.raises(ValueError, match="the range of a pixel is empty"):
        pgd(net, pixel, step=0.02, eps=0.05, lower=torch.ones(3, device=device), upper=1.0, **options)
    with pytest.raises(ValueError, match=r"lower: .* shape \(4,\)"):
        pgd(net, pixel, step=0.02, eps=0.05, lower=torch.zeros(4, device=device), **options)


@pytest.mark.parametrize("start", ["uniform", "normal"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_start_knows_the_range_of_its_images(start: str, norm: str, device: torch.device) -> None:
    clean = torch.rand(5, 3, 4, 4, device=device) * 2 - 1
    options: dict[str, Any] = dict(objective=torch.sum, steps=0, step=0.1, eps=0.25, lower=-1.0, norm=norm, seed=2)
    adv = pgd(lambda image: image, clean, start=start, **options)
    assert adv.min() < -0.9 and -1 <= adv.min() and adv.max() <= 1
    drawn = random_start_(torch.empty_like(clean), clean, 0.25, noise=start, seed=2, lower=-1.0, norm=norm)
    assert torch.equal(adv, drawn)


def test_a_random_start_in_l2_is_uniform_in_the_ball(device: torch.device) -> None:
    clean, pixels = torch.full((4000, 1, 2, 3), 0.5, device=device), 6
    options: dict[str, Any] = dict(objective=torch.sum, steps=0, step=0.1, eps=0.25, norm="l2", clip_start=False)
    moved = (pgd(nn.Identity(), clean, **options, seed=0) - clean).flatten(1).double().cpu()
    lengths = moved.norm(dim=1)
    assert lengths.max() <= 0.25 * (1 + 1e-6)
    inside = (lengths / 0.25) ** pixels  # uniform in [0, 1]: the share of the ball within the radius of an image
    expected = (torch.arange(4000) + 0.5) / 4000
    assert (inside.sort().values - expected).abs().max() < 0.03  # Kolmogorov: 0.0307 is passed once in 1000 seeds
    assert (moved / lengths[:, None]).mean(0).abs().max() < 0.03 and (moved.T @ moved).fill_diagonal_(0).abs().max() < 3
    options["eps"] = 0.002
    near = (pgd(nn.Identity(), clean, **options, start="normal", seed=0) - clean).flatten(1).norm(dim=1)
    assert near.max() <= 0.002 + 1e-6 and near.min() < 0.001
