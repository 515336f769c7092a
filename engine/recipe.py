"""What a run is: a method, which is what a paper defines, and beside it the options of the run.

A recipe file makes a `Method` and, for each setting, a `Recipe`; the engine reads them. Nothing here knows a method by
its name. Dimension key: B batch, C channels, H, W, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from retemper.engine.attack import Watcher
from retemper.engine.epoch_stats import EpochStats
from retemper.engine.groups import STEPS, Data, Networks, Optimisation, Selection, TrainingAttack, taken
from retemper.engine.losses import KlObjective, Objective, cross_entropy_objective
from retemper.engine.models import PIXELS
from retemper.engine.presets import preset_options
from retemper.engine.speed.execution import Execution
from retemper.engine.targets import Forwards, Targets
from retemper.errors import nearest
from retemper.options import Option, Options, option, options_of

UNTRAINED = "not trained yet"


@dataclass(frozen=True, kw_only=True)
class Method(Options):
    """A method as its paper defines it: the constants, the class state, the attack's objective, the training loss.

    A method is a subclass with its constants as fields. Most define `objective` and `loss` alone.

    Attributes:
        variants: the forms that the method has, the paper's first.
        variant_options: the options of the run that a variant sets otherwise.
        hard_labels: whether the loss has a cross-entropy against the labels, which the run may smooth.
        forwards: the student's training forwards, in order. "adv" and "clean" are the attacked and the clean images.
        released_forwards: those of the variant `released`, where the authors' code takes others.
        needs_own_prediction: whether `Targets.own` is computed before the attack.
        teacher_sees, clean_teacher_sees: the images that each teacher is asked about, of "clean" and "adv".
        average_sees: the images, of "clean" and "adv", that the average of the student's weights is ever asked about,
            in eval mode and without gradient. The recipe keeps one then (`Optimisation.average`).
        trains_peer: whether a second network is trained beside the student, from scratch: it answers to the clean
            images (`Targets.peer_BK`) and, in training mode, to the attacked ones (`Targets.peer_adv_BK`).
        watches_progress: whether `Targets.progress` is set in every step.
        draws: whether `Targets.uniform` is drawn in every step.
        attack_asks_teacher: whether `objective` reads the logits of the teachers or of the peer. `margins` and
            `watcher` never do.
        attacks_teacher: whether the attack goes through the teacher too; its logits are then (B, 2 K), the student's
            and then the teacher's. With `attacks_slope` they are too.
        follows_iterates: whether `watcher` needs an attack of several steps.
        validates_by: what attacks the held-out images that the class state moves by: PGD on the cross-entropy, or the
            method's own training attack. None where the class state does not need them.
    """

    variant: str = option(
        "paper", "the form of the method: as the paper has it, or as the authors' code does", choices="variants"
    )

    variants: ClassVar[tuple[str, ...]] = ("paper",)
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    hard_labels: ClassVar[bool] = False
    forwards: ClassVar[tuple[str, ...]] = ("adv", "clean")
    released_forwards: ClassVar[Forwards | None] = None
    needs_own_prediction: ClassVar[bool] = False
    teacher_sees: ClassVar[tuple[str, ...]] = ("clean",)
    clean_teacher_sees: ClassVar[tuple[str, ...]] = ()
    average_sees: ClassVar[tuple[str, ...]] = ()
    trains_peer: ClassVar[bool] = False
    watches_progress: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    attack_asks_teacher: ClassVar[bool] = True
    attacks_teacher: ClassVar[bool] = False
    follows_iterates: ClassVar[bool] = False
    validates_by: ClassVar[Literal["pgd", "training attack"] | None] = None

    def class_state(self, num_classes: int, recipe: "Recipe") -> dict[str, Tensor]:
        """Return the state at the start, float32 or float64 by name; (K,) where there is one number for each class."""
        return {}

    def objective(self, targets: Targets) -> Objective:
        """Return what the attack raises: a function from (B, K) logits to a scalar, summed over the batch."""
        raise NotImplementedError

    def margins(self, targets: Targets, attack: TrainingAttack) -> tuple[float | Tensor, float | Tensor]:
        """Return the attack's radius and step in pixel units: numbers, or (B,) where each class has its own."""
        return attack.eps, attack.step

    def attacks(self) -> int:
        """Return how many attacks a step takes, each from a random start of its own.

        The images of a later one take the place of those of the same name. A `watcher` may keep some from that.
        """
        return 1

    def attack_in(self, epoch: int, recipe: "Recipe") -> Mapping[str, Any]:
        """Return the fields of `recipe.attack`, other than its mode, that are otherwise in `epoch`, from 1."""
        return {}

    def shown_to_teacher(self) -> tuple[str, ...]:
        """Return the images that the teacher is asked about: "clean", "adv", and names of `views`."""
        return self.teacher_sees

    def attacks_slope(self) -> float:
        """Return c of first_order.py, where the attack goes through the teacher to first order; 0: it does not."""
        return 0.0

    def shown_to_average(self, epoch: int, recipe: "Recipe") -> tuple[str, ...]:
        """Return the images of `average_sees` that the average of the weights is asked about in `epoch`, from 1."""
        return self.average_sees

    def views(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return further images of the step by name, (B, C, H, W), made of its clean and attacked ones."""
        return {}

    def watcher(self, clean_BCHW: Tensor, targets: Targets) -> Watcher | None:
        """Return what looks on at the attack, or None."""
        return None

    def surveys_by(self, epoch: int, recipe: "Recipe") -> TrainingAttack | None:
        """Return the attack, on the cross-entropy, that the training images are shown under before `epoch`, from 1."""
        return None

    def surveyed(self, logits_BK: Tensor, label_B: Tensor) -> Tensor:
        """Return what is then summed over each class's images: (B, D), of (B, K) logits on attacked images."""
        raise NotImplementedError

    def forwards_in(self, epoch: int, recipe: "Recipe") -> Forwards:
        """Return the student's forwards in each step of `epoch`, from 1."""
        if self.variant == "released" and self.released_forwards is not None:
            return self.released_forwards
        return Forwards(self.forwards)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """Return what training lowers: a scalar, a mean over these rows.

        At which of the logits it has a gradient must be the same in all steps with the same forwards: it is found out
        in the first of them, with logits of zeros, and the others' forwards are run without one.

        Args:
            logits: (B, K) for each of the images of `forwards_in`, with gradient.
        """
        raise NotImplementedError

    def training_loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """Return `loss` and what is added to it whatever the method. Arguments and value are as for `loss`."""
        return self.loss(logits, targets)

    def smooths_labels(self) -> bool:
        """Return `hard_labels`, but False where the constants leave that part of the loss out."""
        return self.hard_labels

    def perturbing_loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """Return what adversarial weight perturbation raises. Arguments and value are as for `loss`."""
        return self.training_loss(logits, targets)

    def measured(self, logits: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Return what is averaged over each class's images in an epoch, by name: (B,) or (B, D)."""
        return {}

    def after_step(self, state: Mapping[str, Tensor], logits: Mapping[str, Tensor], targets: Targets) -> None:
        """Change, in place, what moves with every step. `logits` are those of before the step, without gradient."""

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: "Recipe"
    ) -> dict[str, Tensor]:
        """Return the class state after `epoch`, from what the epoch has shown.

        A method with `validates_by` or `surveys_by` is asked after epoch 0 as well, with what these have shown alone.
        """
        return dict(state)


@dataclass(frozen=True, kw_only=True)
class LabelAttack(Method):
    """A method whose attack raises the cross-entropy against the label."""

    attack_asks_teacher: ClassVar[bool] = False

    def objective(self, targets: Targets) -> Objective:
        return cross_entropy_objective(targets.label_B)


@dataclass(frozen=True, kw_only=True)
class OwnPredictionAttack(Method):
    """A method whose attack leads away from the student's own clean prediction, KL(S(x) || S(x')), as TRADES does."""

    needs_own_prediction: ClassVar[bool] = True
    attack_asks_teacher: ClassVar[bool] = False

    def objective(self, targets: Targets) -> KlObjective:
        return KlObjective(targets.own, targets.label_B)


GROUPS: Mapping[str, type[Options]] = {
    "data": Data,
    "networks": Networks,
    "attack": TrainingAttack,
    "optim": Optimisation,
    "selection": Selection,
    "execution": Execution,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run's result, seed and files apart.

    Raises:
        ValueError: two options contradict each other; the message names them by their flat names.
    """

    method: Method
    data: Data
    networks: Networks
    attack: TrainingAttack
    optim: Optimisation
    selection: Selection
    execution: Execution

    def __post_init__(self) -> None:
        if self.method.validates_by and not self.holds_out:
            raise ValueError("this method learns from held-out training images: holdout_per_class must be above 0")
        if self.optim.average_above and (self.optim.average_every != "epoch" or not self.holds_out):
            raise ValueError(
                f"average_above = {self.optim.average_above}: held-out training images decide, once an epoch; "
                "set average_every = 'epoch' and holdout_per_class above 0"
            )
        if self.networks.normalise and self.data.dataset not in PIXELS:
            raise ValueError(
                f"normalise = True: no mean and deviation are known of the pixels of {self.data.dataset}, but of "
                f"{', '.join(PIXELS)}: set normalise = False"
            )
        if self.method.average_sees and self.optim.average == "none":
            raise ValueError("average = 'none': this method learns from an average of its weights; set ema or swa")
        if self.networks.peer_model is not None and not self.method.trains_peer:
            raise ValueError(f"peer_model = {self.networks.peer_model!r}: this method trains no peer; leave it at none")
        if self.data.strong and self.execution.teacher_table == "on":
            raise ValueError(
                f"teacher_table = 'on': augment = {self.data.augment!r} and cutout = {self.data.cutout} show other "
                "views in every epoch, too many for a table; set teacher_table = 'auto', which asks the teacher ahead"
            )
        if self.attack.kind == "pgi" and self.data.strong:
            raise ValueError(
                f"attack = 'pgi', augment = {self.data.augment!r}, cutout = {self.data.cutout}: what is kept of an "
                "image follows its crop and flip alone; take nfgsm, or augment = 'crop' and cutout = 0"
            )
        if self.attack.kind == "pgi" and self.data.extra_fraction:
            raise ValueError(
                f"attack = 'pgi', extra_fraction = {self.data.extra_fraction:g}: what is kept of an image is of the "
                "real ones alone, and extra ones seldom come again: take nfgsm, or leave out --extra"
            )
        if self.attack.guard == "on" and taken(self.attack).steps >= STEPS["pgd10"]:
            raise ValueError(
                f"guard = 'on': attack = {self.attack.kind!r} takes {taken(self.attack).steps} steps already, and the "
                "guard knows no more than ten to go on with; set guard = 'auto'"
            )
        if self.method.follows_iterates and self.attack.one_step:
            raise ValueError(
                f"attack = {self.attack.kind!r}: this method looks for where the steps of an attack cross the "
                "boundary, and one step tells nothing: take pgd, pgd10 or pgd3"
            )
        if self.attack.kind == "pgi" and self.method.attacks() > 1:
            raise ValueError("attack = 'pgi': this method attacks several times a step, and an image keeps one: nfgsm")
        if self.method.attacks_teacher and self.attack.bn_mode != "eval":
            raise ValueError("attack_bn = 'train': an attack on the teacher too would move its statistics")

    @property
    def holds_out(self) -> bool:
        """True where training images are held out: they choose the epoch, or the run learns from them."""
        learned_from = self.method.validates_by is not None or self.optim.average_above > 0
        return self.selection.holdout_per_class > 0 and (learned_from or self.selection.select_on == "holdout")

    @classmethod
    def of(cls, method: type[Method], **options: Any) -> "Recipe":
        """Make a recipe from options by their flat names.

        Raises:
            ValueError: an option has a value that it may not have.
            TypeError: there is no such option, or one without a default is missing.
        """
        groups = {"method": method, **GROUPS}
        given: dict[str, dict[str, Any]] = {group: {} for group in groups}
        places = _places(method)
        for name, value in options.items():
            if name not in places:
                raise TypeError(f"there is no option {name!r}{nearest(name, places)}")
            group, one = places[name]
            given[group][one.attribute] = value
        values: dict[str, Any] = {group: kind(**given[group]) for group, kind in groups.items()}
        return cls(**values)

    def options(self) -> dict[str, tuple[str, Option]]:
        """Return each option's group and what is known of it, by flat name."""
        return _places(type(self.method))

    def replace(self, **options: Any) -> "Recipe":
        """Return this recipe with options, by their flat names, that have other values. Raises as `of` does."""
        return Recipe.of(type(self.method), **{**self.flat(), **options})

    def as_variant(self, variant: str) -> "Recipe":
        """Return this recipe with the method's `variant` and the options that it sets."""
        brought = dict(self.method.variant_options.get(variant, {}))
        if self.data.dataset not in PIXELS:  # of a folder no mean is known to normalise by
            brought.pop("normalise", None)
        return self.replace(variant=variant, **brought)

    def as_preset(self, preset: str, **changes: Any) -> "Recipe":
        """Return this recipe with what a preset (`retemper.engine.presets`) sets in a run with these `changes`."""
        seen = self.replace(**changes)
        return self.replace(
            preset=preset, **preset_options(preset, seen.data, seen.optim, self.method.smooths_labels())
        )

    def named_in(self, options: Mapping[str, Any]) -> "Recipe":
        """Return this recipe in the variant and the preset that `options`, by flat name, name in place of its own."""
        recipe, now = self, self.flat()
        if (variant := options.get("variant", now["variant"])) != now["variant"]:
            recipe = recipe.as_variant(variant)
        if (preset := options.get("preset", now["preset"])) != now["preset"]:
            recipe = recipe.as_preset(
                preset, **{name: options[name] for name in ("epochs", "dataset", "image_size") if name in options}
            )
        return recipe

    def flat(self) -> dict[str, Any]:
        """Return the value of every option by flat name."""
        return {name: getattr(getattr(self, group), one.attribute) for name, (group, one) in self.options().items()}

    def grouped(self) -> dict[str, dict[str, Any]]:
        """Return the values as config.json shows them: by group, and within it by flat name."""
        values, options = self.flat(), self.options()
        groups = {group: [name for name, place in options.items() if place[0] == group] for group in vars(self)}
        return {group: {name: values[name] for name in names} for group, names in groups.items()}


def _places(method: type[Method]) -> dict[str, tuple[str, Option]]:
    groups = {"method": method, **GROUPS}
    return {name: (group, one) for group, kind in groups.items() for name, one in options_of(kind).items()}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A recipe with one line on what it is, and one on what was measured with it, and where."""

    recipe: Recipe
    note: str
    status: str = UNTRAINED

    @property
    def is_trained(self) -> bool:
        """True where a result of it is committed."""
        return self.status != UNTRAINED
