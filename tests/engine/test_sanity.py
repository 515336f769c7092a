"""Checks: networks that hide their gradients are called so, honest ones, robust or not, are not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retemper.cli import run
from retemper.engine.checkpoints.header import load_network, read_facts
from retemper.engine.predict import balanced_order
from retemper.engine.sanity import flags
from retemper.engine.sanity.check import check, check_lines
from retemper.engine.sanity.gradients import input_gradient, margin_rows, probe_gradients
from retemper.engine.sanity.gradients import off_slope as off_slope_rows
from retemper.engine.sanity.ladder import CheckRequest, Ladder, square_survivors
from retemper.loaders import Split, load_split

CPU = torch.device("cpu")
EPS = 0.15


class Defended(nn.Module):
    """A network behind something that is done to its input or its logits."""

    def __init__(
        self, net: nn.Module, before: Callable[[Tensor], Tensor] | None = None, after: Callable | None = None
    ) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, image: Tensor) -> Tensor:
        logits = self.net(image if self.before is None else self.before(image))
        return logits if self.after is None else self.after(logits)


def rounded(image: Tensor) -> Tensor:
    return (image * 8).round() / 8


def straight_through(image: Tensor) -> Tensor:
    return image + (rounded(image) - image).detach()


def noisy(image: Tensor) -> Tensor:
    return image + 0.05 * torch.randn_like(image)


@pytest.fixture(scope="module")
def digits() -> Split:
    return load_split("digits", "test", None)


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: SAT, a few epochs."""
    out = tmp_path_factory.mktemp("robust") / "sat"
    words = ["--epochs", "5", "--lr-drops", "4", "--attack-steps", "3", "--select-from", "5", "--batch-size", "64"]
    assert run(["train", "sat:digits_student", "--out", str(out), *words]) == 0
    return out


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    out = tmp_path_factory.mktemp("standard") / "clean"
    words = ["--epochs", "4", "--lr-drops", "3", "--select-from", "4", "--batch-size", "64", "--student", "tiny_resnet"]
    assert run(["train", "sat:digits_clean", "--out", str(out), *words]) == 0
    return network(out)


def network(folder: Path) -> nn.Module:
    weights = folder / "best.safetensors"
    return load_network(weights, read_facts(weights), CPU)


def request(model: nn.Module, split: Split, images: int = 50) -> CheckRequest:
    indices = balanced_order(split.labels, images)
    return CheckRequest(model=model.eval(), split=split, indices=indices, eps=EPS, device=CPU, batch_size=64)


def raised(found: dict[str, Any]) -> set[str]:
    return {flag["name"] for flag in found["flags"] if flag["raised"]}


@pytest.fixture(scope="module")
def honest(robust: Path, digits: Split) -> dict[str, Any]:
    return check(request(network(robust), digits, 150))


def test_an_honestly_robust_network_is_not_suspected(honest: dict[str, Any]) -> None:
    assert honest["verdict"] == "ok", raised(honest)
    attack = honest["ladder"]["attack"]
    assert attack["pgd50"] > 0.3 and attack["clean"] > 0.8, "the fixture is meant to be robust"
    assert attack["square"] <= honest["ladder"]["white_box"] <= attack["pgd50"] <= attack["noise"] <= attack["clean"]


def test_radius_zero_is_clean_and_radius_one_leaves_nothing(honest: dict[str, Any]) -> None:
    radius = honest["ladder"]["radius"]
    assert [rung["eps"] for rung in radius] == [0, EPS / 2, EPS, 2 * EPS, 4 * EPS, 1]
    assert radius[0]["accuracy"] == honest["ladder"]["attack"]["clean"] and radius[-1]["accuracy"] <= 0.01


def test_a_standard_network_falls_to_nothing_and_hides_nothing(standard: nn.Module, digits: Split) -> None:
    found = check(request(standard, digits))
    assert found["ladder"]["attack"]["clean"] > 0.9 and found["ladder"]["radius"][3]["accuracy"] <= 0.02
    assert found["verdict"] == "ok", raised(found)


@pytest.mark.parametrize(
    "before, after, expected",
    [
        (None, lambda logits: logits * 1e4, {"logit_scale", "zero_gradients", "underflow", "radius_end", "transfer"}),
        (rounded, None, {"zero_gradients", "off_slope", "radius_end", "transfer", "black_box"}),
        (straight_through, None, {"off_slope"}),
        (noisy, None, {"random_outputs", "off_slope"}),
    ],
    ids=["scaled", "rounded", "straight through", "random"],
)
def test_a_network_that_hides_its_gradients_is_suspected(
    before: Callable | None, after: Callable | None, expected: set[str], robust: Path, digits: Split
) -> None:
    net = network(robust)
    torch.manual_seed(0)
    found = check(request(Defended(net, before, after), digits), teacher=net)
    assert found["verdict"] == "suspect" and expected <= raised(found)
    lines = check_lines(found)
    assert lines[0].startswith("SUSPECT") and "not to be trusted" in lines[0] and "masked" in lines[0]
    assert {line.split(":")[0].strip() for line in lines[1:]} == raised(found)


def test_the_checks_are_repeatable_and_leave_the_network_as_it_was(robust: Path, digits: Split) -> None:
    net = network(robust)
    net.train()
    of = CheckRequest(model=net, split=digits, indices=np.arange(20), eps=EPS, device=CPU)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found, again = check(of), check(of)
    assert raised(found) == {"training_mode"} and found["verdict"] == "suspect"
    assert all(module.training for module in net.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert found["flags"] == again["flags"] and found["ladder"] == again["ladder"]


def test_what_can_be_seen_in_the_outputs_alone() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [20.0, -5.0, 1.0], [0.5, 0.2, 0.1]])
    assert not flags.probabilities(logits).raised and flags.probabilities(logits.softmax(1)).raised
    assert flags.logit_scale(logits).value == 2 and not flags.logit_scale(logits).raised
    assert flags.logit_scale(logits * 9).raised  # a gap of 18: 1 - softmax is 0 in float32
    assert flags.few_classes(3).raised and not flags.few_classes(4).raised
    broken = nn.Linear(2, 2)
    assert not flags.not_finite_weights(broken).raised
    nn.init.constant_(broken.bias, float("nan"))
    assert flags.not_finite_weights(broken).value == 1


def test_a_gap_called_saturated_has_no_digits_left_in_float32() -> None:
    gap = torch.tensor([[flags.logit_scale(torch.zeros(1, 2)).threshold, 0.0]])
    assert (gap * 1.01).softmax(1)[0, 0] == 1 and (gap * 0.9).softmax(1)[0, 0] < 1


def test_a_small_step_goes_where_the_gradient_points_or_not() -> None:
    weight, label = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    image = torch.full((3, 1, 2, 2), 0.4)

    def rows(logits: Tensor) -> Tensor:
        return margin_rows(logits, label)

    def linear(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight

    grad = input_gradient(nn.Identity(), image, lambda x: rows(linear(x)))
    assert not off_slope_rows(nn.Identity(), image, grad, lambda x: rows(linear(x))).any()
    assert off_slope_rows(nn.Identity(), image, -grad, lambda x: rows(linear(x))).all()
    assert off_slope_rows(nn.Identity(), image, grad * 3, lambda x: rows(linear(x))).all()
    assert off_slope_rows(nn.Identity(), image, grad, lambda x: rows(linear(rounded(x)))).all()


def test_a_shard_is_not_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "x", "--attacks", "autoattack", "--shard", "1/2", "--check"]) == 2
    assert "--check" in capsys.readouterr().err


def test_pixels_that_the_network_ignores_have_not_underflown(robust: Path, digits: Split) -> None:
    net = network(robust)
    border = torch.zeros(8, 8)
    border[2:6, 2:6] = 1
    ignoring = probe_gradients(request(Defended(net, lambda image: image * border), digits))
    assert ignoring["cross_entropy, clean"]["zero_pixels"] == 0.75 and not flags.underflow(ignoring).raised
    assert "kl, clean" not in ignoring and ignoring["kl, random start"]["zero"] == 0
    scaled = probe_gradients(request(Defended(net, after=lambda logits: logits * 1e4), digits))
    assert scaled["margin, clean"]["zero_pixels"] == 0 and flags.underflow(scaled).raised


def ladder(**accuracies: float) -> Ladder:
    """Return a ladder on 100 images. In the names of rungs a double underscore stands for a comma and a space."""
    verdicts = {name.replace("__", ", "): torch.arange(100) < 100 * value for name, value in accuracies.items()}
    return Ladder(attack=verdicts, radius={eps: verdicts["clean"] for eps in (0.0, 0.1, 1.0)})


def test_rungs_out_of_order_are_flagged() -> None:
    good = ladder(clean=0.9, noise=0.9, fgsm=0.6, pgd1=0.7, pgd10=0.5, pgd50=0.5, transfer=0.8)
    for flag in (flags.more_steps, flags.single_step, flags.noise, flags.transfer, flags.zero_radius):
        assert not flag(good).raised
    bad = ladder(clean=0.9, noise=0.5, fgsm=0.5, pgd1=0.4, pgd10=0.6, pgd50=0.6, transfer=0.5)
    for flag in (flags.more_steps, flags.single_step, flags.noise, flags.transfer, flags.radius_end):
        assert flag(bad).raised and (flag(bad).value or 0) > flag(bad).threshold
    bad.radius[0.1], bad.radius[0.0] = bad.attack["clean"], bad.attack["pgd50"]
    assert flags.radius_rises(bad).raised and flags.zero_radius(bad).raised
    assert flags.transfer(ladder(clean=0.9, pgd50=0.5)).value is None  # no teacher: nothing is known
    assert flags.square_helps(3, 1000).raised and not flags.square_helps(2, 1000).raised


def test_starts_that_find_different_images_are_flagged() -> None:
    starts = {"pgd10": 0.5, "pgd10, 2nd start": 0.5, "pgd10, 3rd start": 0.5}
    same = Ladder({name: torch.arange(100) < 50 for name in ("clean", *starts)})
    apart = Ladder({name: torch.roll(same.attack["clean"], 10 * n) for n, name in enumerate(("clean", *starts))})
    assert not flags.more_starts(same).raised and flags.more_starts(apart).raised
    assert flags.more_starts(apart).value == pytest.approx(0.2)


def test_square_breaks_only_what_is_left(robust: Path, digits: Split) -> None:
    of = request(network(robust), digits, 40)
    left = torch.arange(40) % 2 == 0
    after = square_survivors(of, left, queries=20)
    assert after is not None and not (after & ~left).any() and left.sum() == 20


def test_evaluate_writes_the_checks_and_says_the_verdict(
    teacher: Path, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rslad"
    assert train("rslad:digits", out) == 0
    words = ["evaluate", str(out), "--attacks", "clean", "--limit", "60"]
    assert run(words) == 0 and "checks" not in json.loads((out / "evaluation.json").read_text())
    assert run([*words, "--check"]) == 0
    content = json.loads((out / "evaluation.json").read_text())
    found = content["checks"]
    assert found["verdict"] == "ok" and found["images"] == 60 and list(content["attacks"]) == ["clean"]
    assert found["ladder"]["attack"]["clean"] == content["attacks"]["clean"]["average"]
    assert all(flag.keys() == {"name", "raised", "value", "threshold", "text"} for flag in found["flags"])
    assert "transfer" in found["ladder"]["attack"], "the config names a teacher"
    assert "none speaks against" in capsys.readouterr().out
