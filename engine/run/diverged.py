"""Training that leaves the finite numbers: how it is noticed, and what is kept of it to look at."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from retemper.engine.run.host_memory import on_host
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
            kept: says what is on the disk, once all is saved.
        Raises:
            Diverged: a step was not finite.
        """
        if self.is_finite():
            return
        held = kept()  # where the newest save failed, that is said instead
        state, loss = self.state, float(self.state.guard.loss)
        step = int(state.guard.seed) - first_seed + 1
        batch, teacher_BK = batch_at(step - 1)
        content = {"epoch": epoch, "step": step, "loss": loss, **vars(batch), "teacher": teacher_BK}
        weights = state.student.state_dict() | self.statistics
        self.folder.save_diverged(on_host(content | {"student": weights, "class_state": state.class_state}))

        what = f"the loss is {loss:g}"
        if math.isfinite(loss):
            what = f"a gradient is not finite ({what})"
        what = f"{what} at epoch {epoch}, step {step}"
        if rows := [] if teacher_BK is None else (~teacher_BK.isfinite().all(1)).nonzero()[:, 0].tolist():
            what, advice = (
                f"{what}: the teacher's answers to {self._images(batch, rows)} are not finite",
                "Try another teacher",
            )
        else:
            what, advice = f"{what}, on {self._images(batch, list(range(len(batch.label))))}", LOWER
        advice += " or --precision fp32" * (state.precision is not torch.float32)
        there = f"the update was not made; {self.folder.diverged} holds the batch and the weights before it"
        raise Diverged(f"{what}; {there}; {held}. {advice}")

    def _images(self, batch: Batch, rows: list[int]) -> str:
        """Name some rows of the batch, by position in the data set and class."""
        index, label = batch.index.tolist(), batch.label.tolist()
        classes = [*self.classes, "no label"]
        named = ", ".join(
            f"{f'extra {-1 - index[row]}' if index[row] < 0 else index[row]} ({classes[label[row]]})"
            for row in rows[:SHOWN]
        )
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        return f"image{'s' * (len(rows) > 1)} {named}{more}"
