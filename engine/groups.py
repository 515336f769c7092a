"""What a run is besides its method: the images, the networks, the attack, the optimiser, the choice of an epoch.

How the step is executed is the sixth group (`retemper.engine.speed.execution`). Each is a frozen value of options.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from retemper.engine.data_options import Data as Data
from retemper.engine.models import MODELS
from retemper.engine.schedule import cosine, onecycle, triangle
from retemper.options import MOST_EPOCHS, Options, option

LR_PEAK, MOMENTUM, ADAM_BETAS = 0.3, 0.9, (0.9, 0.999)  # where nothing else is said
MANY = 10_000  # steps of an epoch, where it is not said how many it has


@dataclass(frozen=True, kw_only=True)
class Networks(Options):
    """Who learns from whom."""

    student: str = option(
        help="the architecture that is trained, timm:NAME, or net.py:build (your own nn.Module)",
        choices=tuple(MODELS),
        or_file=True,
        or_timm=True,
    )
    normalise: bool = option(
        False, "the student first subtracts its data set's mean from the pixels and divides by their deviation"
    )
    teacher_model: str | None = option(None, "the teacher's architecture", choices=(None, *MODELS), or_timm=True)
    teacher_recipe: str | None = option(
        None, "the METHOD:SETTING that trains such a teacher, or robustbench:NAME where it is published"
    )
    train_teacher: bool = option(False, "train missing teachers and starts first, where none is given")
    clean_teacher_model: str | None = option(
        None, "the architecture of the second teacher, trained without attacks", choices=(None, *MODELS), or_timm=True
    )
    clean_teacher_recipe: str | None = option(None, "the METHOD:SETTING that trains such a second teacher")
    peer_model: str | None = option(
        None,
        "the architecture of the peer, where the method trains one beside the student (none: the student's)",
        choices=(None, *MODELS),
        or_timm=True,
    )
    start_recipe: str | None = option(None, "fine-tune the weights of such a METHOD:SETTING (none: begin at random)")


@dataclass(frozen=True, kw_only=True)
class TrainingAttack(Options):
    """The inner maximisation: projected gradient descent in the L-inf ball, or a cheaper attack in one step.

    `taken` has the numbers of steps that a `kind` other than "pgd" takes in place of those given.
    """

    kind: Literal["pgd", "pgd10", "pgd3", "pgd2", "nfgsm", "pgi"] = option(
        "pgd",
        "pgd: as the options below say; pgd10, pgd3, pgd2: so many steps of 2 eps / steps from a uniform start; "
        "nfgsm: one step of eps from uniform noise of 2 eps, and no projection to the ball; "
        "pgi: one step of eps from where the image's last one led",
        name="attack",
    )
    eps: float = option(8 / 255, "the radius of the ball, in [0, 1] pixels: 8/255, not 8", at_most=1)
    step: float = option(2 / 255, "the size of one step, in [0, 1] pixels", name="attack_step", at_most=1)
    steps: int = option(10, "how many steps", name="attack_steps", at_most=10_000)
    start: Literal["none", "normal", "uniform"] = option(
        "normal", "where it starts: the image, 0.001 x Gaussian noise on it, uniform in the ball", name="attack_start"
    )
    clip_start: bool = option(False, "clip the start to [0, 1]")
    bn_mode: Literal["eval", "train"] = option(
        "eval", "batch norm under attack: running statistics, or the batch's own (and the running ones move)",
        name="attack_bn",
    )  # fmt: skip
    pgi_weight: float = option(
        10.0,
        "with pgi: the weight of the squared distance between the logits on attacked images and on those it began at; "
        "above 0 it costs a training forward",
        at_most=1000,
    )
    pgi_decay: float = option(0.3, "with pgi: how much of an image's momentum is left an epoch later", at_most=1)
    pgi_reset: int = option(40, "with pgi: begin anew after so many epochs", positive=True, at_most=MOST_EPOCHS)
    guard: Literal["auto", "on", "off"] = option(
        "auto",
        "hold the attack against ten steps after each epoch, and take more steps where they part; auto does so for "
        "attacks in one step",
    )
    guard_share: float = option(
        0.5, "they part where the accuracy under ten steps is below this share of that under the attack", at_most=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "nfgsm" and self.eps > 1 / 2:
            raise ValueError(f"eps = {self.eps}: attack = 'nfgsm' draws noise of twice that, so it must be at most 0.5")

    @property
    def one_step(self) -> bool:
        """True for the attacks that are made to take one step."""
        return STEPS.get(self.kind) == 1

    @property
    def own_steps(self) -> dict[str, Any]:
        """The options by which `Plan` goes as these options say, whatever `kind` puts in their place."""
        return {name: getattr(self, name) for name in ("steps", "step", "eps", "start", "clip_start")}


STEPS = {"nfgsm": 1, "pgi": 1, "pgd2": 2, "pgd3": 3, "pgd10": 10}  # of the attacks whose names say how many


def step_share(steps: int) -> float:
    """Return the size of one of so many steps in units of eps, for the attacks of `STEPS`.

    Together they cross the ball, so that any of its points is reached from any start. Three steps of 2/3 eps are those
    of Salman et al. (NeurIPS 2020), ten of eps/5 those of Andriushchenko and Flammarion (NeurIPS 2020).
    """
    return min(1.0, 2 / steps)


@cache
def taken(attack: TrainingAttack, kind: Any = None) -> TrainingAttack:
    """Return the attack, or the one of the `kind` that stands in for it, with its steps, its step and its start."""
    attack = attack if kind is None else replace(attack, kind=kind)
    steps = STEPS.get(attack.kind)
    if steps is None:
        return attack
    return replace(attack, steps=steps, step=attack.eps * step_share(steps), start="uniform", clip_start=True)


def harder(own: TrainingAttack, now: TrainingAttack) -> str | None:
    """Return the kind of attack that takes the next more steps: two, three, ten; None after ten.

    Args:
        own: the recipe's attack. If its own options say how to take ten steps or more, they are the last resort.
        now: the attack in force, as `taken` returns it.
    """
    more = next((kind for kind in ("pgd2", "pgd3", "pgd10") if STEPS[kind] > now.steps), None)
    return "pgd" if more == "pgd10" and own.steps >= STEPS[more] else more


@dataclass(frozen=True, kw_only=True)
class Optimisation(Options):
    """The outer minimisation: the optimizer, its schedule, and what is done to the weights besides."""

    preset: Literal["paper", "strong"] = option(
        "paper",
        "how strongly it is trained: as in its paper, or with one cycle of the rate, an average and a perturbation of "
        "the weights, and more",
    )
    epochs: int = option(300, "how many passes over the training images", positive=True, at_most=MOST_EPOCHS)
    batch_size: int = option(128, "images a step, over all processes together", positive=True, at_most=2**20)
    lr: float = option(0.1, "the learning rate, at its peak", positive=True, at_most=1e38)
    lr_schedule: Literal["steps", "cosine", "onecycle", "triangle"] = option(
        "steps",
        "how it moves: in drops, by half a cosine, up and down by cosines as torch's OneCycleLR, or by lines as Rice's "
        "cyclic; all but the drops move it with every step",
    )
    lr_warmup: float = option(
        0.0, "epochs, also a part of one, in which the rate of steps or cosine first rises", at_most=MOST_EPOCHS
    )
    lr_peak: float = option(
        LR_PEAK, "share of the epochs after which onecycle or triangle is at its peak", positive=True, at_most=1
    )
    lr_drops: tuple[int, ...] = option(
        (215, 260, 285), "steps: the epochs after which the learning rate falls: 215,260,285", at_most=MOST_EPOCHS
    )
    lr_factor: float = option(0.1, "what it is multiplied by at each drop", at_most=1)
    lr_drop_of: Literal["last", "first"] = option(
        "last", "whether a drop multiplies the last rate or the first; of the first, later drops change nothing"
    )
    lr_drop_early: bool = option(
        False, "let a drop hold in the last step of its epoch already, as schedules of fractional epochs do"
    )
    optimizer: Literal["sgd", "adamw"] = option("sgd", "what moves the weights; adamw wants a rate of about 0.001")
    momentum: float = option(MOMENTUM, "SGD's momentum", at_most=1)
    nesterov: bool = option(False, "take Nesterov's momentum")
    adam_betas: tuple[float, ...] = option(
        ADAM_BETAS, "AdamW's decay of the mean gradient and of the mean square: 0.9,0.999", at_most=1
    )
    weight_decay: float = option(
        2e-4, "pull of the weights towards 0: SGD adds it to the gradient, AdamW takes it apart", at_most=10
    )
    decay_norms: bool = option(True, "let it pull at batch norm's scales and shifts and at biases too")
    label_smoothing: float = option(
        0.0, "spread so much of a label's weight over all classes, in the loss, where it has hard labels", at_most=1
    )
    batch_norm: Literal["local", "synced"] = option(
        "local", "on several GPUs: batch norm over each one's images, or over the whole batch"
    )
    joint: bool = option(False, "make all forwards of a step one batch to batch norm")
    awp_gamma: float = option(
        0.0, "adversarial weight perturbation, relative to each layer's norm; 0 is off", at_most=1
    )
    awp_decay: Literal["own", "perturbed"] = option(
        "own",
        "with awp_gamma: what weight decay pulls at, the weights themselves or, as the authors' code, the perturbed",
    )
    awp_from: int = option(1, "the first epoch that perturbs weights", at_most=MOST_EPOCHS)
    average: Literal["none", "ema", "swa"] = option("none", "the average of the weights that is evaluated and kept")
    average_from: int = option(1, "the first epoch that the average takes in", at_most=MOST_EPOCHS)
    average_every: Literal["step", "epoch"] = option("step", "how often the average takes the weights in")
    average_above: float = option(
        0.0,
        "take in only epochs whose worst class has at least this held-out robust accuracy (with every epoch)",
        at_most=1,
    )
    ema_decay: float = option(0.999, "how much of the old average each update keeps", at_most=1)
    ema_warmup: bool = option(False, "with ema: after t updates let each keep at most (1 + t) / (10 + t) of it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average == "ema" and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay = {self.ema_decay}: it must lie between 0 and 1")
        if self.momentum >= 1 or (self.nesterov and self.momentum == 0):
            raise ValueError(f"momentum = {self.momentum}: it must be below 1, and above 0 with nesterov")
        if min(self.lr_drops, default=1) < 1:
            raise ValueError(f"lr_drops = {self.lr_drops}: epochs count from 1")
        self._check_schedule()
        self._check_optimizer()

    def _check_schedule(self) -> None:
        if self.lr_schedule in ("onecycle", "triangle"):
            if self.lr_warmup:
                raise ValueError(f"lr_warmup = {self.lr_warmup}: {self.lr_schedule} rises by itself; set lr_peak")
        elif self.lr_peak != LR_PEAK:
            raise ValueError(f"lr_peak = {self.lr_peak}: {self.lr_schedule} has no peak; set lr_warmup")
        elif self.lr_warmup >= self.epochs:
            raise ValueError(f"lr_warmup = {self.lr_warmup}: it must be below epochs = {self.epochs}")

    def _check_optimizer(self) -> None:
        if len(self.adam_betas) != 2 or max(self.adam_betas) >= 1:
            raise ValueError(f"adam_betas = {self.adam_betas}: they are two numbers below 1, as 0.9,0.999")
        if self.optimizer == "sgd":
            if self.adam_betas != ADAM_BETAS:
                raise ValueError(f"adam_betas = {self.adam_betas}: SGD has none; set optimizer = 'adamw'")
            return
        sgds = {"momentum": MOMENTUM, "nesterov": False, "awp_decay": "own"}  # the last adds decay to the gradient
        for name, default in sgds.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name} = {getattr(self, name)!r}: AdamW has no use for it; set it to {default!r}")

    @property
    def lr_moves(self) -> bool:
        """Whether the learning rate is another one from step to step."""
        return self.lr_schedule != "steps" or self.lr_warmup > 0

    def decay(self, epoch: int) -> float:
        """Return the learning rate after `epoch` (from 1) as a share of its peak: what methods scale their rates by."""
        return self._factor(epoch + 1, 0, MANY)

    def lr_at(self, epoch: int, step: int = 0, steps: int = MANY) -> float:
        """Return the learning rate of step `step` (from 0) of the `steps` of `epoch` (from 1)."""
        return self.lr * self._factor(epoch, step, steps)

    def _factor(self, epoch: int, step: int, steps: int) -> float:
        """Return the learning rate of a step as a share of its peak (`retemper.engine.schedule`)."""
        total = self.epochs * steps
        done = min((epoch - 1) * steps + step, total - 1)
        if self.lr_schedule in ("onecycle", "triangle"):
            return (onecycle if self.lr_schedule == "onecycle" else triangle)(done, total, self.lr_peak)
        warm = self.lr_warmup * steps
        risen = (done + 1) / warm if done + 1 < warm else 1
        if self.lr_schedule == "cosine":
            return risen * cosine(max(done - warm, 0), total - warm)
        over = epoch if self.lr_drop_early and step + 1 == steps else epoch - 1
        drops = sum(drop <= over for drop in self.lr_drops)
        return risen * self.lr_factor ** (min(drops, 1) if self.lr_drop_of == "first" else drops)


@dataclass(frozen=True, kw_only=True)
class Selection(Options):
    """The choice of the epoch that is kept, and the images that are held out of training."""

    select_on: Literal["holdout", "test"] = option(
        "holdout", "the images that choose: held-out training images, or the test images, as the papers did"
    )
    select_by: Literal["robust+worst", "robust", "worst", "clean+robust"] = option(
        "robust+worst",
        "what is largest at the kept epoch: average + worst class under attack, either alone, or clean + that average",
    )
    holdout_per_class: int = option(
        100,
        "training images of each class that are held out, where they choose or the method learns from them; 0: none, "
        "and the last epoch is kept unless test images choose",
        at_most=10**7,
    )
    holdout_from: Literal["random", "start", "end"] = option(
        "random",
        "which images of a class are held out: drawn at random, or its first or last in the order of the files",
    )
    select_every: int = option(10, "look every so many epochs", positive=True, at_most=MOST_EPOCHS)
    select_always_from: int = option(215, "look after every epoch from here on", at_most=MOST_EPOCHS)
    select_from: int = option(1, "the first epoch that may be kept as the best", at_most=MOST_EPOCHS)
    select_steps: int = option(20, "steps of the PGD attack that judges; 0 judges clean images", at_most=10_000)
    select_step: float = option(1 / 4, "the size of such a step, as a share of eps", positive=True, at_most=1)

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Say whether `epoch`, from 1, of `epochs` is looked at."""
        return epoch == epochs or epoch >= self.select_always_from or epoch % self.select_every == 0
