"""What changes during a run: the networks, the optimizer, the class state, and the sums of the running epoch.

Dimension key: B batch, C channels, H, W, K classes, D values.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from retemper.console import say
from retemper.engine.distributed.gradient_bucket import GradientBucket
from retemper.engine.distributed.ranks import ALONE, Part, Ranks
from retemper.engine.epoch_stats import ClassMeans, ClassSums
from retemper.engine.groups import TrainingAttack, taken
from retemper.engine.kept import Kept
from retemper.engine.models import MODELS, channels_last
from retemper.engine.optim import Average, Guard, Perturbation, make_optimizer, wide_dtype
from retemper.engine.peer import Peer
from retemper.engine.recipe import Method, Recipe
from retemper.engine.speed.beside import Branch
from retemper.engine.speed.fold import Folded
from retemper.engine.speed.together import OneForward, Together
from retemper.engine.targets import Forwards, Targets
from retemper.kernels import augment, resized_crop, strong_augment


class State:
    """The state of a run. No tensor in it changes its address, so that a step can be captured in a CUDA graph.

    A student in float64 is trained in float64 throughout.

    Attributes:
        teacher, clean_teacher: frozen; folded as `Execution.fold` says, where torch.fx can trace them.
        twin: the student as the attack sees it, folded anew in every step; None where it sees the student itself.
        peer: the network that is trained beside the student; None where the method has none.
        trained: the student, and the network of the peer.
        joined: the student as its training forwards see it, all in one batch; None where they run one by one.
        in_training: the student as an attack in training mode sees it; None where it sees another network.
        differentiated: the forwards that the loss has a gradient at, by the names of all and whether statistics move.
        guard: holds updates back once something is not finite.
        noise_seed: (1,) int64, the seed of the next random start; every step adds one.
        forwards: the student's forwards in each step of the epoch.
        attack: the attack of the epoch; None for the recipe's own.
        prior: what the attack "pgi" keeps of each image; None with another.
        fallback: the kind of attack that stands in for both since the guard saw a collapse; None before.
        progress: 0-dim, the share of the run that is done, where the method watches it.
        rate: the learning rate of the next step.
        sums, measured, loss_sum: of the epoch so far; `start_epoch` empties them.
        one: 0-dim, where every backward pass begins.
        average: of the student's weights, where the recipe asks for one.
        averaged: the network of the average as it answers the method, folded anew in every step (`fold_average`); None
            where the method never asks it.
        average_sees: the images that it is asked about in the steps of the epoch.
        lacks_labels: whether batches may hold images without a label, -1, for which the teacher's answer stands in.
        perturbation: of the student's weights, where the recipe asks for one.
        part: which rows of each batch are this process's.
        beside: where the teachers and the average answer before the attack.
        bucket: the gradients, where several processes add them up; None in one on its own.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: nn.Module,
        teacher: nn.Module | None,
        num_classes: int,
        device: torch.device,
        clean_teacher: nn.Module | None = None,
        ranks: Ranks = ALONE,
        peer: nn.Module | None = None,
    ) -> None:
        """Make everything as it is before the first step; the student and the peer move to `device`.

        Raises:
            ValueError: `fold` is set and torch.fx cannot trace the student; synced batch norm without a GPU; the method
                trains a peer, and none is given.
        """
        optim, execution, method = recipe.optim, recipe.execution, recipe.method
        self.device, self.num_classes = device, num_classes
        if method.trains_peer and peer is None:
            raise ValueError("peer: the method trains one beside the student, and none is given")
        self.precision = execution.dtype_on(device)
        self.student = student = _placed(student, recipe, device, ranks)
        self.teacher, self.clean_teacher = (one and _eyes(one, recipe, device) for one in (teacher, clean_teacher))
        self.twin, self.joined = _twin(student, recipe, device), _joined(student, recipe, device)
        self.peer = None
        if peer is not None:
            peer = _placed(peer, recipe, device, ranks)
            self.peer = Peer(peer, _eyes(peer, recipe, device), _joined(peer, recipe, device))
        self.trained = nn.ModuleList([student] if self.peer is None else [student, self.peer.network])
        trains = recipe.attack.bn_mode == "train"
        self.in_training = OneForward(self.joined) if trains and self.joined is not None else None
        self.differentiated: dict[tuple[tuple[str, ...], bool], tuple[str, ...]] = {}
        self.guard = Guard(device)
        self.optimizer = make_optimizer(optim, self.trained, device, fused=execution.fused_sgd)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        if execution.fused_sgd and not self.scaler.is_enabled():  # as a scaler sets it
            self.optimizer.found_inf = self.guard.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        class_state = method.class_state(num_classes, recipe)
        self.dtype = dtype = wide_dtype(next(student.parameters()))
        self.one = torch.ones((), device=device, dtype=dtype)
        self.class_state = {name: value.to(device, dtype) for name, value in class_state.items()}
        self.forwards, self.attack, self.rate = method.forwards_in(1, recipe), attack_in(1, recipe), optim.lr
        self.fallback: str | None = None
        self.prior: Kept | None = None
        self.progress = torch.zeros((), device=device, dtype=dtype)
        self.noise_seed = torch.zeros(1, dtype=torch.int64, device=device)
        counted = method.forwards if self.peer is None else (*method.forwards, "peer")
        self.sums = {name: ClassSums.zeros(num_classes, device, dtype) for name in counted}
        self.measured: dict[str, ClassMeans] = {}
        self.loss_sum = torch.zeros((), device=device, dtype=dtype)
        self.average = self.averaged = None
        if optim.average != "none":
            self.average = Average(student, optim.average, optim.ema_decay, optim.ema_warmup)
        if self.average is not None and method.average_sees:
            self.averaged = _eyes(self.average.network, recipe, device)
        self.average_sees = method.shown_to_average(1, recipe)
        self.lacks_labels = False
        self.perturbation = Perturbation(student, self.joined is not None) if optim.awp_gamma else None
        self.part, self.beside = Part.begin(ranks, device), Branch(device, execution.beside)
        self.bucket = GradientBucket(self.trained, ranks) if ranks.joined else None

    def autocast(self) -> AbstractContextManager[object]:
        """Return mixed precision for one phase; a context for two would carry casts made without gradient along."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    @property
    def kept(self) -> nn.Module:
        """The network that is evaluated and kept: the student, or the average of its weights."""
        return self.student if self.average is None else self.average.network

    def phase(self) -> tuple[Forwards, TrainingAttack | None, str | None, tuple[str, ...]]:
        """Return what decides which work the steps of the epoch do."""
        return self.forwards, self.attack, self.fallback, self.average_sees

    def start_epoch(self, recipe: Recipe, epoch: int, noise_seed: int) -> None:
        """Empty the sums, and set what depends on the epoch, and the seed of the first random start."""
        optim = recipe.optim
        self.forwards, self.attack = recipe.method.forwards_in(epoch, recipe), attack_in(epoch, recipe)
        self.average_sees = recipe.method.shown_to_average(epoch, recipe)
        for total in self.epoch_sums():
            total.zero_()
        if self.perturbation is not None:
            self.perturbation.gamma.fill_(optim.awp_gamma if epoch >= optim.awp_from else 0.0)
        if self.average is not None:
            self.average.active.fill_(epoch >= optim.average_from)
        self.noise_seed.fill_(noise_seed)
        if self.prior is not None:
            self.prior.start_epoch(epoch, noise_seed)
        self.set_lr(optim.lr_at(epoch))

    def begin_step(self, recipe: Recipe, epoch: int, step: int, steps: int) -> None:
        """Set what moves within an epoch before its step `step`, from 0, of `steps`."""
        if recipe.method.watches_progress:
            self.progress.fill_((epoch - 1 + step / steps) / recipe.optim.epochs)
        rate = recipe.optim.lr_at(epoch, step, steps)
        if rate != self.rate:
            self.set_lr(rate)

    def attack_now(self, recipe: Recipe) -> TrainingAttack:
        """Return the attack of the next step."""
        return taken(self.attack or recipe.attack, self.fallback)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        self.rate = lr
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def move_classes(self, class_state: Mapping[str, Tensor]) -> None:
        """Take over another class state of the same names."""
        for name, value in self.class_state.items():
            value.copy_(class_state[name])

    def attacked(self) -> nn.Module:
        """Return what the attack looks at: the student as it is now."""
        if self.twin is not None:
            return self.twin.refresh()
        return self.student if self.in_training is None or self.part.idle else self.in_training

    def fold_average(self) -> None:
        """Give the folded average the weights that the average has now."""
        if isinstance(self.averaged, Folded) and self.average_sees:
            self.averaged.refresh()

    def count(self, method: Method, logits: Mapping[str, Tensor], targets: Targets) -> None:
        """Count a step: each forward's class sums, and what the method measures besides. The guard counts its loss.

        A process without rows counts nothing, and moves the class state along with the others.
        """
        counts = not targets.part.idle
        label_B = targets.label_B if targets.counted_B is None else targets.counted_B
        logits = {name: logits_BK.detach() for name, logits_BK in logits.items()}
        if counts:
            peer = {} if targets.peer_adv_BK is None else {"peer": targets.peer_adv_BK.detach()}
            for name, logits_BK in (logits | peer).items():
                if name in self.sums:
                    self.sums[name].add(logits_BK, label_B)
        for name, value_BD in method.measured(logits, targets).items():
            if name not in self.measured:  # in the first step, which is not captured
                values = value_BD.numel() // max(1, len(value_BD))
                self.measured[name] = ClassMeans.zeros(self.num_classes, values, self.device, self.dtype)
            if counts:
                self.measured[name].add(value_BD, label_B)
        method.after_step(self.class_state, logits, targets)

    def epoch_sums(self) -> list[Tensor]:
        """Return every tensor that the steps of an epoch add to."""
        sums = (*self.sums.values(), *self.measured.values())
        return [self.loss_sum, *(total for one in sums for total in vars(one).values())]

    def all_reduce(self) -> None:
        """Sum over the processes what their steps of the epoch have summed, and average their batch-norm statistics.

        Each process's statistics are of its own images; afterwards all hold the same networks.
        """
        ranks = self.part.ranks
        if self.prior is not None:
            self.prior.merge(ranks)
        ranks.all_reduce_each_(self.epoch_sums())
        networks = [self.trained] if self.average is None else [self.trained, self.kept]
        buffers = [value for network in networks for value in network.buffers()]
        ranks.all_reduce_each_([value for value in buffers if value.is_floating_point()], mean=True)
        for count in (value for value in buffers if not value.is_floating_point()):
            ranks.all_reduce_(count, largest=True)  # of batches: a process without rows has seen one less


def attack_in(epoch: int, recipe: Recipe) -> TrainingAttack | None:
    """Return the attack of `epoch`, from 1, where the method has another than the recipe's."""
    changes = recipe.method.attack_in(epoch, recipe)
    return replace(recipe.attack, **changes) if changes else None


def clean_images(recipe: Recipe, image: Tensor, view: Tensor, index: Tensor | None = None) -> Tensor:
    """Return the images that networks are shown, (B, C, H, W) fp32 in [0, 1], in the recipe's memory format.

    Args:
        image, view, index: what a loader gives, as `augment`, `strong_augment` and `resized_crop` take it.
    """
    if recipe.data.augment == "resized-crop":
        size = recipe.data.image_size if recipe.data.max_side else image.shape[1]
        clean = resized_crop(
            image, view, size=size or 0, index=index, least_area=recipe.data.crop_area, flip=recipe.data.flip
        )
        return clean if recipe.execution.channels_last else clean.contiguous()
    data, how = recipe.data, {"padding": recipe.data.padding, "padding_mode": recipe.data.padding_mode}
    if data.strong:
        how |= {"policy": data.augment, "flip": data.flip, "cutout": data.cutout}
    clean = (strong_augment if data.strong else augment)(image, view, index=index, **how)
    return clean if recipe.execution.channels_last else clean.contiguous()


def _placed(student: nn.Module, recipe: Recipe, device: torch.device, ranks: Ranks) -> nn.Module:
    """Return the student on its device, in its memory format, with synced batch norm where that is asked for."""
    if recipe.optim.batch_norm == "synced" and ranks.world_size > 1:
        if device.type != "cuda":
            raise ValueError("batch_norm = 'synced': PyTorch has it on GPUs alone; leave it at 'local'")
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    return channels_last(student, device) if recipe.execution.channels_last else student.to(device)


def _eyes(network: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """Return a network as it answers in eval mode: folded where the recipe says so, with a note where it cannot be."""
    execution = recipe.execution
    if not execution.fold:
        return network
    try:
        return Folded(network, execution.dtype_on(device), execution.epilogue_on(device))
    except ValueError as error:  # it may be anybody's
        say(f"note: {error}; it answers as it is")
        return network


def _twin(student: nn.Module, recipe: Recipe, device: torch.device) -> Folded | None:
    """Return the student's twin for attacks; None without one, and where torch.fx does not trace a user's network."""
    execution, attack = recipe.execution, recipe.attack
    if not execution.fold or attack.bn_mode != "eval" or not taken(attack).steps:
        return None
    try:
        return Folded(student, execution.dtype_on(device), execution.epilogue_on(device))
    except ValueError as error:
        if recipe.networks.student in MODELS:
            raise
        say(f"note: {error}; the attack looks at the student itself")
        return None


def _joined(network: nn.Module, recipe: Recipe, device: torch.device) -> Together | None:
    """Return a network's twin for training; None without one, and where its forwards in one batch may be others."""
    if not recipe.execution.together_on(device):
        return None
    dtype = recipe.execution.dtype_on(device)
    try:
        return Together(network, dtype if dtype != torch.float32 else None)
    except ValueError as error:
        say(f"note: {error}; its training forwards run one by one")
        return None
