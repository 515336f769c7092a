"""IGDM on every host: its term by the formula in float64, the views and the forwards of a step, and its class state."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retemper.engine import EpochStats, Forwards, Recipe, State, Targets, create_model, step, train_step
from retemper.engine.catalogue import find_setting
from retemper.recipes.absld import Absld
from retemper.recipes.adaad import AdaAd
from retemper.recipes.adaiad import AdaIad
from retemper.recipes.ard import Ard
from retemper.recipes.fair_ard import FairArd
from retemper.recipes.fair_iad import FairIad
from retemper.recipes.fair_rslad import FairRslad
from retemper.recipes.iad import Iad, Iad2
from retemper.recipes.igdm import Igdm
from retemper.recipes.label_trust import LabelTrust
from retemper.recipes.rslad import Rslad

CPU = torch.device("cpu")
HOSTS = (Ard, Iad, Iad2, Rslad, AdaAd, AdaIad, Absld, FairArd, FairIad, FairRslad, LabelTrust)
SETTINGS = [
    *("ard:digits", "iad:digits", "iad:digits_ii", "rslad:digits", "adaad:digits", "adaiad:digits", "absld:digits"),
    *("fair_ard:digits", "fair_iad:digits", "fair_rslad:digits", "label_trust:digits"),
]
NAMES = ("adv", "clean", "minus", "plus")


def drawn() -> list[dict[str, Tensor]]:
    """Logits of the student, with gradient, and of the teacher, by the names of their images."""
    gen = torch.Generator().manual_seed(0)
    both = [{name: 3 * torch.randn(7, 5, generator=gen, dtype=torch.float64) for name in NAMES} for _ in range(2)]
    return [{name: value.requires_grad_() for name, value in both[0].items()}, both[1]]


def targets(teacher: dict[str, Tensor], weight: float) -> Targets:
    """Targets with all that any host reads."""
    spread_K = torch.linspace(0.25, 0.75, 5)
    state = dict.fromkeys(("class_weight", "label_trust", "temperature_adv", "temperature_clean"), spread_K)
    return Targets(
        label_B=torch.arange(7) % 5,
        teacher_BK=teacher["clean"],
        teacher_adv_BK=teacher["adv"],
        teacher_views={name: teacher[name] for name in ("minus", "plus")},
        clean_teacher_adv_BK=teacher["plus"],
        state=state | {"begun": torch.ones(1), "igdm_weight": torch.tensor(weight)},
    )


def term(student: dict[str, Tensor], teacher: dict[str, Tensor], plus: str, minus: str) -> Tensor:
    """The authors' term: the divergence of the softmaxes of two differences of logits, summed over the classes."""
    p = (teacher[plus] - teacher[minus]).softmax(1)
    q = (student[plus] - student[minus]).softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("options", "views"),
    [({}, ("adv", "minus")), ({"igdm_gamma": 0.0}, ("adv", "clean")), ({"igdm_beta": 0.5}, ("plus", "minus"))],
)
def test_the_loss_is_the_hosts_and_the_term(host: type[Igdm], options: dict[str, Any], views: tuple[str, str]) -> None:
    (ours, teacher), (theirs, _) = drawn(), drawn()
    given = targets(teacher, weight=0.75)
    method = host(igdm=3.0, **options)
    assert method.igdm_views == views
    loss = method.training_loss(ours, given)
    expected = host().loss(theirs, given) + 0.75 * term(theirs, teacher, *views)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert loss.shape == () and torch.equal(host().training_loss(theirs, given), host().loss(theirs, given))
    loss.backward()
    expected.backward()
    for name, value in theirs.items():
        assert (ours[name].grad is None) == (value.grad is None)
        if value.grad is not None:
            torch.testing.assert_close(ours[name].grad, value.grad, rtol=1e-10, atol=1e-14)


def taken(
    name: str, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Recipe, nn.Module, nn.Module, dict[str, Tensor], Targets, nn.Module]:
    """Take a step in float64; return what it descended on, and the student before the descent and behind it."""
    torch.manual_seed(0)
    fixed: dict[str, Any] = dict(attack_steps=2, precision="fp32", fold=False, epochs=4)
    recipe = find_setting(name)[2].recipe.replace(**fixed | options)
    teacher = create_model("tiny_resnet", 10).double().eval().requires_grad_(False)
    clean_teacher = teacher if recipe.networks.clean_teacher_model else None
    state = State(recipe, create_model("tiny_resnet", 10).double(), teacher, 10, CPU, clean_teacher)
    seen: list[Any] = []
    descend = step.descend

    def watched(state: State, recipe: Recipe, images: dict[str, Tensor], targets: Targets) -> Tensor:
        seen.extend((deepcopy(state.student), images, targets))
        return descend(state, recipe, images, targets)

    monkeypatch.setattr(step, "descend", watched)
    state.start_epoch(recipe, 1, 0)
    clean = torch.rand(12, 1, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    train_step(state, recipe, clean, torch.arange(12) % 10)
    return recipe, teacher, *seen, state.student


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name in SETTINGS for variant in find_setting(name)[2].recipe.method.variants],
)
def test_a_step_descends_on_host_and_term(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The views lie on both sides of the image, unclipped; that against the attack has a forward behind the host's."""
    host = find_setting(name)[2].recipe.as_variant(variant)
    recipe, teacher, student, images, seen, after = taken(name, monkeypatch, variant=variant, igdm=2.0)
    clean, adv, minus = images["clean"], images["adv"], images["minus"]
    torch.testing.assert_close(minus - clean, clean - adv, rtol=0, atol=1e-15)
    assert minus.amin() < 0 and minus.amax() > 1
    torch.testing.assert_close(seen.teacher_views["minus"], teacher(minus), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen.teacher_adv_BK, teacher(adv), rtol=1e-12, atol=1e-12)
    assert float(seen.state["igdm_weight"]) == 2 / 4

    order = recipe.method.forwards_in(1, recipe).before
    assert order == (*host.replace(epochs=4).method.forwards_in(1, host.replace(epochs=4)).before, "minus")
    sgd = torch.optim.SGD(
        student.parameters(), recipe.optim.lr, weight_decay=recipe.optim.weight_decay
    )  # momentum has no effect on the first step, but Nesterov's
    student.train()
    if recipe.optim.joint:
        logits = dict(zip(order, student(torch.cat([images[name] for name in order])).chunk(3), strict=True))
    else:
        logits: dict[str, Tensor] = {}
        for image in order:
            found = student(images[image])
            logits.setdefault(image, found)
    answers = {"adv": teacher(adv), "minus": teacher(minus)}
    loss = host.method.loss(logits, seen) + 2 / 4 * term(logits, answers, "adv", "minus")
    loss.backward()
    if recipe.optim.nesterov:  # w <- w - lr (1 + momentum) g at first
        sgd.param_groups[0]["lr"] *= 1 + recipe.optim.momentum
    sgd.step()
    for key, value in student.state_dict().items():
        torch.testing.assert_close(after.state_dict()[key], value, rtol=1e-9, atol=1e-11)


def test_the_clean_view_costs_no_forward_and_a_longer_one_two(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, images, seen, _ = taken("rslad:digits", monkeypatch, igdm=1.0, igdm_gamma=0.0)
    assert images.keys() == {"clean", "adv"} and not seen.teacher_views and seen.teacher_adv_BK is not None
    monkeypatch.undo()
    recipe, _, _, images, _, _ = taken("rslad:digits", monkeypatch, igdm=1.0, igdm_beta=2.0, igdm_gamma=0.5)
    away = images["adv"] - images["clean"]
    torch.testing.assert_close(images["plus"] - images["clean"], 2 * away, rtol=0, atol=1e-15)
    torch.testing.assert_close(images["minus"] - images["clean"], -away / 2, rtol=0, atol=1e-15)
    assert recipe.method.forwards_in(1, recipe).before == ("adv", "clean", "plus", "minus")
    assert recipe.method.shown_to_teacher() == ("clean", "plus", "minus")


@pytest.mark.parametrize("host", HOSTS)
def test_without_it_a_host_is_as_it_was(host: type[Igdm]) -> None:
    recipe = Recipe.of(host, dataset="digits", student="tiny_resnet")
    method = recipe.method
    assert method.views({"clean": torch.zeros(1), "adv": torch.ones(1)}) == {}
    assert method.shown_to_teacher() == host.teacher_sees
    assert method.forwards_in(1, recipe) == Forwards(host.forwards)
    assert "igdm_weight" not in method.class_state(10, recipe)


def test_the_weight_rises_to_the_last_epoch() -> None:
    recipe = Recipe.of(Iad, dataset="digits", student="tiny_resnet", epochs=4, igdm=20.0, begin=0.5)
    state = recipe.method.class_state(10, recipe)
    seen = []
    for epoch in range(1, 5):
        seen.append((float(state["igdm_weight"]), float(state["begun"])))
        state = recipe.method.next_class_state(state, EpochStats(), epoch, recipe)
    assert seen == [(5, 0), (10, 0), (15, 1), (20, 1)]
    assert float(state["igdm_weight"]) == 20


def test_a_run_shows_the_weight_of_each_epoch(train: Callable[..., int], tmp_path: Path) -> None:
    assert train("absld:digits", tmp_path / "run", "--igdm", "3") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["igdm_weight"] for line in lines] == [1.5, 3]
    assert all(len(line["temperature_adv"]) == 10 for line in lines)
    assert lines[0]["temperature_adv"] != lines[1]["temperature_adv"]
