"""The steps of an epoch: every batch that is left of it, with one training step each."""

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import islice

import numpy as np
from torch import Tensor

from retemper.console import Progress
from retemper.engine.run.diverged import FiniteWatch
from retemper.engine.run.pace import Pace
from retemper.engine.run.saving import Saver
from retemper.engine.run.teacher_logits import TeacherLogits
from retemper.engine.speed.capture import captured
from retemper.engine.state import clean_images
from retemper.engine.step import train_step
from retemper.errors import DataError, Interrupted
from retemper.interrupts import asked, undisturbed
from retemper.loaders import Batch, Loader

STEPS_BETWEEN_READS = {
    "cuda": 50,
    "cpu": 1,
}  # when the host looks at the loss: for the bar, whether it is finite, saves


class Steps:
    """Runs the steps of one epoch after another.

    Args:
        teacher: where the teacher's logits come from; None where the step asks it.
        pace: counts the steps, and says how many of them the run is to take.
    """

    def __init__(
        self, loader: Loader, teacher: TeacherLogits | None, saver: Saver, watch: FiniteWatch, pace: Pace
    ) -> None:
        self.loader, self.teacher, self.saver, self.watch, self.pace = loader, teacher, saver, watch, pace
        self.recipe, self.state = saver.recipe, saver.state
        self.order = np.empty(0, np.int64)
        captures = self.recipe.execution.captures_on(self.state.device)
        self.step = captured(self._step, self.state.phase) if captures else self._step

    def run(self, epoch: int) -> bool:
        """Train on every batch of `epoch` that is left; say whether that is all of it, or the run is cut here.

        Raises:
            KeyboardInterrupt: a signal came; steps that were begun are done.
            Diverged: a loss or a gradient is not finite.
        """
        self._leave_together()
        saver, ranks, size = self.saver, self.saver.ranks, self.recipe.optim.batch_size
        allowed = self.pace.allowed(epoch)
        if allowed <= saver.done < len(self.loader):
            return False
        if not saver.done:
            saver.start_epoch(epoch)
        looks, total = STEPS_BETWEEN_READS[self.state.device.type], self.loader.num_images
        done = min(saver.done * size, total)
        what, whole = f"epoch {epoch}/{self.recipe.optim.epochs}", lambda: self.pace.left_s(epoch, saver.done)
        self.pace.begin()
        with (
            Progress(what, min(total, allowed * size), done=done, whole=whole) as progress,
            closing(self._batches(epoch, saver.done)) as batches,
        ):
            for batch, teacher_BK in batches:
                rows = min(size, total - saver.done * size)
                self.state.part.take(len(batch.label), rows)
                self.state.begin_step(self.recipe, epoch, saver.done, len(self.loader))
                with undisturbed():
                    loss = self._take(epoch, batch, teacher_BK)
                    saver.done += 1
                self.pace.step()
                saver.look()
                look = saver.done % looks == 0
                if look and not self.watch.is_finite():
                    break
                progress.advance(rows, self._words(loss) if look else None)
                if look:
                    self._leave_together()
                    # all processes do the same, and the host has waited for the device
                    if ranks.any(time.monotonic() >= saver.next_save) == [True]:
                        with undisturbed():
                            self._save_here()
                if saver.done == allowed < len(self.loader):
                    break
        self._require_finite(epoch)
        return saver.done >= len(self.loader)

    @contextmanager
    def saved_on_leaving(self) -> Iterator[None]:
        """Save what was trained where the block is left by a signal or because the images cannot be read.

        Raises:
            Interrupted: a signal came; the message says what is saved.
            DataError: as it was.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(self.save_here()) from None
        except DataError:
            if not self.saver.ranks.joined:  # of several processes, the others are somewhere else
                self.save_here()
            raise

    def _take(self, epoch: int, batch: Batch, teacher_BK: Tensor | None) -> Tensor:
        """Take the next step, and carry what is kept of the images to and fro around it; return the loss."""
        prior = self.state.prior
        if prior is None:
            return self.step(batch.image, batch.view, batch.label, teacher_BK, None)
        index = np.empty(0, np.int64)
        if prior.on_disk:
            index, self.order = np.split(self._order(epoch), [len(batch.label)])
        prior.begin_step(index)
        loss = self.step(batch.image, batch.view, batch.label, teacher_BK, batch.index)
        prior.end_step(index)
        return loss

    def _order(self, epoch: int) -> np.ndarray:
        """Return which images the batches from the next one on hold, (M,) int64 on the host."""
        if not len(self.order):
            self.order, _ = self.loader.schedule(epoch, self.saver.done)
        return self.order

    def _step(
        self, image: Tensor, view: Tensor, label: Tensor, teacher_BK: Tensor | None, index: Tensor | None
    ) -> Tensor:
        """Train on one batch; return the loss."""
        clean = clean_images(self.recipe, image, view)
        return train_step(self.state, self.recipe, clean, label, teacher_BK, index, view)

    def _words(self, loss: Tensor) -> str:
        """Return what the bar says: the loss and, where it moves from step to step, the learning rate."""
        rate = f"  lr {self.state.rate:.3g}" * self.recipe.optim.lr_moves
        return f"loss {loss.item():.4f}{rate}"

    def _leave_together(self) -> None:
        """Raise KeyboardInterrupt where a signal came to one of several processes: each does so at this place."""
        ranks = self.saver.ranks
        if ranks.joined and ranks.any(asked()) == [True]:
            raise KeyboardInterrupt

    def save_here(self) -> str:
        """Save the state after the newest step, where that is not done yet; say where that is, once it is there."""
        saver = self.saver
        saver.settle()
        if saver.saved != (saver.finished, saver.done):
            self._require_finite(saver.finished + 1)
            self._save_here()
            saver.settle()
        saver.ranks.barrier()
        return saver.where(len(self.loader))

    def _save_here(self) -> None:
        if self.teacher is not None:
            self.teacher.keep()
        self.saver.save_here()

    def _require_finite(self, epoch: int) -> None:
        self.watch.require(epoch, self.saver.noise_seed(epoch), lambda step: self._batch(epoch, step), self.saver.kept)

    def _batch(self, epoch: int, step: int) -> tuple[Batch, Tensor | None]:
        with closing(self._batches(epoch, step)) as batches:
            return next(batches)

    def _batches(self, epoch: int, done: int) -> Generator[tuple[Batch, Tensor | None], None, None]:
        """Yield each batch after so many, with the teacher's logits where they are asked for ahead.

        The teacher is asked for the same batches at once as if nothing had come between: the bits may depend on it.
        """
        if self.teacher is None:
            yield from ((batch, None) for batch in self.loader.epoch(epoch, done))
            return
        first = done - done % self.teacher.ahead
        answered = self.teacher.epoch(self.loader.epoch(epoch, first), *self.loader.schedule(epoch, first))
        yield from islice(answered, done - first, None)
