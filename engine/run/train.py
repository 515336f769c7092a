"""One training run, from a recipe to its folder: epochs, class state, selection, checkpoints, resume.

The same command again goes on where the run was, between any two steps: every random number comes from (seed, epoch,
image) or (seed, step), so that a resumed run ends in the weights of an undisturbed one: bit for bit on a CPU with as
many threads, and on a GPU as far as its convolutions repeat themselves (`Job.deterministic` makes them).

Several processes (parallel/ranks.py) train one network on their own rows of every batch. They hold equal weights after
each step and equal networks after each epoch; the first of them writes the files, and all leave at the same step.
"""

import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retemper.console import Progress, say
from retemper.engine.checkpoints.header import Facts
from retemper.engine.class_report import by_class
from retemper.engine.device import (
    cpu_threads,
    device_name,
    exact_fp32,
    is_out_of_memory,
    repeatable,
    tuned_convolutions,
)
from retemper.engine.epoch_stats import EpochStats, HeldOut
from retemper.engine.models import create_model
from retemper.engine.predict import Attack, balanced_order, predictions
from retemper.engine.recipe import describe
from retemper.engine.run.diverged import LOWER, PostMortem
from retemper.engine.run.interrupts import asked, undisturbed
from retemper.engine.run.job import Job
from retemper.engine.run.memory import memory_advice
from retemper.engine.run.metrics import Board
from retemper.engine.run.networks import Networks
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.selection import Best, newest_best, validate
from retemper.engine.run.snapshot import epoch_so_far, go_on, own_part, restore, snapshot, take_own_part
from retemper.engine.run.teacher_logits import teacher_logits
from retemper.engine.speed.capture import captured
from retemper.engine.state import State, clean_images
from retemper.engine.step import train_step
from retemper.errors import DataError, Diverged, Interrupted, UsageError
from retemper.files import finite
from retemper.loaders import Batch, Loader, Split, ViewSpace, holdout_split, load_split, make_loader, split_of_arrays
from retemper.provenance import commit, versions

STEPS_BETWEEN_READS = {"cuda": 50, "cpu": 1}  # when the host looks at the loss: for the bar, and whether it is finite


def train(job: Job) -> Path:
    """Run `job` to its end, from wherever an earlier process left it.

    Returns:
        The run's folder.
    Raises:
        UsageError: the folder belongs to another run; an option does not fit the data.
        DataError: the data or the teacher cannot be used.
        Diverged: the loss or a gradient is not finite any more; what was saved before stays.
        Interrupted: a signal came; the state is saved.
        RankLost: another process is gone.
    """
    folder, ranks = RunFolder(job.out, job.ranks.rank), job.ranks
    locked = folder.locked() if ranks.is_first else nullcontext()
    together = undisturbed() if ranks.joined else nullcontext()  # none leaves while the others wait for it
    full = exact_fp32() if job.recipe.precision == "fp32" else nullcontext()
    convolutions = repeatable() if job.deterministic else tuned_convolutions()
    with together, locked, cpu_threads(job.recipe.cpu_threads), convolutions, full, memory_advice(job):
        run = Run(job, folder)
        first = run.resume()
        if first > job.recipe.epochs:
            say(f"{job.name}: all {job.recipe.epochs} epochs are done in {job.out}")
            ranks.barrier()
            return job.out
        where = f"epochs {first}{f' (after step {run.done})' if run.done else ''} to {job.recipe.epochs}"
        processes = f"{ranks.world_size} processes, each on " if ranks.joined else ""
        say(f"{job.name}: {where} on {processes}{device_name(job.device)}; {run.loader.description}")
        try:
            for epoch in range(first, job.recipe.epochs + 1):
                run.epoch(epoch)
        finally:
            run.loader.close()
        ranks.barrier()
        say(f"{job.name}: done, best epoch {run.best.epoch}; next: retemper evaluate {job.out}")
    return job.out


class Run:
    """A job with its data, networks and state in memory.

    Attributes:
        finished, done: the epochs, and the steps of the next one, that the state is behind.
        saved: both as they are on the disk.
        tail: the state at the end of the epoch's steps, while that epoch is being concluded.
    """

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self.job, self.folder, self.recipe, self.ranks = job, folder, job.recipe, job.ranks
        recipe, device = job.recipe, job.device
        self.split = load_split(recipe.dataset, "train", job.data_root, recipe.image_size)
        self.num_classes, self.channels = len(self.split.classes), self.split.shape[2]
        self.board = Board(folder, self.split.classes) if job.tensorboard and self.ranks.is_first else None
        train_indices, held_indices = np.arange(len(self.split)), np.arange(0)
        if recipe.select_on == "holdout" and recipe.holdout_per_class:
            train_indices, held_indices = holdout_split(self.split.labels, recipe.holdout_per_class)
        if recipe.images_per_class is not None:
            order = balanced_order(self.split.labels[train_indices], recipe.images_per_class * self.num_classes)
            train_indices = np.sort(train_indices[order])
        torch.manual_seed(job.seed)
        student = create_model(recipe.student, self.num_classes, channels=self.channels)
        self.facts = Facts(
            model=recipe.student,
            num_classes=self.num_classes,
            channels=self.channels,
            image_size=recipe.image_size,
            dataset=recipe.dataset,
            eps=recipe.eps,
        )
        self.networks = Networks(job, self.split)
        teacher, self.teacher_source = self.networks.teacher(recipe.teacher_model, job.teacher)
        clean_teacher, self.clean_teacher_source = self.networks.teacher(recipe.clean_teacher_model, job.clean_teacher)
        self.start_source = self.networks.start(student)
        try:
            self.state = State.begin(recipe, student, teacher, self.num_classes, device, clean_teacher, self.ranks)
            self.step = captured(self._step) if recipe.captures_on(device) else self._step
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.best = Best()
        self.finished = self.done = 0
        self.saved = (0, 0)
        self.tail: dict[str, Any] | None = None
        self.started = time.monotonic()  # when the epoch would have begun, had it not been cut in two
        self.next_save = self.started + job.save_every
        self.statistics: dict[str, Tensor] = {}  # of the student, when the host last looked
        self.loader: Loader = make_loader(
            recipe.loader,
            self.split,
            indices=train_indices,
            batch_size=recipe.batch_size,
            seed=job.seed,
            views=ViewSpace(recipe.padding, recipe.flip),
            device=device,
            cache_dir=job.cache,
            beton=job.beton,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        last = self.loader.num_images % recipe.batch_size or recipe.batch_size
        if recipe.batch_norm == "synced" and last < self.ranks.world_size:
            raise UsageError(
                f"an epoch ends in a batch of {last} of {self.loader.num_images} images, too few for synced batch norm "
                f"on {self.ranks.world_size} processes: use another --batch-size"
            )
        self.held = self._held(held_indices)
        self.teacher_logits = teacher_logits(job, self.state, self.loader, self.split, self.teacher_source)

    def _held(self, indices: np.ndarray) -> Split | None:
        """The images that choose the best epoch: the held-out ones, in memory, or the test images where asked for."""
        if self.recipe.select_on == "test":
            return load_split(self.recipe.dataset, "test", self.job.data_root, self.recipe.image_size)
        if len(indices) == 0:
            return None
        images = np.concatenate([batch.image.cpu().numpy() for batch in self.loader.walk(indices)])
        labels = self.split.labels[indices]
        return split_of_arrays(self.split.name, "train", images, labels, self.split.classes, self.split.fingerprint)

    def resume(self) -> int:
        """Begin the folder or take up the state in it; the epoch to run next."""
        found = self.ranks.broadcast(self._found() if self.ranks.is_first else {})
        saved = found["state"]
        if saved is None:
            self._validate(0)
            return 1
        processes = saved.get("world_size", 1)
        if saved["step"] and processes != self.ranks.world_size:
            raise UsageError(
                f"{self.folder.state} was saved within an epoch, on {processes} processes: start as many again "
                "(between epochs the number may change)"
            )
        try:
            self._take_up(saved)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise DataError(f"{self.folder.state} is not this run's: delete the folder to start it anew") from None
        self.best = Best(**found["best"])
        self.started = time.monotonic() - saved["seconds"]
        return self.finished + 1

    def _found(self) -> dict[str, Any]:
        """Begin the folder, or say what is in it: the state, and the best epoch so far."""
        job = self.job
        if not self.folder.state.exists():
            self.networks.check(self.held)
        self.folder.begin(
            {
                "method": job.method,
                "setting": job.setting,
                "recipe": describe(self.recipe),
                "seed": job.seed,
                "classes": list(self.split.classes),
                "channels": self.channels,
                "out": str(job.out),
                "data_root": None if job.data_root is None else str(job.data_root),
                "teacher": self.teacher_source,
                "clean_teacher": self.clean_teacher_source,
                "start": self.start_source,
                "loader": self.loader.description,
                "versions": versions(),
                "device": device_name(job.device),
                "processes": self.ranks.world_size,
                "commit": commit(),
                "started": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
        saved = self.folder.load_state()
        best = Best() if saved is None else newest_best(self.folder, saved["best"])
        return {"state": saved, "best": best.saved()}

    def _take_up(self, saved: dict[str, Any]) -> None:
        """Go on from a saved state."""
        restore(self.state, saved)
        self.finished, self.done = self.saved = saved["epoch"], saved["step"]
        if self.done:
            self._start_epoch(self.finished + 1)
        if self.ranks.joined and saved.get("world_size") == self.ranks.world_size:
            take_own_part(self.state, saved["processes"][self.ranks.rank], running=self.done > 0)
        elif self.done:
            go_on(self.state, saved["so_far"])

    def _start_epoch(self, epoch: int) -> None:
        self.state.start_epoch(self.recipe, epoch, self._noise_seed(epoch))

    def _noise_seed(self, epoch: int) -> int:
        """Of the epoch's first step; each step adds one."""
        return (self.job.seed << 40) + (epoch << 24)

    def epoch(self, epoch: int) -> None:
        """Train for one epoch, or for what is left of it, move the class state, choose, and save.

        Raises:
            Interrupted, DataError: a signal came, or the loader failed; what was trained is saved.
            Diverged: the loss or a gradient is not finite.
        RankLost: another process is gone; what was saved before is whole.
        """
        try:
            self._leave_together()
            self._pass(epoch)
            self._conclude(epoch)
        except KeyboardInterrupt:
            raise Interrupted(self._save_here()) from None
        except DataError:
            if not self.ranks.joined:  # else the others are somewhere else
                self._save_here()
            raise

    def _leave_together(self) -> None:
        """Raises KeyboardInterrupt: a signal came to one of several processes; each does so at this place."""
        if self.ranks.joined and self.ranks.any(asked()) == [True]:
            raise KeyboardInterrupt

    def _conclude(self, epoch: int) -> None:
        """After the epoch's steps: move the class state, choose, and save."""
        recipe, state = self.recipe, self.state
        seconds = time.monotonic() - self.started
        if not self.ranks.joined:  # else no signal comes between
            self.tail = self._snapshot(epoch - 1, self.done)
        state.meet()
        if not self.ranks.hold_same_bits([*state.student.state_dict().values()]):
            raise Diverged(f"the processes hold different weights after epoch {epoch}; {self._kept()}")
        line = self._line(epoch, float(state.loss_sum) / self.loader.num_images, seconds)
        if self.recipe.validates:
            self._validate(epoch)
        else:
            state.move_classes(recipe.next_class_state(state.class_state, state.stats(), epoch))
        self._follow(epoch)
        self._select(epoch, line)
        with undisturbed():
            self._save(epoch, line)
            self._report(line)

    def _validate(self, epoch: int) -> None:
        """Move the class state by the held-out images, where the method does so."""
        if not self.recipe.validates:
            return
        held = self._validated()
        seen = self.state.stats(held) if epoch else EpochStats(held=held)
        self.state.move_classes(self.recipe.next_class_state(self.state.class_state, seen, epoch))

    def _validated(self) -> HeldOut:
        """How the student fares on the held-out images."""
        assert self.held is not None
        return validate(self.state.student, self.recipe, self.held, self.num_classes, self.job.device, ranks=self.ranks)

    def _follow(self, epoch: int) -> None:
        """Take the epoch's weights into their average, where that is done by epochs."""
        recipe, average = self.recipe, self.state.average
        if average is None or recipe.average_every != "epoch":
            return
        if recipe.average_above and epoch >= recipe.average_from:
            held = self._validated()
            if held.robust_accuracy_K.min() < recipe.average_above:
                average.skip(self.state.student)
                return
        average.follow(self.state.student)

    def _pass(self, epoch: int) -> None:
        """Every batch of the epoch that is left."""
        if not self.done:
            self.started = time.monotonic()
            self._start_epoch(epoch)
        looks = STEPS_BETWEEN_READS[self.job.device.type]
        progress = Progress(f"epoch {epoch}/{self.recipe.epochs}", self.loader.num_images)
        with progress, closing(self._batches(epoch, self.done)) as batches:
            progress.advance(min(self.done * self.recipe.batch_size, self.loader.num_images))
            for batch, teacher_BK in batches:
                rows = min(self.recipe.batch_size, self.loader.num_images - self.done * self.recipe.batch_size)
                self.state.part.take(len(batch.label), rows)
                with undisturbed():
                    loss = self.step(batch.image, batch.view, batch.label, teacher_BK)
                    self.done += 1
                look, save = self.done % looks == 0, time.monotonic() >= self.next_save
                if self.ranks.joined:  # all of them do the same, and ask one another only when the host waits anyway
                    save = look and self.ranks.any(save) == [True]
                if (look or save) and not self._is_finite():
                    break
                progress.advance(rows, f"loss {loss.item():.4f}" if look else None)
                if look:
                    self._leave_together()
                if save:
                    with undisturbed():
                        self._save_here()
        self._require_finite(epoch)

    def _batches(self, epoch: int, done: int) -> Generator[tuple[Batch, Tensor | None], None, None]:
        """Each batch after so many, with the teacher's logits where they are asked for ahead.

        The teacher is asked for the same batches at once as if nothing had come between: the bits may depend on it.
        """
        if self.teacher_logits is None:
            yield from ((batch, None) for batch in self.loader.epoch(epoch, done))
            return
        first = done - done % self.teacher_logits.ahead
        asked = self.teacher_logits.epoch(self.loader.epoch(epoch, first), *self.loader.schedule(epoch, first))
        yield from islice(asked, done - first, None)

    def _step(self, image: Tensor, view: Tensor, label: Tensor, teacher_BK: Tensor | None) -> Tensor:
        """One training step from what a loader gives."""
        return train_step(self.state, self.recipe, clean_images(self.recipe, image, view), label, teacher_BK)

    def _is_finite(self) -> bool:
        """Whether every step so far was; the device is waited for."""
        finite = int(self.state.guard.seed) < 0
        if finite:
            self.statistics = {name: value.clone() for name, value in self.state.student.named_buffers()}
        return finite

    def _require_finite(self, epoch: int) -> None:
        """Raises Diverged: a step of this epoch was stopped before its update; what there is to look at is saved."""
        if self._is_finite():
            return
        guard, state = self.state.guard, self.state
        step = int(guard.seed) - self._noise_seed(epoch) + 1
        with closing(self._batches(epoch, step - 1)) as batches:
            batch, teacher_BK = next(batches)
        found = PostMortem(
            epoch=epoch,
            step=step,
            loss=float(guard.loss),
            batch=batch,
            teacher_BK=teacher_BK,
            weights=state.student.state_dict() | self.statistics,
            class_state=state.class_state,
            classes=self.split.classes,
        )
        self.folder.save_diverged(found.content())
        advice = found.advice(state.precision is not torch.float32)
        held = f"the update was not made; {self.folder.diverged} holds the batch and the weights before it"
        raise Diverged(f"{found.words()}; {held}; {self._kept()}. {advice}")

    def _kept(self) -> str:
        finished, done = self.saved
        within = f" and {done} steps of the next" if done else ""
        return f"{self.folder.state} holds epoch {finished}{within}" if any(self.saved) else "no state was saved yet"

    def _line(self, epoch: int, loss: float, seconds: float) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl; the class state is the one that the epoch was trained under."""
        line: dict[str, Any] = {
            "epoch": epoch,
            "loss": loss,
            "lr": self.recipe.lr_at(epoch),
            "images_per_second": self.loader.num_images / seconds,
            "seconds": seconds,
        }
        for name, sums in self.state.sums.items():
            suffix = "" if name == "adv" else f"_{name}"
            line[f"class_loss{suffix}"] = sums.mean_loss_K.tolist()
            line[f"class_accuracy{suffix}"] = sums.accuracy_K.tolist()
        return finite(line | {name: value.tolist() for name, value in self.state.class_state.items()})

    def _select(self, epoch: int, line: dict[str, Any]) -> None:
        """Attack the held-out images when it is time, and keep the weights if they are the best so far."""
        recipe = self.recipe
        last = epoch == recipe.epochs
        if self.held is None:
            if last:
                self._keep_as_best(-1.0, epoch)
            return
        if not (last or epoch >= recipe.select_always_from or epoch % recipe.select_every == 0):
            return
        attack = Attack(loss="cross-entropy", steps=recipe.select_steps, step=1 / 4, start="uniform")
        options: dict[str, Any] = dict(eps=recipe.eps, device=self.job.device, ranks=self.ranks)
        given = predictions(self.state.kept, self.held, attack, **options)
        report = by_class(given.numpy(), self.held.labels, self.num_classes)
        left_out = ("count", "interval", "confusion")
        line["holdout"] = {name: value for name, value in report.items() if name not in left_out}
        score = report["average"] + report["worst"]
        if score > self.best.score and (last or epoch >= recipe.select_from):
            self._keep_as_best(score, epoch)

    def _keep_as_best(self, score: float, epoch: int) -> None:
        self.best = Best(score, epoch)
        if self.ranks.is_first:
            metadata = self._metadata(epoch) | self.best.metadata()
            self.folder.save_weights(self.folder.best, self.state.kept, metadata)

    def _snapshot(self, finished: int, done: int) -> dict[str, Any]:
        """All that going on needs, on the host.

        Raises:
            Diverged: a weight or a statistic is not finite: the last update was made before anything was seen.
        """
        state = snapshot(self.state)
        if self.ranks.any(not all(value.isfinite().all() for value in state["student"].values())) == [True]:
            when = f"epoch {finished + 1}, step {done}" if done else f"epoch {finished}"
            raise Diverged(f"the weights are not finite after {when}; {self._kept()}. {LOWER}")
        return state | {
            "epoch": finished,
            "step": done,
            "so_far": epoch_so_far(self.state) if done else {},
            "seconds": time.monotonic() - self.started if done else 0.0,
            "best": self.best.saved(),
            "world_size": self.ranks.world_size,
            "processes": self.ranks.gather(own_part(self.state)) if self.ranks.joined else [],
        }

    def _save(self, epoch: int, line: dict[str, Any]) -> None:
        """The epoch is done."""
        state = self._snapshot(epoch, 0)
        if self.ranks.is_first:
            self.folder.save_epoch(line, self.state.kept, self._metadata(epoch), state)
        self.finished, self.done, self.tail = epoch, 0, None
        self._was_saved()

    def _save_here(self) -> str:
        """Save the state as it stands after the newest step, where that is not done yet; in words."""
        if self.saved != (self.finished, self.done):
            self._require_finite(self.finished + 1)
            if self.teacher_logits is not None:
                self.teacher_logits.keep()
            state = self.tail or self._snapshot(self.finished, self.done)
            if self.ranks.is_first:
                self.folder.save_state(state)
            self.ranks.barrier()
            self._was_saved()
        if not any(self.saved):
            return "nothing was trained yet"
        within = f"step {self.done} of {len(self.loader)} in epoch {self.finished + 1}"
        return f"saved at {within if self.done else f'epoch {self.finished}'} in {self.folder.path}"

    def _was_saved(self) -> None:
        self.saved, self.next_save = (self.finished, self.done), time.monotonic() + self.job.save_every

    def _metadata(self, epoch: int) -> dict[str, str]:
        return self.facts.as_metadata() | {"method": self.job.method, "setting": self.job.setting, "epoch": str(epoch)}

    def _report(self, line: dict[str, Any]) -> None:
        """One line on the epoch."""
        if self.board is not None:
            self.board.write(line)
        words = f"epoch {line['epoch']}/{self.recipe.epochs}  loss {line['loss']:.4f}  lr {line['lr']:g}"
        words += f"  {line['images_per_second']:.0f} img/s"
        if "holdout" in line:
            held = line["holdout"]
            kind = "robust" if self.recipe.select_steps else "clean"
            name = self.split.classes[held["worst_class"]]
            words += f"  held-out {kind} {held['average']:.1%}, worst {held['worst']:.1%} ({name})"
            words += "  best so far" if self.best.epoch == line["epoch"] else ""
        say(words)
