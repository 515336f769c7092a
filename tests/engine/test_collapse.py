"""The guard of one-step attacks: it tells a student that learned that attack alone, and takes more steps then."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from retemper.cli import run
from retemper.engine import Recipe, State, create_model, train_step
from retemper.engine.catalogue import find_setting
from retemper.engine.distributed.ranks import ALONE
from retemper.engine.run.collapse import CollapseGuard, collapse_words, guard_of
from retemper.engine.run.data import TrainingData, load_data, training_split
from retemper.engine.run.state_file import unpack
from retemper.engine.state import clean_images

SHORT = "--epochs 3 --holdout-per-class 5 --batch-size 256 --device cpu --select-every 3 --select-steps 2".split()


def made(tmp_path: Path, method: str = "rslad", **options: Any) -> tuple[Recipe, State, TrainingData]:
    torch.manual_seed(0)
    recipe = find_setting(f"{method}:digits")[2].recipe.replace(**options)
    device = torch.device("cpu")
    teacher = create_model("tiny_resnet", 10).eval().requires_grad_(False)
    state = State(recipe, create_model("tiny_resnet", 10), teacher if method == "rslad" else None, 10, device)
    split = training_split(recipe.data, None, None)
    data = load_data(split, recipe, ALONE, device, seed=0, data_root=None, cache=tmp_path, beton=None)
    return recipe, state, data


def seeing(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[float, float]) -> None:
    """Have the guard see these accuracies, under the attack in force and under ten steps, one pair a look."""
    own, ten = (iter(values) for values in zip(*pairs, strict=True))
    monkeypatch.setattr(CollapseGuard, "_own_accuracy", lambda self: next(own))
    monkeypatch.setattr(CollapseGuard, "_accuracy_in_ten_steps", lambda self: next(ten))


def test_more_steps_are_taken_each_time_the_accuracies_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe, state, data = made(tmp_path, attack="nfgsm")
    guard = guard_of(recipe, state, data, ALONE)
    assert guard is not None
    # healthy; parted by less than 0.1; then by more than half three times
    seeing(monkeypatch, (0.6, 0.4), (0.15, 0.06), (0.9, 0.4), (0.9, 0.4), (0.9, 0.5), (0.9, 0.1))
    seen = [guard.look() for _ in range(6)]
    forms = [(one["attack"], one["next"]) for one in seen]
    following = [("pgd2", "pgd3"), ("pgd3", "pgd3"), ("pgd3", "pgd")]
    assert forms == [("nfgsm", "nfgsm")] * 2 + [("nfgsm", "pgd2"), *following]
    assert (seen[2]["own"], seen[2]["pgd10"]) == (0.9, 0.4)
    assert state.attack_now(recipe) == find_setting("rslad:digits")[2].recipe.replace(attack="pgd").attack
    assert guard.look() == {}  # nothing is known beyond ten steps


def test_a_recipe_of_few_steps_ends_at_ten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe, state, data = made(tmp_path, "sat", attack_steps=1, attack_start="none", guard="on")
    guard = CollapseGuard(recipe, state, data, ALONE)
    seeing(monkeypatch, *[(0.9, 0.1)] * 3)
    assert [guard.look()["next"] for _ in range(3)] == ["pgd2", "pgd3", "pgd10"]
    attack = state.attack_now(recipe)
    assert (attack.steps, attack.step, attack.start) == (10, pytest.approx(recipe.attack.eps / 5), "uniform")


def test_it_stands_by_where_one_step_is_taken_and_can_be_switched(tmp_path: Path) -> None:
    for options, there in (
        ({}, False),
        ({"attack": "pgd2"}, False),
        ({"attack": "pgd2", "guard": "on"}, True),
        ({"attack": "nfgsm"}, True),
        ({"attack": "nfgsm", "guard": "off"}, False),
    ):
        recipe, state, data = made(tmp_path, **options)
        assert (guard_of(recipe, state, data, ALONE) is not None) == there, options


def test_a_step_takes_the_attack_in_force(tmp_path: Path) -> None:
    recipe, state, _ = made(tmp_path, attack="nfgsm", fold=False)
    seen: list[int] = []
    state.student.register_forward_pre_hook(lambda *_: seen.append(1))
    clean, label = torch.rand(8, 1, 8, 8), torch.arange(8)
    passes = []
    for kind in (None, "pgd2", "pgd3", "pgd"):
        state.fallback = kind
        seen.clear()
        train_step(state, recipe, clean, label)
        passes.append(len(seen) - len(state.forwards.before))
    assert passes == [1, 2, 3, 10]


def test_the_accuracies_are_those_of_the_two_attacks(tmp_path: Path) -> None:
    recipe, state, data = made(tmp_path, "sat", attack="nfgsm", fold=False, attack_bn="train")
    before = {name: value.clone() for name, value in state.student.state_dict().items()}
    guard = CollapseGuard(recipe, state, data, ALONE)
    assert len(guard.order) == 100 and np.bincount(guard.images.labels[guard.order]).tolist() == [10] * 10
    seen, steps = guard.look(), []
    state.student.register_forward_pre_hook(lambda *_: steps.append(1))
    guard._own_accuracy()
    assert len(steps) == 3  # clean, the one step, attacked
    steps.clear()
    guard._accuracy_in_ten_steps()
    assert len(steps) == 2 or len(steps) == 12  # a twin is attacked where the network can be folded
    assert 0 <= seen["pgd10"] <= 1 and 0 <= seen["own"] <= 1
    for name, value in state.student.state_dict().items():
        assert torch.equal(value, before[name]), name  # looking moves nothing


def test_it_looks_at_training_images_where_none_are_held_out(tmp_path: Path) -> None:
    recipe, state, data = made(tmp_path, "sat", attack="nfgsm", holdout_per_class=0)
    guard = CollapseGuard(recipe, state, data, ALONE)
    assert data.held is None and len(guard.order) == 500
    assert {np.bincount(guard.images.labels[guard.order])[k] for k in range(10)} == {50}
    assert guard.look().keys() == {"attack", "own", "pgd10", "next"}


def test_a_guard_that_knows_no_more_steps_is_refused_and_after_the_last_epoch_none_is_promised() -> None:
    for options in ({"attack": "pgd10"}, {"attack": "pgd", "attack_steps": 10}):
        with pytest.raises(ValueError, match=r"guard = 'on': .* takes 10 steps already"):
            find_setting("sat:digits")[2].recipe.replace(guard="on", **options)
    seen = {"own": 0.9, "pgd10": 0.1, "attack": "nfgsm", "next": "pgd2"}
    assert collapse_words(seen, is_last=False).endswith("that attack alone: training goes on with pgd2")
    assert collapse_words(seen, is_last=True).endswith("the last epoch, so begin anew with --attack pgd2")


def lines(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in line.keys() - {"seconds", "images_per_second", "peak_memory_mib"}} for line in read
    ]


def test_what_it_chose_is_said_saved_and_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "sat:digits_student", *SHORT, "--attack", "nfgsm"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    seeing(monkeypatch, (0.9, 0.1), (0.6, 0.5), (0.6, 0.5))
    assert run([*words, "--out", str(whole)]) == 0
    said = capsys.readouterr().err
    assert "after epoch 1 the student is right on 90.0% of the images looked at under nfgsm, and on 10.0% under" in said
    assert "training goes on with pgd2" in said and "pgd2 60.0%, ten steps 50.0%" in said
    assert [line["guard"]["attack"] for line in lines(whole)] == ["nfgsm", "pgd2", "pgd2"]
    assert unpack(whole / "last.state")["fallback"] == "pgd2"
    seeing(monkeypatch, (0.9, 0.1), (0.6, 0.5), (0.6, 0.5))
    for more in ("--max-steps=9", "--max-steps=13", "--max-steps=100"):  # within the second epoch and the third
        assert run([*words, "--out", str(cut), more]) == 0
    assert lines(cut) == lines(whole)
    one, two = (load_file(folder / "last.safetensors") for folder in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert run(["report", str(whole), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.html").read_text()
    assert "After epoch 1, right on 90% under nfgsm, on 10% under ten steps: it was trained on with pgd2." in text
    assert "training attack" in text


def test_a_collapse_made_on_purpose_is_caught(tmp_path: Path) -> None:
    """FGSM without noise, far out: the student learns to be right under that step alone."""
    far: dict[str, Any] = dict(eps=0.3, attack_step=0.3, attack_steps=1, attack_start="none", guard="on")
    recipe, state, data = made(tmp_path, "sat", student="tiny_resnet", **far)
    guard = CollapseGuard(recipe, state, data, ALONE)
    seen: dict[str, Any] = {}
    for epoch in range(1, 31):  # ten, as a rule
        state.start_epoch(recipe, epoch, epoch << 24)
        for one in data.loader.epoch(epoch):
            train_step(state, recipe, clean_images(recipe, one.image, one.view), one.label)
        seen = guard.look()
        if seen["next"] != seen["attack"]:
            break
    assert (seen["attack"], seen["next"]) == ("pgd", "pgd2")
    assert seen["own"] > 0.1 and seen["pgd10"] < seen["own"] / 2


def test_both_attacks_keep_to_the_radius_in_force(tmp_path: Path) -> None:
    """GKL begins with a radius near 0: ten steps in the whole ball would look like a collapse."""
    recipe, state, data = made(tmp_path, "gkl", attack="nfgsm")
    guard = CollapseGuard(recipe, state, data, ALONE)
    state.class_state["radius_share"].zero_()
    seen: list[torch.Tensor] = []
    state.student.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for accuracy in (guard._own_accuracy, guard._accuracy_in_ten_steps):
        seen.clear()
        accuracy()
        torch.testing.assert_close(seen[0], seen[-1], rtol=0, atol=1e-6)  # clean, and attacked
