"""PGD: ours, a loop as anyone would write it, torchattacks, and foolbox, on the same network, images and objective.

Every contestant starts from the clean images, because not every library takes a given start, and gets a copy of the
network in eval mode, channels-last, whose parameters ask for gradients, as those of a student in training do. Before
anything is timed its examples must lie in the ball and in the range of pixels, and reach a loss within 0.1% of the
plain loop's. The bound is that of the arithmetic alone: a forward and a data gradient a step.

"ce" is the cross-entropy. "kl" is the objective of adversarial distillation at a temperature of each class. The
libraries' own loss is overridden as they provide for: torchattacks takes labels that are probabilities (its loss is
torch's cross-entropy, whose gradient is then that of the KL), foolbox has `get_loss_fn` to override.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from retemper.engine.attack import pgd
from retemper.engine.bench import peers
from retemper.engine.bench.machine import Work
from retemper.engine.bench.plan import Plan, Request
from retemper.engine.bench.timing import Contestant, Race, Run, failure
from retemper.engine.device import DTYPES
from retemper.engine.losses import KlObjective, Objective, cross_entropy_objective
from retemper.engine.models import channels_last, create_model
from retemper.engine.speed.fold import Folded

EPS, STEP, CLASSES = 8 / 255, 2 / 255, 10
LOSS_TOLERANCE = 1e-3
SHAPES = {"tiny_resnet": (1, 8, 8), "mobilenet_v2": (3, 32, 32), "resnet18": (3, 32, 32)}
CPU_BATCH = {"tiny_resnet": 128, "mobilenet_v2": 4, "resnet18": 2}
CPU_ROUNDS = {"tiny_resnet": 20, "mobilenet_v2": 5, "resnet18": 5}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is attacked. `teacher_BK` is there for the KL, else the objective is the cross-entropy."""

    model: "InPrecision"
    clean_BCHW: Tensor
    label_B: Tensor
    steps: int
    teacher_BK: Tensor | None = None
    temperature_K: Tensor

    @property
    def objective(self) -> Objective:
        """What is raised, summed over the batch, as ours computes it."""
        if self.teacher_BK is None:
            return cross_entropy_objective(self.label_B)
        return KlObjective(self.teacher_BK, self.label_B, self.temperature_K)

    def plain_objective(self, logits_BK: Tensor) -> Tensor:
        """The same in plain PyTorch."""
        if self.teacher_BK is None:
            return F.cross_entropy(logits_BK, self.label_B, reduction="sum")
        return F.kl_div(logits_BK.log_softmax(1), self.target, reduction="sum")

    @property
    def target(self) -> Tensor:
        """What a cross-entropy is taken against: labels (B,), or the teacher's tempered probabilities (B, K)."""
        if self.teacher_BK is None:
            return self.label_B
        return (self.teacher_BK / self.temperature_K[self.label_B][:, None]).softmax(1)

    def own_model(self) -> nn.Module:
        """A copy, so that no contestant finds another's gradients."""
        return copy.deepcopy(self.model)


def plan(request: Request) -> Iterator[Plan]:
    """Networks x precisions x objectives x steps; on a GPU the KL and full float32 at 10 steps only."""
    precisions = ("tf32", "bf16", "fp32") if request.on_gpu else ("fp32",)
    for name in ("tiny_resnet",) if request.quick else SHAPES:
        (batch,) = request.batches((128 if request.on_gpu else CPU_BATCH[name],), 8)
        for precision in precisions:
            for objective, steps in (("ce", 10), ("ce", 20), ("kl", 10)):
                if precision == "fp32" and request.on_gpu and (objective, steps) != ("ce", 10):
                    continue
                title = f"{name} {objective} PGD-{steps} {precision} batch {batch}"
                yield Plan(title, partial(race, title, request, name, precision, objective, steps, batch))


def race(title: str, request: Request, name: str, precision: str, objective: str, steps: int, batch: int) -> Race:
    torch.manual_seed(0)
    clean = torch.rand(batch, *SHAPES[name], device=request.device).to(memory_format=torch.channels_last)
    model = settled(name, request.device, clean, precision)
    with torch.no_grad():
        label, other = model(clean).argmax(1), settled(name, request.device, clean, precision)(clean)
    problem = Problem(
        model=model,
        clean_BCHW=clean,
        label_B=label,
        steps=steps,
        teacher_BK=3 * other if objective == "kl" else None,
        temperature_K=torch.linspace(0.5, 5, CLASSES, device=request.device),
    )
    check = examples_check(problem)
    contestants = [
        Contestant(name=name, run=run, reason=reason, exactness=exactness, check=check)
        for name, exactness, (run, reason) in (
            (name, exactness, make(problem)) for name, exactness, make in CONTESTANTS
        )
    ]
    flop = steps * flop_of_a_step(problem)
    return Race(
        name=title,
        contestants=contestants,
        work=Work(images=batch, flop=flop),
        precision=precision,
        rounds=None if request.on_gpu else CPU_ROUNDS[name],
        warm_up=1,
    )


class InPrecision(nn.Module):
    """A network under autocast, for whoever calls it; logits in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K)."""
        mixed = self.dtype != torch.float32
        with torch.autocast(image_BCHW.device.type, dtype=self.dtype) if mixed else nullcontext():
            return self.model(image_BCHW).float()


def settled(name: str, device: torch.device, clean_BCHW: Tensor, precision: str) -> InPrecision:
    """A fresh network in eval mode; its batch norm has seen the images, or its logits would mean nothing."""
    model = InPrecision(channels_last(create_model(name, CLASSES), device), DTYPES[precision]).train()
    with torch.no_grad():
        for _ in range(20):
            model(clean_BCHW)
    model.eval()
    return model


def examples_check(problem: Problem) -> Callable[[Any], str | None]:
    """Whether examples keep to the rules and are as strong as those of the plain loop, in float32."""
    expected = reached_loss(problem, plain_loop(problem)())

    def check(adv_BCHW: Any) -> str | None:
        off = float((adv_BCHW.double() - problem.clean_BCHW.double()).abs().max())
        if off > EPS + 1e-6:
            return f"a pixel is {off:.6f} away from its own, {EPS:.6f} allowed"
        if float(adv_BCHW.min()) < 0 or float(adv_BCHW.max()) > 1:
            return "a pixel leaves [0, 1]"
        found = reached_loss(problem, adv_BCHW)
        if abs(found - expected) > LOSS_TOLERANCE * expected:
            return f"it reaches a loss of {found:.6g}, the plain loop {expected:.6g}"
        return None

    return check


@torch.no_grad()
def reached_loss(problem: Problem, adv_BCHW: Tensor) -> float:
    """In float32, whatever precision the examples were made in."""
    return float(problem.plain_objective(problem.model.model(adv_BCHW)))


def flop_of_a_step(problem: Problem) -> float:
    """Counted by torch in the matrix products and convolutions of one forward and data gradient."""
    model = problem.own_model().requires_grad_(False)
    adv = problem.clean_BCHW.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        problem.plain_objective(model(adv)).backward()
    return counter.get_total_flops()


# Contestants: a problem to a call that returns the examples, or the reason why there is none


def folded(problem: Problem) -> Run:
    """As training and evaluation do it: on the network's folded twin, folded anew for each attack."""
    twin = Folded(problem.model.model, problem.model.dtype, "fused" if problem.clean_BCHW.is_cuda else "plain")

    def run() -> Tensor:
        return pgd(
            twin.refresh(),
            problem.clean_BCHW,
            objective=problem.objective,
            steps=problem.steps,
            step=STEP,
            eps=EPS,
            start=None,
        )

    return run


def unfolded(problem: Problem) -> Run:
    model = problem.own_model()
    return lambda: pgd(
        model, problem.clean_BCHW, objective=problem.objective, steps=problem.steps, step=STEP, eps=EPS, start=None
    )


def plain_loop(problem: Problem) -> Run:
    model, clean = problem.own_model(), problem.clean_BCHW

    def run() -> Tensor:
        adv = clean.clone()
        for _ in range(problem.steps):
            adv.requires_grad_()
            (grad,) = torch.autograd.grad(problem.plain_objective(model(adv)), adv)
            adv = adv.detach() + STEP * grad.sign()
            adv = torch.min(torch.max(adv, clean - EPS), clean + EPS).clamp(0, 1)
        return adv

    return run


def torchattacks(problem: Problem) -> Run:
    attack = peers.torchattacks().PGD(problem.own_model(), eps=EPS, alpha=STEP, steps=problem.steps, random_start=False)
    target = problem.target
    return lambda: attack(problem.clean_BCHW, target)


def foolbox(problem: Problem) -> Run:
    library, eagerpy = peers.foolbox(), peers.eagerpy()
    target = problem.target

    class Kl(library.attacks.LinfPGD):
        def get_loss_fn(self, model: Any, labels: Any) -> Callable[[Any], Any]:
            return lambda image: eagerpy.astensor(F.kl_div(model(image).raw.log_softmax(1), target, reduction="sum"))

    kind = library.attacks.LinfPGD if problem.teacher_BK is None else Kl
    attack = kind(abs_stepsize=STEP, steps=problem.steps, random_start=False)
    device = problem.clean_BCHW.device
    model = library.PyTorchModel(problem.own_model(), bounds=(0, 1), device=device)
    criterion = library.criteria.Misclassification(problem.label_B)
    return lambda: attack(model, problem.clean_BCHW, criterion, epsilons=EPS)[1]


def library(make: Callable[[Problem], Run], *packages: str) -> Callable[[Problem], tuple[Run | None, str | None]]:
    """`make`, or why it cannot be."""

    def made(problem: Problem) -> tuple[Run | None, str | None]:
        reason = peers.missing(*packages)
        if reason:
            return None, reason
        try:
            return make(problem), None
        except Exception as error:  # a library that is broken here: the row says so, and the others go on
            return None, failure(error)

    return made


CONTESTANTS: list[tuple[str, str, Callable[[Problem], tuple[Run | None, str | None]]]] = [
    ("retemper", "rounding", library(folded)),
    ("retemper, not folded", "rounding", library(unfolded)),
    ("plain loop", "peer", library(plain_loop)),
    ("torchattacks.PGD", "peer", library(torchattacks, "torchattacks")),
    ("foolbox.LinfPGD", "peer", library(foolbox, "foolbox", "eagerpy")),
]
