"""One training run, from a recipe to its folder: epochs, class state, selection, checkpoints, resume.

The same command again goes on where the run was: every random number comes from (seed, epoch, image) or (seed, step),
so that a resumed run ends in the weights of an undisturbed one: bit for bit on a CPU with as many threads, and on a GPU
as far as its convolutions repeat themselves.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retemper.engine.capture import captured
from retemper.engine.errors import Diverged
from retemper.engine.evaluation.evaluate import Attack, balanced_order, by_class, exact_fp32, finite, survivors
from retemper.engine.job import Job, cpu_threads, tuned_convolutions
from retemper.engine.models import create_model
from retemper.engine.networks import Networks
from retemper.engine.recipe import describe
from retemper.engine.run_folder import RunFolder, commit, device_name, versions
from retemper.engine.seen import Seen
from retemper.engine.step import State, clean_images, train_step
from retemper.engine.teacher_logits import teacher_logits
from retemper.engine.tensorboard import Board
from retemper.engine.trained import Facts, header_of
from retemper.engine.validate import validate
from retemper.engine.weights import save_weights
from retemper.loaders import Batch, Loader, Split, ViewSpace, holdout_split, load_split, make_loader, split_of_arrays
from retemper.loaders.errors import DataError, UsageError
from retemper.loaders.progress import Progress, say

STEPS_BETWEEN_READS = 50  # how often the loss is read from the device: for the bar, and to stop when it is not finite


def train(job: Job) -> Path:
    """Run `job` to its end, from wherever an earlier process left it.

    Returns:
        The run's folder.
    Raises:
        UsageError: the folder belongs to another run; an option does not fit the data.
        DataError: the data or the teacher cannot be used.
        Diverged: the loss is not finite any more; the last good epoch stays.
    """
    folder = RunFolder(job.out)
    full = exact_fp32() if job.recipe.precision == "fp32" else nullcontext()
    with folder.locked(), cpu_threads(job.recipe.cpu_threads), tuned_convolutions(), full:
        run = Run(job, folder)
        first = run.resume()
        if first > job.recipe.epochs:
            say(f"{job.name}: all {job.recipe.epochs} epochs are done in {job.out}")
            return job.out
        say(f"{job.name}: epochs {first} to {job.recipe.epochs} on {device_name(job.device)}; {run.loader.description}")
        try:
            for epoch in range(first, job.recipe.epochs + 1):
                run.epoch(epoch)
        finally:
            run.loader.close()
        say(f"{job.name}: done, best epoch {run.best['epoch']}; next: retemper evaluate {job.out}")
    return job.out


class Run:
    """A job with its data, networks and state in memory."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self.job, self.folder, self.recipe = job, folder, job.recipe
        recipe, device = job.recipe, job.device
        self.split = load_split(recipe.dataset, "train", job.data_root, recipe.image_size)
        self.num_classes, self.channels = len(self.split.classes), self.split.shape[2]
        self.board = Board(folder, self.split.classes) if job.tensorboard else None
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
            self.state = State.begin(recipe, student, teacher, self.num_classes, device, clean_teacher)
            self.step = captured(self._step) if recipe.captures_on(device) else self._step
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.best: dict[str, Any] = {"score": -1.0, "epoch": 0}
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
                "commit": commit(),
                "started": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
        saved = self.folder.load_state()
        if saved is None:
            self._validate(0)
            return 1
        try:
            self.state.load(saved)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{self.folder.state} is not this run's: delete the folder to start it anew") from None
        self.best = self._newest_best(saved["best"])
        return saved["epoch"] + 1

    def _newest_best(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The best epoch: of the state, or of weights that a killed process saved after it."""
        if not self.folder.best.exists():
            return {"score": -1.0, "epoch": 0}
        header = header_of(self.folder.best)
        epoch = int(header.get("epoch", 0))
        return {"score": float(header["score"]), "epoch": epoch} if epoch > saved["epoch"] else saved

    def epoch(self, epoch: int) -> None:
        """Train for one epoch, move the class state, choose, and save."""
        recipe, state = self.recipe, self.state
        started = time.monotonic()
        loss = self._pass(epoch)
        line = self._line(epoch, loss, time.monotonic() - started)
        self._require_finite_weights(epoch)
        if self.recipe.validates:
            self._validate(epoch)
        else:
            state.move_classes(recipe.next_class_state(state.class_state, state.seen(), epoch))
        self._follow(epoch)
        self._select(epoch, line)
        self._save(epoch, line)
        self._report(line)

    def _validate(self, epoch: int) -> None:
        """Move the class state by the held-out images, where the method does so."""
        if not self.recipe.validates:
            return
        assert self.held is not None
        held = validate(self.state.student, self.recipe, self.held, self.num_classes, self.job.device)
        seen = self.state.seen(held) if epoch else Seen(held=held)
        self.state.move_classes(self.recipe.next_class_state(self.state.class_state, seen, epoch))

    def _follow(self, epoch: int) -> None:
        """Take the epoch's weights into their average, where that is done by epochs."""
        recipe, average = self.recipe, self.state.average
        if average is None or recipe.average_every != "epoch":
            return
        if recipe.average_above and epoch >= recipe.average_from:
            assert self.held is not None
            held = validate(self.state.student, recipe, self.held, self.num_classes, self.job.device)
            if held.robust_accuracy_K.min() < recipe.average_above:
                average.skip(self.state.student)
                return
        average.follow(self.state.student)

    def _pass(self, epoch: int) -> float:
        """Every batch of the epoch once; the mean loss."""
        self.state.start_epoch(self.recipe, epoch, (self.job.seed << 40) + (epoch << 24))
        with Progress(f"epoch {epoch}/{self.recipe.epochs}", self.loader.num_images) as progress:
            for number, (batch, teacher_BK) in enumerate(self._batches(epoch), 1):
                loss = self.step(batch.image, batch.view, batch.label, teacher_BK)
                note = f"loss {self._finite(loss, epoch, number):.4f}" if number % STEPS_BETWEEN_READS == 0 else None
                progress.advance(len(batch.label), note)
        return self._finite(self.state.loss_sum / self.loader.num_images, epoch, len(self.loader))

    def _batches(self, epoch: int) -> Iterator[tuple[Batch, Tensor | None]]:
        """Each batch, with the teacher's logits where they are asked for ahead."""
        batches = self.loader.epoch(epoch)
        if self.teacher_logits is None:
            return ((batch, None) for batch in batches)
        return iter(self.teacher_logits.epoch(batches, *self.loader.schedule(epoch)))

    def _step(self, image: Tensor, view: Tensor, label: Tensor, teacher_BK: Tensor | None) -> Tensor:
        """One training step from what a loader gives."""
        return train_step(self.state, self.recipe, clean_images(self.recipe, image, view), label, teacher_BK)

    def _finite(self, loss: Tensor, epoch: int, step: int) -> float:
        """The loss on the host.

        Raises:
            Diverged: it is not a finite number.
        """
        value = loss.item()
        if math.isfinite(value):
            return value
        raise Diverged(
            f"the loss is {value} at epoch {epoch}, by step {step}; {self._kept(epoch)}. Try a lower --lr"
            + ("" if self.state.precision is torch.float32 else " or --precision fp32")
        )

    def _require_finite_weights(self, epoch: int) -> None:
        """The last step's loss was taken before it: look at what it left.

        Raises:
            Diverged: a weight or a statistic is not finite.
        """
        values = [value for value in self.state.student.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in values]).all():
            raise Diverged(f"the weights are not finite after epoch {epoch}; {self._kept(epoch)}. Try a lower --lr")

    def _kept(self, epoch: int) -> str:
        return f"{self.folder.last} holds epoch {epoch - 1}" if epoch > 1 else "nothing was saved yet"

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
        correct = survivors(self.state.kept, self.held, attack, eps=recipe.eps, device=self.job.device)
        report = by_class(correct, self.held.labels, self.num_classes)
        line["holdout"] = {name: value for name, value in report.items() if name not in ("count", "interval")}
        score = report["average"] + report["worst"]
        if score > self.best["score"] and (last or epoch >= recipe.select_from):
            self._keep_as_best(score, epoch)

    def _keep_as_best(self, score: float, epoch: int) -> None:
        """The score travels in the file: a kill before the state is saved must not part the two."""
        self.best = {"score": score, "epoch": epoch}
        save_weights(self.folder.best, self.state.kept, self._metadata(epoch) | {"score": repr(score)})

    def _save(self, epoch: int, line: dict[str, Any]) -> None:
        state = self.state
        self.folder.save_epoch(
            line,
            state.kept,
            self._metadata(epoch),
            {
                "epoch": epoch,
                "student": state.student.state_dict(),
                "optimizer": state.optimizer.state_dict(),
                "scaler": state.scaler.state_dict(),
                "class_state": state.class_state,
                "best": self.best,
                **({} if state.average is None else {"average": state.average.state()}),
            },
        )

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
            words += "  best so far" if self.best["epoch"] == line["epoch"] else ""
        say(words)
