"""BAT: the two images of an attack by the authors' definition, walked image by image, and the loss in float64."""

import math

import pytest
import torch
from torch import Tensor

from retemper.engine import Targets
from retemper.recipes.bat import SETTINGS, Bat, Boundary


def by_definition(wrong: list[bool], tau: int) -> tuple[int, int]:
    """Return the numbers of the iterates that are x_c and x_a by definition; the attack ends in number len(wrong)."""
    last_clean = first_adv = len(wrong)
    if True in wrong:
        last_clean = max(wrong.index(True) - 1, 0)
    allowed = tau
    for number, is_wrong in enumerate(wrong):
        if is_wrong and allowed == 0:
            first_adv = number
            break
        allowed -= is_wrong
    return last_clean, first_adv


WALKS = [[bool(int(bit)) for bit in f"{number:05b}"] for number in range(32)]


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_every_walk_across_the_boundary_keeps_the_right_iterates(tau: int) -> None:
    label = torch.zeros(len(WALKS), dtype=torch.int64)
    boundary = Boundary(torch.full((len(WALKS), 1, 2, 2), -1.0), label, tau)
    adv = torch.zeros(len(WALKS), 1, 2, 2)
    for number in range(5):
        adv.fill_(number)
        right = torch.tensor([0.0 if walk[number] else 2.0 for walk in WALKS])
        boundary(adv, torch.stack([right, torch.ones(len(WALKS))], 1))
        adv.fill_(-7)  # as the attack writes over its iterate
    adv.fill_(5)
    images = boundary.images(adv)
    last_clean, first_adv = images["last_clean"], images["adv"]
    for row, walk in enumerate(WALKS):
        assert (int(last_clean[row, 0, 0, 0]), int(first_adv[row, 0, 0, 0])) == by_definition(walk, tau), walk
        assert last_clean[row].unique().numel() == first_adv[row].unique().numel() == 1


def test_images_go_by_the_names_of_the_forwards() -> None:
    method = Bat()
    clean = torch.rand(2, 1, 4, 4).to(memory_format=torch.channels_last)
    targets = Targets(label_B=torch.tensor([0, 0]), state={})
    watched = method.watcher(clean, targets)
    for number in range(3):  # the second is wrong from its second iterate on
        watched(clean + number, torch.tensor([[1.0, 0, 0], [1.0, number, 0]]) + torch.tensor([0.0, 0.0, 0.0]))
    images = {"clean": clean, "adv": clean + 3} | watched.images(clean + 3)
    assert images.keys() == {*method.forwards} and method.forwards == ("last_clean", "adv", "clean")
    shift = {name: (image - clean).mean((1, 2, 3)).round().tolist() for name, image in images.items()}
    assert shift == {"last_clean": [3, 1], "adv": [3, 3], "clean": [0, 0]}


def test_the_code_takes_each_side_from_an_attack_of_its_own() -> None:
    paper = SETTINGS["cifar10_resnet18"].recipe
    released = paper.as_variant("released")
    one, other = paper.flat(), released.flat()
    changed = {name: other[name] for name in one if one[name] != other[name]}
    assert changed == {"variant": "released", "holdout_per_class": 0, "precision": "fp32"}
    assert (paper.method.attacks(), released.method.attacks()) == (1, 2)
    clean = torch.rand(2, 1, 4, 4)
    for attack, side in enumerate(("last_clean", "adv")):
        targets = Targets(label_B=torch.tensor([0, 0]), state={}, attack=attack)
        watched = released.method.watcher(clean, targets)
        assert watched is not None
        watched(clean, torch.eye(2))
        assert watched.images(clean).keys() == {side}


def test_loss_is_the_formula() -> None:
    gen = torch.Generator().manual_seed(0)
    method = Bat()
    logits: dict[str, Tensor] = {n: torch.randn(8, 5, generator=gen, dtype=torch.float64) for n in method.forwards}
    label = torch.arange(8) % 5
    p = {name: value.softmax(1) for name, value in logits.items()}
    ce = -p["last_clean"][torch.arange(8), label].log().mean()
    kl = (p["clean"] * (p["clean"] / p["adv"]).log()).sum(1).mean()
    uniform = sum(math.log(5) + (p[name] * p[name].log()).sum(1).mean() for name in ("last_clean", "adv"))
    loss = method.loss(logits, Targets(label_B=label, state={}))
    torch.testing.assert_close(loss.double(), ce + 6 * kl + uniform, rtol=1e-6, atol=0)


def test_the_full_setting_is_the_authors() -> None:
    recipe = SETTINGS["cifar10_resnet18"].recipe
    assert (recipe.attack.eps, recipe.attack.step) == (0.031, 0.007)
    assert (recipe.attack.steps, recipe.attack.clip_start) == (10, True)
    assert (recipe.optim.epochs, recipe.optim.lr_drops, recipe.optim.weight_decay) == (200, (74, 89, 99), 2e-4)
