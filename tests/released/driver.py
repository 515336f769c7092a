"""A short training run in float64, by the engine itself, with all that another program needs to repeat it."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine import Recipe, State
from retemper.engine.catalogue import find_setting
from retemper.engine.checkpoints.header import read_header
from retemper.engine.run import networks, steps, train
from retemper.engine.run.job import Job
from retemper.kernels import random_start_
from retemper.loaders import Split, load_split

CPU = torch.device("cpu")
SHORT: dict[str, Any] = dict(
    dataset="digits",
    image_size=None,
    loader="resident",
    images_per_class=16,
    batch_size=8,
    epochs=2,
    lr_drops=(1,),
    attack_steps=3,
    select_from=1,
    select_always_from=1,
    teacher_ahead=0,
    teacher_table="off",
    fold=False,
    channels_last=False,
    precision="fp32",
    cpu_threads=1,
)


class Small(nn.Module):
    """Two convolutions with batch norm, and a linear layer, of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 16, 10)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 1, 8, 8) images to (B, 10) logits."""
        x = torch.relu(self.bn1(self.conv1(image)))
        return self.linear(torch.relu(self.bn2(self.conv2(x))).flatten(1))


def small(seed: int) -> Small:
    """Return a small network whose weights and statistics are drawn from `seed`."""
    torch.manual_seed(seed)
    network = Small()
    for norm in (network.bn1, network.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        nn.init.normal_(norm.running_mean, std=0.1)  # pyright: ignore[reportArgumentType]
        nn.init.uniform_(norm.running_var, 0.5, 1.5)  # pyright: ignore[reportArgumentType]
    return network


PASSES = (3, 6, 3)  # over the digits: the student, the robust teacher and the clean one, which so disagree


def trained(seed: int) -> nn.Module:
    """Return a small network that knows the digits, so that the attack takes some steps to turn an answer."""
    return deepcopy(_trained(seed))


@cache
def _trained(seed: int) -> nn.Module:
    network, split = small(seed).train(), load_split("digits", "train")
    image, label = torch.from_numpy(split.images).movedim(-1, 1).double() / 255, torch.from_numpy(split.labels)
    adam = torch.optim.Adam(network.parameters(), lr=0.01)
    for chosen in torch.arange(len(label)).repeat(PASSES[seed]).split(64):
        adam.zero_grad()
        F.cross_entropy(network(image[chosen]), label[chosen]).backward()
        adam.step()
    adam.zero_grad()
    return network


@dataclass
class Batch:
    """A batch as the step is given it: (B, 1, 8, 8) float64 in [0, 1], (B,) int64, and the seed of its noise, (1,)."""

    image: Tensor
    label: Tensor
    seed: Tensor


@dataclass
class Run:
    """A run that has ended, and what it began with.

    Attributes:
        student0: the student as it was before the first step, in training mode.
        teacher, clean_teacher: frozen, in eval mode; None where the method has none.
        batches: by epoch.
        lr: the learning rate of each step.
        held, judged: the images that are held out of training, and those that choose the epoch.
        class_state: by epoch; the first is that of the first epoch, the last what the last epoch has led to.
        student, kept: the weights and statistics in the end, of the student and of what is kept.
        best_epoch: the epoch whose weights are kept as the best, from 1.
    """

    recipe: Recipe
    student0: nn.Module
    teacher: nn.Module | None
    clean_teacher: nn.Module | None
    batches: list[list[Batch]] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    held: tuple[Tensor, Tensor] | None = None
    judged: tuple[Tensor, Tensor] | None = None
    class_state: list[dict[str, Tensor]] = field(default_factory=list)
    student: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0

    def start(self, image: Tensor, eps: float | Tensor, seed: Tensor, kind: str, clip: bool) -> Tensor:
        """Return the random start that the run's attack draws around `image`, of a kind of `random_start_`."""
        eps = eps if isinstance(eps, Tensor) else float(eps)
        return random_start_(torch.empty_like(image), image, eps, noise=kind, seed=seed, clip=clip)


def free_run(
    name: str,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str = "released",
    make: Callable[[int], nn.Module] = small,
    **options: Any,
) -> Run:
    """Train METHOD:SETTING for two epochs of twenty steps on digits, with small networks in float64.

    Args:
        make: makes the student, the teacher and the clean teacher of 0, 1 and 2.
        options: what the recipe has otherwise than the setting, its variant and `SHORT` say.
    """
    recipe = find_setting(name)[2].recipe
    recipe = recipe.as_variant(variant) if variant != recipe.method.variant else recipe
    short = SHORT | {"holdout_per_class": min(recipe.selection.holdout_per_class, 4)}
    recipe = recipe.replace(**short | options)
    own = recipe.networks
    run = Run(
        recipe=recipe,
        student0=make(0).train(),
        teacher=make(1).eval().requires_grad_(False) if own.teacher_model else None,
        clean_teacher=make(2).eval().requires_grad_(False) if own.clean_teacher_model else None,
    )
    states = _watch(run, monkeypatch)
    method, _, setting = name.partition(":")
    job = Job(method=method, setting=setting, recipe=recipe, out=out / "run", cache=out / "cache", device=CPU)
    train.train(job)
    (state,) = states
    run.class_state.append({key: value.clone() for key, value in state.class_state.items()})
    run.student = {key: value.clone() for key, value in state.student.state_dict().items()}
    run.kept = {key: value.clone() for key, value in state.kept.state_dict().items()}
    run.best_epoch = int(read_header(out / "run" / "best.safetensors")["epoch"])
    return run


def _watch(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """Give the engine the run's networks and images in float64, and write down what it does with them."""
    states: list[State] = []
    begin, step, images, load = train.begin_state, steps.train_step, steps.clean_images, train.load_data
    as_float = train.judge.__globals__["attacked_batches"].__globals__["as_float"]
    start_epoch = State.start_epoch

    def built(*_: Any, **__: Any) -> nn.Module:
        return deepcopy(run.student0)

    def teacher(loader: Any, model: str | None, *_: Any, whose: str = "the teacher", **__: Any) -> Any:
        return (None if model is None else run.clean_teacher if whose == networks.CLEAN else run.teacher), None

    def begun(*arguments: Any, **options: Any) -> Any:
        found = begin(*arguments, **options)
        states.append(found[0])
        run.student0 = deepcopy(found[0].student).train()  # with a layer that normalises, where it has one
        return found

    def loaded(*arguments: Any, **options: Any) -> Any:
        data = load(*arguments, **options)
        run.held, run.judged = _images(data.held), _images(data.judged)
        return data

    def started(state: State, recipe: Recipe, epoch: int, noise_seed: int) -> None:
        start_epoch(state, recipe, epoch, noise_seed)
        run.batches.append([])
        run.class_state.append({key: value.clone() for key, value in state.class_state.items()})

    def stepped(state: State, recipe: Recipe, image: Tensor, label: Tensor, *rest: Tensor | None) -> Tensor:
        run.batches[-1].append(Batch(image.clone(), label.clone(), state.noise_seed.clone()))
        run.lr.append(float(state.optimizer.param_groups[0]["lr"]))
        return step(state, recipe, image, label, *rest)

    monkeypatch.setattr(networks, "build_student", built)
    for name, stand_in in (("teacher", teacher), ("start", _none), ("probe", _none), ("check_teachers", _none)):
        monkeypatch.setattr(networks.NetworkLoader, name, stand_in)
    monkeypatch.setattr(train, "begin_state", begun)
    monkeypatch.setattr(train, "load_data", loaded)
    monkeypatch.setattr(State, "start_epoch", started)
    monkeypatch.setattr(steps, "train_step", stepped)
    monkeypatch.setattr(steps, "clean_images", lambda *arguments: images(*arguments).double())
    monkeypatch.setattr("retemper.engine.predict.as_float", lambda *arguments: as_float(*arguments).double())
    return states


def _none(*_: Any, **__: Any) -> None:
    return None


def _images(split: Split | None) -> tuple[Tensor, Tensor] | None:
    """Return the images of a split as the engine evaluates them, (N, 1, 8, 8) float64, and their labels."""
    if split is None:
        return None
    image = torch.from_numpy(split.images).movedim(-1, 1).float().div(255).double()
    return image, torch.from_numpy(split.labels)


def assert_same(
    run: Run,
    student: nn.Module | Mapping[str, Tensor],
    *,
    kept: nn.Module | Mapping[str, Tensor] | None = None,
    class_state: Mapping[str, Tensor] | None = None,
    lr: Sequence[float] | None = None,
    within: float = 1e-10,
) -> float:
    """Hold the run to what a reference has come to, and return the largest difference.

    Args:
        student, kept: the networks in the end, their weights and running statistics.
        class_state: the state after the last epoch, by the run's names.
        lr: the learning rate of each step.
    """
    largest = _difference(run.student, student, within)
    if kept is not None:
        largest = max(largest, _difference(run.kept, kept, within))
    if class_state is not None:
        assert class_state.keys() == run.class_state[-1].keys()
        largest = max(largest, _difference(run.class_state[-1], class_state, within))
    if lr is not None:
        assert run.lr == pytest.approx(list(lr), rel=within)
    return largest


def _difference(ours: Mapping[str, Tensor], theirs: nn.Module | Mapping[str, Tensor], within: float) -> float:
    """Return the largest difference of two tables of tensors, which must be below `within`."""
    theirs = theirs.state_dict() if isinstance(theirs, nn.Module) else theirs
    assert theirs.keys() == ours.keys()
    apart = {}
    for name, value in ours.items():
        assert value.shape == theirs[name].shape, name
        assert value.is_floating_point() or torch.equal(value, theirs[name]), f"{name}: {value}, not {theirs[name]}"
        apart[name] = float((value.double() - theirs[name].double()).abs().amax())
    assert max(apart.values()) <= within, {name: found for name, found in apart.items() if found > within}
    return max(apart.values())
