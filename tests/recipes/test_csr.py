"""CSR and its control: the weights of pairs and the losses in float64, the counts by hand, and when they are made."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine import ClassMeans, EpochStats, Recipe, State, Targets, create_model, cross_entropy_objective, pgd
from retemper.engine.catalogue import find_setting
from retemper.engine.run.survey import OWN_NOISE, survey
from retemper.engine.state import clean_images
from retemper.loaders import ViewSpace, load_split, make_loader
from retemper.recipes.csr import Csr, pair_weight

CPU = torch.device("cpu")


def csr(**options: object) -> Recipe:
    return find_setting("csr:digits")[2].recipe.replace(**options)


def logits() -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    return {name: 2 * torch.randn(9, 3, generator=gen, dtype=torch.float64) for name in ("clean", "adv")}


def kl(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    return (p_BK * (p_BK / q_BK).log()).sum(1)


def test_weights_are_the_gradient_of_the_spectral_norm_scaled() -> None:
    """The norm's gradient is found here by differences of the norm itself."""
    counts = np.random.default_rng(0).integers(0, 40, (5, 5)).astype(float)
    np.fill_diagonal(counts, 0)
    gradient = np.zeros_like(counts)
    for place in np.ndindex(counts.shape):
        step = np.zeros_like(counts)
        step[place] = 1e-4
        ends = [np.linalg.norm(counts + sign * step, 2) for sign in (1, -1)]
        gradient[place] = (ends[0] - ends[1]) / 2e-4
    expected = 2 * (gradient - gradient.min()) / (gradient.max() - gradient.min()) + 0.01
    found = pair_weight(torch.from_numpy(counts).float())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert (gradient >= 0).all() and found.min() == 0.01 and found.max() == 2.01


def test_weights_without_any_confusion_are_the_least() -> None:
    torch.testing.assert_close(pair_weight(torch.zeros(3, 3)), torch.full((3, 3), 0.01, dtype=torch.float64))


def test_counts_lower_the_true_logit_by_its_share() -> None:
    method = csr().method
    assert isinstance(method, Csr) and method.gamma == 0.1
    logits_BK = torch.tensor([[1.0, 0.95, 0.0], [1.0, 0.85, 0.0], [-1.0, -0.95, -2.0], [-1.0, -0.85, -2.0]])
    given = method.surveyed(logits_BK, torch.zeros(4, dtype=torch.long))
    assert given.argmax(1).tolist() == [1, 0, 0, 1] and given.sum(1).tolist() == [1.0] * 4  # a negative one is raised
    exact = csr(gamma=0.0).method.surveyed(logits_BK, torch.zeros(4, dtype=torch.long))
    assert exact.argmax(1).tolist() == [0, 0, 1, 1]


def test_loss_is_the_papers() -> None:
    of, label = logits(), torch.arange(9) % 3
    weight = torch.rand(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = {"pair_weight": weight}
    found = csr().method.loss(of, Targets(label_B=label, state=state))
    p, q = of["clean"].softmax(1), of["adv"].softmax(1)
    clean, adv = (F.cross_entropy(of[name], label, reduction="none") for name in ("clean", "adv"))
    given = q.argmax(1)
    assert (given != label).any() and (given == label).any()
    expected = 0.7 * clean.mean() + 6 * kl(p, q).mean() + 0.3 * (weight[given, label] * adv).mean()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    control = find_setting("csr_control:digits")[2].recipe.method.loss(of, Targets(label_B=label, state={}))
    torch.testing.assert_close(control, clean.mean() + 6 * kl(p, q).mean(), rtol=1e-10, atol=0)


def test_control_differs_in_the_method_alone() -> None:
    ours, control = (find_setting(f"{method}:digits")[2].recipe for method in ("csr", "csr_control"))
    assert [vars(ours)[group] for group in ("data", "networks", "attack", "optim", "selection", "execution")] == [
        vars(control)[group] for group in ("data", "networks", "attack", "optim", "selection", "execution")
    ]
    optim = ours.optim
    assert (optim.epochs, optim.lr, optim.momentum, optim.weight_decay) == (2, 0.001, 0.9, 5e-4)
    assert optim.lr_at(2) == 0.001


def counted(label: list[int], given: list[int]) -> ClassMeans:
    seen = ClassMeans.zeros(3, 3, CPU)
    seen.add(F.one_hot(torch.tensor(given), 3).float(), torch.tensor(label))
    return seen


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_rule_takes_what_is_off_the_diagonal_by_the_class_that_is_given(variant: str) -> None:
    recipe = csr().as_variant(variant)
    before = recipe.method.class_state(3, recipe)
    seen = counted(label=[0, 0, 0, 0, 1, 2, 2], given=[0, 0, 1, 1, 0, 2, 1])
    counts = torch.tensor([[0.0, 1, 0], [2, 0, 1], [0, 0, 0]])  # [given, true]
    confusion = counts if variant == "released" else counts / torch.tensor([4, 1, 2])
    moved = recipe.method.next_class_state(before, EpochStats(surveyed=seen), 0, recipe)
    torch.testing.assert_close(moved["pair_weight"], pair_weight(confusion).float())
    assert (moved["pair_weight"][1, 0] == moved["pair_weight"].max()) == (variant == "released")
    kept = recipe.method.next_class_state(moved, EpochStats(), 2, recipe)
    assert torch.equal(kept["pair_weight"], moved["pair_weight"])


def test_images_are_looked_at_before_each_epoch_or_in_the_training_attack() -> None:
    recipe, cheap = csr(), csr(confusion_of="training")
    for epoch in (1, 2):
        attack = recipe.method.surveys_by(epoch, recipe)
        assert attack is not None and (attack.start, attack.clip_start, attack.steps) == ("uniform", False, 10)
        assert (attack.eps, attack.step) == (recipe.attack.eps, recipe.attack.step)
    assert cheap.method.surveys_by(1, cheap) is not None and cheap.method.surveys_by(2, cheap) is None
    of, label = logits(), torch.arange(9) % 3
    assert recipe.method.measured(of, Targets(label_B=label, state={})) == {}
    given = cheap.method.measured(of, Targets(label_B=label, state={}))["given"]
    assert torch.equal(given, cheap.method.surveyed(of["adv"], label))
    seen = counted(label=[0, 1, 2], given=[1, 1, 0])
    moved = cheap.method.next_class_state(
        cheap.method.class_state(3, cheap), EpochStats(measured={"given": seen}), 1, cheap
    )
    torch.testing.assert_close(
        moved["pair_weight"], pair_weight(torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, 0]])).float()
    )


SURVEYS: dict[str, dict[str, Any]] = {  # of `pgd`, at the setting's radius of 0.15 and step of 0.0375
    "pgd": dict(steps=2, step=0.0375, eps=0.15, clip_start=False),
    "nfgsm": dict(steps=1, step=0.15, eps=1.0, start_eps=0.3),
    "pgi": dict(steps=1, step=0.15, eps=0.15),
    "pgd2": dict(steps=2, step=0.15, eps=0.15),
}


@pytest.mark.parametrize("kind", SURVEYS)
def test_survey_is_a_loop_over_the_epochs_images(kind: str) -> None:
    """It counts what each class's attacked images are taken for, and moves neither weights nor statistics."""
    torch.manual_seed(0)
    recipe = csr(attack=kind, attack_steps=2, gamma=0.0, batch_size=64, fold=False)
    student = create_model("tiny_resnet", 10)
    state = State(recipe, student, None, 10, CPU)
    split = load_split("digits", "train")
    indices = np.arange(150)
    loader = make_loader(
        "resident", split, indices=indices, batch_size=64, seed=3, views=ViewSpace(1, False), device=CPU
    )
    before = {name: value.clone() for name, value in student.state_dict().items()}
    attack = recipe.method.surveys_by(2, recipe)
    assert attack is not None
    seen = survey(state, recipe, loader, 2, attack, seed=3)
    assert seen is not None
    counts = torch.zeros(10, 10)
    for number, batch in enumerate(loader.epoch(2)):
        clean = clean_images(recipe, batch.image, batch.view)
        seed = OWN_NOISE ^ ((3 << 40) + (2 << 24) + number)
        adv = pgd(
            student.eval(),
            clean,
            objective=cross_entropy_objective(batch.label),
            start="uniform",
            seed=seed,
            **SURVEYS[kind],
        )
        with torch.no_grad():
            given = student(adv).argmax(1)
        for true, taken in zip(batch.label.tolist(), given.tolist(), strict=True):
            counts[true, taken] += 1
    assert torch.equal(seen.total_KD, counts) and counts.sum() == 150
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
