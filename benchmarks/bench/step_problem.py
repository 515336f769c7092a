"""The problem that all contenders of a step's case share: networks, batches, a start of the attack, and checks.

A row is timed only if its attack stays in the ball and in the range of pixels, and reaches the authors' KL divergence
within 0.1 %, measured in float64 by one network, having added what theirs adds within 1 %. The networks are random,
their sizes real: no time depends on what they have learnt.
"""

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from retemper.bench.authors_step import EPS, AuthorsStep
from retemper.bench.authors_step import attack as authors_attack
from retemper.bench.case import Request, Work
from retemper.engine.catalogue import find_setting
from retemper.engine.models import channels_last, create_model
from retemper.engine.recipe import Recipe
from retemper.engine.state import State
from retemper.kernels import random_start_

TEACHERS = {"tiny_resnet": "tiny_resnet_wide", "mobilenet_v2": "wrn34_10", "resnet18": "wrn34_10"}  # of each student
INPUTS = 8  # batches that take turns
REACTION = 50  # times the student's last layer, since an untrained network hardly reacts to its input
AGREEMENT = 1e-3  # of the KL reached, and ten times as much of what the attack added to it
LOSS_AGREEMENT = {"fp32": 1e-2, "bf16": 5e-2}  # of the first loss: batch statistics of few images enlarge rounding

BARE: dict[str, Any] = dict(
    precision="fp32",
    channels_last=False,
    fold=False,
    epilogue="plain",
    together="off",
    capture="off",
    teacher_ahead=0,
    teacher_table="off",
    fused_sgd=False,
    beside=False,
    kept="device",
    extra_on="auto",
)


class StepProblem:
    """The networks and the batches that a step is timed on.

    Attributes:
        student, teacher: the networks that each row copies.
        batches: INPUTS pairs of images (B, C, H, W) in [0, 1] and labels (B,).
        recipe: ABSLD, variant `released`, with nothing of what makes our step fast.
    """

    def __init__(self, request: Request, student: str, batch: int) -> None:
        torch.manual_seed(0)
        self.request, self.name, self.batch, self.device = request, student, batch, request.device
        size, channels = (8, 1) if student == "tiny_resnet" else (32, 3)
        self.student = create_model(student, 10).to(self.device)
        self.teacher = create_model(TEACHERS[student], 10).to(self.device).eval().requires_grad_(False)
        with torch.no_grad():
            for network, times in ((self.student, REACTION), (self.teacher, 10)):
                last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
                last.weight *= times  # and soft labels that differ from class to class
        shape = (batch, channels, size, size)
        self.batches = [
            (torch.rand(shape, device=self.device), torch.randint(10, (batch,), device=self.device))
            for _ in range(INPUTS)
        ]
        self.temperatures = [0.5 + 0.15 * k for k in range(10)]
        self.recipe = bare_recipe(student)
        self._references: dict[bool, tuple[float, float]] = {}

    @property
    def first(self) -> tuple[Tensor, Tensor]:
        """Return the first batch, on which every row is checked."""
        return self.batches[0]

    def state(self, recipe: Recipe) -> State:
        """Return the state of our step before the first one."""
        teacher = copy.deepcopy(self.teacher)
        teacher = channels_last(teacher, self.device) if recipe.execution.channels_last else teacher
        state = State(recipe, copy.deepcopy(self.student), teacher, 10, self.device)
        temperature_K = torch.tensor(self.temperatures)
        own = {"temperature_adv": temperature_K, "temperature_clean": temperature_K}
        state.move_classes(state.class_state | own)
        return state

    def layout(self, images: Tensor, recipe: Recipe) -> Tensor:
        """Return the images in the recipe's memory format."""
        return images.contiguous(
            memory_format=torch.channels_last if recipe.execution.channels_last else torch.contiguous_format
        )

    def authors(self, deterministic: bool = True) -> AuthorsStep:
        """Return the authors' step on a student of its own."""
        return AuthorsStep(copy.deepcopy(self.student), self.teacher, self.temperatures, deterministic)

    def misses(self, adv: Tensor, recipe: Recipe) -> str | None:
        """Return what is wrong with the images that an attack made of the first batch, or None."""
        clean, kl, expected = self.first[0], self._reached(adv), self._reference(recipe)[0]
        if float((adv - clean).abs().max()) > EPS + 1e-6 or float(adv.min()) < 0 or float(adv.max()) > 1:
            return "its images leave the ball or the range of pixels"
        start = self._reached(clean)
        if abs((kl - start) / (expected - start) - 1) > 10 * AGREEMENT:
            return f"its attack adds {kl - start:.6g} to the KL, the script's {expected - start:.6g}"
        close = abs(kl / expected - 1) <= AGREEMENT
        return None if close else f"its attack reaches {kl:.6g}, the script's {expected:.6g}"

    def misses_loss(self, loss: Any, recipe: Recipe) -> str | None:
        """Return what is wrong with the first loss, or None."""
        expected = self._reference(recipe)[1]
        precision = "bf16" if recipe.execution.precision == "bf16" else "fp32"
        close = abs(float(loss) / expected - 1) <= LOSS_AGREEMENT[precision]
        return None if close else f"its first loss is {float(loss):.6g}, the script's {expected:.6g}"

    def work(self, teacher: bool = True) -> Work:
        """Return the least work of a step; without the teacher's where its answers are known.

        FLOP are counted by torch: a forward of the teacher, 20 of the student for the attack (an input gradient costs a
        forward), 6 for the training.
        """
        image = self.first[0]
        return Work(
            images=self.batch,
            flop=self.batch * (26 * _flop(self.student, image) + teacher * _flop(self.teacher, image)),
        )

    @cached_property
    def _judge(self) -> nn.Module:
        """Return the student in float64."""
        return copy.deepcopy(self.student).double().eval()

    @cached_property
    def _target(self) -> Tensor:
        """Return the soft labels of the first batch, (B, K) in float64."""
        clean, label = self.first
        temperature = torch.tensor(self.temperatures, device=self.device, dtype=torch.float64)
        with torch.no_grad():
            return (self.teacher(clean).double() / temperature[label][:, None] ** 2).softmax(1)

    @torch.no_grad()
    def _reached(self, adv: Tensor) -> float:
        """Return the KL divergence at `adv`, summed over the first batch."""
        parts = zip(adv.double().split(64), self._target.split(64), strict=True)
        return sum(float(F.kl_div(self._judge(x).log_softmax(1), y, reduction="sum")) for x, y in parts)

    def _reference(self, recipe: Recipe) -> tuple[float, float]:
        """Return the KL that the authors' attack reaches on the first batch from the recipe's start, and its loss."""
        if recipe.execution.channels_last not in self._references:
            clean, label = self.first
            authors = self.authors()
            logits, _ = authors.targets(clean, label)
            adv = authors_attack(authors.student, clean, logits, self._noise(recipe), again=True)
            authors.student.train()
            target = self._target.float()
            with torch.no_grad():
                kl_adv, kl_clean = (
                    F.kl_div(authors.student(x).log_softmax(1), target, reduction="batchmean") for x in (adv, clean)
                )
            loss = float(5 / 6 * kl_adv + 1 / 6 * kl_clean) / target.shape[1]
            self._references[recipe.execution.channels_last] = self._reached(adv), loss
        return self._references[recipe.execution.channels_last]

    def _noise(self, recipe: Recipe) -> Tensor:
        """Return the random start of the first batch, as our seed 0 draws it in the recipe's memory format."""
        zeros = torch.zeros_like(self.layout(self.first[0], recipe))
        seed = torch.zeros(1, dtype=torch.int64, device=self.device)
        return random_start_(zeros.clone(), zeros, EPS, noise="normal", seed=seed, clip=False).contiguous()


def bare_recipe(student: str) -> Recipe:
    """Return ABSLD, variant `released`, with nothing of what makes our step fast."""
    recipe = find_setting("absld:cifar10_resnet18")[2].recipe.as_variant("released")
    return recipe.replace(student=student, **BARE)


def _flop(model: nn.Module, images: Tensor) -> float:
    """Return the operations of one forward on one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(images[:1])
    return counter.get_total_flops()
