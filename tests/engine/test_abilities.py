"""What the engine does for methods that ask: each ability, by a recipe that has nothing else."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine import (
    EpochStats,
    Forwards,
    HeldOut,
    Method,
    Objective,
    Recipe,
    State,
    Targets,
    TrainingAttack,
    Watcher,
    create_model,
    cross_entropy_objective,
    given,
    train_step,
)
from retemper.engine.distributed.ranks import Ranks
from retemper.engine.maximise import attack
from retemper.engine.models import channels_last
from retemper.engine.step import descend, observe, observe_attacked
from retemper.kernels import random_start_


@dataclass(frozen=True, kw_only=True)
class Plain(Method):
    """A method whose loss is the cross-entropy on whatever it forwards."""

    def objective(self, targets: Targets) -> Objective:
        return cross_entropy_objective(targets.label_B)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return sum((F.cross_entropy(value, targets.label_B) for value in logits.values()), torch.zeros(()))


SMALL: dict[str, Any] = dict(
    dataset="digits", student="tiny_resnet", eps=0.2, attack_step=0.1, attack_steps=3, lr=0.05, precision="fp32"
)


def small(method: type[Method], **options: Any) -> Recipe:
    return Recipe.of(method, **(SMALL | options))


def network(device: torch.device, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return channels_last(create_model("tiny_resnet", 10), device).eval().requires_grad_(False)


def begin(recipe: Recipe, device: torch.device, teacher: bool = False, clean_teacher: bool = False) -> State:
    torch.manual_seed(0)
    networks = network(device, 1) if teacher else None, network(device, 2) if clean_teacher else None
    return State(recipe, create_model("tiny_resnet", 10), networks[0], 10, device, networks[1])


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    image = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return image.to(device).to(memory_format=torch.channels_last), (torch.arange(12) % 10).to(device)


def attacked(state: State, recipe: Recipe, device: torch.device) -> tuple[Tensor, Targets]:
    clean, label = batch(device)
    looked_at = state.attacked()
    targets = observe(state, recipe, looked_at, clean, label, None)
    return attack(state, recipe, looked_at, clean, targets), targets


# what is known before the attack and after it


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_its_own_prediction_is_the_students_before_the_attack(mode: str, device: torch.device) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(Plain):
        needs_own_prediction: ClassVar[bool] = True

    recipe = small(Own, attack_bn=mode)
    state = begin(recipe, device)
    clean, label = batch(device)
    before = state.student.get_submodule("bn1").state_dict()["num_batches_tracked"].clone()
    targets = observe(state, recipe, state.attacked(), clean, label, None)
    assert state.student.get_submodule("bn1").state_dict()["num_batches_tracked"] - before == (mode == "train")
    own = given(targets.own_BK)
    assert not own.requires_grad and targets.teacher_BK is None
    state.student.train(mode == "train")
    torch.testing.assert_close(own, state.student(clean).detach(), rtol=1e-3, atol=1e-4)
    assert observe(state, small(Plain), state.attacked(), clean, label, None).own_BK is None


@pytest.mark.parametrize("sees", [(), ("clean",), ("adv",), ("clean", "adv")])
@pytest.mark.parametrize("clean_sees", [(), ("clean", "adv")])
def test_each_teacher_sees_what_the_method_asks_for(
    sees: tuple[str, ...], clean_sees: tuple[str, ...], device: torch.device
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Two(Plain):
        teacher_sees: ClassVar[tuple[str, ...]] = sees
        clean_teacher_sees: ClassVar[tuple[str, ...]] = clean_sees

    recipe = small(Two, teacher_model="tiny_resnet", clean_teacher_model="tiny_resnet")
    state = begin(recipe, device, teacher=True, clean_teacher=True)
    adv, targets = attacked(state, recipe, device)
    assert targets.teacher_adv_BK is None and targets.clean_teacher_adv_BK is None  # not known during the attack
    targets = observe_attacked(state, recipe, {"adv": adv}, targets)
    images = {"clean": batch(device)[0], "adv": adv}
    for which, prefix, seed in ((sees, "teacher", 1), (clean_sees, "clean_teacher", 2)):
        for image, suffix in (("clean", "_BK"), ("adv", "_adv_BK")):
            logits = getattr(targets, prefix + suffix)
            assert (logits is not None) == (image in which)
            if logits is not None:
                expected = network(device, seed)(images[image])
                torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_a_teachers_known_answer_is_not_asked_again(device: torch.device) -> None:
    recipe = small(Plain, teacher_model="tiny_resnet")
    state = begin(recipe, device, teacher=True)
    known = torch.zeros(12, 10, device=device)
    clean, label = batch(device)
    assert observe(state, recipe, state.student, clean, label, known).teacher_BK is known


def test_an_attack_on_both_networks_gets_both_gradients(device: torch.device) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Both(Plain):
        attacks_teacher: ClassVar[bool] = True

        def objective(self, targets: Targets) -> Objective:
            return lambda logits: (logits[:, :10].softmax(1) * logits[:, 10:].log_softmax(1)).sum()

    recipe = small(Both, attack_start="none", attack_steps=1, teacher_model="tiny_resnet")
    state = begin(recipe, device, teacher=True)
    adv, _ = attacked(state, recipe, device)
    clean = batch(device)[0].requires_grad_()
    both = torch.cat([state.student.eval()(clean), network(device, 1)(clean)], 1)
    (grad,) = torch.autograd.grad(recipe.method.objective(Targets(label_B=clean, state={}))(both), clean)
    expected = (clean.detach() + 0.1 * grad.sign()).clamp(0, 1)
    assert ((adv - expected).abs() < 1e-6).float().mean() > 0.99  # but where rounding decides a sign


# the attack


def test_each_class_has_its_own_margin_and_step(device: torch.device) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Margins(Plain):
        def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
            return {"margin": torch.arange(num_classes) / 20.0}

        def margins(self, targets: Targets, attack: TrainingAttack) -> tuple[Tensor, Tensor]:
            eps_B = targets.state["margin"][targets.label_B]
            return eps_B, eps_B / 2

    recipe = small(Margins, attack_start="none")
    adv, _ = attacked(begin(recipe, device), recipe, device)
    clean, label = batch(device)
    moved = (adv - clean).abs().amax((1, 2, 3))
    assert (moved <= label / 20 + 1e-6).all()
    inside = moved[label > 0] / (label[label > 0] / 20)
    assert inside.min() > 0.9 and moved[label == 0].max() == 0


@dataclass(frozen=True, kw_only=True)
class Drawing(Plain):
    draws: ClassVar[bool] = True


def drawn(state: State, rows: int, method: type[Method] = Drawing) -> Tensor | None:
    label = torch.zeros(rows, dtype=torch.int64, device=state.device)
    clean = torch.zeros(rows, 1, 8, 8, device=state.device)
    return observe(state, small(method), state.student, clean, label, None).uniform_BK


def test_what_a_method_draws_follows_from_the_steps_seed_and_the_rows_places(device: torch.device) -> None:
    state = begin(small(Drawing), device)
    state.noise_seed.fill_(7)
    whole = given(drawn(state, 400))
    assert whole.shape == (400, 10) and whole.min() >= 0 and whole.max() <= 1
    assert (whole.mean() - 0.5).abs() < 0.02 and (whole.std() - 12**-0.5).abs() < 0.02  # 4 deviations
    start = random_start_(torch.empty_like(whole), torch.full_like(whole, 0.5), 0.5, seed=7)
    assert not (start == whole).any()  # not the noise of the attack
    assert torch.equal(given(drawn(state, 400)), whole)
    state.part = replace(state.part, ranks=Ranks(rank=1, world_size=3))
    assert torch.equal(given(drawn(state, 20)), whole[1::3][:20])  # as a process of three draws its rows
    state.part = replace(state.part, ranks=Ranks())
    state.noise_seed += 1
    assert not (given(drawn(state, 400)) == whole).any()
    assert drawn(state, 1, Plain) is None


def test_a_watcher_sees_every_iterate_before_its_step(device: torch.device) -> None:
    iterates: list[tuple[Tensor, Tensor]] = []

    class Recorder(Watcher):
        def __call__(self, adv_BCHW: Tensor, logits_BK: Tensor) -> None:
            iterates.append((adv_BCHW.clone(), logits_BK.clone()))

    @dataclass(frozen=True, kw_only=True)
    class Watched(Plain):
        def watcher(self, clean_BCHW: Tensor, targets: Targets) -> Watcher:
            assert targets.watched is None and len(clean_BCHW) == 12
            return Recorder()

    recipe = small(Watched)
    state = begin(recipe, device)
    state.student.eval()
    adv, targets = attacked(state, recipe, device)
    assert targets.watched is not None and len(iterates) == recipe.attack.steps
    clean = batch(device)[0]
    for number, (iterate, logits) in enumerate(iterates):
        assert not iterate.requires_grad and not logits.requires_grad
        torch.testing.assert_close(logits, state.student(iterate).detach(), rtol=1e-3, atol=1e-4)
        step = ((iterates[number + 1][0] if number < 2 else adv) - iterate).abs().amax()
        assert 0.05 < step <= 0.1 + 1e-6
    assert (iterates[0][0] - clean).abs().amax() < 0.01  # the start
    unwatched, _ = attacked(begin(small(Plain), device), small(Plain), device)
    assert torch.equal(adv, unwatched), "looking on changes nothing"


# the loss


class Middle(Watcher):
    """A forward of the images halfway between the clean and the attacked ones."""

    def __init__(self, clean_BCHW: Tensor) -> None:
        self.clean_BCHW = clean_BCHW

    def __call__(self, adv_BCHW: Tensor, logits_BK: Tensor) -> None:
        pass

    def images(self, adv_BCHW: Tensor) -> dict[str, Tensor]:
        return {"middle": (self.clean_BCHW + adv_BCHW) / 2}


@dataclass(frozen=True, kw_only=True)
class Halfway(Plain):
    """A method that forwards images of its own making, and counts its calls."""

    forwards: ClassVar[tuple[str, ...]] = ("middle", "clean")

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        return {"steps": torch.zeros(()), "confidence": torch.zeros(num_classes)}

    def watcher(self, clean_BCHW: Tensor, targets: Targets) -> Middle:
        return Middle(clean_BCHW)

    def measured(self, logits: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        return {"probability": logits["middle"].softmax(1), "right": targets.label_B.float()}

    def after_step(self, state: Mapping[str, Tensor], logits: Mapping[str, Tensor], targets: Targets) -> None:
        state["steps"].add_(1)
        state["confidence"].index_add_(0, targets.label_B, logits["clean"].softmax(1).amax(1))


def test_a_method_forwards_images_of_its_own_in_its_order(device: torch.device) -> None:
    recipe = small(Halfway)
    state = begin(recipe, device)
    seen: list[Tensor] = []
    state.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    adv, _ = attacked(state, recipe, device)
    clean, label = batch(device)
    seen.clear()
    train_step(state, recipe, clean, label)  # the attack looks at the student's folded twin
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], (clean + adv) / 2)
    torch.testing.assert_close(seen[1], clean)
    assert set(state.sums) == {"middle", "clean"}


def test_what_is_measured_is_averaged_by_class_until_the_epoch_ends(device: torch.device) -> None:
    recipe = small(Halfway)
    state = begin(recipe, device)
    rows: list[Tensor] = []
    original = Halfway.measured

    def recording(self: Halfway, logits: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        result = original(self, logits, targets)
        assert not result["probability"].requires_grad
        rows.append(result["probability"])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Halfway, "measured", recording)
        for _ in range(2):
            train_step(state, recipe, *batch(device))
    label = batch(device)[1].repeat(2)
    expected = torch.stack([torch.cat(rows)[label == k].mean(0) for k in range(10)])
    measured = state.measured
    torch.testing.assert_close(measured["probability"].mean_KD, expected)
    torch.testing.assert_close(measured["right"].mean_K, torch.arange(10.0, device=device))
    state.start_epoch(recipe, 2, 0)
    assert not state.measured["probability"].mean_KD.any() and not state.sums["clean"].count_K.any()


def test_a_state_that_moves_with_every_step_keeps_its_address(device: torch.device) -> None:
    recipe = small(Halfway)
    state = begin(recipe, device)
    before = {name: value.data_ptr() for name, value in state.class_state.items()}
    for _ in range(3):
        train_step(state, recipe, *batch(device))
    assert state.class_state["steps"] == 3
    count = torch.bincount(batch(device)[1], minlength=10)
    assert (state.class_state["confidence"] > 0.1 * 3 * count).all()
    state.move_classes(
        recipe.method.next_class_state(
            {"steps": torch.ones(()), "confidence": torch.zeros(10)}, EpochStats(), 1, recipe
        )
    )
    assert state.class_state["steps"] == 1
    assert {name: value.data_ptr() for name, value in state.class_state.items()} == before


def test_a_method_that_validates_is_asked_before_the_first_epoch_and_after_each(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retemper.cli import run
    from retemper.recipes.wat import Wat

    asked: list[tuple[int, bool, HeldOut | None]] = []

    def next_class_state(
        self: Wat, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        asked.append((epoch, bool(stats.forwards), stats.held))
        return dict(state)

    monkeypatch.setattr(Wat, "next_class_state", next_class_state)
    words = ["train", "wat:digits", "--out", str(tmp_path / "run"), "--attack-steps", "1", "--select-steps", "1"]
    assert run([*words, "--epochs", "2", "--batch-size", "512"]) == 0
    assert [(epoch, seen) for epoch, seen, _ in asked] == [(0, False), (1, True), (2, True)]
    assert all(isinstance(held, HeldOut) for *_, held in asked)
    assert run([*words, "--holdout-per-class", "0"]) == 2


def test_a_variant_brings_its_constants_and_the_user_has_the_last_word() -> None:
    from retemper.engine.catalogue import override

    @dataclass(frozen=True, kw_only=True)
    class Twofold(Plain):
        variants: ClassVar[tuple[str, ...]] = ("paper", "released")
        variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": dict(lr=0.3, epochs=7)}

    paper = small(Twofold)
    assert (paper.optim.lr, paper.as_variant("released").optim.lr) == (0.05, 0.3)
    recipe = override(paper, {"variant": "released", "lr": "0.4"})
    assert (recipe.method.variant, recipe.optim.lr, recipe.optim.epochs) == ("released", 0.4, 7)
    with pytest.raises(ValueError, match="variant"):
        paper.as_variant("other")


@pytest.mark.parametrize("joint", [False, True])
def test_joint_forwards_are_one_batch_to_batch_norm(joint: bool, device: torch.device) -> None:
    recipe = small(Plain, joint=joint, lr=1e-9)
    state = begin(recipe, device)
    clean, label = batch(device)
    images = {"adv": 1 - clean, "clean": clean}  # as unlike as can be
    by_hand = copy.deepcopy(state.student).train()
    if joint:
        logits = dict(zip(images, by_hand(torch.cat([*images.values()])).split(12), strict=True))
    else:
        logits = {name: by_hand(image) for name, image in images.items()}
    loss = descend(state, recipe, images, Targets(label_B=label, state={}))
    torch.testing.assert_close(loss, recipe.method.loss(logits, Targets(label_B=label, state={})).detach())
    for (name, value), expected in zip(state.student.named_buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
    assert state.student.get_submodule("bn1").state_dict()["num_batches_tracked"] == (1 if joint else 2)


@dataclass(frozen=True, kw_only=True)
class AsTheyRan(Plain):
    """A method whose authors take more forwards than the loss needs, from the second epoch on."""

    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    released_forwards: ClassVar[Forwards | None] = Forwards(("clean", "adv", "clean"), ("adv",))

    def forwards_in(self, epoch: int, recipe: Recipe) -> Forwards:
        return super().forwards_in(epoch, recipe) if epoch > 1 else Forwards(("adv",))


def test_forwards_of_no_use_move_the_statistics_alone_and_in_their_order(device: torch.device) -> None:
    recipe = small(AsTheyRan, variant="released", attack_steps=1, fused_sgd=False, fold=False)
    assert small(AsTheyRan).method.forwards_in(2, recipe) == Forwards(("adv", "clean"))
    state = begin(recipe, device)
    clean, label = torch.rand(8, 1, 8, 8, device=device), torch.arange(8, device=device)
    state.start_epoch(recipe, 1, 0)
    train_step(state, recipe, clean, label)
    assert int(state.student.get_buffer("bn1.num_batches_tracked")) == 1 and not state.sums["clean"].count_K.any()

    state.start_epoch(recipe, 2, 100)
    adv = attack(state, recipe, state.student, clean, Targets(label_B=label, state={}))
    theirs = copy.deepcopy(state.student).train()
    sgd = torch.optim.SGD(theirs.parameters(), lr=recipe.optim.lr, momentum=0.9, weight_decay=2e-4)
    sgd.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
    loss = F.cross_entropy(theirs(clean), label) + F.cross_entropy(theirs(adv), label)
    theirs(clean)
    loss.backward()
    sgd.step()
    theirs(adv)
    train_step(state, recipe, clean, label)
    for name, value in state.student.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], msg=name)


def test_weights_are_perturbed_along_the_loss_that_the_method_names(device: torch.device) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nowhere(Plain):
        def perturbing_loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
            return 0 * self.loss(logits, targets)  # no slope: no move

    def weights(method: type[Method], gamma: float) -> Tensor:
        recipe = small(method, awp_gamma=gamma, attack_steps=1)
        state = begin(recipe, device)
        state.start_epoch(recipe, 1, 0)
        gen = torch.Generator().manual_seed(0)
        train_step(state, recipe, torch.rand(8, 1, 8, 8, generator=gen).to(device), torch.arange(8, device=device))
        return state.student.get_parameter("conv1.weight").detach()

    here, along, nowhere = weights(Plain, 0.0), weights(Plain, 0.01), weights(Nowhere, 0.01)
    torch.testing.assert_close(nowhere, here)
    assert (along - here).abs().max() > 1e-4


def test_a_drop_may_hold_in_the_last_step_of_its_epoch_already() -> None:
    late, early = (small(Plain, lr=0.5, lr_drops=(2,), lr_drop_early=early).optim for early in (False, True))
    assert [late.lr_at(epoch, 9, 10) for epoch in (1, 2, 3)] == [0.5, 0.5, 0.05]
    assert [early.lr_at(epoch, 9, 10) for epoch in (1, 2, 3)] == [0.5, 0.05, 0.05]
    assert [early.lr_at(epoch, 8, 10) for epoch in (1, 2, 3)] == [0.5, 0.5, 0.05]
