"""A peer that is trained beside the student: its step, its place in a run's state, and what is refused."""

import copy
import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.cli import run
from retemper.engine import Method, Recipe, State, Targets, cross_entropy_objective, given, train_step
from retemper.engine.models import create_model
from retemper.engine.run.state_file import unpack
from retemper.engine.speed.fold import Folded

CPU = torch.device("cpu")
STEPS = 14  # an epoch of the run
STEP = "retemper.engine.run.steps.train_step"
COMMAND = (
    "train peeraid:digits --device cpu --epochs 2 --attack-steps 2 --holdout-per-class 33 --select-steps 2 "
    "--batch-size 64 --select-every 1 --select-from 1 --average-from 1"
).split()


@dataclass(frozen=True, kw_only=True)
class Both(Method):
    """A method whose student learns from the peer, and whose peer learns from the label and the student."""

    trains_peer: ClassVar[bool] = True
    forwards: ClassVar[tuple[str, ...]] = ("adv",)
    seen: ClassVar[list[Targets]] = []

    def objective(self, targets: Targets) -> Any:
        self.seen.append(targets)
        return cross_entropy_objective(targets.label_B)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return both(logits["adv"], given(targets.peer_adv_BK), targets.label_B)


def both(student_BK: Tensor, peer_BK: Tensor, label_B: Tensor) -> Tensor:
    pull = F.kl_div(peer_BK.log_softmax(1), student_BK.softmax(1), reduction="batchmean")
    return F.cross_entropy(peer_BK, label_B) + pull


def begin(**options: Any) -> tuple[State, Recipe]:
    Both.seen.clear()
    torch.manual_seed(0)
    small: dict[str, Any] = dict(dataset="digits", student="tiny_resnet", eps=0.2, attack_step=0.1, attack_steps=1)
    recipe = Recipe.of(Both, **small, lr=0.1, momentum=0.5, precision="fp32", **options)
    student, peer = (create_model("tiny_resnet", 10, channels=1).double() for _ in range(2))
    return State(recipe, student, None, 10, CPU, peer=peer), recipe


def a_batch() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    image = torch.rand(12, 1, 8, 8, generator=gen, dtype=torch.float64)
    return image.contiguous(memory_format=torch.channels_last), torch.arange(12) % 10


def networks(state: State) -> list[nn.Module]:
    assert state.peer is not None
    return [state.student, state.peer.network]


@pytest.mark.parametrize("options", [{}, {"fold": False}, {"fused_sgd": False}, {"joint": True}], ids=str)
def test_both_networks_take_the_step_of_the_formula(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, with weight decay and momentum, and with what each batch norm has seen."""
    state, recipe = begin(**options)
    clean, label = a_batch()
    adv = (clean + 0.05).clamp(max=1)
    monkeypatch.setattr("retemper.engine.maximise.ascend", lambda *_, **__: adv)
    theirs = [copy.deepcopy(one).train() for one in networks(state)]
    optimizer = torch.optim.SGD(
        [weight for one in theirs for weight in one.parameters()], lr=0.1, momentum=0.5, weight_decay=2e-4
    )
    for _ in range(2):
        expected = both(theirs[0](adv), theirs[1](adv), label)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(train_step(state, recipe, clean, label), expected.detach(), rtol=1e-9, atol=0)
    for one, other in zip(networks(state), theirs, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-7, atol=1e-9)
    assert torch.equal(state.sums["peer"].count_K, state.sums["adv"].count_K)
    assert not torch.equal(state.sums["peer"].loss_K, state.sums["adv"].loss_K)


@pytest.mark.parametrize("fold", [True, False])
def test_the_peer_answers_the_clean_images_in_eval_mode_before_the_attack(fold: bool) -> None:
    state, recipe = begin(fold=fold)
    assert state.peer is not None and isinstance(state.peer.eyes, Folded) == fold
    clean, label = a_batch()
    for _ in range(2):  # the second answers with the weights of after the first
        expected = copy.deepcopy(state.peer.network).eval()(clean)
        train_step(state, recipe, clean, label)
        found = given(Both.seen[-1].peer_BK)
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-4)
        assert not found.requires_grad and Both.seen[-1].peer_adv_BK is None
    assert state.peer.network.get_submodule("bn1").state_dict()["num_batches_tracked"] == 2, "one forward a step moves"


def test_the_weights_of_the_student_alone_are_perturbed_and_averaged() -> None:
    state, recipe = begin(awp_gamma=0.1, average="swa")
    assert state.perturbation is not None and state.average is not None and state.peer is not None
    state.start_epoch(recipe, 1, 0)
    of_student = {id(weight) for weight in state.student.parameters() if weight.dim() > 1}
    assert {id(weight) for weight in state.perturbation.weights} == of_student
    before = copy.deepcopy(state.peer.network.state_dict())
    train_step(state, recipe, *a_batch())
    torch.testing.assert_close(state.kept.state_dict(), state.student.state_dict(), rtol=0, atol=0)
    after = state.peer.network.state_dict()
    assert int(after["bn1.num_batches_tracked"]) == 1, "the pass that finds the perturbation asks the peer for nothing"
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"]), "it learns all the same"


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_of_the_peer_that_is_not_finite_holds_both_networks_back(fused: bool) -> None:
    state, recipe = begin(fused_sgd=fused)
    train_step(state, recipe, *a_batch())
    next(networks(state)[1].parameters()).register_hook(lambda gradient: gradient * torch.nan)
    before = [weight.detach().clone() for weight in state.trained.parameters()]
    train_step(state, recipe, *a_batch())
    assert all(torch.equal(one, two) for one, two in zip(before, state.trained.parameters(), strict=True))
    assert int(state.guard.seed) >= 0


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, recipe = begin()
    with pytest.raises(ValueError, match="peer: the method trains one beside the student, and none is given"):
        State(recipe, state.student, None, 10, CPU)
    assert run(["train", "sat:digits", "--peer-model", "tiny_resnet", "--out", str(tmp_path / "run")]) == 2
    assert "peer_model = 'tiny_resnet': this method trains no peer" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run([*COMMAND, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("at", [5, STEPS + 3])
def test_a_run_that_is_asked_to_leave_within_an_epoch_goes_on_to_the_same_bits(
    at: int, whole: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [*COMMAND, "--out", out]
    assert start(*words, place=STEP, at={at: signal.SIGTERM}).wait()[0] == 75
    assert unpack(out / "last.state")["step"] == at % STEPS
    assert start(*words).wait()[0] == 0
    states = [unpack(folder / "last.state") for folder in (whole, out)]
    for name in ("student", "peer", "optimizer", "average"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)
    one, two = (load_file(folder / "last.safetensors") for folder in (whole, out))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_has_a_peer_of_other_weights_and_tells_how_it_learns(whole: Path) -> None:
    state = unpack(whole / "last.state")
    assert state["peer"].keys() == state["student"].keys()
    assert not any(
        torch.equal(state["peer"][name], value) for name, value in state["student"].items() if "conv" in name
    )
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(len(line["class_accuracy_peer"]) == 10 for line in lines)
    assert sum(lines[-1]["class_loss_peer"]) < sum(lines[0]["class_loss_peer"])


def test_the_peer_may_be_another_network(tmp_path: Path) -> None:
    words = [*COMMAND, "--epochs", "1", "--max-steps", "2", "--peer-model", "tiny_resnet_wide", "--out", str(tmp_path)]
    assert run(words) == 0
    state = unpack(tmp_path / "last.state")
    assert state["peer"]["conv1.weight"].shape != state["student"]["conv1.weight"].shape
