"""What a method may ask of a step beside its attack and its loss: views, an average, the share done, the attack."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from retemper.engine import LabelAttack, Recipe, State, Targets, cross_entropy_rows, given, train_step
from retemper.engine.models import create_model

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Watching(LabelAttack):
    """A method that keeps what each step has shown it."""

    teacher_sees: ClassVar[tuple[str, ...]] = ("clean", "adv", "opposite")
    average_sees: ClassVar[tuple[str, ...]] = ("clean", "adv")
    watches_progress: ClassVar[bool] = True
    seen: ClassVar[list[Any]] = []

    def attack_in(self, epoch: int, recipe: Recipe) -> Mapping[str, Any]:
        return {"steps": 0, "start": "none"} if epoch == 2 else {}

    def views(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"opposite": 2 * images["clean"] - images["adv"]}

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return targets.cross_entropy_rows(logits["adv"]).mean() + targets.cross_entropy_rows(logits["clean"]).mean()

    def training_loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return 3 * self.loss(logits, targets)

    def after_step(self, state: Mapping[str, Tensor], logits: Mapping[str, Tensor], targets: Targets) -> None:
        self.seen.append((targets, {name: value.clone() for name, value in logits.items()}))


@pytest.fixture
def recipe() -> Recipe:
    Watching.seen.clear()
    options: dict[str, Any] = dict(average="ema", ema_decay=0.9, epochs=4, lr_drops=(), label_smoothing=0.25)
    return Recipe.of(
        Watching, dataset="digits", student="tiny_resnet", eps=0.1, attack_step=0.05, fold=False, **options
    )


def a_step() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    return torch.rand(6, 1, 8, 8, generator=gen), torch.randint(10, (6,), generator=gen)


def test_a_step_shows_the_teacher_and_the_average_what_the_method_asks_for(recipe: Recipe) -> None:
    """The teacher and the average answer in eval mode, to the very images that the student sees."""
    student, teacher = (create_model("tiny_resnet", 10, channels=1) for _ in range(2))
    shown: list[Tensor] = []
    teacher.eval().register_forward_pre_hook(lambda _, args: shown.append(args[0].clone()))
    state = State(recipe, student, teacher, 10, CPU)
    clean, label = a_step()
    assert state.average is not None
    average: nn.Module = state.average.network
    with torch.no_grad():
        wanted = average(clean)
    loss = train_step(state, recipe, clean, label)
    (targets, logits) = Watching.seen[-1]
    torch.testing.assert_close(given(targets.average_BK), wanted)
    adv, opposite = shown[1][:6], shown[1][6:]
    assert not torch.equal(adv, clean)
    torch.testing.assert_close(opposite, 2 * clean - adv)
    with torch.no_grad():
        torch.testing.assert_close(given(targets.teacher_adv_BK), teacher(adv))
        torch.testing.assert_close(targets.teacher_views["opposite"], teacher(opposite))
    assert targets.average_adv_BK is not None and not torch.equal(targets.average_adv_BK, wanted)
    smoothed = sum(
        nn.functional.cross_entropy(logits[name].double(), label, label_smoothing=0.25) for name in ("adv", "clean")
    )
    torch.testing.assert_close(loss.double(), 3 * smoothed, rtol=1e-5, atol=1e-5)  # `training_loss` is what is lowered


@pytest.mark.parametrize("awp", [0.0, 0.01])
def test_a_folded_average_answers_as_it_was_before_the_step(recipe: Recipe, awp: float) -> None:
    teacher = create_model("tiny_resnet", 10, channels=1).eval()
    recipe = recipe.replace(fold=True, precision="fp32", awp_gamma=awp)
    state = State(recipe, create_model("tiny_resnet", 10, channels=1), teacher, 10, CPU)
    state.start_epoch(recipe, 1, 0)
    assert state.average is not None and state.averaged is not state.average.network
    clean, label = a_step()
    for _ in range(3):  # after the first, the average is no copy of the student
        with torch.no_grad():
            wanted = state.average.network(clean)
        train_step(state, recipe, clean, label)
        torch.testing.assert_close(given(Watching.seen[-1][0].average_BK), wanted, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert (state.average.network(clean) - wanted).abs().max() > 1e-3


def test_the_average_is_asked_in_the_epochs_that_the_method_names(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watching, "shown_to_average", lambda self, epoch, recipe: ("clean", "adv")[: epoch - 1])
    teacher = create_model("tiny_resnet", 10, channels=1).eval()
    state = State(recipe, create_model("tiny_resnet", 10, channels=1), teacher, 10, CPU)
    for epoch, clean, adv in ((1, False, False), (2, True, False), (3, True, True)):
        state.start_epoch(recipe, epoch, 0)
        train_step(state, recipe, *a_step())
        targets = Watching.seen[-1][0]
        assert (targets.average_BK is not None, targets.average_adv_BK is not None) == (clean, adv)


def test_progress_and_the_attack_follow_the_epoch(recipe: Recipe) -> None:
    teacher = create_model("tiny_resnet", 10, channels=1).eval()
    state = State(recipe, create_model("tiny_resnet", 10, channels=1), teacher, 10, CPU)
    for epoch, step, share in ((1, 0, 0.0), (2, 1, 0.375), (4, 1, 0.875)):
        state.start_epoch(recipe, epoch, 0)
        state.begin_step(recipe, epoch, step, 2)
        train_step(state, recipe, *a_step())
        targets = Watching.seen[-1][0]
        assert targets.progress is state.progress and float(state.progress) == share
        opposite, plain = targets.teacher_views["opposite"], targets.teacher
        assert torch.allclose(opposite, plain, atol=1e-6) == (epoch == 2)  # which has no attack


def test_a_method_that_learns_from_its_average_needs_one(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="average = 'none'"):
        recipe.replace(average="none")


def test_smoothed_labels_are_those_of_the_formula() -> None:
    logits, label = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    target = 0.7 * nn.functional.one_hot(label, 7) + 0.3 / 7
    torch.testing.assert_close(cross_entropy_rows(logits, label, 0.3), -(target * logits.log_softmax(1)).sum(1))
