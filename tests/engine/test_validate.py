"""Held-out images: every value by hand, class by class, under both attacks."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import HeldOut, Recipe, create_model, cross_entropy_objective, pgd
from retemper.engine.catalogue import find_setting
from retemper.engine.run.selection import validate
from retemper.loaders import Split, load_split, split_of_arrays

CPU = torch.device("cpu")
METHODS = {"pgd": "frl:digits", "training attack": "wat:digits"}


def split() -> Split:
    """Return 50 digits: classes of unequal size, and no image of class 9."""
    whole = load_split("digits", "train")
    chosen = [index for index, label in enumerate(whole.labels) if label != 9][:50]
    return split_of_arrays("digits", "train", whole.images[chosen], whole.labels[chosen], whole.classes, "")


def recipe(by: str) -> Recipe:
    return find_setting(METHODS[by])[2].recipe.replace(select_steps=3, attack_steps=2)


def model() -> torch.nn.Module:
    torch.manual_seed(2)
    network = create_model("tiny_resnet", 10)
    for parameter in network.parameters():
        parameter.data *= 1.5  # opinions strong enough for classes to differ
    return network


def kl(clean: Tensor, adv: Tensor) -> Tensor:
    p, q = clean.softmax(1), adv.softmax(1)
    return (p * (p / q).log()).sum(1)


@pytest.mark.parametrize("by", METHODS)
def test_values_are_those_by_hand(by: str) -> None:
    network, held = model().eval(), split()
    label = torch.from_numpy(held.labels)
    image = torch.from_numpy(held.images).permute(0, 3, 1, 2).float() / 255
    assert recipe(by).method.validates_by == by
    rows: dict[str, list[Tensor]] = {"clean": [], "adv": []}
    for chosen in torch.arange(50).split(32):  # the random start is drawn batch by batch
        clean = network(image[chosen]).detach()
        settings = dict(steps=3, step=0.15 / 4, start="uniform")
        objective = cross_entropy_objective(label[chosen])
        if by == "training attack":
            settings = dict(steps=2, step=0.15 / 4, start="normal", clip_start=False)
            objective = lambda logits, clean=clean: kl(clean, logits).sum()  # noqa: E731
        adv = pgd(network, image[chosen], objective=objective, eps=0.15, seed=int(chosen[0]), **settings)  # pyright: ignore
        rows["clean"].append(clean)
        rows["adv"].append(network(adv).detach())
    clean, adv = (torch.cat(value) for value in rows.values())
    result = validate(model(), recipe(by), held, 10, CPU, batch_size=32)
    each = {
        "clean_accuracy_K": (clean.argmax(1) == label).float(),
        "robust_accuracy_K": (adv.argmax(1) == label).float(),
        "clean_loss_K": F.cross_entropy(clean, label, reduction="none"),
        "boundary_loss_K": kl(clean, adv),
    }
    for name, value in each.items():
        expected = torch.stack([value[label == k].mean() if k != 9 else torch.tensor(0.0) for k in range(10)])
        torch.testing.assert_close(getattr(result, name), expected, rtol=1e-3, atol=1e-5)
    assert result.boundary_loss_K[:9].min() > 0 and 0 < result.clean_accuracy_K.max()


def test_repeats_itself_and_leaves_the_statistics_alone() -> None:
    network = model().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    one, other = (validate(network, recipe("pgd"), split(), 10, CPU) for _ in range(2))
    for name in HeldOut.__dataclass_fields__:
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
