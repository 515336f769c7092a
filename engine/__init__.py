"""What a run is and how it moves: recipes, the attack, the training step, checkpoints, evaluation, reports."""

from importlib import import_module

from retemper.engine.attack import Watcher, pgd
from retemper.engine.captured_attack import CapturedAttack
from retemper.engine.checkpoints.weights import load_checkpoint, save_weights
from retemper.engine.class_report import ClassReport, class_measures, class_report, intervals
from retemper.engine.distributed.ranks import WHOLE, Part
from retemper.engine.epoch_stats import ClassMeans, ClassSums, EpochStats, HeldOut
from retemper.engine.groups import TrainingAttack
from retemper.engine.losses import (
    KlObjective,
    Objective,
    RowsObjective,
    at_least_float32,
    cross_entropy_objective,
    cross_entropy_rows,
    cw_objective,
    is_label,
    kl_rows,
)
from retemper.engine.models import create_model
from retemper.engine.recipe import LabelAttack, Method, OwnPredictionAttack, Recipe, Setting
from retemper.engine.state import State
from retemper.engine.step import train_step
from retemper.engine.targets import Forwards, Targets, given
from retemper.errors import Diverged
from retemper.options import MOST_EPOCHS, option, require_order


def run_recipe(file: str) -> None:
    """Run a recipe file as a script: `python recipes/absld.py SETTING ...` is `retemper train absld:SETTING ...`."""
    # by its name: a recipe lies below the command line, and no module imports from above it
    import_module("retemper.cli").run_as_script(file)


__all__ = [
    "MOST_EPOCHS", "WHOLE", "CapturedAttack", "ClassMeans", "ClassReport", "ClassSums", "Diverged", "EpochStats",
    "Forwards", "HeldOut", "KlObjective", "LabelAttack", "Method", "Objective", "OwnPredictionAttack", "Part",
    "Recipe", "RowsObjective", "Setting", "State", "Targets", "TrainingAttack", "Watcher", "at_least_float32",
    "class_measures", "class_report", "create_model", "cross_entropy_objective", "cross_entropy_rows", "cw_objective",
    "given", "intervals", "is_label", "kl_rows", "load_checkpoint", "option", "pgd", "require_order", "run_recipe",
    "save_weights", "train_step",
]  # fmt: skip
