"""What docs/kernels/drop-ins.md promises: other codes' arithmetic, written anew in plain PyTorch, beside our calls."""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import retemper.kernels
from retemper.kernels import class_temperature_js, class_temperature_kl, class_temperature_kl_grad_, pgd_step_

PAGE = Path(__file__).parents[2] / "docs/kernels/drop-ins.md"
STEP, EPS = 2 / 255, 5 / 255
STEP_L2, EPS_L2 = 0.4, 0.6
LAST_PLACE = 3e-7  # a few roundings of a pixel in [0, 1]
Advance = Callable[[Tensor, Tensor, Tensor], Tensor]  # adv, grad, clean -> adv


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images, many of them at the border of the range, and starts in the ball."""
    clean = (draw(6, 3, 5, 4, seed=seed) * 0.7 + 0.5).clamp(0, 1)
    return clean, (clean + EPS * torch.tanh(draw(6, 3, 5, 4, seed=seed + 1))).clamp(0, 1)


def walk(advance: Advance, adv: Tensor, clean: Tensor) -> Tensor:
    """Take four steps along gradients that do not depend on the images."""
    for number in range(4):
        adv = advance(adv, draw(*adv.shape, seed=10 + number) * 1e-3, clean)
    return adv


def norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def within(x: Tensor, eps: float) -> Tensor:
    """What renorm and its like do: no longer than eps, the direction kept."""
    return x * (eps / norm(x).clamp(min=1e-12)).clamp(max=1)


def by_bounds(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
    """TRADES, RSLAD, MART, AWP, DM-Improves-AT in their training."""
    moved = adv + STEP * grad.sign()
    return torch.min(torch.max(moved, clean - EPS), clean + EPS).clamp(0, 1)


def by_two_masks(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
    """torchattacks.BIM: bounds chosen by products with 0 and 1."""
    moved, low, high = adv + STEP * grad.sign(), (clean - EPS).clamp(min=0), clean + EPS
    moved = (moved >= low).float() * moved + (moved < low).float() * low
    return ((moved > high).float() * high + (moved <= high).float() * moved).clamp(max=1)


def by_difference(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
    """torchattacks.PGD, foolbox, robustness, TRADES' evaluation, revisiting-at's FGSM."""
    return (clean + (adv + STEP * grad.sign() - clean).clamp(-EPS, EPS)).clamp(0, 1)


def clipped_first(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
    """RSLAD's evaluation, ART."""
    return clean + ((adv + STEP * grad.sign()).clamp(0, 1) - clean).clamp(-EPS, EPS)


def by_perturbation(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
    """robust_overfitting, DM-Improves-AT's evaluation: the perturbation is what they keep."""
    delta = (adv - clean + STEP * grad.sign()).clamp(-EPS, EPS)
    return clean + torch.max(torch.min(delta, 1 - clean), 0 - clean)


def ours(**options: object) -> Advance:
    return lambda adv, grad, clean: pgd_step_(adv.clone(), grad, clean, STEP, EPS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("theirs", [by_bounds, by_two_masks])
def test_the_step_by_bounds_is_ours_to_the_bit(theirs: Advance) -> None:
    clean, adv = batch()
    assert torch.equal(walk(theirs, adv, clean), walk(ours(), adv, clean))


@pytest.mark.parametrize("theirs", [by_difference, clipped_first, by_perturbation])
def test_the_step_by_differences_is_ours_to_rounding(theirs: Advance) -> None:
    clean, adv = batch()
    torch.testing.assert_close(walk(theirs, adv, clean), walk(ours(), adv, clean), rtol=0, atol=LAST_PLACE)


def test_a_targeted_attack_is_a_negative_step() -> None:
    """torchattacks, robustness and foolbox negate the loss, the gradient or the step."""
    clean, adv = batch()
    descend: Advance = lambda adv, grad, clean: pgd_step_(adv.clone(), grad, clean, -STEP, EPS)  # noqa: E731
    theirs: Advance = lambda adv, grad, clean: by_bounds(adv, -grad, clean)  # noqa: E731
    assert torch.equal(walk(theirs, adv, clean), walk(descend, adv, clean))


def test_fgsm_is_a_step_to_the_border() -> None:
    clean, _ = batch()
    grad = draw(*clean.shape, seed=3)
    assert torch.equal(pgd_step_(clean.clone(), grad, clean, EPS, EPS), (clean + EPS * grad.sign()).clamp(0, 1))


def test_the_step_of_fast_adversarial_has_its_numbers_by_channel() -> None:
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)))
    step, eps, lower, upper = STEP / std, EPS / std, (0 - mean) / std, (1 - mean) / std
    clean, adv = ((images - mean) / std for images in batch())

    def theirs(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        delta = torch.max(torch.min(adv - clean + step * grad.sign(), eps), -eps)
        return clean + torch.max(torch.min(delta, upper - clean), lower - clean)

    def by_channel(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        return pgd_step_(adv.clone(), grad, clean, step, eps, lower=lower, upper=upper)

    torch.testing.assert_close(walk(theirs, adv, clean), walk(by_channel, adv, clean), rtol=0, atol=4 * LAST_PLACE)


def test_numbers_by_sample_are_those_of_dm_improves_at() -> None:
    clean, adv = batch()
    step, eps = torch.linspace(0.5, 2, 6) * STEP, torch.linspace(0.5, 2, 6) * EPS

    def theirs(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        wide = eps.view(-1, 1, 1, 1)
        delta = torch.min(torch.max(adv - clean + step.view(-1, 1, 1, 1) * grad.sign(), -wide), wide)
        return (clean + delta).clamp(0, 1)

    by_sample: Advance = lambda adv, grad, clean: pgd_step_(adv.clone(), grad, clean, step, eps)  # noqa: E731
    torch.testing.assert_close(walk(theirs, adv, clean), walk(by_sample, adv, clean), rtol=0, atol=LAST_PLACE)


def test_early_stopping_is_a_mask_of_rows() -> None:
    """robust_overfitting and fast_adversarial move the images that are still classified rightly."""
    clean, adv = batch()
    right = torch.tensor([True, False, True, True, False, True])

    def theirs(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        adv = adv.clone()
        adv[right] = by_bounds(adv[right], grad[right], clean[right])
        return adv

    assert torch.equal(walk(theirs, adv, clean), walk(ours(mask=right), adv, clean))


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("kind", ["linf", "l2"])
def test_art_masks_the_gradient_before_all_else(kind: str, decay: float | None) -> None:
    """ART clips, then projects; its start is masked too, so that masked pixels stay those of the image."""
    clean, adv = batch()
    mask = draw(*clean.shape, seed=7) > 0
    adv = torch.where(mask, adv, clean)
    step, eps = (STEP, EPS) if kind == "linf" else (STEP_L2, EPS_L2)
    held, buffer = torch.zeros_like(clean), None if decay is None else torch.zeros_like(clean)

    def theirs(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        grad = grad * mask
        if decay is not None:
            grad = held.mul_(decay).add_(grad / grad.abs().flatten(1).sum(1).view(-1, 1, 1, 1))
        delta = (adv + step * (grad.sign() if kind == "linf" else grad / norm(grad))).clamp(0, 1) - clean
        return clean + (delta.clamp(-eps, eps) if kind == "linf" else within(delta, eps))

    def mine(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        rest = {"norm": kind, "clip_first": kind == "l2", "mask": mask, "momentum": buffer, "decay": decay or 1.0}
        return pgd_step_(adv.clone(), grad, clean, step, eps, **rest)

    torch.testing.assert_close(walk(theirs, adv, clean), walk(mine, adv, clean), rtol=0, atol=2 * LAST_PLACE)


@pytest.mark.parametrize("by", ["mean", "sum"])
def test_momentum_is_that_of_torchattacks_and_art(by: str) -> None:
    """torchattacks divides a gradient by its mean, ART by its sum: the sign of the momentum is the same."""
    clean, adv = batch()
    held, buffer = torch.zeros_like(clean), torch.zeros_like(clean)

    def theirs(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        size = grad.abs().flatten(1)
        held.mul_(0.9).add_(grad / (size.mean(1) if by == "mean" else size.sum(1)).view(-1, 1, 1, 1))
        return by_difference(adv, held, clean)

    stepped = walk(ours(momentum=buffer, decay=0.9), adv, clean)
    torch.testing.assert_close(walk(theirs, adv, clean), stepped, rtol=0, atol=LAST_PLACE)


def l2(clip_first: bool = False) -> Advance:
    """Take the step of the L2 attacks: some clip last, some before the projection."""

    def advance(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        moved = adv + STEP_L2 * grad / norm(grad)
        if clip_first:
            return clean + within(moved.clamp(0, 1) - clean, EPS_L2)
        return (clean + within(moved - clean, EPS_L2)).clamp(0, 1)

    return advance


def test_l2_is_that_of_torchattacks_foolbox_robustness_and_robust_overfitting() -> None:
    clean, adv = batch()
    stepped: Advance = lambda a, g, c: pgd_step_(a.clone(), g, c, STEP_L2, EPS_L2, norm="l2")  # noqa: E731
    torch.testing.assert_close(walk(l2(), adv, clean), walk(stepped, adv, clean), rtol=0, atol=2 * LAST_PLACE)


def test_l2_that_clips_first_is_that_of_trades_awp_art_and_dm_improves_at() -> None:
    clean, adv = batch()

    def stepped(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        return pgd_step_(adv.clone(), grad, clean, STEP_L2, EPS_L2, norm="l2", clip_first=True)

    theirs = walk(l2(clip_first=True), adv, clean)
    torch.testing.assert_close(theirs, walk(stepped, adv, clean), rtol=0, atol=2 * LAST_PLACE)
    assert not torch.allclose(theirs, walk(l2(), adv, clean), atol=1e-4), "the order shows"


@pytest.mark.parametrize("kind", ["linf", "l2"])
def test_the_update_of_auto_attack_and_revisiting_at_is_ours(kind: str) -> None:
    """Their attack: two points, inertia 1 in the first step, and a step for each image that is halved."""
    clean, adv = batch()
    eps = EPS if kind == "linf" else EPS_L2
    step = 2 * eps / torch.tensor([1.0, 2, 1, 4, 2, 1]).view(-1, 1, 1, 1)

    def project(x: Tensor) -> Tensor:
        if kind == "linf":
            return torch.min(torch.max(x, clean - eps), clean + eps).clamp(0, 1)
        return (clean + (x - clean) / norm(x - clean) * norm(x - clean).clamp(max=eps)).clamp(0, 1)

    plain, plain_old = adv, adv
    mine, mine_old = adv.clone(), adv.clone()
    for number in range(4):
        grad, inertia = draw(*clean.shape, seed=10 + number), 0.75 if number else 1.0
        towards = grad.sign() if kind == "linf" else grad / norm(grad)
        goal = project(plain + step * towards)
        back, plain_old = plain - plain_old, plain
        plain = project(plain + (goal - plain) * inertia + back * (1 - inertia))
        mine = pgd_step_(mine, grad, clean, step, eps, norm=kind, previous=mine_old, inertia=inertia)
        for one, other in ((mine, plain), (mine_old, plain_old)):
            torch.testing.assert_close(one, other, rtol=0, atol=0 if kind == "linf" else 2 * LAST_PLACE)


def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Return logits under attack, clean logits and labels."""
    adv_BK, clean_BK = (2 * draw(8, 10, seed=seed) for seed in (20, 21))
    return adv_BK.requires_grad_(), clean_BK.requires_grad_(), torch.arange(8)


def assert_same(mine: Tensor, theirs: Tensor, *inputs: Tensor, value: float = 1e-6) -> None:
    """Compare two scalars, and their gradients with respect to the inputs."""
    torch.testing.assert_close(mine, theirs, rtol=value, atol=value)
    for one, other in zip(torch.autograd.grad(mine, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)


def test_the_outer_loss_of_trades_and_awp_has_both_gradients() -> None:
    adv_BK, clean_BK, _ = logits()
    theirs = F.kl_div(adv_BK.log_softmax(1), clean_BK.softmax(1), reduction="sum") / len(adv_BK)
    assert_same(class_temperature_kl(adv_BK, clean_BK), theirs, adv_BK, clean_BK)


def test_the_inner_loss_of_trades_and_rslad_takes_either_call() -> None:
    adv_BK, clean_BK, _ = logits()
    theirs = F.kl_div(adv_BK.log_softmax(1), clean_BK.softmax(1).detach(), reduction="sum")
    assert_same(class_temperature_kl(adv_BK, clean_BK.detach(), reduction="sum"), theirs, adv_BK)
    (expected,) = torch.autograd.grad(
        F.kl_div(adv_BK.log_softmax(1), clean_BK.softmax(1).detach(), reduction="sum"), adv_BK
    )
    at_logits = class_temperature_kl_grad_(adv_BK.detach().clone(), clean_BK.detach())
    torch.testing.assert_close(at_logits, expected, rtol=2e-6, atol=2e-7)


def test_the_loss_of_rslad_differs_by_a_constant() -> None:
    adv_BK, clean_BK, _ = logits()
    soft = clean_BK.detach().softmax(1)
    theirs = (-adv_BK.log_softmax(1) * soft + (soft + 1e-5).log() * soft).mean()
    assert_same(class_temperature_kl(adv_BK, clean_BK.detach(), reduction="mean"), theirs, adv_BK, value=1e-5)


def test_the_weighted_loss_of_mart_has_the_gradient_of_its_weight() -> None:
    adv_BK, clean_BK, label = logits()

    def away() -> Tensor:
        return 1.0000001 - clean_BK.softmax(1).gather(1, label[:, None])[:, 0]

    rows = F.kl_div((adv_BK.softmax(1) + 1e-12).log(), clean_BK.softmax(1), reduction="none").sum(1)
    mine = (class_temperature_kl(adv_BK, clean_BK, reduction="none") * away()).mean()
    assert_same(mine, (rows * away()).sum() / len(label), adv_BK, clean_BK)
    with pytest.raises(ValueError, match="row_weight"):
        class_temperature_kl(adv_BK, clean_BK, row_weight=away())


def test_the_rows_of_mair_are_ours() -> None:
    adv_BK, clean_BK, _ = logits()
    theirs = F.kl_div(adv_BK.log_softmax(1), clean_BK.softmax(1), reduction="none").sum(1)
    mine = class_temperature_kl(adv_BK, clean_BK, reduction="none")
    assert_same(mine.square().sum(), theirs.square().sum(), adv_BK, clean_BK)


def test_mixed_labels_of_dm_improves_at_are_probabilities() -> None:
    adv_BK, _, label = logits()
    mixed = 0.7 * F.one_hot(label, 10) + 0.3 * F.one_hot(label.flip(0), 10)
    theirs = F.kl_div(adv_BK.log_softmax(1), mixed, reduction="batchmean")
    assert_same(class_temperature_kl(adv_BK, mixed, teacher_is="probabilities"), theirs, adv_BK)


def test_the_consistency_loss_of_dm_improves_at_is_jensen_shannon() -> None:
    one, other, _ = logits()
    soft, other_soft = (one / 0.5).softmax(1), (other / 0.5).softmax(1)
    middle = (0.5 * (soft + other_soft)).clamp(min=1e-8).log()
    theirs = 0.5 * (F.kl_div(middle, soft, reduction="batchmean") + F.kl_div(middle, other_soft, reduction="batchmean"))
    assert_same(class_temperature_js(one, other, temperature=0.5, student_temperature=0.5), theirs, one, other)


def calls() -> list[str]:
    """Return the calls of the page's tables: what stands between backticks and names one of our functions."""
    names = "|".join(retemper.kernels.__all__)
    return [code for code in re.findall(r"`([^`]+)`", PAGE.read_text()) if re.search(rf"\b({names})\(", code)]


@pytest.mark.parametrize("code", sorted(set(calls())))
def test_a_call_on_the_page_fits_its_function(code: str) -> None:
    called = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    mine = [node for node in called if isinstance(node.func, ast.Name) and hasattr(retemper.kernels, node.func.id)]
    assert mine
    for node in mine:
        keywords = {word.arg: None for word in node.keywords if word.arg}
        if isinstance(node.func, ast.Name):
            inspect.signature(getattr(retemper.kernels, node.func.id)).bind(*node.args, **keywords)


def test_the_page_has_all_codes() -> None:
    headings = re.findall(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(headings) == 14 and len(calls()) >= 40
