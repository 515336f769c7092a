"""What a run is: one frozen value that a recipe file makes and the engine reads.

A method is a subclass with its own constants as fields and at most four methods: `class_state`, `objective`, `loss`
and `next_class_state`. A setting is a function that returns one. Nothing here knows a method by name.

Dimension key: B batch, K classes.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from retemper.engine.attack import Objective
from retemper.engine.models import MODELS
from retemper.engine.moves import Moves
from retemper.loaders import DATASETS


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the student is held against on one batch.

    Attributes:
        label_B: (B,) int64.
        teacher_BK: the teacher's logits on the clean images; None for methods without a teacher.
        own_BK: the student's own logits on the clean images, taken before the attack in the attack's batch-norm mode,
            without gradient; None unless the method asks for them (`needs_own_prediction`).
        state: the method's class state, name -> (K,) float32.
        ones_K: (K,) of ones: the class temperature of methods that have none.
    """

    label_B: Tensor
    teacher_BK: Tensor | None = None
    own_BK: Tensor | None = None
    state: Mapping[str, Tensor]
    ones_K: Tensor

    @property
    def teacher(self) -> Tensor:
        """The teacher's logits, for methods that have one."""
        assert self.teacher_BK is not None, "the method asks for a teacher that the recipe does not name"
        return self.teacher_BK


@dataclass(frozen=True, kw_only=True)
class ClassSums:
    """An epoch's sums so far for one of the forwards ("adv" or "clean"): each (K,), added to in place."""

    loss_K: Tensor  # cross-entropy against the label, before the step
    correct_K: Tensor
    count_K: Tensor

    @classmethod
    def zeros(cls, num_classes: int, device: torch.device) -> "ClassSums":
        """Nothing seen yet."""
        loss, correct, count = torch.zeros(3, num_classes, device=device)
        return cls(loss_K=loss, correct_K=correct.long(), count_K=count.long())

    def add(self, loss_K: Tensor, correct_K: Tensor, count_K: Tensor) -> None:
        """Count one more batch."""
        self.loss_K.add_(loss_K)
        self.correct_K.add_(correct_K)
        self.count_K.add_(count_K)

    def clear(self) -> None:
        """Start anew."""
        for sum_K in (self.loss_K, self.correct_K, self.count_K):
            sum_K.zero_()

    @property
    def mean_loss_K(self) -> Tensor:
        """(K,) the mean loss of each class's images; 0 where there were none."""
        return self.loss_K / self.count_K.clamp(min=1)

    @property
    def accuracy_K(self) -> Tensor:
        """(K,) the share of each class's images classified correctly; 0 where there were none."""
        return self.correct_K / self.count_K.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Recipe(Moves):
    """Everything that decides a run's result, seed and data apart. `eps` and `attack_step` are in [0, 1] pixels."""

    # who learns what from whom
    dataset: str
    student: str
    teacher_model: str | None = None
    teacher_recipe: str | None = None  # the METHOD:SETTING that trains such a teacher
    train_teacher: bool = False  # do so first when a run is given none; where that takes days, ask instead
    variant: str = "paper"

    # the inner maximisation
    eps: float = 8 / 255
    attack_step: float = 2 / 255
    attack_steps: int = 10
    attack_start: str = "normal"
    clip_start: bool = False  # none of the released codes clips its start
    attack_bn: str = "eval"

    # the outer minimisation
    epochs: int = 300
    batch_size: int = 128
    lr: float = 0.1
    lr_drops: tuple[int, ...] = (215, 260, 285)  # the rate falls after these epochs
    lr_factor: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 2e-4
    nesterov: bool = False
    cpu_threads: int | None = None  # None: as many as torch takes

    # the images
    padding: int = 4
    flip: bool = True
    image_size: int | None = None  # images are resized to it (see load_split); None: as they are
    images_per_class: int | None = None  # train on so many of each class only; None: on all
    loader: Literal["auto", "ffcv", "resident"] = "auto"

    # which epoch is kept as the best: the largest average + worst-class robust accuracy
    select_on: str = "holdout"
    holdout_per_class: int = 100
    select_every: int = 10
    select_always_from: int = 215  # every epoch from here on
    select_from: int = 1  # no earlier epoch is kept as the best
    select_steps: int = 20

    variants: ClassVar[tuple[str, ...]] = ("paper",)
    forwards: ClassVar[tuple[str, ...]] = ("adv", "clean")  # the student's training forwards, in order
    needs_own_prediction: ClassVar[bool] = False

    def __post_init__(self) -> None:
        choices = {
            "dataset": DATASETS,
            "student": MODELS,
            "teacher_model": (None, *MODELS),
            "variant": self.variants,
            "attack_start": ("none", "normal", "uniform"),
            "attack_bn": ("eval", "train"),
            "loader": ("auto", "ffcv", "resident"),
            **{name: get_args(kind) for name, kind in get_type_hints(Moves).items() if get_args(kind)},
            "select_on": ("holdout", "test"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: it must be one of {', '.join(map(str, allowed))}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} = {value}: it must be a finite number")
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{field.name} = {value}: it must not be negative")
        if self.teacher_table == "on" and not self.teacher_ahead:
            raise ValueError("teacher_table = 'on': a teacher asked within the step fills no table; set teacher_ahead")
        positive = "epochs batch_size select_every lr cpu_threads images_per_class image_size".split()
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} = {value}: it must be above 0")
        if self.eps > 1 or self.attack_step > 1:
            raise ValueError(
                f"eps = {self.eps}, attack_step = {self.attack_step}: give them in [0, 1] pixels, 8/255 not 8"
            )
        if self.momentum >= 1 or (self.nesterov and self.momentum == 0):
            raise ValueError(f"momentum = {self.momentum}: it must be below 1, and above 0 with nesterov")
        if min(self.lr_drops, default=1) < 1:
            raise ValueError(f"lr_drops = {self.lr_drops}: epochs count from 1")

    def decay(self, epoch: int) -> float:
        """The factor that the schedule has reached after `epoch` (from 1)."""
        return self.lr_factor ** sum(drop <= epoch for drop in self.lr_drops)

    def lr_at(self, epoch: int) -> float:
        """The learning rate during `epoch` (from 1)."""
        return self.lr * self.decay(epoch - 1)

    def class_state(self, num_classes: int) -> dict[str, Tensor]:
        """The method's state per class at the start, name -> (K,) float32. None by default."""
        return {}

    def objective(self, targets: Targets) -> Objective:
        """What the attack raises: logits to a scalar, summed over the batch."""
        raise NotImplementedError

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """What training lowers: a scalar, a mean over the batch. `logits` has a (B, K) entry for each of `forwards`."""
        raise NotImplementedError

    def next_class_state(
        self, state: Mapping[str, Tensor], sums: Mapping[str, ClassSums], epoch: int
    ) -> dict[str, Tensor]:
        """The class state after `epoch`, from that epoch's training sums. Unchanged by default."""
        return dict(state)


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields, as the command line names them and config.json holds them."""
    return asdict(recipe)
