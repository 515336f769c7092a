"""ReBAT: the loss in float64 either way round, when the average is asked, and the stronger attack of ReBAT++."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from retemper.cli import run
from retemper.engine import Forwards, Recipe, State, Targets, create_model
from retemper.recipes.rebat import AUTHORS, SETTINGS, Rebat


def rebat(**options: Any) -> Recipe:
    return Recipe.of(Rebat, **AUTHORS | dict(dataset="digits", student="tiny_resnet") | options)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    adv, average = 2 * torch.randn(2, 9, 4, generator=gen, dtype=torch.float64)
    return adv.requires_grad_(), average, torch.arange(9) % 4


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_pull_leads_to_the_average(variant: str) -> None:
    adv, average, label = batch()
    s, a = adv.softmax(1), average.softmax(1)
    pull = (s * (s / a).log()).sum(1) if variant == "paper" else (a * (a / s).log()).sum(1)
    expected = (F.cross_entropy(adv, label, reduction="none") + 0.7 * pull).mean()
    targets = Targets(label_B=label, average_adv_BK=average, state={})
    loss = rebat(pull=0.7, variant=variant).method.loss({"adv": adv}, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, adv), torch.autograd.grad(expected, adv))


def test_until_the_average_begins_it_is_sat_with_smoothed_labels_where_they_are() -> None:
    adv, _, label = batch()
    for smoothing in (0.0, 0.2):
        loss = rebat().method.loss({"adv": adv}, Targets(label_B=label, label_smoothing=smoothing, state={}))
        torch.testing.assert_close(loss, F.cross_entropy(adv, label, label_smoothing=smoothing))


def test_the_average_is_asked_from_its_first_epoch_on() -> None:
    recipe = rebat(average_from=3)
    state = State(recipe, create_model("tiny_resnet", 10), None, 10, torch.device("cpu"))
    asked, phases = {}, {}
    for epoch in (1, 2, 3, 4):
        state.start_epoch(recipe, epoch, 0)
        asked[epoch], phases[epoch] = state.average_sees, state.phase()
    assert asked == {1: (), 2: (), 3: ("adv",), 4: ("adv",)}
    assert phases[1] == phases[2] != phases[3] == phases[4]  # so that a CUDA graph is recorded anew


def test_the_attack_of_rebat_plus_plus_grows_with_the_first_drop() -> None:
    recipe = SETTINGS["cifar10_resnet18_plus_plus"].recipe
    assert not recipe.method.attack_in(100, recipe)
    stronger = recipe.method.attack_in(101, recipe)
    assert stronger["eps"] == pytest.approx(10 / 255, rel=1e-12) and stronger["steps"] == 12 and len(stronger) == 2
    assert recipe.optim.lr_factor == 1 / 1.7
    plain = SETTINGS["cifar10_resnet18"].recipe
    assert not plain.method.attack_in(101, plain)


def test_the_full_setting_is_the_authors() -> None:
    recipe = SETTINGS["cifar10_preact_resnet18"].recipe
    optim = recipe.optim
    assert (optim.epochs, optim.lr_drops, optim.weight_decay, optim.nesterov) == (200, (100, 150), 5e-4, False)
    assert [optim.lr_at(epoch) for epoch in (100, 101, 151)] == pytest.approx([0.1, 0.1 / 1.5, 0.1 / 1.5**2])
    # epochs count from 1, and theirs from 0: the first with an average is number 105 there
    assert (optim.average, optim.average_from, optim.ema_decay) == ("ema", 106, 0.999)
    assert (recipe.attack.start, recipe.attack.bn_mode, recipe.attack.steps) == ("uniform", "train", 10)
    assert isinstance(recipe.method, Rebat) and recipe.method.pull == 1


def test_variants_differ_as_stated() -> None:
    paper = SETTINGS["cifar10_preact_resnet18"].recipe
    released = paper.as_variant("released")
    one, other = paper.flat(), released.flat()
    expected = {"variant": "released", "padding_mode": "reflect", "normalise": True, "lr_drop_early": True}
    expected |= {"select_by": "robust", "select_steps": 10, "select_every": 1, "precision": "fp32"}
    assert {name: other[name] for name in one if one[name] != other[name]} == expected
    assert released.method.forwards_in(1, released) == Forwards(("adv", "adv"), after=("clean",))


def test_a_run_is_pulled_only_from_then_on_and_resumes_within_an_epoch(tmp_path: Path) -> None:
    """The first epoch is SAT's to the bit. The second is not, and goes on from its middle as if it had not stopped."""
    words = "--attack-steps 1 --select-steps 1 --holdout-per-class 5 --batch-size 128 --device cpu".split()
    words += "--epochs 2 --average-from 2 --average ema --lr-factor 0.5 --lr-drops 1 --select-from 1".split()
    words += ["--select-every", "1", "--ema-decay", "0.9"]
    whole, cut, hard = (tmp_path / name for name in ("whole", "cut", "hard"))
    assert run(["train", "rebat:digits", *words, "--out", str(whole)]) == 0
    assert run(["train", "rebat:digits", *words, "--pull", "0", "--out", str(hard)]) == 0
    pulled, alone = (
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, hard)
    )
    assert pulled[0] == alone[0] and pulled[1] > alone[1]
    steps = -(-(1198 - 50) // 128)  # of an epoch, were all training images there: the cut lies in the second epoch
    assert run(["train", "rebat:digits", *words, "--max-steps", str(steps + 3), "--out", str(cut)]) in (0, 75)
    assert len((cut / "metrics.jsonl").read_text().splitlines()) == 1
    assert run(["train", "rebat:digits", *words, "--out", str(cut)]) == 0
    for name in ("last", "best"):
        one, other = (load_file(out / f"{name}.safetensors") for out in (whole, cut))
        assert all(torch.equal(one[key], other[key]) for key in one)
