"""Averages of weights and perturbed weights: by hand, where they take no part, and across a resumed run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.cli import run
from retemper.engine import HeldOut, Recipe, State, create_model, train_step
from retemper.engine.catalogue import find_setting
from retemper.engine.optim import Average, Perturbation
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.steps import Steps
from retemper.engine.step import descend, observe

TINY: dict[str, Any] = dict(attack_steps=1, lr=0.05, precision="fp32")


def make(device: torch.device, **fields: Any) -> tuple[State, Recipe]:
    torch.manual_seed(0)
    recipe = find_setting("trades:digits_student")[2].recipe.replace(**(TINY | fields))
    return State(recipe, create_model("tiny_resnet", 10), None, 10, device), recipe


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    label = torch.arange(20) % 10
    image = torch.rand(20, 1, 8, 8, generator=gen)
    return image.to(device).to(memory_format=torch.channels_last), label.to(device)


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


# averages


@pytest.mark.parametrize(("kind", "every"), [("ema", "step"), ("swa", "step"), ("ema", "epoch")])
def test_an_average_is_the_one_by_hand_with_its_statistics(kind: str, every: str, device: torch.device) -> None:
    state, recipe = make(device, average=kind, average_every=every, ema_decay=0.8)
    state.start_epoch(recipe, 1, 0)
    seen = []
    for _ in range(4):
        train_step(state, recipe, *batch(device))
        if every == "epoch":
            assert state.average is not None
            state.average.follow(state.student)
        seen.append(values(state.student))
    assert any("running_var" in name for name in seen[0])
    for name, kept in state.kept.state_dict().items():
        history = [value[name].double() for value in seen]
        expected = history[0]
        for number, value in enumerate(history[1:], 2):
            expected = 0.8 * expected + 0.2 * value if kind == "ema" else expected + (value - expected) / number
        if kept.dtype is torch.int64:
            assert int(kept) == int(seen[-1][name])
        else:
            torch.testing.assert_close(kept.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_average_forgets_its_first_weights_sooner_with_a_warm_up(device: torch.device) -> None:
    state, recipe = make(device, average="ema", ema_decay=0.3, ema_warmup=True)
    state.start_epoch(recipe, 1, 0)
    expected, decays = {}, [0.0, 2 / 11, 3 / 12, 0.3, 0.3]  # (1 + t) / (10 + t) up to 0.3
    for decay in decays:
        train_step(state, recipe, *batch(device))
        now = {name: value.double() for name, value in values(state.student).items()}
        expected = {name: decay * expected.get(name, now[name]) + (1 - decay) * value for name, value in now.items()}
    for name, kept in state.kept.state_dict().items():
        if kept.is_floating_point():
            torch.testing.assert_close(kept.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_an_average_is_the_network_itself_until_it_begins(device: torch.device) -> None:
    state, recipe = make(device, average="swa", average_from=2)
    state.start_epoch(recipe, 1, 0)
    for _ in range(2):
        train_step(state, recipe, *batch(device))
        same(values(state.kept), values(state.student))
    state.start_epoch(recipe, 2, 0)
    train_step(state, recipe, *batch(device))
    first = values(state.student)
    same(values(state.kept), first)  # of one
    train_step(state, recipe, *batch(device))
    second = values(state.student)
    expected = {name: (first[name] + second[name]) / 2 for name in first if first[name].is_floating_point()}
    for name, value in expected.items():
        torch.testing.assert_close(state.kept.state_dict()[name], value)


def test_a_skipped_epoch_leaves_an_average_alone_once_there_is_one() -> None:
    network, average = nn.Linear(1, 1), Average(nn.Linear(1, 1), "ema", 0.5)
    average.active.fill_(1)
    average.skip(network)  # nothing taken in yet: what is kept is no older network
    same(values(average.network), values(network))
    average.follow(network)
    kept = values(network)
    with torch.no_grad():
        network.weight += 1
    average.skip(network)
    same(values(average.network), kept)
    average.follow(network)
    torch.testing.assert_close(average.network.state_dict()["weight"], kept["weight"] + 0.5)


def test_an_average_never_trains_and_never_leaves_eval_mode(device: torch.device) -> None:
    state, recipe = make(device, average="ema")
    train_step(state, recipe, *batch(device))
    assert not any(module.training for module in state.kept.modules())
    assert not any(parameter.requires_grad for parameter in state.kept.parameters())
    assert state.kept is not state.student


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


SHORT = (
    "--attack-steps 1 --holdout-per-class 5 --select-steps 1 --batch-size 256 --select-every 1 --select-from 1".split()
)


def average_run(out: Path, epochs: int, *options: str) -> None:
    words = ["train", "sat:digits_student", "--out", str(out), "--epochs", str(epochs), *SHORT]
    assert run([*words, "--average", "ema", "--ema-decay", "0.7", *options]) == 0


def test_a_resumed_average_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    average_run(tmp_path / "whole", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "run", stop_before(2))
        assert run(["train", "sat:digits_student", "--out", str(tmp_path / "cut"), "--epochs", "2", *SHORT,
                    "--average", "ema", "--ema-decay", "0.7"]) == 75  # fmt: skip
    average_run(tmp_path / "cut", 2)
    whole, cut = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "cut"))
    same(whole, cut)
    states = [torch.load(tmp_path / name / "last.state", weights_only=True) for name in ("whole", "cut")]
    assert states[0]["average"]["count"] == states[1]["average"]["count"] > 2
    same(states[0]["average"]["network"], whole)  # what is kept is the average
    student = states[0]["student"]
    assert any(not torch.equal(student[name], whole[name]) for name in whole)  # and not the student


def stop_before(last: int) -> Callable[..., bool]:
    steps = Steps.run

    def stopping(self: Steps, epoch: int) -> bool:
        if epoch == last:
            raise KeyboardInterrupt
        return steps(self, epoch)

    return stopping


def test_an_epoch_whose_worst_class_is_too_weak_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worst = iter([0.1, 0.3, 0.1, 0.4])  # of epochs 2 to 5: the first is before the average begins, and not asked

    def validate(*_: object, **__: object) -> HeldOut:
        robust = torch.full((10,), 0.9)
        robust[3] = next(worst)
        return HeldOut(clean_accuracy_K=robust, robust_accuracy_K=robust, clean_loss_K=robust, boundary_loss_K=robust)

    students: list[dict[str, Tensor]] = []
    monkeypatch.setattr("retemper.engine.run.train.validate", validate)
    monkeypatch.setattr(
        "retemper.engine.run.train._select", lambda job, state, *_: students.append(values(state.student))
    )
    average_run(tmp_path / "run", 5, "--average-every", "epoch", "--average-from", "2", "--average-above", "0.2")
    kept = load_file(tmp_path / "run/last.safetensors")
    for name, value in kept.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.7 * students[2][name] + 0.3 * students[4][name])
    assert torch.load(tmp_path / "run/last.state", weights_only=True)["average"]["count"] == 2


@pytest.mark.parametrize(
    "options",
    [["--average-above", "0.2"], ["--average-above", "0.2", "--average-every", "epoch", "--holdout-per-class", "0"]],
)
def test_a_bound_that_nothing_could_measure_is_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "sat:digits", "--out", str(tmp_path / "x"), "--average", "ema", *options]) == 2
    assert "average_above" in capsys.readouterr().err


# adversarial weight perturbation


def prepared(device: torch.device, **fields: Any) -> tuple[State, Recipe, dict[str, Tensor], Any]:
    """A state with AWP, and a batch with fixed adversarial images."""
    state, recipe = make(device, awp_gamma=0.05, **fields)
    state.start_epoch(recipe, 1, 0)
    clean, label = batch(device)
    targets = observe(state, recipe, state.student, clean, label, None)
    adv = (clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2)).to(clean)).clamp(0, 1)
    return state, recipe, {"clean": clean, "adv": adv}, targets


def loss_of(state: State, recipe: Recipe, images: dict[str, Tensor], targets: Any) -> Tensor:
    state.student.train()
    return recipe.method.loss({name: state.student(images[name]) for name in recipe.method.forwards}, targets)


def perturbed(student: nn.Module, loss: Callable[[], Tensor]) -> Perturbation:
    """Move the student's weights up the loss by a twentieth of their norms."""
    perturbation = Perturbation(student)
    perturbation.gamma.fill_(0.05)
    perturbation.move(loss)
    return perturbation


def test_the_perturbed_weights_are_the_formula_and_cost_more(device: torch.device) -> None:
    state, recipe, images, targets = prepared(device)
    student = state.student
    start = values(student)
    plain = loss_of(state, recipe, images, targets)
    weights = {name: parameter for name, parameter in student.named_parameters() if parameter.dim() > 1}
    gradients = dict(zip(weights, torch.autograd.grad(plain, list(weights.values())), strict=True))
    student.load_state_dict(start)

    perturbation = perturbed(student, lambda: loss_of(state, recipe, images, targets))
    before = dict(zip(map(id, perturbation.weights), perturbation.before, strict=True))
    assert len(before) == len(weights) > 5
    for name, value in student.state_dict().items():
        if name in weights:
            step = 0.05 * start[name].norm() * gradients[name] / gradients[name].norm()
            torch.testing.assert_close(value, start[name] + step)
            assert not torch.equal(value, start[name])
            assert torch.equal(before[id(student.get_parameter(name))], start[name])
        else:
            assert torch.equal(value, start[name]), "biases, scales and statistics stay"
    assert loss_of(state, recipe, images, targets) > 1.01 * plain


def test_a_step_descends_by_the_gradient_at_the_perturbed_weights(device: torch.device) -> None:
    state, recipe, images, targets = prepared(device, momentum=0.0, weight_decay=0.0, nesterov=False)
    student, start = state.student, values(state.student)
    perturbed(student, lambda: loss_of(state, recipe, images, targets))
    there = loss_of(state, recipe, images, targets)
    parameters = dict(student.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(there, list(parameters.values())), strict=True))
    statistics = values(student)
    student.load_state_dict(start)

    loss = descend(state, recipe, images, targets)
    torch.testing.assert_close(loss, there.detach())
    for name, value in student.state_dict().items():
        expected = start[name] - 0.05 * gradients[name] if name in gradients else statistics[name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    moved = [value for name, value in student.state_dict().items() if "num_batches" in name]
    assert all(int(value) == len(recipe.method.forwards) for value in moved), "the perturbing forward leaves no trace"


def test_a_perturbation_waits_for_its_epoch(device: torch.device) -> None:
    results = []
    for fields in (dict(awp_gamma=0.05, awp_from=3), {}):
        state, recipe = make(device, **fields)
        state.start_epoch(recipe, 2, 7)
        train_step(state, recipe, *batch(device))
        results.append(values(state.student))
    same(*results)
    state, recipe = make(device, awp_gamma=0.05, awp_from=3)
    state.start_epoch(recipe, 3, 7)
    train_step(state, recipe, *batch(device))
    assert any(not torch.equal(value, results[0][name]) for name, value in values(state.student).items())


@pytest.mark.usefixtures("values_unseen")
def test_what_moves_many_tensors_takes_few_operators(device: torch.device) -> None:
    """A dozen at most, however many layers there are: an operator of many tensors is a launch or two on a GPU."""
    state, _ = make(device, average="ema", awp_gamma=0.05)
    student, average, perturbation = state.student, state.average, state.perturbation
    assert average is not None and perturbation is not None and state.twin is not None
    for weight in student.parameters():
        weight.grad = torch.ones_like(weight)
    gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
    ready = [torch.ones_like(weight) for weight in perturbation.weights]
    zero = torch.zeros((), device=device)
    assert operators(state.twin.refresh) == ["fold_norms_", "scale_rows_", "_foreach_copy_"]
    assert operators(lambda: average.follow(student)) == ["follow_", "_foreach_copy_", "add_"]
    assert operators(lambda: state.guard.look(zero, gradients, state.noise_seed, state.loss_sum, 3)) == [
        "_foreach_norm", "stack", "guard_",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *_: ready)
        moved = operators(lambda: perturbation.move(lambda: zero))
    assert moved == ["_foreach_copy_"] * 5 + ["_foreach_norm", "stack", "perturb_"]
    assert operators(lambda: perturbation.put_back(0.1, state.scaler)) == [
        "_foreach_sub", "_foreach_mul_", "_foreach_add_", "_foreach_copy_",
    ]  # fmt: skip


def operators(work: Callable[[], object]) -> list[str]:
    """The operators that `work` calls, but for views."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        work()
    return [name for name in seen if name not in ("detach", "alias", "split")]


@pytest.mark.parametrize("decay", ["own", "perturbed"])
def test_the_decay_of_perturbed_weights_is_added_to_their_gradients(decay: str, device: torch.device) -> None:
    student = nn.Linear(3, 2).to(device)
    perturbation, start = Perturbation(student), student.weight.detach().clone()
    perturbation.gamma.fill_(0.1)
    gradient = torch.randn(2, 3, device=device)
    perturbation.move(lambda: (student.weight * gradient).sum())
    there = student.weight.detach().clone()
    student.weight.grad = gradient.clone()
    rate = 0.3 if decay == "perturbed" else 0.0
    perturbation.put_back(rate, torch.amp.GradScaler(device.type, enabled=False))
    assert torch.equal(student.weight, start) and not torch.equal(there, start)
    assert torch.equal(student.weight.grad, gradient + rate * (there - start))


def test_a_run_with_awp_and_a_mean_of_its_weights_is_evaluated(tmp_path: Path) -> None:
    options = ["--awp-gamma", "0.005", "--awp-from", "2", "--average", "swa", "--average-from", "2"]
    assert (
        run(["train", "trades:digits_student", "--out", str(tmp_path / "run"), "--epochs", "2", *SHORT, *options]) == 0
    )
    assert run(["evaluate", str(tmp_path / "run"), "--attacks", "clean", "--limit", "20"]) == 0
    assert RunFolder(tmp_path / "run").read_config()["recipe"]["awp_gamma"] == 0.005
