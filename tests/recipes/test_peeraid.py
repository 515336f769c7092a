"""PeerAiD: both losses and all gradients against PyTorch's terms in float64, the attack's objective, the settings."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import Targets
from retemper.recipes.peeraid import SETTINGS, PeerAid

WEIGHTS = {"student": (0.0, 1.0, 1.0, 5.0), "all": (0.3, 2.0, 0.7, 2.0)}  # l1, l2, l3, T


def mean_kl(target_BK: Tensor, logits_BK: Tensor, t: float = 1.0) -> Tensor:
    """Return PyTorch's KLDivLoss as the authors call it: a mean over images and classes, of differentiable terms."""
    return F.kl_div((logits_BK / t).log_softmax(1), (target_BK / t).softmax(1), reduction="none").mean()


@pytest.mark.parametrize(("l1", "l2", "l3", "t"), WEIGHTS.values(), ids=WEIGHTS)
def test_losses_and_gradients_are_the_formula(l1: float, l2: float, l3: float, t: float) -> None:
    """The student has a gradient in the peer's loss and at its clean answers; the peer has none in the student's."""
    gen = torch.Generator().manual_seed(0)
    drawn = {name: 2 * torch.randn(6, 10, generator=gen, dtype=torch.float64) for name in ("adv", "clean", "peer")}
    ours, theirs = ({name: value.clone().requires_grad_() for name, value in drawn.items()} for _ in range(2))
    label = torch.arange(6) % 10
    method = PeerAid(label_weight=l1, soft_weight=l2, clean_weight=l3, temperature=t)
    loss = method.loss(
        {name: ours[name] for name in ("adv", "clean")}, Targets(label_B=label, peer_adv_BK=ours["peer"], state={})
    )
    adv, clean, peer = theirs.values()
    of_peer = F.cross_entropy(peer, label) + 0.1 * mean_kl(adv, peer)
    of_student = l1 * F.cross_entropy(adv, label) + l2 * t * t * mean_kl(peer.detach(), adv, t)
    expected = of_peer + of_student + l3 * t * t * mean_kl(clean, adv, t)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-10, atol=1e-14)


def test_the_attack_leaves_what_the_peer_says_of_the_clean_image() -> None:
    peer, adv = torch.randn(2, 4, 10, dtype=torch.float64)
    targets = Targets(label_B=torch.arange(4), peer_BK=peer, state={})
    expected = F.kl_div(adv.log_softmax(1), peer.softmax(1), reduction="sum")
    torch.testing.assert_close(PeerAid().objective(targets)(adv), expected, rtol=1e-12, atol=0)


def test_the_full_settings_are_the_authors() -> None:
    for name, classes, soft in (("cifar10_resnet18", 10, 0.1), ("cifar100_resnet18", 100, 1.0)):
        recipe = SETTINGS[name].recipe
        assert isinstance(recipe.method, PeerAid)
        assert (recipe.method.kl_scale, recipe.method.peer_soft_weight) == (1 / classes, soft)
        assert [recipe.optim.lr_at(epoch) for epoch in (214, 215, 260, 285)] == pytest.approx([0.1, 0.01, 1e-3, 1e-4])
        assert (recipe.optim.average, recipe.optim.average_every, recipe.optim.average_from) == ("swa", "epoch", 215)
        assert (recipe.optim.weight_decay, recipe.optim.batch_size, recipe.optim.epochs) == (2e-4, 128, 300)
    tiny = SETTINGS["tiny_imagenet_preact_resnet18"].recipe
    assert isinstance(tiny.method, PeerAid) and tiny.optim.lr_drops == (99, 149)
    assert (tiny.method.label_weight, tiny.method.soft_weight, tiny.method.clean_weight) == (0.035, 35, 20)
    released = SETTINGS["cifar10_resnet18"].recipe.as_variant("released")
    assert released.method.forwards_in(1, released).before == ("adv", "adv", "clean")


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_average_begins_at_the_first_drop(setting: str) -> None:
    optim = SETTINGS[setting].recipe.optim
    assert optim.average_from == optim.lr_drops[0] + 1
