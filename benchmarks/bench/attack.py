"""PGD: ours, a loop as anyone would write it, torchattacks, and foolbox, on the same network, images and objective.

One table a network, objective, number of steps and precision. `ratio` is a row's time in ours: above 1 ours is faster.
`of bound` is the time of the arithmetic alone, a forward and a data gradient a step, at this machine's matrix rate.

Every contender starts from the clean images, because not every library takes a given start, and gets a copy of the
network in eval mode, channels-last, whose parameters ask for gradients, as those of a student in training do. Before
anything is timed its examples must lie in the ball and in the range of pixels, and reach a loss within 0.1% of the
plain loop's.

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

from retemper.bench import peers
from retemper.bench.case import Call, Case, Check, Contender, PlannedCase, Request, Work
from retemper.bench.timing import failure
from retemper.engine.attack import pgd
from retemper.engine.captured_attack import CapturedAttack
from retemper.engine.device import DTYPES
from retemper.engine.losses import KlObjective, Objective, cross_entropy_objective
from retemper.engine.models import channels_last, create_model
from retemper.engine.speed.fold import Folded

EPS, STEP, CLASSES = 8 / 255, 2 / 255, 10
LOSS_TOLERANCE = 1e-3
SHAPES = {"tiny_resnet": (1, 8, 8), "mobilenet_v2": (3, 32, 32), "resnet18": (3, 32, 32)}
CPU_BATCH = {"tiny_resnet": 128, "mobilenet_v2": 4, "resnet18": 2}
NOT_CAPTURED = "retemper, not captured"  # on a CPU nothing is
CPU_ROUNDS = {"tiny_resnet": 20, "mobilenet_v2": 5, "resnet18": 5}


class InPrecision(nn.Module):
    """A network that runs under autocast, whoever calls it, and returns logits in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels to (B, K) float32 logits."""
        mixed = self.dtype != torch.float32
        with torch.autocast(image_BCHW.device.type, dtype=self.dtype) if mixed else nullcontext():
            return self.model(image_BCHW).float()


@dataclass(frozen=True, kw_only=True)
class AttackProblem:
    """The network, the images and the objective of an attack.

    Attributes:
        teacher_BK: logits that the KL is taken against; None for the cross-entropy.
    """

    model: InPrecision
    clean_BCHW: Tensor
    label_B: Tensor
    steps: int
    teacher_BK: Tensor | None = None
    temperature_K: Tensor

    @property
    def objective(self) -> Objective:
        """Return the objective that the attack raises, summed over the batch, as our library computes it."""
        if self.teacher_BK is None:
            return cross_entropy_objective(self.label_B)
        return KlObjective(self.teacher_BK, self.label_B, self.temperature_K)

    def plain_objective(self, logits_BK: Tensor) -> Tensor:
        """Compute the objective in plain PyTorch: from (B, K) logits to 0-dim, summed over the batch."""
        if self.teacher_BK is None:
            return F.cross_entropy(logits_BK, self.label_B, reduction="sum")
        return F.kl_div(logits_BK.log_softmax(1), self.target, reduction="sum")

    @property
    def target(self) -> Tensor:
        """Return the target of a cross-entropy: labels (B,), or the teacher's tempered probabilities (B, K)."""
        if self.teacher_BK is None:
            return self.label_B
        return (self.teacher_BK / self.temperature_K[self.label_B][:, None]).softmax(1)

    def own_model(self) -> nn.Module:
        """Return a copy of the network, so that no contender finds another's gradients."""
        return copy.deepcopy(self.model)

    @torch.no_grad()
    def reached(self, adv_BCHW: Tensor) -> float:
        """Return the objective on (B, C, H, W) images in float32, whatever precision they were made in."""
        return float(self.plain_objective(self.model.model(adv_BCHW)))

    def flop_of_a_step(self) -> float:
        """Return the operations of one forward and data gradient, as torch counts matrix products and convolutions."""
        model = self.own_model().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            self.plain_objective(model(self.clean_BCHW.clone().requires_grad_())).backward()
        return counter.get_total_flops()


def cases(request: Request) -> Iterator[PlannedCase]:
    """Yield a case for networks x precisions x objectives x steps; the KL, and on a GPU float32, at 10 steps only."""
    for name in ("tiny_resnet",) if request.quick else SHAPES:
        (batch,) = request.batches((128 if request.on_gpu else CPU_BATCH[name],), 8)
        for precision in ("tf32", "bf16", "fp32") if request.on_gpu else ("fp32",):
            for objective, steps in (("ce", 10), ("ce", 20), ("kl", 10)):
                if precision == "fp32" and request.on_gpu and (objective, steps) != ("ce", 10):
                    continue
                title = f"{name} {objective} PGD-{steps} {precision} batch {batch}"
                yield PlannedCase(title, partial(_case, title, request, name, precision, objective, steps, batch))


def _case(title: str, request: Request, name: str, precision: str, objective: str, steps: int, batch: int) -> Case:
    torch.manual_seed(0)
    clean = torch.rand(batch, *SHAPES[name], device=request.device).to(memory_format=torch.channels_last)
    model = settled(name, request.device, clean, precision)
    with torch.no_grad():
        label, other = model(clean).argmax(1), settled(name, request.device, clean, precision)(clean)
    problem = AttackProblem(
        model=model,
        clean_BCHW=clean,
        label_B=label,
        steps=steps,
        teacher_BK=3 * other if objective == "kl" else None,
        temperature_K=torch.linspace(0.5, 5, CLASSES, device=request.device),
    )
    check = examples_check(problem)
    return Case(
        name=title,
        contenders=[contender(problem, check, *one) for one in CONTENDERS if request.on_gpu or one[0] != NOT_CAPTURED],
        work=Work(images=batch, flop=steps * problem.flop_of_a_step()),
        precision=precision,
        rounds=None if request.on_gpu else CPU_ROUNDS[name],
        warm_up=1,
    )


def settled(name: str, device: torch.device, clean_BCHW: Tensor, precision: str) -> InPrecision:
    """Return a fresh network in eval mode; its batch norm has seen the images, or its logits would mean nothing."""
    model = InPrecision(channels_last(create_model(name, CLASSES), device), DTYPES[precision]).train()
    with torch.no_grad():
        for _ in range(20):
            model(clean_BCHW)
    model.eval()
    return model


def examples_check(problem: AttackProblem) -> Check:
    """Return a check that examples keep to the rules and are as strong as those of the plain loop."""
    expected = problem.reached(plain_loop(problem)())

    def check(adv_BCHW: Any) -> str | None:
        off = float((adv_BCHW.double() - problem.clean_BCHW.double()).abs().max())
        if off > EPS + 1e-6:
            return f"a pixel is {off:.6f} away from its own, {EPS:.6f} allowed"
        if float(adv_BCHW.min()) < 0 or float(adv_BCHW.max()) > 1:
            return "a pixel leaves [0, 1]"
        found = problem.reached(adv_BCHW)
        if abs(found - expected) > LOSS_TOLERANCE * expected:
            return f"it reaches a loss of {found:.6g}, the plain loop {expected:.6g}"
        return None

    return check


def contender(
    problem: AttackProblem, check: Check, name: str, make: Callable[[AttackProblem], Call], packages: tuple[str, ...]
) -> Contender:
    """Return the contender whose call, which returns the examples, is made by `make` and needs these packages."""
    exactness = "rounding" if name.startswith("retemper") else "peer"
    reason, call = peers.missing(*packages), None
    if reason is None:
        try:
            call = make(problem)
        except Exception as error:  # a library that is broken here: the row says so, and the others go on
            reason = failure(error)
    return Contender(name=name, call=call, reason=reason, exactness=exactness, check=check)


def our_attack(problem: AttackProblem, model: nn.Module) -> Callable[..., Tensor]:
    """Return our attack on `model`, replayed from a CUDA graph on a GPU; it takes images and what `targets` has."""
    objective = cross_entropy_objective if problem.teacher_BK is None else KlObjective
    return CapturedAttack(model, objective, steps=problem.steps, step=STEP, eps=EPS, start="none")


def targets(problem: AttackProblem) -> tuple[Tensor, ...]:
    """Return what the objective is made of: the labels, or the teacher's logits, labels and temperatures."""
    if problem.teacher_BK is None:
        return (problem.label_B,)
    return problem.teacher_BK, problem.label_B, problem.temperature_K


def our_pgd(problem: AttackProblem, model: nn.Module) -> Tensor:
    """Return the examples, (B, C, H, W), that our attack makes with `model`, call by call."""
    return pgd(
        model, problem.clean_BCHW, objective=problem.objective, steps=problem.steps, step=STEP, eps=EPS, start="none"
    )


def twin_of(problem: AttackProblem) -> Folded:
    """Return the network with batch norm folded."""
    return Folded(problem.model.model, problem.model.dtype, "fused" if problem.clean_BCHW.is_cuda else "plain")


def folded(problem: AttackProblem) -> Call:
    """Return our attack as training and evaluation run it: batch norm is folded, anew for each attack; captured."""
    twin = twin_of(problem)
    attack, given = our_attack(problem, twin), targets(problem)

    def call() -> Tensor:
        twin.refresh()
        return attack(problem.clean_BCHW, *given)

    return call


def eager(problem: AttackProblem) -> Call:
    """Return the same without a CUDA graph."""
    twin = twin_of(problem)
    return lambda: our_pgd(problem, twin.refresh())


def unfolded(problem: AttackProblem) -> Call:
    """Return our attack on the network as it is."""
    return partial(our_attack(problem, problem.own_model()), problem.clean_BCHW, *targets(problem))


def plain_loop(problem: AttackProblem) -> Call:
    """Return the attack as anyone would write it in PyTorch."""
    model, clean = problem.own_model(), problem.clean_BCHW

    def call() -> Tensor:
        adv = clean.clone()
        for _ in range(problem.steps):
            adv.requires_grad_()
            (grad,) = torch.autograd.grad(problem.plain_objective(model(adv)), adv)
            adv = adv.detach() + STEP * grad.sign()
            adv = torch.min(torch.max(adv, clean - EPS), clean + EPS).clamp(0, 1)
        return adv

    return call


def torchattacks(problem: AttackProblem) -> Call:
    """Return torchattacks' PGD; with the KL it is given probabilities as labels."""
    library, target = peers.library("torchattacks"), problem.target
    attack = library.PGD(problem.own_model(), eps=EPS, alpha=STEP, steps=problem.steps, random_start=False)
    return lambda: attack(problem.clean_BCHW, target)


def foolbox(problem: AttackProblem) -> Call:
    """Return foolbox' PGD; with the KL a class of it that overrides the loss."""
    library, eagerpy, target = peers.library("foolbox"), peers.library("eagerpy"), problem.target

    class Kl(library.attacks.LinfPGD):
        def get_loss_fn(self, model: Any, labels: Any) -> Callable[[Any], Any]:
            return lambda image: eagerpy.astensor(F.kl_div(model(image).raw.log_softmax(1), target, reduction="sum"))

    kind = library.attacks.LinfPGD if problem.teacher_BK is None else Kl
    attack = kind(abs_stepsize=STEP, steps=problem.steps, random_start=False)
    model = library.PyTorchModel(problem.own_model(), bounds=(0, 1), device=problem.clean_BCHW.device)
    criterion = library.criteria.Misclassification(problem.label_B)
    return lambda: attack(model, problem.clean_BCHW, criterion, epsilons=EPS)[1]


CONTENDERS: tuple[tuple[str, Callable[[AttackProblem], Call], tuple[str, ...]], ...] = (  # with packages they need
    ("retemper", folded, ()),
    (NOT_CAPTURED, eager, ()),
    ("retemper, not folded", unfolded, ()),
    ("plain loop", plain_loop, ()),
    ("torchattacks.PGD", torchattacks, ("torchattacks",)),
    ("foolbox.LinfPGD", foolbox, ("foolbox", "eagerpy")),
)
