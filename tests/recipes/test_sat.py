"""SAT: cross-entropy on the adversarial images, and nothing else."""

import pytest
import torch

from retemper.engine import State, Targets, create_model, train_step
from retemper.recipes.sat import SETTINGS, Sat


def test_losses_are_cross_entropies() -> None:
    method = Sat()
    logits, label = torch.tensor([[0.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
    targets = Targets(label_B=label, state={})
    each = torch.tensor([0.693147, 3.048587])  # log 2; log(1 + e^3)
    torch.testing.assert_close(method.loss({"adv": logits}, targets), each.mean())
    torch.testing.assert_close(method.objective(targets)(logits), each.sum())


def test_sees_adversarial_images_alone() -> None:
    assert all(setting.recipe.method.forwards == ("adv",) for setting in SETTINGS.values())
    assert all(setting.recipe.networks.teacher_model is None for setting in SETTINGS.values())


def test_students_are_attacked_in_training_mode_and_teachers_in_evaluation_mode() -> None:
    modes = {name: setting.recipe.attack.bn_mode for name, setting in SETTINGS.items()}
    students = {name for name, mode in modes.items() if mode == "train"}
    assert students == {name for name, setting in SETTINGS.items() if "teacher" not in setting.note}
    assert modes["cifar10_preact_resnet18"] == "train" and modes["digits"] == "eval"


def test_the_clean_teachers_are_trained_and_chosen_without_an_attack() -> None:
    found = [setting.recipe for name, setting in SETTINGS.items() if name.endswith("_clean")]
    assert len(found) == 9
    seen = {(recipe.attack.steps, recipe.attack.start, recipe.selection.select_steps) for recipe in found}
    assert seen == {(0, "none", 0)}
    with pytest.raises(ValueError, match="variant"):  # the script would choose the epoch by an attack
        found[0].as_variant("released")


def test_without_attack_steps_the_images_are_the_clean_ones() -> None:
    recipe = SETTINGS["digits_clean"].recipe
    state = State(recipe, create_model("tiny_resnet_wide", 10), None, 10, torch.device("cpu"))
    clean, seen = torch.rand(4, 1, 8, 8), []
    state.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    train_step(state, recipe, clean, torch.arange(4))
    assert len(seen) == 1 and torch.equal(seen[0], clean)
    assert recipe.attack.eps == SETTINGS["digits"].recipe.attack.eps  # what an evaluation attacks it with
