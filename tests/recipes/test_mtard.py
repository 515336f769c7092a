"""MTARD and B-MTARD: the tasks' weights and the teachers' temperatures, step by step as in the authors' code."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.cli import run
from retemper.engine import EpochStats, Recipe, Targets
from retemper.recipes.b_mtard import SETTINGS as B_SETTINGS
from retemper.recipes.b_mtard import BMtard
from retemper.recipes.mtard import SETTINGS, Mtard, floor_cost, next_clean_weight

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/recipes.json").read_text())["mtard_weight"]
LABEL = torch.arange(7) % 5


def drawn(step: int, scale: float = 1.0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The student's logits, and the two teachers', of a step."""
    gen = torch.Generator().manual_seed(step)
    adv, clean, robust, sure = (2 * torch.randn(7, 5, generator=gen, dtype=torch.float64) for _ in range(4))
    return {"adv": adv, "clean": clean}, robust, scale * sure


def start_of(method: Mtard) -> dict[str, Tensor]:
    return method.class_state(5, Recipe.of(type(method), dataset="digits", student="tiny_resnet"))


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in state.items()}


def targets(robust: Tensor, sure: Tensor, state: dict[str, Tensor]) -> Targets:
    return Targets(label_B=LABEL, teacher_adv_BK=robust, clean_teacher_BK=sure, state=state)


def mean_kl(teacher: Tensor, logits: Tensor) -> float:
    """The mean over images and over classes, as in the authors' code: a tenth of the sum where there are 10."""
    return F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="sum").item() / 7 / 10


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{len(case['adv_loss'])} steps")
def test_the_rule_over_steps_is_the_known_one(case: dict) -> None:
    adv, clean = (torch.tensor(case[f"{name}_loss"], dtype=torch.float64) for name in ("adv", "clean"))
    weight = torch.tensor([0.5], dtype=torch.float64)
    for step, expected in enumerate(case["clean_weight"]):
        weight = next_clean_weight(weight, adv[step] / adv[0], clean[step] / clean[0], case["rate"])
        torch.testing.assert_close(weight.item(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{len(case['adv_loss'])} steps")
def test_steps_move_the_state_as_the_rule_says(case: dict) -> None:
    class Known(Mtard):
        """A stand-in whose task losses are the case's."""

        def task_losses(self, logits, targets):
            return logits["adv"], logits["clean"]

    method = Known(task_rate=case["rate"])
    state = double(start_of(method))
    state["task_rate"].fill_(case["rate"])
    addresses = {name: value.data_ptr() for name, value in state.items()}
    for adv, clean, expected in zip(case["adv_loss"], case["clean_loss"], case["clean_weight"], strict=True):
        logits = {name: torch.tensor(loss, dtype=torch.float64) for name, loss in (("adv", adv), ("clean", clean))}
        at = targets(torch.zeros(7, 5), torch.zeros(7, 5), state)
        loss = method.loss(logits, at)  # weighed by what this very step makes of the weights
        torch.testing.assert_close(loss.item(), (1 - expected) * adv + expected * clean, rtol=1e-10, atol=0)
        method.after_step(state, logits, at)
        torch.testing.assert_close(state["clean_task_weight"].item(), expected, rtol=1e-10, atol=0)
    assert {name: value.data_ptr() for name, value in state.items()} == addresses


def test_the_loss_is_the_formula() -> None:
    method = Mtard()
    state = double(start_of(method))
    weight, first = 0.5, None
    for step in range(4):
        logits, robust, sure = drawn(step)
        adv, clean = mean_kl(robust, logits["adv"]), mean_kl(sure, logits["clean"])
        first = first or (adv, clean)
        ratios = adv / first[0], clean / first[1]
        weight -= state["task_rate"].item() * (weight - ratios[1] / sum(ratios))
        loss = method.loss(logits, targets(robust, sure, state))
        torch.testing.assert_close(loss.item(), (1 - weight) * adv + weight * clean, rtol=1e-10, atol=0)
        method.after_step(state, logits, targets(robust, sure, state))


@pytest.mark.parametrize("temperature", [None, [0.5, 1.0, 2.0, 3.0, 1.5]])
@pytest.mark.parametrize("weight", [None, [1.0, 2.5, 0.8, 1.0, 1.2]])
def test_the_floor_raises_the_loss_by_what_the_authors_logarithm_does(
    temperature: list[float] | None, weight: list[float] | None
) -> None:
    _, robust, _ = drawn(0)
    t, w = (torch.tensor(value or [1.0] * 5).double() for value in (temperature, weight))
    p = (robust / t[LABEL, None]).softmax(1)
    expected = (w[LABEL] * (p * ((p + 1e-5).log() - p.log())).sum(1)).mean()
    cost = floor_cost(robust, LABEL, None if temperature is None else t, None if weight is None else w)
    torch.testing.assert_close(cost, expected, rtol=1e-9, atol=0)
    assert 0 < cost < w.max() * 5 * 1e-5
    sure = torch.tensor([[0.0, -2000.0]])
    assert floor_cost(sure, torch.zeros(1, dtype=torch.int64)) == torch.tensor(1 + 1e-5).log()  # and no 0 * inf


def test_the_weights_carry_no_gradient() -> None:
    method = Mtard()
    state = double(start_of(method)) | {"first_adv_loss": torch.ones(1).double()}
    logits, robust, sure = drawn(0)
    adv = logits["adv"].requires_grad_()
    loss = method.loss(logits, targets(robust, sure, state))
    weight = method.balance(state, *method.task_losses(logits, targets(robust, sure, state)))["clean_task_weight"]
    (grad,) = torch.autograd.grad(loss, adv)
    expected = (1 - weight) * (adv.softmax(1) - robust.softmax(1)) / 7 / 10
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


def test_a_student_that_is_the_teacher_stays_finite() -> None:
    method = Mtard()
    state = start_of(method)
    same = torch.randn(7, 5)
    for _ in range(2):
        at = targets(same, same, state)
        assert method.loss({"adv": same, "clean": same}, at).isfinite()
        method.after_step(state, {"adv": same, "clean": same}, at)
    assert state["clean_task_weight"].tolist() == [0.5]


def test_the_rates_fall_with_the_learning_rate() -> None:
    recipe = Recipe.of(BMtard, dataset="digits", student="tiny_resnet", lr_drops=(5,))
    state = {name: value.float() for name, value in start_of(BMtard()).items()}
    for epoch, share in ((4, 1.0), (5, 0.1)):
        state = recipe.method.next_class_state(state, EpochStats(), epoch, recipe)
        torch.testing.assert_close(state["task_rate"], torch.tensor([0.025 * share]))
        torch.testing.assert_close(state["temperature_rate"], torch.tensor([0.001 * share]))


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_b_mtard_moves_temperatures_as_the_authors_code(scale: float) -> None:
    """The code's own steps, on the host: temperatures of this step in its loss, moved after it."""
    method = BMtard(temperature_rate=0.5)
    state = double(start_of(method))
    t_adv = t_nat = 1.0
    weights, first = {"adv": 0.5, "nat": 0.5}, None
    for step in range(25):
        logits, robust, sure = drawn(step, scale)
        adv, nat = mean_kl(robust / t_adv, logits["adv"]), mean_kl(sure / t_nat, logits["clean"])
        h_adv, h_nat = ((p * p.log()).mean().item() for p in ((robust / t_adv).softmax(1), (sure / t_nat).softmax(1)))
        t_adv = min(10.0, max(1.0, t_adv - 0.5 * (1 if h_adv / h_nat > 1 else -1)))
        t_nat = min(10.0, max(1.0, t_nat - 0.5 * (1 if h_nat / h_adv > 1 else -1)))
        first = first or (adv, nat)
        mean = (adv / first[0] + nat / first[1]) / 2
        r_adv, r_nat = adv / first[0] / mean, nat / first[1] / mean
        rate = state["task_rate"].item()
        weights["nat"] = max(0.0, weights["nat"] - rate * (weights["nat"] - r_nat / (r_adv + r_nat)))
        weights["adv"] = max(0.0, weights["adv"] - rate * (weights["adv"] - r_adv / (r_adv + r_nat)))
        total = sum(weights.values())
        weights = {name: value / total for name, value in weights.items()}

        at = targets(robust, sure, state)
        expected = weights["adv"] * adv + weights["nat"] * nat
        torch.testing.assert_close(method.loss(logits, at).item(), expected, rtol=1e-10, atol=0)
        method.after_step(state, logits, at)
        assert (state["temperature_adv"].item(), state["temperature_clean"].item()) == (t_adv, t_nat)
    # the teacher that is less sure stays at 1, the surer one is softened
    assert (t_adv > 1, t_nat > 1) == (scale < 1, scale > 1)


def test_released_compares_the_teachers_by_entropies_with_the_floor() -> None:
    _, robust, sure = drawn(0)
    for variant, floor in (("paper", 0.0), ("released", 1e-5)):
        method = BMtard(variant=variant)
        state = double(start_of(method))
        state["temperature_adv"].fill_(2.5)
        p = (robust / 2.5).softmax(1)
        expected = -(p * (p + floor).log()).sum(1).mean()
        torch.testing.assert_close(method.entropy("adv", targets(robust, sure, state)), expected, rtol=1e-9, atol=0)


def test_the_full_settings_are_the_authors() -> None:
    for settings in (SETTINGS, B_SETTINGS):
        recipe = settings["cifar10_resnet18"].recipe
        method = recipe.method
        assert isinstance(method, Mtard)
        assert (recipe.optim.epochs, recipe.optim.lr_drops, recipe.optim.batch_size) == (300, (215, 260, 285), 128)
        assert (recipe.optim.weight_decay, recipe.optim.nesterov, recipe.attack.bn_mode) == (2e-4, False, "eval")
        assert (recipe.attack.start, method.task_rate, method.kl_scale) == ("normal", 0.025, 0.1)
        assert (recipe.networks.teacher_model, recipe.networks.clean_teacher_model) == ("wrn34_10", "resnet56")
        assert (method.teacher_sees, method.clean_teacher_sees, method.forwards) == (
            ("adv",),
            ("clean",),
            ("adv", "clean"),
        )


def test_a_run_goes_on_under_its_own_clean_teacher_alone(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "train mtard:digits --attack-steps 1 --holdout-per-class 5 --select-steps 1 --batch-size 512".split()
    words += ["--epochs", "1", "--teacher", str(teacher), "--out", str(tmp_path / "run")]
    assert run([*words, "--clean-teacher", str(teacher / "best.safetensors")]) == 0
    other = tmp_path / "other"
    clean = "train sat:digits_clean --epochs 1 --holdout-per-class 5 --batch-size 512".split()
    assert run([*clean, "--out", str(other)]) == 0
    assert run([*words, "--clean-teacher", str(other)]) == 2
    assert "clean_teacher" in capsys.readouterr().err
