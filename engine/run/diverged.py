"""What to look at after training left the finite numbers: the batch, and the weights before the update on it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retemper.loaders import Batch

SHOWN = 3  # images named in the message
LOWER = "Try a lower --lr"


@dataclass(frozen=True, kw_only=True)
class PostMortem:
    """The first step whose loss or gradient was not finite.

    Attributes:
        step: of the epoch, from 1.
        teacher_BK: the teacher's answers, where they were asked for ahead.
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
        """What is not finite, when, and on which images."""
        what = f"the loss is {self.loss:g}"
        if math.isfinite(self.loss):
            what = f"a gradient is not finite ({what})"
        what = f"{what} at epoch {self.epoch}, step {self.step}"
        if rows := self._without_teacher():
            return f"{what}: the teacher's answers to {self._images(rows)} are not finite"
        return f"{what}, on {self._images(list(range(len(self.batch.label))))}"

    def advice(self, half: bool) -> str:
        """What to try; `half`: the networks compute in half precision."""
        if self._without_teacher():
            return "Try another teacher" + " or --precision fp32" * half
        return LOWER + " or --precision fp32" * half

    def _without_teacher(self) -> list[int]:
        """The rows of the batch for which the teacher gave no numbers."""
        return [] if self.teacher_BK is None else (~self.teacher_BK.isfinite().all(1)).nonzero()[:, 0].tolist()

    def _images(self, rows: list[int]) -> str:
        """Some of the batch, by position in the data set and class."""
        index, label = self.batch.index.tolist(), self.batch.label.tolist()
        named = ", ".join(f"{index[row]} ({self.classes[label[row]]})" for row in rows[:SHOWN])
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        return f"image{'s' * (len(rows) > 1)} {named}{more}"

    def content(self) -> dict[str, Any]:
        """For a file: numbers, and tensors on the host."""
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
