"""The comparison with other libraries' attacks: it sees a weaker attack, and one that leaves the ball."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    try:
        return import_module("peer_attacks")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def contest(script: ModuleType) -> Any:
    torch.manual_seed(0)
    linear, image = nn.Linear(64, 10), torch.rand(40, 1, 8, 8)
    network = nn.Sequential(nn.Flatten(), linear)
    with torch.no_grad():
        linear.weight.mul_(4)
        return script.Contest(network=network, image=image, label=network(image).argmax(1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_same_attack_holds_and_a_weaker_one_does_not(
    norm: str, targeted: bool, script: ModuleType, contest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    aim, ours = script.Aim(norm=norm, lower=-1.0, targeted=targeted), script.our_pgd

    def same(aim: Any, model: Any, image: Tensor, classes: Tensor, random: bool) -> Tensor:
        return ours(aim, model, image, classes, start="uniform" if random else "none", seed=7)

    for start in ("none", "the peer's"):
        row = contest.row("same", same, aim, start)
        assert row.holds and row.equal == 40 and row.left == row.ours_left and row.left[0] < 38, row
    monkeypatch.setattr(script, "our_pgd", lambda aim, model, image, classes, **_: image.clone())
    row = contest.row("stronger", same, aim, "none")
    assert row.inside and row.ours_left == [40] and not row.holds, row
    monkeypatch.setattr(script, "our_pgd", lambda aim, model, image, classes, **_: image + 2 * aim.eps)
    assert not contest.row("in the ball", same, aim, "none").inside


def test_our_own_starts_are_as_many_as_the_peers(script: ModuleType, contest: Any) -> None:
    started: list[bool] = []

    def peer(aim: Any, model: Any, image: Tensor, classes: Tensor, random: bool) -> Tensor:
        started.append(random)
        return image

    row = contest.row("idle", peer, script.Aim(norm="linf", lower=0.0, targeted=False), "own", draws=3)
    assert started == [True] * 3 and row.equal is None and row.left == [40] * 3 and row.holds


def test_one_image_of_the_mean_is_allowed(script: ModuleType) -> None:
    aim = script.Aim(norm="linf", lower=0.0, targeted=False)

    def holds(left: list[int], ours: list[int]) -> bool:
        row = script.Row(peer="", aim=aim, start="own", left=left, ours_left=ours, equal=None, inside=True)
        return row.holds

    assert holds([300], [301]) and not holds([300], [302])
    assert holds([298, 302], [300, 302]) and not holds([298, 302], [300, 303])
    assert holds([300, 300], [290, 290])
