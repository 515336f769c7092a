"""One training step of adversarial distillation: ask the teacher, attack the student, descend.

No value is read on the host, so that the device never waits. Dimension key: B batch, C channels, H, W, K classes.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from retemper.engine.attack import module_mode, pgd
from retemper.engine.models import channels_last
from retemper.engine.recipe import ClassSums, Recipe, Targets
from retemper.kernels import class_sums


@dataclass
class State:
    """What changes during a run, and the two networks. `sums` and `loss_sum` start anew every epoch."""

    student: nn.Module
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: torch.dtype
    class_state: dict[str, Tensor]
    ones_K: Tensor
    noise_seed: Tensor  # (1,) int64: the seed of the next random start; every step adds one
    sums: dict[str, ClassSums] = field(default_factory=dict)
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def begin(
        cls, recipe: Recipe, student: nn.Module, teacher: nn.Module | None, num_classes: int, device: torch.device
    ) -> "State":
        """Everything as it is before the first step; the student moves to `device`, channels-last."""
        student = channels_last(student, device)
        precision = precision_on(device, recipe.precision)
        state = cls(
            student=student,
            teacher=teacher,
            optimizer=torch.optim.SGD(
                student.parameters(),
                lr=recipe.lr,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                nesterov=recipe.nesterov,
                fused=device.type == "cuda",  # with a scaler the fused step alone does not wait for the device
            ),
            scaler=torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
            precision=precision,
            class_state={name: value.to(device) for name, value in recipe.class_state(num_classes).items()},
            ones_K=torch.ones(num_classes, device=device),
            noise_seed=torch.zeros(1, dtype=torch.int64, device=device),
        )
        state.start_epoch()
        return state

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision for one phase; a context for two would carry casts made without gradient into the second."""
        device = self.ones_K.device.type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision != torch.float32)

    def start_epoch(self) -> None:
        """Empty the sums."""
        self.sums, self.loss_sum = {}, torch.zeros((), device=self.ones_K.device)

    def add(self, logits: dict[str, Tensor], label_B: Tensor, loss: Tensor) -> None:
        """Count a step: per-class cross-entropy, correct predictions and images of each forward, and the loss."""
        for name, logits_BK in logits.items():
            new = class_sums(logits_BK.detach(), label_B, self.ones_K.numel())
            old = self.sums.get(name)
            total = new if old is None else (old.loss_K + new[0], old.correct_K + new[1], old.count_K + new[2])
            self.sums[name] = ClassSums(loss_K=total[0], correct_K=total[1], count_K=total[2])
        self.loss_sum += loss * label_B.numel()


def precision_on(device: torch.device, name: str) -> torch.dtype:
    """The dtype a recipe means: "auto" is bf16 on a GPU that has it, and fp32 on a CPU, where that is faster."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def observe(state: State, recipe: Recipe, clean_BCHW: Tensor, label_B: Tensor) -> Targets:
    """The teacher's logits on the clean images, and the student's own where the method asks for them."""
    teacher_BK = own_BK = None
    with torch.no_grad(), state.autocast():
        if state.teacher is not None:
            teacher_BK = state.teacher(clean_BCHW)
        if recipe.needs_own_prediction:
            with module_mode(state.student, recipe.attack_bn):
                own_BK = state.student(clean_BCHW)
    return Targets(label_B=label_B, teacher_BK=teacher_BK, own_BK=own_BK, state=state.class_state, ones_K=state.ones_K)


def train_step(state: State, recipe: Recipe, clean_BCHW: Tensor, label_B: Tensor) -> Tensor:
    """One step on one batch.

    Args:
        clean_BCHW: fp32, channels-last, pixels in [0, 1], on the student's device.
        label_B: int64.
    Returns:
        The loss, a scalar on the device.
    """
    targets = observe(state, recipe, clean_BCHW, label_B)
    with state.autocast():
        adv_BCHW = pgd(
            state.student,
            clean_BCHW,
            objective=lambda logits_BK: recipe.attack_loss(logits_BK, targets),
            steps=recipe.attack_steps,
            step=recipe.attack_step,
            eps=recipe.eps,
            start=recipe.attack_start,
            clip_start=recipe.clip_start,
            bn_mode=recipe.attack_bn,
            seed=state.noise_seed,
        )
    images = {"adv": adv_BCHW, "clean": clean_BCHW}
    state.student.train()
    with state.autocast():
        logits = {name: state.student(images[name]) for name in recipe.forwards}
        loss = recipe.loss(logits, targets)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.noise_seed += 1
    state.add(logits, label_B, loss.detach())
    return loss.detach()
