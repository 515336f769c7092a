"""What changes during a run: networks, optimizer, class state, sums. Dimension key: B batch, K classes."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from retemper.engine.distributed.gradient_bucket import GradientBucket
from retemper.engine.distributed.ranks import ALONE, WHOLE, Part, Ranks
from retemper.engine.epoch_stats import ClassMeans, ClassSums, EpochStats, HeldOut
from retemper.engine.models import channels_last
from retemper.engine.optim import Average, Guard, sgd
from retemper.engine.recipe import Recipe, Targets
from retemper.engine.speed.fold import Folded
from retemper.kernels import augment, class_sums


@dataclass
class State:
    """What changes during a run, and the networks. No tensor in it changes its address, so that a step can be captured.

    Attributes:
        teacher: frozen; as `Moves.fold` says, folded, where torch.fx can trace it.
        twin: the student as the attack sees it, folded anew in every step; None where it sees the student itself.
        sums, measured, loss_sum: of the epoch so far; `start_epoch` empties them.
        noise_seed: (1,) int64, the seed of the next random start; every step adds one.
        clean_teacher: a second teacher, frozen and folded like the first.
        guard: holds updates back once something is not finite.
        average: of the student's weights, where the recipe asks for one.
        awp_gamma: how far the weights are perturbed; None where they never are.
        part: which rows of each batch are this process's.
        bucket: the gradients, where several processes add them up; None in one on its own.
    """

    student: nn.Module
    teacher: nn.Module | None
    twin: Folded | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: Guard
    precision: torch.dtype
    class_state: dict[str, Tensor]
    ones_K: Tensor
    noise_seed: Tensor
    sums: dict[str, ClassSums]
    loss_sum: Tensor
    clean_teacher: nn.Module | None = None
    average: Average | None = None
    awp_gamma: Tensor | None = None
    part: Part = WHOLE
    bucket: GradientBucket | None = None
    measured: dict[str, ClassMeans] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        student: nn.Module,
        teacher: nn.Module | None,
        num_classes: int,
        device: torch.device,
        clean_teacher: nn.Module | None = None,
        ranks: Ranks = ALONE,
    ) -> "State":
        """Everything as it is before the first step; the student moves to `device`.

        Raises:
            ValueError: `recipe.fold`, and torch.fx cannot trace the student; synced batch norm without a GPU.
        """
        if recipe.batch_norm == "synced" and ranks.world_size > 1:
            if device.type != "cuda":
                raise ValueError("batch_norm = 'synced': PyTorch has it on GPUs alone; leave it at 'local'")
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        student = channels_last(student, device) if recipe.channels_last else student.to(device)
        precision, epilogue = recipe.dtype_on(device), recipe.epilogue_on(device)
        if recipe.fold:
            teacher, clean_teacher = (one and _folded(one, precision, epilogue) for one in (teacher, clean_teacher))
        twin = None
        if recipe.fold and recipe.attack_bn == "eval" and recipe.attack_steps:
            twin = Folded(student, precision, epilogue)
        guard, optimizer = Guard(device), sgd(recipe, student, device)
        scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
        if recipe.fused_sgd and not scaler.is_enabled():
            optimizer.found_inf = guard.found_inf  # pyright: ignore[reportAttributeAccessIssue]  # as a scaler sets it
        return cls(
            student=student,
            teacher=teacher,
            twin=twin,
            optimizer=optimizer,
            scaler=scaler,
            guard=guard,
            precision=precision,
            class_state={name: value.to(device) for name, value in recipe.class_state(num_classes).items()},
            ones_K=torch.ones(num_classes, device=device),
            noise_seed=torch.zeros(1, dtype=torch.int64, device=device),
            sums={name: ClassSums.zeros(num_classes, device) for name in recipe.forwards},
            loss_sum=torch.zeros((), device=device),
            clean_teacher=clean_teacher,
            average=None if recipe.average == "none" else Average(student, recipe.average, recipe.ema_decay),
            awp_gamma=torch.zeros((), device=device) if recipe.awp_gamma else None,
            part=Part.begin(ranks, device),
            bucket=GradientBucket(student, ranks) if ranks.joined else None,
        )

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision for one phase; a context for two would carry casts made without gradient into the second."""
        device = self.ones_K.device.type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision != torch.float32)

    @property
    def kept(self) -> nn.Module:
        """The network that is evaluated and kept: the student, or the average of its weights."""
        return self.student if self.average is None else self.average.network

    def start_epoch(self, recipe: Recipe, epoch: int, noise_seed: int) -> None:
        """Empty the sums, and set what depends on the epoch, and the seed of the first random start."""
        lr = recipe.lr_at(epoch)
        for sums in (*self.sums.values(), *self.measured.values()):
            sums.clear()
        if self.awp_gamma is not None:
            self.awp_gamma.fill_(recipe.awp_gamma if epoch >= recipe.awp_from else 0.0)
        if self.average is not None:
            self.average.active.fill_(epoch >= recipe.average_from)
        self.loss_sum.zero_()
        self.noise_seed.fill_(noise_seed)
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
        """What the attack looks at: the student as it is now."""
        return self.student if self.twin is None else self.twin.refresh()

    def add(self, recipe: Recipe, logits: Mapping[str, Tensor], targets: Targets, loss: Tensor) -> None:
        """Count a step: per-class cross-entropy, correct predictions and images of each forward, the loss, and what the
        method measures besides. An idle process has nothing to count, and moves the class state along."""
        counts = not targets.part.idle
        logits = {name: logits_BK.detach() for name, logits_BK in logits.items()}
        for name, logits_BK in logits.items():
            if counts:
                self.sums[name].add(*class_sums(logits_BK, targets.label_B, self.ones_K.numel()))
        if counts:
            self.loss_sum += loss * targets.label_B.numel()
        for name, value_BD in recipe.measured(logits, targets).items():
            if name not in self.measured:  # in the first step, which is not captured
                values = value_BD.numel() // max(1, len(value_BD))
                self.measured[name] = ClassMeans.zeros(self.ones_K.numel(), values, self.ones_K.device)
            if counts:
                self.measured[name].add(value_BD, targets.label_B)
        recipe.after_step(self.class_state, logits, targets)

    def stats(self, held: HeldOut | None = None) -> EpochStats:
        """The epoch so far."""
        return EpochStats(forwards=self.sums, measured=self.measured, held=held)

    def meet(self) -> None:
        """Sum up over the processes what their steps of the epoch have summed up; average the statistics of their
        batch norm, which are of their own images, so that all hold the same networks."""
        ranks, sums = self.part.ranks, (*self.sums.values(), *self.measured.values())
        ranks.all_reduce_each_([self.loss_sum, *(value for one in sums for value in vars(one).values())])
        networks = [self.student] if self.average is None else [self.student, self.kept]
        buffers = [value for network in networks for value in network.buffers()]
        ranks.all_reduce_each_([value for value in buffers if value.is_floating_point()], mean=True)
        for count in (value for value in buffers if not value.is_floating_point()):
            ranks.all_reduce_(count, largest=True)  # of batches: an idle process has seen one less


def _folded(teacher: nn.Module, dtype: torch.dtype, epilogue: str) -> nn.Module:
    try:
        return Folded(teacher, dtype, epilogue)
    except ValueError:  # it may be anybody's network
        return teacher


def clean_images(recipe: Recipe, image: Tensor, view: Tensor, index: Tensor | None = None) -> Tensor:
    """What networks are shown of a loader's images: see `augment`; in the recipe's memory format."""
    clean = augment(image, view, index=index, padding=recipe.padding)
    return clean if recipe.channels_last else clean.contiguous()
