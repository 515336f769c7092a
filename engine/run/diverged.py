"""Training that leaves the finite numbers: how it is noticed, and what is kept of it to look at."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retemper.engine.run.run_folder import RunFolder
from retemper.engine.state import State
from retemper.errors import Diverged
from retemper.loaders import Batch

SHOWN = 3  # images named in the message
LOWER = "Try a lower --lr"


class FiniteWatch:
    """Looks, now and then, whether every step was finite, and remembers the statistics of the last time that it was."""

    def __init__(self, state: State, folder: RunFolder, classes: tuple[str, ...]) -> None:
        self.state, self.folder, self.classes = state, folder, classes
        self.statistics: dict[str, Tensor] = {}  # of the student's batch norm

    def is_finite(self) -> bool:
        """Say whether every step so far was finite; the device is waited for."""
        finite = int(self.state.guard.seed) < 0
        if finite:
            self.statistics = {name: value.clone() for name, value in self.state.student.named_buffers()}
        return finite

    def require(
        self,
        epoch: int,
        first_seed: int,
        batch_at: Callable[[int], tuple[Batch, Tensor | None]],
        kept: Callable[[], str],
    ) -> None:
        """Raise where a step of `epoch` was stopped before its update, and save what there is to look at.

        Args:
            first_seed: the noise seed of the epoch's first step.
            batch_at: the batch, and the teacher's logits where they were asked for ahead, of a step from 0.
            kept: says what is on the disk.
        Raises:
            Diverged: a step was not finite.
        """
        if self.is_finite():
            return
        guard, state = self.state.guard, self.state
        step = int(guard.seed) - first_seed + 1
        batch, teacher_BK = batch_at(step - 1)
        found = PostMortem(
            epoch=epoch,
            step=step,
            loss=float(guard.loss),
            batch=batch,
            teacher_BK=teacher_BK,
            weights=state.student.state_dict() | self.statistics,
            class_state=state.class_state,
            classes=self.classes,
        )
        self.folder.save_diverged(found.content())
        advice = found.advice(state.precision is not torch.float32)
        held = f"the update was not made; {self.folder.diverged} holds the batch and the weights before it"
        raise Diverged(f"{found.words()}; {held}; {kept()}. {advice}")


@dataclass(frozen=True, kw_only=True)
class PostMortem:
    """The first step whose loss or gradient was not finite.

    Attributes:
        step: of the epoch, from 1.
        teacher_BK: the teacher's logits, where they were asked for ahead.
        weights: the student's, before the update; its statistics are of the last time that the host looked.
    """

    epoch: int
    step: int
    loss: float
    batch: Batch
    teacher_BK: Tensor | None
    weights: Mapping[str, Tensor]
    class_state: Mapping[str, Tensor]
    classes: tuple[str, ...]

    def words(self) -> str:
        """Say what is not finite, when, and on which images."""
        what = f"the loss is {self.loss:g}"
        if math.isfinite(self.loss):
            what = f"a gradient is not finite ({what})"
        what = f"{what} at epoch {self.epoch}, step {self.step}"
        if rows := self._without_teacher():
            return f"{what}: the teacher's answers to {self._images(rows)} are not finite"
        return f"{what}, on {self._images(list(range(len(self.batch.label))))}"

    def advice(self, half: bool) -> str:
        """Say what to try; `half`: the networks compute in half precision."""
        if self._without_teacher():
            return "Try another teacher" + " or --precision fp32" * half
        return LOWER + " or --precision fp32" * half

    def _without_teacher(self) -> list[int]:
        """Return the rows of the batch for which the teacher's logits are not finite."""
        return [] if self.teacher_BK is None else (~self.teacher_BK.isfinite().all(1)).nonzero()[:, 0].tolist()

    def _images(self, rows: list[int]) -> str:
        """Name some of the batch, by position in the data set and class."""
        index, label = self.batch.index.tolist(), self.batch.label.tolist()
        named = ", ".join(f"{index[row]} ({self.classes[label[row]]})" for row in rows[:SHOWN])
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        return f"image{'s' * (len(rows) > 1)} {named}{more}"

    def content(self) -> dict[str, Any]:
        """Return what is written to a file: numbers, and tensors on the host."""
        batch = {name: value.cpu() for name, value in vars(self.batch).items()}
        return {
            "epoch": self.epoch,
            "step": self.step,
            "loss": self.loss,
            **batch,
            "teacher": None if self.teacher_BK is None else self.teacher_BK.cpu(),
            "student": {name: value.cpu() for name, value in self.weights.items()},
            "class_state": {name: value.cpu() for name, value in self.class_state.items()},
        }
