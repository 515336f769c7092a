"""Where the networks come from that a run builds on: its teachers, and the weights that it begins with.

Each is the user's checkpoint, a run trained earlier, or one trained now.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from retemper.commands import command
from retemper.console import say
from retemper.engine.catalogue import find_setting
from retemper.engine.checkpoints.header import read_header
from retemper.engine.recipe import Recipe
from retemper.engine.run.changed import changed_options
from retemper.engine.run.commands import absolute
from retemper.engine.run.data import pool_of, training_split
from retemper.engine.run.job import Job, default_out
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.train import train
from retemper.errors import DataError, UsageError
from retemper.options import shown_value

CARRIED = {  # the options that a teacher or a start shares with the student, and how the folder's name shows them
    "dataset": "",
    "image_size": "px",
    "max_side": "of",
    "images_per_class": "perclass",
    "imbalance": "tail",
    "padding": "padding",
    "padding_mode": "",
    "flip": "flip",
    "eps": "eps",
    "attack_step": "step",
    "student": "",
    "normalise": "normalise",
}
VARIED = ("padding", "padding_mode", "flip")
SAME_NETWORK = ("student", "normalise")  # that a start shares with the student, and a teacher does not


def with_teacher(job: Job) -> Job:
    """Return `job` with the teachers and the start that its recipe names.

    What no option gives is the run of that recipe, with the images and the radius that the user gave this one. It is
    looked for beside this run and in runs/, and trained first where the recipe says that this is a matter of minutes.

    Raises:
        DataError: the extra images cannot be used.
        UsageError: one is missing and training it would take long: it says how; or one is given that is not wanted.
    """
    RunFolder(job.out).require_place()
    if job.extra is not None:  # before a teacher is trained for nothing
        pool_of(job.extra, training_split(job.recipe.data, job.data_root, job.beton), job.recipe, job.cache)
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
    if name.startswith("robustbench:"):  # nobody has to train it
        return replace(job, **{what: name})
    method, setting, found = find_setting(name)
    carried = carried_options(job, found.recipe)
    if what == "start":
        now, theirs = job.recipe.flat(), found.recipe.flat()
        carried |= {name: now[name] for name in SAME_NETWORK if now[name] != theirs[name]}
    folder = default_out(method, setting, 0).name + _suffix(carried, job)
    # always seed 0: runs that differ in their seed share one teacher, and are compared under it
    first = replace(job, method=method, setting=setting, recipe=found.recipe.replace(**carried), seed=0, extra=None)
    places = list(dict.fromkeys([job.out.parent / folder, default_out(method, setting, 0).parent / folder]))
    done = job.ranks.any(*(job.ranks.is_first and _is_done(replace(first, out=place)) for place in places))
    if any(done):
        return replace(job, **{what: places[list(done).index(True)]})
    out = places[0]
    if not job.recipe.networks.train_teacher:
        options = {option: shown_value(value) for option, value in carried.items()}
        where = {"data_root": job.data_root, "beton": job.beton, "out": out}
        raise UsageError(
            f"{job.name} needs a {called}: name a {model} checkpoint with {option}, "
            f"or train one with: {command('retemper', 'train', name, **options, **where)}"
        )
    _require_same_folder(job, RunFolder(out), option)
    say(f"{job.name}: no {option} given, so {name} comes first, in {out}; later runs beside it use it too")
    train(with_teacher(replace(first, out=out, max_steps=None, teacher=None, clean_teacher=None, start=None)))
    return replace(job, **{what: out})


def carried_options(job: Job, recipe: Recipe) -> dict[str, Any]:
    """Return the options, by flat name, that the user changed for `job` and that `recipe` must follow.

    They are those of the images and of the radius. How images are varied is followed where both settings agreed on it.

    Args:
        recipe: the setting that trains a teacher or a start of the job.
    """
    now, theirs = job.recipe.flat(), recipe.flat()
    before = find_setting(job.name)[2].recipe.named_in(now).flat()
    changed = [name for name in CARRIED if name not in SAME_NETWORK and now[name] != before[name]]
    follow = [name for name in changed if name not in VARIED or theirs[name] == before[name]]
    return {name: now[name] for name in follow if now[name] != theirs[name]}


def _suffix(carried: dict[str, Any], job: Job) -> str:
    """Return what the folder's name of a network ends in, so that networks of other images or radii have other ones."""
    parts = []
    for name, value in carried.items():
        parts.append(f"{CARRIED[name]}{shown_value(value).replace('/', '_')}")
        if name == "dataset" and value == "folder":
            parts += [place.resolve().stem for place in (job.data_root or job.beton,) if place]
    return "".join(f"-{part}" for part in parts)


def _same_folder(job: Job, config: dict[str, Any]) -> bool:
    """Say whether a run saw the images of the job, where the name of the data set does not say it."""
    named = job.recipe.data.dataset != "folder" or job.data_root is None
    return named or config.get("data_root") == absolute(job.data_root)


def _require_same_folder(job: Job, folder: RunFolder, option: str) -> None:
    """Raise UsageError where the place of a network to be trained holds one of another folder of images."""
    if folder.config.exists() and not _same_folder(job, config := folder.read_config()):
        seen = config.get("data_root")
        raise UsageError(f"{folder.path} was trained on {seen}, not {job.data_root}: name another --out or {option}")


def _is_done(job: Job) -> bool:
    """Say whether the job's folder holds its finished run; `train` says what differs otherwise."""
    folder = RunFolder(job.out)
    if not (folder.config.exists() and folder.best.exists()):
        return False
    try:
        config = folder.read_config()
    except DataError:
        return False
    other = changed_options(config["recipe"], json.loads(json.dumps(job.recipe.flat())), type(job.recipe.method))
    same = (config["method"], config["seed"]) == (job.method, job.seed) and _same_folder(job, config)
    return same and not other and read_header(folder.last).get("epoch") == str(job.recipe.optim.epochs)
