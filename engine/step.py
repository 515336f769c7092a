"""One training step of adversarial distillation: ask the teacher, attack the student, descend.

No value is read on the host, so that the device never waits. Dimension key: B batch, C channels, H, W, K classes.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from retemper.engine.attack import module_mode, pgd
from retemper.engine.models import channels_last
from retemper.engine.parallel.bucket import Bucket
from retemper.engine.parallel.ranks import ALONE, WHOLE, Part, Ranks
from retemper.engine.recipe import Recipe, Targets
from retemper.engine.run.guard import Guard
from retemper.engine.seen import ClassMeans, ClassSums, HeldOut, Seen
from retemper.engine.speed.fold import Folded
from retemper.engine.weight_space import Average, perturb_weights
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
    bucket: Bucket | None = None
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
            form = precision, epilogue, recipe.pad_stem
            teacher, clean_teacher = (one and _folded(one, *form) for one in (teacher, clean_teacher))
        twin = None
        if recipe.fold and recipe.attack_bn == "eval" and recipe.attack_steps:
            twin = Folded(student, precision, epilogue, recipe.pad_stem)
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
            bucket=Bucket(student, ranks) if ranks.joined else None,
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

    def seen(self, held: HeldOut | None = None) -> Seen:
        """The epoch so far."""
        return Seen(forwards=self.sums, measured=self.measured, held=held)

    def meet(self) -> None:
        """Sum up over the processes what their steps of the epoch have summed up; average the statistics of their
        batch norm, which are of their own images, so that all hold the same networks."""
        ranks, sums = self.part.ranks, (*self.sums.values(), *self.measured.values())
        ranks.add_up_([self.loss_sum, *(value for one in sums for value in vars(one).values())])
        networks = [self.student] if self.average is None else [self.student, self.kept]
        buffers = [value for network in networks for value in network.buffers()]
        ranks.add_up_([value for value in buffers if value.is_floating_point()], mean=True)
        for count in (value for value in buffers if not value.is_floating_point()):
            ranks.sum_(count, largest=True)  # of batches: an idle process has seen one less


def _folded(teacher: nn.Module, dtype: torch.dtype, epilogue: str, pad_stem: bool) -> nn.Module:
    try:
        return Folded(teacher, dtype, epilogue, pad_stem)
    except ValueError:  # it may be anybody's network
        return teacher


def clean_images(recipe: Recipe, image: Tensor, view: Tensor, index: Tensor | None = None) -> Tensor:
    """What networks are shown of a loader's images: see `augment`; in the recipe's memory format."""
    clean = augment(image, view, index=index, padding=recipe.padding)
    return clean if recipe.channels_last else clean.contiguous()


def sgd(recipe: Recipe, student: nn.Module, device: torch.device) -> torch.optim.SGD:
    """The optimizer; on a GPU its rate is a tensor there, so that a captured step follows the schedule."""
    return torch.optim.SGD(
        student.parameters(),
        lr=torch.tensor(recipe.lr, device=device) if device.type == "cuda" and recipe.fused_sgd else recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=recipe.fused_sgd or None,  # with a scaler the fused step alone does not wait for the device
    )


class Beside(nn.Module):
    """Two networks as one whose logits stand side by side: (B, 2 K). An attack on both gets both gradients."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 2 K)."""
        return torch.cat([self.first(image), self.second(image)], 1)


def observe(
    state: State, recipe: Recipe, attacked: nn.Module, clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None
) -> Targets:
    """What is known before the attack, as asked for: the teachers' logits on the clean images, the student's own."""
    own_BK = clean_teacher_BK = None
    with torch.no_grad(), state.autocast():
        if state.teacher is not None and teacher_BK is None and "clean" in recipe.teacher_sees:
            teacher_BK = state.teacher(clean_BCHW)
        if state.clean_teacher is not None and "clean" in recipe.clean_teacher_sees:
            clean_teacher_BK = state.clean_teacher(clean_BCHW)
        if recipe.needs_own_prediction:
            with module_mode(attacked, recipe.attack_bn):
                own_BK = attacked(clean_BCHW)
    targets = Targets(
        label_B=label_B,
        teacher_BK=teacher_BK,
        own_BK=own_BK,
        clean_teacher_BK=clean_teacher_BK,
        state=state.class_state,
        ones_K=state.ones_K,
        part=state.part,
    )
    return replace(targets, watched=recipe.watcher(clean_BCHW, targets))


def attack(state: State, recipe: Recipe, attacked: nn.Module, clean_BCHW: Tensor, targets: Targets) -> Tensor:
    """The inner maximisation: adversarial images like `clean_BCHW`."""
    if recipe.attacks_teacher:
        assert state.teacher is not None
        attacked = Beside(attacked, state.teacher)
    eps, step = recipe.margins(targets)
    with state.autocast():
        return pgd(
            attacked,
            clean_BCHW,
            objective=recipe.objective(targets),
            steps=recipe.attack_steps,
            step=step,
            eps=eps,
            start=recipe.attack_start,
            clip_start=recipe.clip_start,
            rows=state.part.ranks.rows,
            bn_mode=recipe.attack_bn,
            seed=state.noise_seed,
            watch=targets.watched,
        )


def observe_attacked(state: State, recipe: Recipe, adv_BCHW: Tensor, targets: Targets) -> Targets:
    """`targets` with the teachers' logits on the attacked images, as asked for."""
    with torch.no_grad(), state.autocast():
        if state.teacher is not None and "adv" in recipe.teacher_sees:
            targets = replace(targets, teacher_adv_BK=state.teacher(adv_BCHW))
        if state.clean_teacher is not None and "adv" in recipe.clean_teacher_sees:
            targets = replace(targets, clean_teacher_adv_BK=state.clean_teacher(adv_BCHW))
    return targets


def update(state: State, loss: Tensor) -> None:
    """The optimizer's step, unless the loss or a gradient is not finite now or was before."""
    weights = [weight for weight in state.student.parameters() if weight.grad is not None]
    # of gradients that overflow in half precision, a scaler skips the step and lowers the scale: they are no fault
    gradients = [] if state.scaler.is_enabled() else [weight.grad for weight in weights if weight.grad is not None]
    state.guard.look(loss, gradients, state.noise_seed)
    held_back = state.scaler.is_enabled() or hasattr(state.optimizer, "found_inf")
    before = [] if held_back else [weight.detach().clone() for weight in weights]
    state.scaler.step(state.optimizer)
    state.scaler.update()
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=False):  # of an optimizer that looks at no flag
            weight.copy_(torch.where(state.guard.found_inf > 0, value, weight))
    state.bucket.clear() if state.bucket else state.optimizer.zero_grad(set_to_none=True)


def descend(state: State, recipe: Recipe, images: Mapping[str, Tensor], targets: Targets) -> Tensor:
    """The outer minimisation: one step of the optimizer on `images`, named as in `forwards`; the loss before it."""

    def forward() -> tuple[dict[str, Tensor], Tensor]:
        with state.autocast():
            if recipe.joint:
                both = torch.cat([images[name] for name in recipe.forwards])
                split = state.student(both).split([len(images[name]) for name in recipe.forwards])
                logits = dict(zip(recipe.forwards, split, strict=True))
            else:
                logits = {name: state.student(images[name]) for name in recipe.forwards}
            return logits, recipe.loss(logits, targets)

    part = state.part
    state.student.train(not part.idle)
    before = {}
    if state.awp_gamma is not None:
        before = perturb_weights(
            state.student, state.awp_gamma, lambda: state.scaler.scale(part.weigh(forward()[1])), part.ranks.summed
        )
    logits, loss = forward()
    share = part.weigh(loss)
    share = share + state.guard.poison if state.scaler.is_enabled() else share
    state.scaler.scale(share).backward()
    with torch.no_grad():
        for weight, value in before.items():
            weight.copy_(value)
    whole = loss.detach() if state.bucket is None else state.bucket.add_up(share.detach())
    update(state, whole)
    state.add(recipe, logits, targets, loss.detach())
    if state.average is not None and recipe.average_every == "step":
        state.average.follow(state.student)
    return whole


def stand_in(clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A black image of class 0 for a process that has none, so that it says all that the others wait to hear."""
    clean_BCHW = clean_BCHW.new_zeros((1, *clean_BCHW.shape[1:]))
    return (
        clean_BCHW,
        label_B.new_zeros(1),
        None if teacher_BK is None else teacher_BK.new_zeros(1, teacher_BK.shape[1]),
    )


def train_step(
    state: State, recipe: Recipe, clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None = None
) -> Tensor:
    """One step on one batch, or on this process's rows of it (`State.part`), which may be none.

    Args:
        clean_BCHW: fp32, in the networks' memory format, pixels in [0, 1], on the student's device.
        label_B: int64.
        teacher_BK: the teacher's logits on `clean_BCHW` where they are known; it is asked otherwise.
    Returns:
        The loss of the whole batch, a scalar on the device.
    """
    state.part.idle = not len(label_B)
    if state.part.idle:
        clean_BCHW, label_B, teacher_BK = stand_in(clean_BCHW, label_B, teacher_BK)
        recipe = replace(recipe, attack_bn="eval")  # whatever has no rows must move no statistics
    attacked = state.attacked()
    targets = observe(state, recipe, attacked, clean_BCHW, label_B, teacher_BK)
    adv_BCHW = attack(state, recipe, attacked, clean_BCHW, targets)
    targets = observe_attacked(state, recipe, adv_BCHW, targets)
    loss = descend(state, recipe, recipe.images(clean_BCHW, adv_BCHW, targets), targets)
    state.noise_seed += 1
    return loss
