"""A look at all training images under attack, before an epoch, for methods that learn from what they are taken for.

The images come in the order and the views of that epoch, and each process attacks its own rows of every batch.
Dimension key: B batch, K classes, D values.
"""

import torch

from retemper.console import Progress
from retemper.engine.attack import ascend
from retemper.engine.device import exact_fp32
from retemper.engine.epoch_stats import ClassMeans
from retemper.engine.groups import TrainingAttack, taken
from retemper.engine.losses import cross_entropy_objective
from retemper.engine.maximise import plan_of
from retemper.engine.recipe import Recipe
from retemper.engine.state import State, clean_images
from retemper.loaders import Loader

OWN_NOISE = 2**62  # a bit of its seeds, so that no step of the run draws the same start


def survey(
    state: State, recipe: Recipe, loader: Loader, epoch: int, attack: TrainingAttack, seed: int
) -> ClassMeans | None:
    """Return the sums of `Method.surveyed` over the images of `epoch`, from 1: the student, in eval mode, is attacked.

    Args:
        attack: its `kind` says how it goes, and once the guard saw a collapse, the one that stands in for it.
        seed: of the run.
    """
    seen: ClassMeans | None = None
    student, ranks = state.student.eval(), state.part.ranks
    network = student if state.twin is None else state.twin.refresh()
    chosen = taken(attack, state.fallback)
    with Progress(f"before epoch {epoch}", loader.num_images) as progress:
        for number, batch in enumerate(loader.epoch(epoch)):
            if not len(batch.label):
                continue
            clean = clean_images(recipe, batch.image, batch.view)
            own_seed = OWN_NOISE ^ ((seed << 40) + (epoch << 24) + number)
            label_B = batch.label.clamp(
                min=0
            )  # an image without a label is attacked as one of class 0, and not counted
            plan = plan_of(chosen, chosen.eps, chosen.step, rows=ranks.rows, seed=own_seed)
            with state.autocast():
                adv = ascend(network, clean, plan, objective=cross_entropy_objective(label_B))
            with torch.no_grad(), exact_fp32():
                value_BD = recipe.method.surveyed(student(adv), label_B)
            if seen is None:
                seen = ClassMeans.zeros(state.num_classes, value_BD.shape[1], state.device, state.dtype)
            seen.add(value_BD, batch.label)
            progress.advance(min(recipe.optim.batch_size, loader.num_images - progress.done))
    if ranks.joined:
        assert seen is not None
        ranks.all_reduce_each_([*vars(seen).values()])
    return seen
