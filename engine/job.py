"""From a user's words to a job: its folder, its device, and its teacher (given, trained earlier, or trained now)."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from retemper.engine.catalogue import find_setting
from retemper.engine.progress import say
from retemper.engine.run_folder import RunFolder
from retemper.engine.train import Job, train
from retemper.loaders.errors import UsageError


def default_out(method: str, setting: str, seed: int) -> Path:
    """Where a run goes that is given no --out."""
    return Path("runs") / f"{method}-{setting}-seed{seed}"


def default_cache() -> Path:
    """Where converted data goes that is given no --cache."""
    return Path.home() / ".cache" / "retemper"


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is.

    Raises:
        UsageError: no such device here; or this is one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("one process trains a run so far: start it with python, or torchrun --nproc-per-node 1")
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: it must be cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no GPU here; leave the option out to train on the CPU")
    return torch.device(name)


def with_teacher(job: Job) -> Job:
    """`job` with a teacher, if its recipe has one.

    Without --teacher, the run of `teacher_recipe` beside this one is taken, finished or trained first where the recipe
    says that this is a matter of minutes.

    Raises:
        UsageError: no teacher, and training one would take long: it says how.
    """
    recipe = job.recipe
    if recipe.teacher_model is None:
        if job.teacher is not None:
            raise UsageError(f"{job.method} learns without a teacher: leave out --teacher")
        return job
    if job.teacher is not None:
        return job
    name = recipe.teacher_recipe
    if name is None:
        raise UsageError(f"{job.name} needs a teacher: name a {recipe.teacher_model} checkpoint or run with --teacher")
    method, setting, found = find_setting(name)
    out = job.out.parent / default_out(method, setting, 0).name
    done = (out / "best.safetensors").exists() and _epochs_done(out) >= found.recipe.epochs
    if not done and not recipe.train_teacher:
        raise UsageError(
            f"{job.name} needs a teacher: name a {recipe.teacher_model} checkpoint with --teacher, "
            f"or train one with: retemper train {name} --out {out}"
        )
    if not done:
        say(f"{job.name}: no --teacher given, so {name} comes first, in {out}; later runs beside it use it too")
        # always seed 0: runs that differ in their seed share one teacher, and are compared under it
        train(replace(job, method=method, setting=setting, recipe=found.recipe, out=out, seed=0))
    return replace(job, teacher=out)


def _epochs_done(out: Path) -> int:
    """How many epochs a run has behind it."""
    metrics = RunFolder(out).metrics
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0
