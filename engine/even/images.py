"""The training images that an evening looks at: those that choose, and those that a bias is fitted on."""

from dataclasses import dataclass

import numpy as np

from retemper.engine.recipe import Recipe
from retemper.engine.run.data import chosen_indices
from retemper.errors import DataError
from retemper.loaders import Split, split_of_arrays

LEAST = 5  # held-out images of a class that tell anything
FITTED = 100  # images of each class, at most, that a bias is fitted on


@dataclass(frozen=True, kw_only=True)
class EvenImages:
    """Training images of a network, apart from each other.

    Attributes:
        held: those that choose; the network's own training held them out, where it is known.
        fit: those that a bias is fitted on: such as the network has not learned from first.
    """

    held: Split
    fit: Split


def even_images(split: Split, recipe: Recipe) -> EvenImages:
    """Return the images, chosen as a run of `recipe` on `split` holds some out.

    Raises:
        UsageError: a class would be left without an image to fit on.
        DataError: a class has too few images that choose.
    """
    trained, held = chosen_indices(split, recipe)
    count_K = np.bincount(split.labels[held], minlength=len(split.classes))
    if count_K.min() < LEAST:
        k, asked = int(count_K.argmin()), recipe.selection.holdout_per_class
        raise DataError(
            f"{count_K[k]} held-out images of class {split.classes[k]} are too few to choose by (--holdout {asked}): "
            f"{LEAST} of each class are needed"
        )
    unseen = np.setdiff1d(np.arange(len(split)), np.concatenate([trained, held]))
    fit = [
        np.concatenate([part[split.labels[part] == k] for part in (unseen, trained)])[:FITTED]
        for k in range(len(split.classes))
    ]
    return EvenImages(held=part_of(split, held), fit=part_of(split, np.sort(np.concatenate(fit))))


def part_of(split: Split, index_N: np.ndarray) -> Split:
    """Return some images of a split, in this order, as a split of their own."""
    images, labels = split.seen(index_N), split.labels[index_N]
    return split_of_arrays(split.name, split.split, images, labels, split.classes, split.fingerprint)
