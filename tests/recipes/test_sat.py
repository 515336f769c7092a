"""SAT: cross-entropy on the adversarial images, and nothing else."""

import torch

from retemper.engine import Targets
from retemper.recipes.sat import SETTINGS, Sat


def test_losses_are_cross_entropies() -> None:
    recipe = Sat(dataset="digits", student="tiny_resnet")
    logits, label = torch.tensor([[0.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
    targets = Targets(label_B=label, state={}, ones_K=torch.ones(2))
    each = torch.tensor([0.693147, 3.048587])  # log 2; log(1 + e^3)
    torch.testing.assert_close(recipe.loss({"adv": logits}, targets), each.mean())
    torch.testing.assert_close(recipe.objective(targets)(logits), each.sum())


def test_sees_adversarial_images_alone() -> None:
    assert all(setting.recipe.forwards == ("adv",) for setting in SETTINGS.values())
    assert all(setting.recipe.teacher_model is None for setting in SETTINGS.values())
