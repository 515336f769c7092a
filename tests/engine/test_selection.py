"""Which images are held out, which choose the kept epoch, and by what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retemper.engine import Recipe, create_model, cross_entropy_objective, load_checkpoint, pgd
from retemper.engine.catalogue import find_setting
from retemper.engine.distributed.ranks import ALONE
from retemper.engine.run import train as training
from retemper.engine.run.changed import changed_options
from retemper.engine.run.data import chosen_indices
from retemper.engine.run.selection import judge, score
from retemper.loaders import load_split, split_of_arrays

Train = Callable[..., int]
CPU = torch.device("cpu")
FAWA = dict(average="ema", average_every="epoch", average_above=0.1)


def recipe(name: str, **options: Any) -> Recipe:
    return find_setting(name)[2].recipe.replace(holdout_per_class=7, **options)


@pytest.mark.parametrize(
    ("name", "options", "held_per_class"),
    [
        ("sat:digits", {}, 7),
        ("sat:digits", dict(select_on="test"), 0),
        ("frl:digits", dict(select_on="test"), 7),
        ("wat:digits", dict(select_on="test"), 7),
        ("sat:digits", dict(select_on="test") | FAWA, 7),
    ],
)
def test_images_are_held_out_where_they_choose_or_the_method_learns_from_them(
    name: str, options: dict[str, Any], held_per_class: int
) -> None:
    split = load_split("digits", "train")
    train, held = chosen_indices(split, recipe(name, **options))
    assert np.bincount(split.labels[held], minlength=10).tolist() == [held_per_class] * 10
    assert sorted([*train, *held]) == list(range(len(split)))


def test_the_last_images_of_each_class_can_be_held_out() -> None:
    split = load_split("digits", "train")
    train, held = chosen_indices(split, recipe("sat:digits", holdout_from="end"))
    for k in range(10):
        assert held[split.labels[held] == k].tolist() == np.flatnonzero(split.labels == k)[-7:].tolist()
    assert sorted([*train, *held]) == list(range(len(split)))


@pytest.mark.parametrize(
    ("name", "options", "validations"),
    [
        ("wat:digits", (), [50, 50, 50]),  # before the first epoch and after each
        ("sat:digits", ("--average", "ema", "--average-every", "epoch", "--average-above", "0.01"), [50, 50]),
        ("sat:digits", (), []),
    ],
)
def test_a_method_learns_from_held_out_images_while_test_images_choose(
    name: str,
    options: tuple[str, ...],
    validations: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from retemper.cli import run

    validated, judged = [], []
    validate, real_judge = training.validate, training.judge

    def validating(model: Any, recipe: Any, split: Any, *more: Any, **named: Any) -> Any:
        validated.append(len(split))
        return validate(model, recipe, split, *more, **named)

    def judging(network: Any, recipe: Any, images: Any, *more: Any) -> Any:
        judged.append((images.split, len(images)))
        return real_judge(network, recipe, images, *more)

    monkeypatch.setattr(training, "validate", validating)
    monkeypatch.setattr(training, "judge", judging)
    short = "--epochs 2 --attack-steps 1 --select-steps 1 --batch-size 256 --holdout-per-class 5".split()
    choose = "--select-on test --select-every 1".split()
    out = tmp_path / "run"
    assert run(["train", name, "--out", str(out), *short, *choose, *options]) == 0
    said, test = capsys.readouterr().err, len(load_split("digits", "test"))
    assert validated == validations and judged == [("test", test)] * 2
    assert said.count("note: the best epoch is chosen on the test images") == 1 and "  test robust" in said
    assert json.loads((out / "config.json").read_text())["recipe"]["selection"]["select_on"] == "test"


JUDGED = [  # by epoch; each rule prefers another one
    dict(average=0.50, worst=0.30, clean_average=0.60),
    dict(average=0.60, worst=0.10, clean_average=0.60),
    dict(average=0.40, worst=0.20, clean_average=0.90),
    dict(average=0.45, worst=0.32, clean_average=0.60),
]


@pytest.mark.parametrize(("by", "best"), [("robust+worst", 1), ("robust", 2), ("clean+robust", 3), ("worst", 4)])
def test_the_kept_epoch_is_the_largest_by_the_rule(
    by: str, best: int, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = iter(JUDGED)
    monkeypatch.setattr(training, "judge", lambda *_: next(reports) | {"worst_class": 0})
    every = "--epochs 4 --select-every 1 --select-from 1 --attack-steps 1".split()
    assert train("rslad:digits", tmp_path / "run", "--select-by", by, *every) == 0
    state = torch.load(tmp_path / "run/last.state", weights_only=True)
    assert state["best"]["epoch"] == best


def test_the_judge_takes_the_steps_and_the_radius_of_the_recipe(teacher: Path) -> None:
    network = create_model("tiny_resnet_wide", 10).eval()
    load_checkpoint(teacher / "best.safetensors", network)
    whole = load_split("digits", "test")
    first = whole.images[:256], whole.labels[:256]  # one batch: the random start is drawn batch by batch
    split = split_of_arrays("digits", "test", *first, whole.classes, "")
    image, label = torch.from_numpy(first[0]).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(first[1])
    robust = []
    for step, taken in ((0.25, 0.15 / 4), (0.1, 0.015)):
        found = recipe("sat:digits", select_steps=5, select_step=step, select_by="clean+robust")
        report = judge(network, found, split, CPU, ALONE)
        objective = cross_entropy_objective(label)
        adv = pgd(network, image, objective=objective, steps=5, step=taken, eps=0.15, start="uniform", seed=0)
        right = [network(x).argmax(1) == label for x in (image, adv)]
        clean, both = (float(of.double().mean()) for of in (right[0], right[0] & right[1]))
        assert (report["clean_average"], report["average"]) == (pytest.approx(clean), pytest.approx(both))
        assert score(report, found) == pytest.approx(clean + both)
        robust.append(both)
    assert 0 < robust[0] < robust[1] < 1


@pytest.mark.parametrize(("select_on", "robust"), [("holdout", 0.0), ("test", 1.0)])
def test_on_test_images_the_attacked_image_alone_is_judged(select_on: str, robust: float) -> None:
    class FooledByNothing(nn.Module):
        """Gives class 1 to a clean image, all of whose pixels are 0, and class 0 to any other."""

        def forward(self, image: Tensor) -> Tensor:
            changed = image.sum((1, 2, 3))[:, None]
            return torch.cat([changed, torch.full_like(changed, 1e-6)], 1)

    images = split_of_arrays("toy", "test", np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int64), ("a", "b"), "")
    report = judge(FooledByNothing(), recipe("sat:digits", select_on=select_on, select_steps=1), images, CPU, ALONE)
    assert report["average"] == robust


def test_a_run_of_before_these_options_is_the_same_run() -> None:
    new = recipe("sat:digits").flat()
    old = {name: new[name] for name in new if name not in ("select_step", "select_by", "holdout_from")}
    assert changed_options(old, new) == []
