"""What a run is: one frozen value that a recipe file makes and the engine reads.

A method is a subclass with its own constants as fields and a few methods: `class_state`, `objective`, `loss` and
`next_class_state` in most; what else the engine can do for one is in the rest of the class. A setting is a function
that returns one. Nothing here knows a method by name.

Dimension key: B batch, K classes.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from torch import Tensor

from retemper.engine.attack import Watcher
from retemper.engine.distributed.ranks import WHOLE, Part
from retemper.engine.epoch_stats import EpochStats
from retemper.engine.losses import Objective
from retemper.engine.models import MODELS
from retemper.engine.speed.options import EXACTNESS, Moves
from retemper.loaders import DATASETS

AnyRecipe = TypeVar("AnyRecipe", bound="Recipe")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the student is held against on one batch. None where the method does not ask for it.

    Attributes:
        label_B: (B,) int64.
        teacher_BK: the teacher's logits on the clean images.
        own_BK: the student's own logits on the clean images, taken before the attack in the attack's batch-norm mode,
            without gradient (`needs_own_prediction`).
        teacher_adv_BK: the teacher's logits on the attacked images; None during the attack (`teacher_sees`).
        clean_teacher_BK, clean_teacher_adv_BK: those of the second teacher (`clean_teacher_sees`).
        watched: what `Recipe.watcher` gave, after the attack.
        state: the method's class state.
        ones_K: (K,) of ones: the class temperature of methods that have none.
        part: which rows of the batch these are, where several processes train: what a method takes of a batch as a
            whole, it asks of this.
    """

    label_B: Tensor
    teacher_BK: Tensor | None = None
    own_BK: Tensor | None = None
    teacher_adv_BK: Tensor | None = None
    clean_teacher_BK: Tensor | None = None
    clean_teacher_adv_BK: Tensor | None = None
    watched: Any = None
    state: Mapping[str, Tensor]
    ones_K: Tensor
    part: Part = WHOLE

    @property
    def teacher(self) -> Tensor:
        """The teacher's logits on the clean images, for methods that have one."""
        return given(self.teacher_BK)

    @property
    def own(self) -> Tensor:
        """The student's own logits on the clean images, for methods that need them."""
        return given(self.own_BK)


def given(logits_BK: Tensor | None) -> Tensor:
    """Logits that a method asked for."""
    assert logits_BK is not None, "the method reads what its recipe does not ask for"
    return logits_BK


@dataclass(frozen=True, kw_only=True)
class Recipe(Moves):
    """Everything that decides a run's result, seed and data apart. `eps` and `attack_step` are in [0, 1] pixels."""

    # who learns what from whom
    dataset: str
    student: str
    teacher_model: str | None = None
    teacher_recipe: str | None = None  # the METHOD:SETTING that trains such a teacher
    train_teacher: bool = False  # do so first when a run is given none; where that takes days, ask instead
    clean_teacher_model: str | None = None  # a second teacher, trained without attacks
    clean_teacher_recipe: str | None = None
    start_recipe: str | None = None  # fine-tune the weights of such a run; None: begin at random
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
    batch_size: int = 128  # of all processes together
    batch_norm: Literal["local", "synced"] = "local"  # on several GPUs: of each one's images, or of the whole batch
    lr: float = 0.1
    lr_drops: tuple[int, ...] = (215, 260, 285)  # the rate falls after these epochs
    lr_factor: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 2e-4
    nesterov: bool = False
    awp_gamma: float = 0.0  # adversarial weight perturbation, relative to each layer's norm (Wu et al., NeurIPS 2020)
    awp_from: int = 1
    average: Literal["none", "ema", "swa"] = "none"  # whether an average of the weights is evaluated and kept
    average_from: int = 1
    average_every: Literal["step", "epoch"] = "step"
    average_above: float = 0.0  # only when the worst class's held-out robust accuracy is no less (CFA)
    ema_decay: float = 0.999
    joint: bool = False  # all forwards of a step are one batch to batch norm
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
    variant_fields: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # the constants that a variant has otherwise
    forwards: ClassVar[tuple[str, ...]] = ("adv", "clean")  # the student's training forwards, in order
    needs_own_prediction: ClassVar[bool] = False
    teacher_sees: ClassVar[tuple[str, ...]] = ("clean",)  # which images, of "clean" and "adv"
    clean_teacher_sees: ClassVar[tuple[str, ...]] = ()
    attacks_teacher: ClassVar[bool] = False  # the attack's logits are (B, 2 K): the student's, then the teacher's
    validates: ClassVar[bool] = False  # the class state moves by held-out images, before the first epoch too
    validates_by: ClassVar[Literal["pgd", "training attack"]] = "pgd"  # what attacks them: PGD on the cross-entropy

    def __post_init__(self) -> None:
        choices = {
            "dataset": DATASETS,
            "student": MODELS,
            "teacher_model": (None, *MODELS),
            "clean_teacher_model": (None, *MODELS),
            "batch_norm": ("local", "synced"),
            "average": ("none", "ema", "swa"),
            "average_every": ("step", "epoch"),
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
        if self.validates and (self.select_on != "holdout" or not self.holdout_per_class):
            raise ValueError("this method learns from held-out training images: holdout_per_class must be above 0")
        held_out = self.select_on == "holdout" and self.holdout_per_class
        if self.average_above and (self.average_every != "epoch" or not held_out):
            raise ValueError(
                f"average_above = {self.average_above}: held-out training images decide, once an epoch; "
                "set average_every = 'epoch' and holdout_per_class above 0"
            )
        if self.attacks_teacher and self.attack_bn != "eval":
            raise ValueError("attack_bn = 'train': an attack on the teacher too would move its statistics")
        if self.average == "ema" and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay = {self.ema_decay}: it must lie between 0 and 1")
        if self.momentum >= 1 or (self.nesterov and self.momentum == 0):
            raise ValueError(f"momentum = {self.momentum}: it must be below 1, and above 0 with nesterov")
        if min(self.lr_drops, default=1) < 1:
            raise ValueError(f"lr_drops = {self.lr_drops}: epochs count from 1")

    def as_variant(self: AnyRecipe, variant: str) -> AnyRecipe:
        """This recipe as `variant`, with that one's constants."""
        return replace(self, variant=variant, **self.variant_fields.get(variant, {}))

    def decay(self, epoch: int) -> float:
        """The factor that the schedule has reached after `epoch` (from 1)."""
        return self.lr_factor ** sum(drop <= epoch for drop in self.lr_drops)

    def lr_at(self, epoch: int) -> float:
        """The learning rate during `epoch` (from 1)."""
        return self.lr * self.decay(epoch - 1)

    def class_state(self, num_classes: int) -> dict[str, Tensor]:
        """The method's state at the start, float32 by name; (K,) where it is one per class. None by default."""
        return {}

    def objective(self, targets: Targets) -> Objective:
        """What the attack raises: logits to a scalar, summed over the batch."""
        raise NotImplementedError

    def margins(self, targets: Targets) -> tuple[float | Tensor, float | Tensor]:
        """The attack's eps and step: numbers, or (B,) for margins of each class."""
        return self.eps, self.attack_step

    def watcher(self, clean_BCHW: Tensor, targets: Targets) -> Watcher | None:
        """What looks on at the attack: given each iterate before its step, and the student's logits there."""
        return None

    def images(self, clean_BCHW: Tensor, adv_BCHW: Tensor, targets: Targets) -> dict[str, Tensor]:
        """What `forwards` names: "clean" and "adv" by default."""
        return {"clean": clean_BCHW, "adv": adv_BCHW}

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """What training lowers: a scalar, a mean over these rows. `logits` has a (B, K) entry for each forward."""
        raise NotImplementedError

    def measured(self, logits: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """What to average over each class's images besides losses: name -> (B,) or (B, D)."""
        return {}

    def after_step(self, state: Mapping[str, Tensor], logits: Mapping[str, Tensor], targets: Targets) -> None:
        """Move what changes with every step, in place; `logits` are those of before it."""

    def next_class_state(self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int) -> dict[str, Tensor]:
        """The class state after `epoch`, from what it has shown. Unchanged by default.

        Where the recipe `validates`, it is asked for after epoch 0 as well, with `stats.held` alone.
        """
        return dict(state)


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields, as the command line names them and config.json holds them."""
    return asdict(recipe)


def other_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields by which `new` leads to another run than `old`, both as config.json holds them.

    A field that `old` is too old to have counts as its default, which is what was done before there was a choice.
    """
    defaults = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
    before = {name: old.get(name, defaults.get(name)) for name in new}
    return [name for name in new if before[name] != new[name] and EXACTNESS.get(name) != "bitwise"]


UNTRAINED = "starts, steps and evaluates in the tests; not trained yet"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A recipe with one line on what it is and one on what was measured with it, and where."""

    recipe: Recipe
    note: str
    status: str = UNTRAINED
