"""Where the networks come from that a run builds on: its teachers, and the weights that it begins with.

Each is the user's checkpoint, a run trained earlier, or one trained now.
"""

import json
from dataclasses import replace
from pathlib import Path

from retemper.commands import command
from retemper.console import say
from retemper.engine.catalogue import find_setting
from retemper.engine.checkpoints.header import read_header
from retemper.engine.recipe import Recipe, changed_options
from retemper.engine.run.job import Job, default_out
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.train import train
from retemper.errors import UsageError


def with_teacher(job: Job) -> Job:
    """Return `job` with the teachers and the start that its recipe names.

    What no option gives is the run of that recipe beside this one, finished or trained first where the recipe says that
    this is a matter of minutes.

    Raises:
        UsageError: one is missing and training it would take long: it says how; or one is given that is not wanted.
    """
    RunFolder(job.out).require_place()
    wanted = job.recipe.networks
    job = _with(job, "teacher", wanted.teacher_model, wanted.teacher_recipe)
    job = _with(job, "clean_teacher", wanted.clean_teacher_model, wanted.clean_teacher_recipe)
    model = wanted.student if wanted.start_recipe or job.start else None  # any run may begin with given weights
    return _with(job, "start", model, wanted.start_recipe)


def _with(job: Job, what: str, model: str | None, name: str | None) -> Job:
    option, called = f"--{what.replace('_', '-')}", what.replace("_", " ")
    given: str | Path | None = getattr(job, what)
    if model is None and given is not None:
        raise UsageError(f"{job.method} learns without a {called}: leave out {option}")
    if model is None or given is not None:
        return job
    if name is None:
        raise UsageError(f"{job.name} needs a {called}: name a {model} checkpoint or run with {option}")
    method, setting, found = find_setting(name)
    out = job.out.parent / default_out(method, setting, 0).name
    (done,) = job.ranks.any(job.ranks.is_first and _is_done(RunFolder(out), found.recipe))
    if not done and not job.recipe.networks.train_teacher:
        raise UsageError(
            f"{job.name} needs a {called}: name a {model} checkpoint with {option}, "
            f"or train one with: {command('retemper', 'train', name, data_root=job.data_root, out=out)}"
        )
    if not done:
        say(f"{job.name}: no {option} given, so {name} comes first, in {out}; later runs beside it use it too")
        # always seed 0: runs that differ in their seed share one teacher, and are compared under it
        first = replace(job, method=method, setting=setting, recipe=found.recipe, out=out, seed=0, max_steps=None)
        train(with_teacher(replace(first, teacher=None, clean_teacher=None, start=None)))
    return replace(job, **{what: out})


def _is_done(folder: RunFolder, recipe: Recipe) -> bool:
    """Say whether the folder holds a finished run of exactly this recipe; `train` says what differs otherwise."""
    if not (folder.config.exists() and folder.best.exists()):
        return False
    other = changed_options(folder.read_config()["recipe"], json.loads(json.dumps(recipe.flat())))
    return not other and read_header(folder.last).get("epoch") == str(recipe.optim.epochs)
