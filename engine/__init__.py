"""What a run is and how it moves: recipes, the attack, the training step, checkpoints, evaluation, reports."""

from retemper.engine.attack import KlObjective, Objective, Watcher, cross_entropy_objective, cw_objective, pgd
from retemper.engine.errors import Diverged
from retemper.engine.evaluation.class_statistics import ClassReport, class_report, intervals
from retemper.engine.losses import cross_entropy_rows, is_label, kl_rows
from retemper.engine.models import create_model
from retemper.engine.networks.weights import load_checkpoint, save_weights
from retemper.engine.parallel.ranks import WHOLE, Part
from retemper.engine.recipe import Recipe, Targets, given
from retemper.engine.seen import ClassMeans, ClassSums, HeldOut, Seen
from retemper.engine.settings import (
    DIGITS,
    ON_BOTH,
    ON_DIGITS,
    Setting,
    adversarial_training,
    as_student,
    distillation,
    teachers,
)
from retemper.engine.step import State, train_step


def run_recipe(file: str) -> None:
    """Run a recipe file as a script: `python recipes/absld.py SETTING ...` is `retemper train absld:SETTING ...`."""
    from retemper.engine.cli import run_as_script  # not at the top: the command line imports everything

    run_as_script(file)


__all__ = [
    "DIGITS",
    "ON_BOTH",
    "ON_DIGITS",
    "WHOLE",
    "ClassMeans",
    "ClassReport",
    "ClassSums",
    "Diverged",
    "HeldOut",
    "KlObjective",
    "Objective",
    "Part",
    "Recipe",
    "Seen",
    "Setting",
    "State",
    "Targets",
    "Watcher",
    "adversarial_training",
    "as_student",
    "class_report",
    "create_model",
    "cross_entropy_objective",
    "cross_entropy_rows",
    "cw_objective",
    "distillation",
    "given",
    "intervals",
    "is_label",
    "kl_rows",
    "load_checkpoint",
    "pgd",
    "run_recipe",
    "save_weights",
    "teachers",
    "train_step",
]
