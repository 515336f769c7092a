"""RSLAD: its loss by hand and against PyTorch's KL in float64."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from retemper.engine import Targets
from retemper.engine.catalogue import find_setting
from retemper.recipes.rslad import Rslad


def test_loss_equals_the_formula_by_hand() -> None:
    targets = Targets(
        label_B=torch.zeros(1, dtype=torch.int64),
        teacher_BK=torch.tensor([[0.75, 0.25]]).log(),
        state={},
    )
    logits = {"adv": torch.tensor([[0.5, 0.5]]).log(), "clean": torch.tensor([[0.25, 0.75]]).log()}
    by_hand = (5 / 6 * 0.130812 + 1 / 6 * 0.549306) / 10  # KL((3/4, 1/4) || (1/2, 1/2)) and || (1/4, 3/4), in nats
    torch.testing.assert_close(Rslad().loss(logits, targets).item(), by_hand, rtol=1e-5, atol=0)


def test_loss_equals_pytorchs_kl() -> None:
    gen = torch.Generator().manual_seed(0)
    teacher, adv, clean = (3 * torch.randn(7, 10, generator=gen, dtype=torch.float64) for _ in range(3))
    targets = Targets(label_B=torch.arange(7), teacher_BK=teacher, state={})

    def mean_over_classes(logits: torch.Tensor) -> torch.Tensor:  # the released code's reduction
        return F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="sum") / logits.numel()

    expected = 5 / 6 * mean_over_classes(adv) + 1 / 6 * mean_over_classes(clean)
    torch.testing.assert_close(Rslad().loss({"adv": adv, "clean": clean}, targets), expected, rtol=1e-12, atol=0)
    attack = F.kl_div(adv.log_softmax(1), teacher.softmax(1), reduction="sum")
    torch.testing.assert_close(Rslad().objective(targets)(adv), attack, rtol=1e-12, atol=0)


ON_TEST = dict(select_on="test", select_steps=20, select_step=0.003 * 255 / 8, precision="fp32", nesterov=False)
LAST = dict(select_on="holdout", holdout_per_class=0, precision="fp32", nesterov=True)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rslad", dict(ON_TEST, select_by="robust", select_every=20)),
        ("absld", dict(ON_TEST, select_by="robust+worst", select_every=10)),
        ("mtard", dict(ON_TEST, select_by="robust", select_every=20)),
        ("b_mtard", dict(ON_TEST, select_by="clean+robust", select_every=20)),
        ("fair_rslad", LAST),
        ("fair_mtard", LAST),
    ],
)
def test_released_has_the_split_the_choice_and_the_precision_of_the_authors(
    method: str, options: dict[str, Any]
) -> None:
    found = find_setting(f"{method}:cifar10_resnet18")[2].recipe.as_variant("released")
    flat = found.flat()
    assert {name: flat[name] for name in options} == options
    assert (flat["select_always_from"], flat["select_from"]) == (215, 1)
    assert not found.holds_out and flat["kl_scale"] == 0.1
    assert find_setting(f"{method}:cifar100_resnet18")[2].recipe.flat()["kl_scale"] == 0.1  # 10 / 100, as in theirs
