"""The training step, move by move: the authors' script, then each thing that makes ours faster, then all but one.

One ABSLD step (variant `released`, which is what the script computes): the teacher on the clean images, PGD-10 on the
student in eval mode, two forwards in train mode, one backward, SGD. Every row starts from the same weights, images and
noise (the script from that of the row's memory format), and is timed only if its attack stays in the ball, reaches the
script's KL divergence within 0.1 %, measured in float64 by one network, and adds what the script's adds within 1 %; a
step in a CUDA graph must also have the eager step's losses. The networks are random, their sizes real: no time depends
on what they have learnt.

FLOP are counted by torch on the two networks: forward of the teacher, 20 of the student for the attack (an input
gradient costs a forward), 6 for the training. Rows that do not ask the teacher in each step have less to do than the
table's work; their TFLOP/s count what they do.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from retemper.engine.bench.authors_step import EPS, CarefulStep, ReleasedStep
from retemper.engine.bench.machine import Work
from retemper.engine.bench.plan import Plan, Request
from retemper.engine.bench.timing import Contestant, Race
from retemper.engine.catalogue import find_setting
from retemper.engine.device import in_precision, tuned_convolutions
from retemper.engine.models import channels_last, create_model
from retemper.engine.recipe import Recipe
from retemper.engine.speed.capture import captured
from retemper.engine.state import State
from retemper.engine.step import attack, descend, observe, train_step
from retemper.kernels import random_start_

STUDENTS = {"tiny_resnet": "tiny_resnet_wide", "mobilenet_v2": "wrn34_10", "resnet18": "wrn34_10"}  # their teachers
CPU_BATCH = {"tiny_resnet": 128, "mobilenet_v2": 8, "resnet18": 4}
INPUTS = 8  # batches that take turns
AHEAD = 8  # batches that the teacher is asked about at once
REACTION = 50  # times the student's last layer, since an untrained network hardly reacts to its input
AGREEMENT = 1e-3  # of the KL reached, and ten times as much of what the attack added to it
LOSS_AGREEMENT = {"fp32": 1e-2, "bf16": 5e-2}  # of the first loss: batch statistics of few images enlarge rounding

BARE: dict[str, Any] = dict(
    precision="fp32",
    channels_last=False,
    fold=False,
    epilogue="plain",
    capture="off",
    teacher_ahead=0,
    teacher_table="off",
    fused_sgd=False,
)


@dataclass(frozen=True)
class Rung:
    """A row of the ladder: what it adds to the one before.

    Attributes:
        exactness: of the addition.
        gpu: why it is left out on a CPU; None where it is not.
        logits: who gives the teacher's logits: the "step", the teacher for AHEAD batches at once ("ahead"), or a
            "table".
    """

    name: str
    changes: dict[str, Any]
    exactness: str
    gpu: str | None = None
    logits: str = "step"


NO_GRAPH = "CUDA graphs need a GPU"
LADDER = (
    Rung("vectorised", {}, "rounding"),
    Rung("+ channels-last", dict(channels_last=True), "rounding"),
    Rung("+ bf16", dict(precision="bf16"), "lower precision", "bf16 is slower than fp32 on a CPU without matrix units"),
    Rung("+ fused SGD", dict(fused_sgd=True), "rounding"),
    Rung("+ folded batch norm", dict(fold=True), "rounding"),
    Rung("+ fused epilogues", dict(epilogue="fused"), "rounding", "on a CPU convolutions add their bias themselves"),
    Rung("+ CUDA graph", dict(capture="on"), "bitwise", NO_GRAPH),
    Rung(f"+ teacher for {AHEAD} batches at once", {}, "rounding", logits="ahead"),
    Rung("+ table, every view known", {}, "rounding", logits="table"),
)
OTHERWISE = (  # the whole ladder but for one thing, asking the teacher in each step
    Rung("all but channels-last", dict(channels_last=False), "rounding"),
    Rung("all but bf16", dict(precision="fp32"), "rounding", "not used on a CPU"),
    Rung("all but fused SGD", dict(fused_sgd=False), "rounding"),
    Rung("all but folded batch norm", dict(fold=False, epilogue="plain"), "rounding"),
    Rung("all but fused epilogues", dict(epilogue="plain"), "rounding", "not used on a CPU"),
    Rung("all but the graph", dict(capture="off"), "bitwise", "not used on a CPU"),
    Rung("twin compiled instead of fused", dict(epilogue="compiled"), "rounding"),
)


def plan(request: Request) -> Iterator[Plan]:
    """Per student and batch: the ladder (with convolutions in TF32 on a GPU, as the script has them), all but one, and
    the phases of the whole; on a GPU also the ladder in strict fp32."""
    for student in ("tiny_resnet", "mobilenet_v2", "resnet18"):
        usual = (128, 1024) if request.on_gpu else (CPU_BATCH[student],)
        for batch in request.batches(usual, 2):
            for name, build in (("ladder", ladder), ("all but one", otherwise), ("phases", phases)):
                title = f"{name}, {student} batch {batch}"
                yield Plan(title, partial(build, title, request, student, batch))
            if request.on_gpu and batch == 128:
                title = f"ladder in strict fp32, {student} batch {batch}"
                yield Plan(title, partial(ladder, title, request, student, batch, strict=True))


class Scene:
    """What all rows of a race share: two networks, INPUTS batches, one noise, and what the script reaches with them."""

    def __init__(self, request: Request, student: str, batch: int) -> None:
        torch.manual_seed(0)
        self.request, self.name, self.batch = request, student, batch
        self.device, size, channels = request.device, *((8, 1) if student == "tiny_resnet" else (32, 3))
        self.student = create_model(student, 10).to(self.device)
        self.teacher = create_model(STUDENTS[student], 10).to(self.device).eval().requires_grad_(False)
        with torch.no_grad():
            for network, times in ((self.student, REACTION), (self.teacher, 10)):
                last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
                last.weight *= times  # and soft labels that differ from class to class
        shape = (batch, channels, size, size)
        self.batches = [
            (torch.rand(shape, device=self.device), torch.randint(10, (batch,), device=self.device))
            for _ in range(INPUTS)
        ]
        self.references: dict[bool, tuple[float, float]] = {}
        self.temperatures = [0.5 + 0.15 * k for k in range(10)]
        self.recipe: Recipe = replace(
            find_setting("absld:cifar10_resnet18")[2].recipe, student=student, variant="released", **BARE
        )

    @property
    def first(self) -> tuple[Tensor, Tensor]:
        return self.batches[0]

    def noise(self, recipe: Recipe) -> Tensor:
        """The random start of the first batch, as our seed 0 draws it in the recipe's memory format."""
        zeros = torch.zeros_like(self.layout(self.first[0], recipe))
        seed = torch.zeros(1, dtype=torch.int64, device=self.device)
        return random_start_(zeros.clone(), zeros, EPS, noise="normal", seed=seed, clip=False).contiguous()

    def released(self, deterministic: bool = True) -> ReleasedStep:
        student, t = copy.deepcopy(self.student), self.temperatures
        return ReleasedStep(student, self.teacher, t, t, deterministic)

    @cached_property
    def judge(self) -> nn.Module:
        return copy.deepcopy(self.student).double().eval()

    @cached_property
    def target(self) -> Tensor:
        """The soft labels of the first batch, float64."""
        clean, label = self.first
        temperature = torch.tensor(self.temperatures, device=self.device, dtype=torch.float64)
        with torch.no_grad():
            return (self.teacher(clean).double() / temperature[label][:, None] ** 2).softmax(1)

    @torch.no_grad()
    def reached(self, adv: Tensor) -> float:
        """The KL divergence at `adv`, summed over the first batch."""
        parts = zip(adv.double().split(64), self.target.split(64), strict=True)
        return sum(float(F.kl_div(self.judge(x).log_softmax(1), y, reduction="sum")) for x, y in parts)

    def reference(self, recipe: Recipe) -> tuple[float, float]:
        """The KL that the script's attack reaches on the first batch from the recipe's start, and its loss then."""
        if recipe.channels_last not in self.references:
            self.references[recipe.channels_last] = self._reference(self.noise(recipe))
        return self.references[recipe.channels_last]

    def _reference(self, noise: Tensor) -> tuple[float, float]:
        clean, label = self.first
        released = self.released()
        target, _ = released.targets(clean, label)
        adv = released.attack(clean, target, noise)
        released.student.train()
        target = self.target.float()
        with torch.no_grad():
            kl = [F.kl_div(released.student(x).log_softmax(1), target, reduction="batchmean") for x in (adv, clean)]
        return self.reached(adv), float(5 / 6 * kl[0] + 1 / 6 * kl[1]) / target.shape[1]

    def misses(self, adv: Tensor, recipe: Recipe) -> str | None:
        """What is wrong with the images that an attack made of the first batch, if anything."""
        clean, kl, expected = self.first[0], self.reached(adv), self.reference(recipe)[0]
        if float((adv - clean).abs().max()) > EPS + 1e-6 or float(adv.min()) < 0 or float(adv.max()) > 1:
            return "its images leave the ball or the range of pixels"
        start = self.reached(clean)
        if abs((kl - start) / (expected - start) - 1) > 10 * AGREEMENT:
            return f"its attack adds {kl - start:.6g} to the KL, the script's {expected - start:.6g}"
        return (
            None if abs(kl / expected - 1) <= AGREEMENT else f"its attack reaches {kl:.6g}, the script's {expected:.6g}"
        )

    def misses_loss(self, loss: Any, recipe: Recipe) -> str | None:
        """What is wrong with the first loss."""
        expected = self.reference(recipe)[1]
        precision = "bf16" if recipe.precision == "bf16" else "fp32"
        close = abs(float(loss) / expected - 1) <= LOSS_AGREEMENT[precision]
        return None if close else f"its first loss is {float(loss):.6g}, the script's {expected:.6g}"

    def state(self, recipe: Recipe) -> State:
        teacher = copy.deepcopy(self.teacher)
        teacher = channels_last(teacher, self.device) if recipe.channels_last else teacher
        state = State.begin(recipe, copy.deepcopy(self.student), teacher, 10, self.device)
        temperature_K = torch.tensor(self.temperatures)
        state.move_classes({"temperature_adv": temperature_K, "temperature_clean": temperature_K})
        return state

    def layout(self, images: Tensor, recipe: Recipe) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last if recipe.channels_last else torch.contiguous_format)

    def flop(self, teacher: bool) -> float:
        return self.batch * (26 * flop(self.student, self.first[0]) + teacher * flop(self.teacher, self.first[0]))

    def work(self, teacher: bool = True) -> Work:
        return Work(images=self.batch, flop=self.flop(teacher))


def flop(model: nn.Module, images: Tensor) -> float:
    """Of one forward on one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(images[:1])
    return counter.get_total_flops()


def ladder(title: str, request: Request, student: str, batch: int, strict: bool = False) -> Race:
    """The script, what a careful user writes, and ours, each row with one thing more."""
    with in_precision("fp32" if strict else "tf32"):
        return _ladder(title, Scene(request, student, batch), strict)


def _ladder(title: str, scene: Scene, strict: bool) -> Race:
    request = scene.request
    rows = peers(scene)
    recipe = scene.recipe
    for rung in LADDER:
        if strict and rung.changes.get("precision") == "bf16":
            continue
        if rung.gpu is None or request.on_gpu:
            recipe = replace(recipe, **rung.changes)
        rows.append(contestant(scene, recipe, rung))
    return _race(title, scene, rows, "fp32" if strict else "tf32")


def otherwise(title: str, request: Request, student: str, batch: int) -> Race:
    """The whole, and the whole with one thing taken away or done otherwise."""
    with in_precision("tf32"):
        return _otherwise(title, Scene(request, student, batch))


def _otherwise(title: str, scene: Scene) -> Race:
    request = scene.request
    recipe = whole(scene)
    rows = [contestant(scene, recipe, Rung("all", {}, "rounding"))]
    for rung in OTHERWISE:
        possible = rung.gpu is None or request.on_gpu
        rows.append(contestant(scene, replace(recipe, **rung.changes) if possible else recipe, rung))
    return _race(title, scene, rows, "tf32")


def whole(scene: Scene, captured: bool = True) -> Recipe:
    """The recipe at the top of the ladder, asking the teacher in each step."""
    recipe = scene.recipe
    for rung in LADDER:
        if (rung.gpu is None or scene.request.on_gpu) and (captured or "capture" not in rung.changes):
            recipe = replace(recipe, **rung.changes)
    return recipe


def peers(scene: Scene) -> list[Contestant]:
    """The script, the baseline of every ratio; and careful PyTorch."""
    turns = [cycle(scene.batches) for _ in range(4)]
    released, free = scene.released(), scene.released(deterministic=False)
    careful = CarefulStep(copy.deepcopy(scene.student), scene.teacher, scene.temperatures)
    rows = [Contestant(name="released script", run=lambda: released(*next(turns[0])))]
    if scene.request.on_gpu:
        rows.append(Contestant(name="released, any convolution", run=lambda: free(*next(turns[1]))))
    rows.append(Contestant(name="careful PyTorch", run=tuned(lambda: careful(*next(turns[2])))))
    name = "careful PyTorch, torch.compile"
    if scene.request.quick or not scene.request.on_gpu:
        reason = "left out by --quick" if scene.request.quick else "takes minutes to compile on a CPU: left out"
        return [*rows, Contestant(name=name, run=None, reason=reason)]
    fast = CarefulStep(copy.deepcopy(scene.student), scene.teacher, scene.temperatures, compile=True)
    return [*rows, Contestant(name=name, run=tuned(lambda: fast(*next(turns[3]))), compiled=True)]


def contestant(scene: Scene, recipe: Recipe, rung: Rung) -> Contestant:
    """Our step under `recipe`, if its attack on the first batch is as strong as the script's."""
    reason = rung.gpu if rung.gpu and not scene.request.on_gpu else None
    if recipe.epilogue == "compiled" and (scene.request.quick or not scene.request.on_gpu):
        reason = "compiling is left out by --quick and on a CPU"
    if reason is None:
        missed = scene.misses(attacked_images(scene, recipe), recipe) or replays_wrongly(scene, recipe)
        reason = f"disagrees: {missed}" if missed else None
    if reason is not None:
        return Contestant(name=rung.name, run=None, exactness=rung.exactness, reason=reason)
    return Contestant(
        name=rung.name,
        run=tuned(run(scene, recipe, rung.logits)),
        exactness=rung.exactness,
        check=None if rung.logits == "ahead" else partial(scene.misses_loss, recipe=recipe),
        calls=AHEAD if rung.logits == "ahead" else 1,
        work=scene.work(teacher=False) if rung.logits == "table" else None,
    )


def tuned(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as training runs it: with the fastest convolutions that cuDNN finds for its shapes."""

    def call() -> Any:
        with tuned_convolutions():
            return run()

    return call


def replays_wrongly(scene: Scene, recipe: Recipe) -> str | None:
    """What is wrong with the step from a CUDA graph, if it is one: its losses are those of the eager step."""
    if not recipe.captures_on(scene.device):
        return None
    losses = []
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        for one in (replace(recipe, capture="off"), recipe):
            step = run(scene, one, "step")
            losses.append([float(step()) for _ in range(6)])
    finally:
        torch.backends.cudnn.deterministic = before
    same = all(abs(one / other - 1) <= AGREEMENT for one, other in zip(*losses, strict=True))
    return None if same else f"replayed, its losses are {losses[1]}, eager {losses[0]}"


def attacked_images(scene: Scene, recipe: Recipe) -> Tensor:
    """What our attack makes of the first batch."""
    state, (clean, label) = scene.state(recipe), scene.first
    clean = scene.layout(clean, recipe)
    attacked = state.attacked()
    return attack(state, recipe, attacked, clean, observe(state, recipe, attacked, clean, label, None)).clone()


def run(scene: Scene, recipe: Recipe, logits: str) -> Callable[[], Any]:
    """One step on the next batch; with logits "ahead", AHEAD steps."""
    state = scene.state(recipe)

    def step(clean: Tensor, label: Tensor, teacher_BK: Tensor | None = None) -> Tensor:
        return train_step(state, recipe, clean, label, teacher_BK)

    step = captured(step) if recipe.captures_on(scene.device) else step
    batches = [(scene.layout(clean, recipe), label) for clean, label in scene.batches]
    if logits == "step":
        turns = cycle(batches)
        return lambda: step(*next(turns))

    @torch.no_grad()
    def ask(images: list[Tensor]) -> list[Tensor]:
        assert state.teacher is not None
        together = scene.layout(torch.cat(images), recipe)
        if scene.device.type == "cpu":  # where one large batch is no faster than its parts
            return [state.teacher(part).float() for part in images]
        with state.autocast():
            return list(state.teacher(together).float().split(scene.batch))

    if logits == "ahead":

        def ahead() -> None:
            for (clean, label), teacher_BK in zip(batches, ask([clean for clean, _ in batches]), strict=True):
                step(clean, label, teacher_BK)

        return ahead
    known = cycle([(*given, row) for given, row in zip(batches, ask([clean for clean, _ in batches]), strict=True)])
    return lambda: step(*next(known))


def phases(title: str, request: Request, student: str, batch: int) -> Race:
    """The parts of the whole step, each alone and eager: which one takes the time."""
    scene = Scene(request, student, batch)
    recipe = whole(scene, captured=False)
    state, (clean, label) = scene.state(recipe), scene.first
    clean = scene.layout(clean, recipe)
    attacked = state.attacked()
    targets = observe(state, recipe, attacked, clean, label, None)
    images = {"adv": attack(state, recipe, attacked, clean, targets), "clean": clean}

    def forwards_and_backward() -> None:
        state.student.train()
        with state.autocast():
            logits = {name: state.student(image) for name, image in images.items()}
            loss = recipe.loss(logits, targets)
        loss.backward()
        state.optimizer.zero_grad(set_to_none=True)

    parts: dict[str, Callable[[], Any]] = {
        "whole step": lambda: train_step(state, recipe, clean, label),
        "teacher": lambda: observe(state, recipe, attacked, clean, label, None),
        "folding": lambda: state.attacked(),
        "attack": lambda: attack(state, recipe, attacked, clean, targets),
        "two forwards, backward": forwards_and_backward,
        "the same with SGD and class sums": lambda: descend(state, recipe, images, targets),
    }
    rows = [Contestant(name=name, run=tuned(part), exactness="rounding") for name, part in parts.items()]
    return replace(_race(title, scene, rows, "tf32"), work=Work())


def _race(title: str, scene: Scene, rows: list[Contestant], precision: str) -> Race:
    """Convolutions in `precision`; the bound is that of bf16 where a row uses it."""
    fast = scene.request.on_gpu and precision == "tf32"
    slow = scene.name != "tiny_resnet" and not scene.request.on_gpu
    return Race(
        name=title,
        contestants=rows,
        work=scene.work(),
        precision=precision,
        bound="bf16" if fast else "fp32",
        rounds=5 if slow else None,
        warm_up=1 if slow else 3,
    )
