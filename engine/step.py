"""One training step of adversarial distillation: ask the teacher, attack the student, descend.

No value is read on the host, so that the device never waits. Dimension key: B batch, C channels, H, W, K classes.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retemper.engine.attack import module_mode, pgd
from retemper.engine.fold import Folded
from retemper.engine.models import channels_last
from retemper.engine.recipe import ClassSums, Recipe, Targets
from retemper.kernels import class_sums


@dataclass
class State:
    """What changes during a run, and the networks. No tensor in it changes its address, so that a step can be captured.

    Attributes:
        teacher: frozen; as `Moves.fold` says, folded.
        twin: the student as the attack sees it, folded anew in every step; None where it sees the student itself.
        sums, loss_sum: of the epoch so far; `start_epoch` empties them.
        noise_seed: (1,) int64, the seed of the next random start; every step adds one.
    """

    student: nn.Module
    teacher: nn.Module | None
    twin: Folded | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: torch.dtype
    class_state: dict[str, Tensor]
    ones_K: Tensor
    noise_seed: Tensor
    sums: dict[str, ClassSums]
    loss_sum: Tensor

    @classmethod
    def begin(
        cls, recipe: Recipe, student: nn.Module, teacher: nn.Module | None, num_classes: int, device: torch.device
    ) -> "State":
        """Everything as it is before the first step; the student moves to `device`.

        Raises:
            ValueError: `recipe.fold`, and torch.fx cannot trace the student or the teacher.
        """
        student = channels_last(student, device) if recipe.channels_last else student.to(device)
        precision, epilogue = recipe.dtype_on(device), recipe.epilogue_on(device)
        if teacher is not None and recipe.fold:
            teacher = Folded(teacher, precision, epilogue, recipe.pad_stem)
        twin = None
        if recipe.fold and recipe.attack_bn == "eval" and recipe.attack_steps:
            twin = Folded(student, precision, epilogue, recipe.pad_stem)
        return cls(
            student=student,
            teacher=teacher,
            twin=twin,
            optimizer=sgd(recipe, student, device),
            scaler=torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
            precision=precision,
            class_state={name: value.to(device) for name, value in recipe.class_state(num_classes).items()},
            ones_K=torch.ones(num_classes, device=device),
            noise_seed=torch.zeros(1, dtype=torch.int64, device=device),
            sums={name: ClassSums.zeros(num_classes, device) for name in recipe.forwards},
            loss_sum=torch.zeros((), device=device),
        )

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision for one phase; a context for two would carry casts made without gradient into the second."""
        device = self.ones_K.device.type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision != torch.float32)

    def start_epoch(self, lr: float, noise_seed: int) -> None:
        """Empty the sums, and set the learning rate and the seed of the first random start."""
        for sums in self.sums.values():
            sums.clear()
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

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over the weights, the optimizer's and the scaler's state and the class state that a run saved.

        Raises:
            RuntimeError, ValueError, KeyError, TypeError, AttributeError: it is not of such a run.
        """
        self.student.load_state_dict(saved["student"])
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr  # the tensor that a captured step reads, not the saved one's copy
        self.scaler.load_state_dict(saved["scaler"])
        self.move_classes(saved["class_state"])

    def attacked(self) -> nn.Module:
        """What the attack looks at: the student as it is now."""
        return self.student if self.twin is None else self.twin.refresh()

    def add(self, logits: Mapping[str, Tensor], label_B: Tensor, loss: Tensor) -> None:
        """Count a step: per-class cross-entropy, correct predictions and images of each forward, and the loss."""
        for name, logits_BK in logits.items():
            self.sums[name].add(*class_sums(logits_BK.detach(), label_B, self.ones_K.numel()))
        self.loss_sum += loss * label_B.numel()


def sgd(recipe: Recipe, student: nn.Module, device: torch.device) -> torch.optim.SGD:
    """The optimizer; on a GPU its rate is a tensor there, so that a captured step follows the schedule."""
    return torch.optim.SGD(
        student.parameters(),
        lr=torch.tensor(recipe.lr, device=device) if device.type == "cuda" and recipe.fused_sgd else recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=recipe.fused_sgd,  # with a scaler the fused step alone does not wait for the device
    )


def observe(
    state: State, recipe: Recipe, attacked: nn.Module, clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None
) -> Targets:
    """The teacher's logits on the clean images, and the student's own where the method asks for them."""
    own_BK = None
    with torch.no_grad(), state.autocast():
        if state.teacher is not None and teacher_BK is None:
            teacher_BK = state.teacher(clean_BCHW)
        if recipe.needs_own_prediction:
            with module_mode(attacked, recipe.attack_bn):
                own_BK = attacked(clean_BCHW)
    return Targets(label_B=label_B, teacher_BK=teacher_BK, own_BK=own_BK, state=state.class_state, ones_K=state.ones_K)


def attack(state: State, recipe: Recipe, attacked: nn.Module, clean_BCHW: Tensor, targets: Targets) -> Tensor:
    """The inner maximisation: adversarial images like `clean_BCHW`."""
    with state.autocast():
        return pgd(
            attacked,
            clean_BCHW,
            objective=recipe.objective(targets),
            steps=recipe.attack_steps,
            step=recipe.attack_step,
            eps=recipe.eps,
            start=recipe.attack_start,
            clip_start=recipe.clip_start,
            bn_mode=recipe.attack_bn,
            seed=state.noise_seed,
        )


def descend(state: State, recipe: Recipe, images: Mapping[str, Tensor], targets: Targets) -> Tensor:
    """The outer minimisation: one step of the optimizer on `images`, "adv" and "clean"; the loss before it."""
    state.student.train()
    with state.autocast():
        logits = {name: state.student(images[name]) for name in recipe.forwards}
        loss = recipe.loss(logits, targets)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.add(logits, targets.label_B, loss.detach())
    return loss.detach()


def train_step(
    state: State, recipe: Recipe, clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None = None
) -> Tensor:
    """One step on one batch.

    Args:
        clean_BCHW: fp32, in the networks' memory format, pixels in [0, 1], on the student's device.
        label_B: int64.
        teacher_BK: the teacher's logits on `clean_BCHW` where they are known; it is asked otherwise.
    Returns:
        The loss, a scalar on the device.
    """
    attacked = state.attacked()
    targets = observe(state, recipe, attacked, clean_BCHW, label_B, teacher_BK)
    adv_BCHW = attack(state, recipe, attacked, clean_BCHW, targets)
    loss = descend(state, recipe, {"adv": adv_BCHW, "clean": clean_BCHW}, targets)
    state.noise_seed += 1
    return loss
