"""One training run, from a recipe to its folder: data, networks, epochs, class state, selection, saving.

The same command again goes on where the run was, between any two steps: every random number comes from (seed, epoch,
image) or (seed, step), so that a resumed run ends in the weights of an undisturbed one: bit for bit on a CPU with as
many threads, and on a GPU as far as its convolutions repeat themselves (`Job.deterministic` makes them).

Several processes (`retemper.engine.distributed`) train one network on their own rows of every batch. They hold equal
weights after each step and equal networks after each epoch; the first of them writes the files, and all leave at the
same step.
"""

from pathlib import Path
from typing import Any

from retemper.commands import command
from retemper.console import duration, say
from retemper.engine.device import peak_memory_mib
from retemper.engine.epoch_stats import EpochStats, HeldOut
from retemper.engine.groups import taken
from retemper.engine.run.collapse import CollapseGuard, collapse_words, guard_of
from retemper.engine.run.data import TrainingData, kept_of, load_data, training_split
from retemper.engine.run.diverged import FiniteWatch
from retemper.engine.run.job import Job
from retemper.engine.run.lone_image import require_no_lone_image
from retemper.engine.run.metrics import Board, epoch_line, epoch_words, held_out_words
from retemper.engine.run.networks import NetworkLoader, begin_state
from retemper.engine.run.pace import Pace
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.saving import Saver
from retemper.engine.run.selection import judge, score, validate
from retemper.engine.run.steps import Steps
from retemper.engine.run.survey import survey
from retemper.engine.run.teacher_logits import teacher_logits
from retemper.engine.state import State
from retemper.errors import Diverged
from retemper.interrupts import undisturbed

FEW = 3  # steps of an attack after which masked gradients are looked for


def train(job: Job) -> Path:
    """Run `job` to its end, from wherever an earlier process left it; return the run's folder.

    Raises:
        UsageError: the folder belongs to another run; an option does not fit the data.
        DataError: the data or the teacher cannot be used.
        Diverged: the loss or a gradient is not finite any more; what was saved before stays.
        Interrupted: a signal came; the state is saved.
        RankLost: another process is gone.
    """
    recipe, ranks, folder = job.recipe, job.ranks, RunFolder(job.out, job.ranks.rank)
    with job.surroundings(folder):
        split = training_split(recipe.data, job.data_root, job.beton)
        board = Board(folder, split.classes) if job.tensorboard and ranks.is_first else None
        eps, device = recipe.attack.eps, job.device
        networks = NetworkLoader(split=split, data=recipe.data, eps=eps, device=device, cache=job.cache)
        names = {"teacher": job.teacher, "clean_teacher": job.clean_teacher, "start": job.start}
        state, sources = begin_state(recipe, networks, seed=job.seed, ranks=ranks, names=names)
        where: dict[str, Any] = dict(data_root=job.data_root, cache=job.cache, beton=job.beton, extra=job.extra)
        data = load_data(split, recipe, ranks, job.device, seed=job.seed, **where)
        state.lacks_labels = data.pool is not None and data.pool.unlabelled > 0
        networks.probe(data.loader)
        for network in state.trained:
            require_no_lone_image(network, recipe, data.loader, split.shape)
        teacher = teacher_logits(recipe, state, data, sources["teacher"], run=job.name, cache=job.cache)
        saver = Saver(folder, recipe, state, seed=job.seed, save_every=job.save_every, header=job.header(split))
        pace = Pace(recipe, len(data.loader), job.max_steps)
        state.prior = kept_of(recipe, data, job.device, job.out)
        guard = guard_of(recipe, state, data, ranks)
        steps = Steps(data.loader, teacher, saver, FiniteWatch(state, folder, split.classes), pace)

        if ranks.is_first and not folder.state.exists():
            networks.check_teachers(data.judged, run=job.name, data_root=job.data_root)
        if saver.resume(job.config(data, sources)):
            _move_classes(job, state, data, epoch=0)
        if saver.finished >= recipe.optim.epochs:
            say(f"{job.name}: all {recipe.optim.epochs} epochs are done in {job.out}")
            ranks.barrier()
            return job.out
        say(f"{job.name}: {saver.to_do(job.max_steps)} on {job.place()}; {data.loader.description}")
        saver.start_clock()
        try:
            with steps.saved_on_leaving():
                for epoch in range(saver.finished + 1, recipe.optim.epochs + 1):
                    if not steps.run(epoch):
                        _cut(job, state, data, saver, steps)
                        break
                    with pace.ending(epoch):
                        _conclude(job, state, data, saver, guard, board, pace, epoch)
                saver.settle()
        finally:
            saver.writer.close()
            data.loader.close()
        ranks.barrier()
        if saver.finished == recipe.optim.epochs:
            say(f"{job.name}: done, best epoch {saver.best.epoch}; next: {_next(job)}")
    return job.out


def _next(job: Job) -> str:
    """Return the command that evaluates the run; one that knows a converted file alone cannot know the test images.

    Training by an attack of few steps may mask gradients, so it is to be looked for.
    """
    few = True if 0 < taken(job.recipe.attack).steps <= FEW else None
    needs_root = job.beton and not job.data_root and job.recipe.data.dataset not in ("digits", "fashion-mnist")
    return command("retemper", "evaluate", job.out, data_root="DIR" if needs_root else None, check=few)


def _cut(job: Job, state: State, data: TrainingData, saver: Saver, steps: Steps) -> None:
    """At --max-steps: save the state to go on from, then average and judge the weights, and save them to be evaluated.

    What is done to the networks after the state was saved is of this process alone.
    """
    epoch = saver.finished + 1
    steps.save_here()
    state.all_reduce()
    reached = -1.0
    if saver.done:
        _average(job, state, data, epoch)
    if saver.best.epoch == 0 and data.judged is not None:
        report = judge(state.kept, job.recipe, data.judged, job.device, job.ranks)
        reached = score(report, job.recipe)
        say(f"{job.name}: {held_out_words(report, job.recipe, data.split.classes)}")
    taken = saver.finished * len(data.loader) + saver.done
    cut = f"after {taken:,} steps, in epoch {epoch} of {job.recipe.optim.epochs}"
    with undisturbed():
        saver.save_cut(reached, cut)
    say(
        f"{job.name}: cut {cut}, so this is no full run; next: {_next(job)}; the same command with more --max-steps, "
        "or without, goes on"
    )


def _conclude(
    job: Job,
    state: State,
    data: TrainingData,
    saver: Saver,
    guard: CollapseGuard | None,
    board: Board | None,
    pace: Pace,
    epoch: int,
) -> None:
    """After the steps of an epoch: move the class state, average the weights, judge them and the attack, and save."""
    recipe, images = job.recipe, data.loader.num_images
    saver.hold_tail(epoch)
    state.all_reduce()
    if not job.ranks.hold_same_bits([*state.trained.state_dict().values()]):
        raise Diverged(f"the processes hold different weights after epoch {epoch}; {saver.kept()}")
    line = epoch_line(epoch, recipe, state, images)
    _move_classes(job, state, data, epoch)
    _average(job, state, data, epoch)
    _select(job, state, data, saver, line)
    if guard is not None and (seen := guard.look()):
        line["guard"] = seen
    with undisturbed():
        seconds = saver.lap_s()
        line |= {"images_per_second": images / seconds, "seconds": seconds}
        line["peak_memory_mib"] = peak_memory_mib(job.device)
        saver.save_epoch(epoch, line)
        if board is not None:
            board.write(line)
        words = epoch_words(line, recipe, data.split.classes, is_best=saver.best.epoch == epoch)
        left_s = pace.left_s(epoch + 1, 0)
        say(f"{words}  {duration(left_s)} left" if left_s else words)
        if "guard" in line and line["guard"]["next"] != line["guard"]["attack"]:
            say(f"{job.name}: after epoch {epoch} {collapse_words(line['guard'], epoch == recipe.optim.epochs)}")


def _move_classes(job: Job, state: State, data: TrainingData, epoch: int) -> None:
    """Move the class state after `epoch`; before the first, epoch 0, only where images are looked at for it."""
    recipe, method = job.recipe, job.recipe.method
    attack = method.surveys_by(epoch + 1, recipe) if epoch < recipe.optim.epochs else None
    if epoch == 0 and not method.validates_by and attack is None:
        return
    stats = EpochStats(
        forwards=state.sums if epoch else {},
        measured=state.measured if epoch else {},
        held=_validated(job, state, data) if method.validates_by else None,
        surveyed=None if attack is None else survey(state, recipe, data.loader, epoch + 1, attack, job.seed),
    )
    state.move_classes(method.next_class_state(state.class_state, stats, epoch, recipe))


def _average(job: Job, state: State, data: TrainingData, epoch: int) -> None:
    """Take the epoch's weights into their average, where that is done by epochs and they are good enough."""
    optim, average = job.recipe.optim, state.average
    if average is None or optim.average_every != "epoch":
        return
    if optim.average_above and epoch >= optim.average_from:
        if _validated(job, state, data).robust_accuracy_K.min() < optim.average_above:
            return average.skip(state.student)
    average.follow(state.student)


def _select(job: Job, state: State, data: TrainingData, saver: Saver, line: dict[str, Any]) -> None:
    """Judge the weights when it is time, and keep them if they are the best so far."""
    selection, epoch, epochs = job.recipe.selection, line["epoch"], job.recipe.optim.epochs
    if data.judged is None:
        if epoch == epochs:
            saver.keep_as_best(-1.0, epoch)
    elif selection.is_due(epoch, epochs):
        line["holdout"] = report = judge(state.kept, job.recipe, data.judged, job.device, job.ranks)
        reached = score(report, job.recipe)
        if reached > saver.best.score and (epoch == epochs or epoch >= selection.select_from):
            saver.keep_as_best(reached, epoch)


def _validated(job: Job, state: State, data: TrainingData) -> HeldOut:
    """Return how the student does on the held-out images."""
    assert data.held is not None
    return validate(state.student, job.recipe, data.held, len(data.split.classes), job.device, ranks=job.ranks)
