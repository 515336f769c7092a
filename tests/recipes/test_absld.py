"""ABSLD: both variants' losses and gradients, the temperature rule, and what an epoch does to the class state."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.engine import ClassSums, EpochStats, Recipe, Targets
from retemper.engine.catalogue import override
from retemper.errors import UsageError
from retemper.recipes.absld import SETTINGS, Absld, next_temperature

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/recipes.json").read_text())
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}


def absld(**constants: Any) -> Absld:
    return Absld(kl_scale=1, **constants)


def targets(case: Mapping[str, Any], dtype: torch.dtype) -> Targets:
    state = {name: torch.tensor(case[name], dtype=dtype) for name in ("temperature_adv", "temperature_clean")}
    return Targets(
        label_B=torch.tensor(case["label"]),
        teacher_BK=torch.tensor(case["teacher"], dtype=dtype),
        state=state,
    )


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("case", GOLDEN["absld"], ids=lambda case: f"K={len(case['teacher'][0])}")
def test_loss_and_gradients_are_the_known_ones(case: dict[str, Any], variant: str, dtype: torch.dtype) -> None:
    expected = case[variant]
    logits = {name: torch.tensor(case[name], dtype=dtype, requires_grad=True) for name in ("adv", "clean")}
    loss = absld(variant=variant).loss(logits, targets(case, dtype))
    tolerance: dict[str, Any] = dict(rtol=RELATIVE[dtype], atol=RELATIVE[dtype] / 100)
    torch.testing.assert_close(loss.item(), expected["loss_batchmean"], **tolerance)
    loss.backward()
    for name, value in logits.items():
        known = torch.tensor(expected[f"{name}_grad_batchmean"], dtype=dtype)
        torch.testing.assert_close(value.grad, known, **tolerance)


@pytest.mark.parametrize("classes", [10, 100])
def test_the_loss_is_a_tenth_of_the_sum_for_any_number_of_classes(classes: int) -> None:
    case = next(case for case in GOLDEN["absld"] if len(case["teacher"][0]) == classes)
    logits = {name: torch.tensor(case[name], dtype=torch.float64) for name in ("adv", "clean")}
    method = Absld()
    loss = method.loss(logits, targets(case, torch.float64))
    torch.testing.assert_close(loss.item(), case["paper"]["loss_batchmean"] / 10, rtol=1e-10, atol=0)


def test_the_attack_raises_the_adversarial_term() -> None:
    case = GOLDEN["absld"][0]
    adv = torch.tensor(case["adv"], dtype=torch.float64)
    at = targets(case, torch.float64)
    paper, released = (absld(variant=variant, adv_weight=1) for variant in ("paper", "released"))
    for method in (paper, released):
        mean = method.loss({"adv": adv, "clean": adv}, at)
        torch.testing.assert_close(method.objective(at)(adv), mean * len(adv))
    assert paper.objective(at)(adv) != released.objective(at)(adv)


@pytest.mark.parametrize("case", GOLDEN["next_temperature"], ids=lambda case: f"K={len(case['loss'][0])}")
def test_the_rule_over_epochs_is_the_known_one(case: dict[str, Any]) -> None:
    temperature = torch.ones(len(case["loss"][0]), dtype=torch.float64)
    for loss, rate, expected in zip(case["loss"], case["rate"], case["temperature"], strict=True):
        temperature = next_temperature(temperature, torch.tensor(loss, dtype=torch.float64), rate)
        torch.testing.assert_close(temperature.tolist(), expected, rtol=1e-10, atol=0)


def test_a_hard_class_gets_a_sharper_label() -> None:
    loss = torch.tensor([1.0, 2.0, 6.0])
    moved = next_temperature(torch.ones(3), loss, 0.1)
    torch.testing.assert_close(moved, torch.tensor([1 + 0.1 * 2 / 3, 1 + 0.1 / 3, 0.9]))


def test_equal_losses_move_nothing() -> None:
    temperature = torch.tensor([0.7, 1.0, 3.0])
    assert torch.equal(next_temperature(temperature, torch.full((3,), 5.0), 0.1), temperature)


def test_temperatures_stay_in_bounds() -> None:
    temperature = torch.ones(2)
    for _ in range(60):
        temperature = next_temperature(temperature, torch.tensor([1.0, 2.0]), 0.1)
    assert temperature.tolist() == [5.0, 0.5]


def test_an_epoch_moves_each_temperature_by_its_own_losses_at_the_schedules_rate() -> None:
    def sums(*loss: float) -> ClassSums:
        count = torch.ones(len(loss), dtype=torch.int64)
        return ClassSums(loss_K=torch.tensor(loss, dtype=torch.float32), correct_K=count, count_K=count)

    recipe = Recipe.of(Absld, dataset="digits", student="tiny_resnet", lr_drops=(5,), temperature_rate=0.2)
    ones: dict[str, Tensor] = recipe.method.class_state(2, recipe)
    stats = EpochStats(forwards={"adv": sums(3, 1), "clean": sums(1, 3)})
    before = recipe.method.next_class_state(ones, stats, 4, recipe)
    torch.testing.assert_close(before["temperature_adv"], torch.tensor([0.8, 1.2]))
    torch.testing.assert_close(before["temperature_clean"], torch.tensor([1.2, 0.8]))
    # after the epoch that the learning rate drops on, the rate has dropped too
    after = recipe.method.next_class_state(ones, stats, 5, recipe)
    torch.testing.assert_close(after["temperature_adv"], torch.tensor([0.98, 1.02]))


def test_a_larger_class_is_not_taken_for_a_harder_one() -> None:
    count = torch.tensor([10, 30])
    sums = ClassSums(loss_K=torch.tensor([10.0, 30.0]), correct_K=count, count_K=count)
    recipe = Recipe.of(Absld, dataset="digits", student="tiny_resnet")
    state = recipe.method.class_state(2, recipe)
    moved = recipe.method.next_class_state(state, EpochStats(forwards={"adv": sums, "clean": sums}), 1, recipe)
    assert moved["temperature_adv"].tolist() == [1.0, 1.0]


def test_manual_temperatures_stay_what_the_user_wrote() -> None:
    recipe = override(SETTINGS["digits"].recipe, {"manual_temperatures": "0.5,1,2,1,1,1,1,1,1,3"})
    state = recipe.method.class_state(10, recipe)
    for name in ("temperature_adv", "temperature_clean"):
        assert state[name].tolist() == [0.5, 1, 2, 1, 1, 1, 1, 1, 1, 3]
    count = torch.ones(10, dtype=torch.int64)
    sums = ClassSums(loss_K=torch.rand(10), correct_K=count, count_K=count)
    after = recipe.method.next_class_state(state, EpochStats(forwards={"adv": sums, "clean": sums}), 1, recipe)
    assert all(torch.equal(after[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="manual_temperatures"):
        recipe.method.class_state(9, recipe)
    with pytest.raises(UsageError, match="manual_temperatures"):
        override(recipe, {"manual_temperatures": "0,1"})


def test_a_wrong_number_of_manual_temperatures_is_told(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("absld:digits", tmp_path / "run", "--manual-temperatures", "0.5,1") == 2
    assert "there are 2, and 10 classes" in capsys.readouterr().err


def test_the_full_setting_is_the_authors() -> None:
    recipe = SETTINGS["cifar10_resnet18"].recipe
    method = recipe.method
    assert isinstance(method, Absld)
    assert (recipe.optim.epochs, recipe.optim.lr_drops, recipe.optim.batch_size) == (300, (215, 260, 285), 128)
    assert (recipe.optim.lr, recipe.optim.momentum) == (0.1, 0.9)
    assert (recipe.optim.weight_decay, recipe.optim.nesterov) == (2e-4, False)
    assert (recipe.attack.eps, recipe.attack.step, recipe.attack.steps) == (8 / 255, 2 / 255, 10)
    assert (recipe.attack.start, recipe.attack.clip_start, recipe.attack.bn_mode) == ("normal", False, "eval")
    assert (method.temperature_rate, method.temperature_lower, method.temperature_upper) == (0.1, 0.5, 5)
    assert (method.adv_weight, method.forwards) == (5 / 6, ("adv", "clean"))
    assert [round(recipe.optim.lr_at(epoch), 9) for epoch in (1, 215, 216, 261, 300)] == [0.1, 0.1, 0.01, 0.001, 0.0001]
