"""Where a run's teacher comes from: the user's checkpoint, a run trained earlier, or one trained now."""

import json
from dataclasses import replace

from retemper.engine.catalogue import find_setting
from retemper.engine.job import Job, default_out
from retemper.engine.recipe import Recipe, describe
from retemper.engine.run_folder import RunFolder
from retemper.engine.train import train
from retemper.engine.trained import header_of
from retemper.loaders.errors import UsageError
from retemper.loaders.progress import say


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
    done = _is_done(RunFolder(out), found.recipe)
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


def _is_done(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether the folder holds a finished run of exactly this recipe; `train` says what differs if it holds another."""
    if not (folder.config.exists() and folder.best.exists()):
        return False
    same = folder.read_config()["recipe"] == json.loads(json.dumps(describe(recipe)))
    return same and header_of(folder.last).get("epoch") == str(recipe.epochs)
