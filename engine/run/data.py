"""The images of a run: those it trains on, batch by batch, those held out, and those that choose its best epoch."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from retemper.console import say
from retemper.engine.distributed.ranks import Ranks
from retemper.engine.groups import Data
from retemper.engine.kept import Kept
from retemper.engine.recipe import Recipe
from retemper.errors import DataError, UsageError
from retemper.loaders import (
    Extra,
    Loader,
    Pool,
    Split,
    ViewSpace,
    beton_split,
    holdout_split,
    load_split,
    long_tail,
    make_loader,
    middle,
    open_pool,
    split_of_arrays,
)
from retemper.loaders.split import fingerprint_of

SIDES_PX = {"digits": 8, "fashion-mnist": 28, "cifar10": 32, "cifar100": 32, "svhn": 32, "tiny-imagenet": 64}


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The images of a run.

    Attributes:
        split: all training images of the data set.
        loader: the batches that it trains on.
        held: the images held out of training, in memory; None where there are none.
        judged: the images that choose the best epoch: those held out, or the test images where the recipe says so.
            None where the last epoch is kept.
        pool: the images that are mixed into the batches; None where there are none.
    """

    split: Split
    loader: Loader
    held: Split | None
    judged: Split | None
    pool: Pool | None = None


def training_split(data: Data, data_root: Path | None, beton: Path | None) -> Split:
    """Return all training images of the data set: a converted file serves by itself where no root is named.

    Raises:
        UsageError: no such data set; the converted file has images of another size than the recipe says; or they are
            too small to be reflected as far as the recipe pads them, or for its cutout.
        DataError: the images cannot be read, or the converted file holds others.
    """
    split = _split(data, data_root, beton)
    side = min(split.shape[:2])
    if data.augment == "resized-crop" and side != max(split.shape[:2]):
        raise UsageError(
            f"images of {split.shape[0]} x {split.shape[1]} px: views are square, give --image-size {side}"
        )
    if data.cutout >= side:
        raise UsageError(f"--cutout {data.cutout}: images of {side} px a side can lose {side - 1} px a side at most")
    if data.augment == "crop" and data.padding_mode == "reflect" and data.padding >= side:
        raise UsageError(f"--padding {data.padding}: images of {side} px a side can be reflected by {side - 1} at most")
    return split


def _split(data: Data, data_root: Path | None, beton: Path | None) -> Split:
    if beton is None or data_root is not None:
        return load_split(data.dataset, "train", data_root, data.image_size, data.max_side)
    split = beton_split(beton)
    if (split.name, split.split) != (data.dataset, "train"):
        raise DataError(f"{beton} holds {split.name} {split.split}, the run needs {data.dataset} train: convert that")
    height, width, channels = split.shape
    told = data.max_side or data.image_size or SIDES_PX.get(data.dataset)
    if height == width and height != told:  # or the test images would be read in another size
        option = "--max-side" if data.max_side else "--image-size"
        raise UsageError(f"{beton} holds images of {height} px a side: give {option} {height}")
    if data.max_side is None or data.max_side == data.image_size:
        return split
    assert data.image_size is not None
    return replace(split, shape=(data.image_size, data.image_size, channels), max_side=data.max_side)


def load_data(
    split: Split,
    recipe: Recipe,
    ranks: Ranks,
    device: torch.device,
    *,
    seed: int,
    data_root: Path | None,
    cache: Path,
    beton: Path | None,
    extra: Path | None = None,
) -> TrainingData:
    """Return the images of a run on `split`, the training images of its data set.

    Args:
        seed: of the order of the images and of their views.
        cache: the folder of converted data sets.
        beton: a converted training set to read in place of one in the cache.
        extra: the files of a pool, of which each batch holds a share; None for none.
    Raises:
        UsageError: the backend is not there, or batches and processes do not fit; labels are missing that no teacher
            gives.
        DataError: the images cannot be read.
    """
    test, pool = None, None if extra is None else pool_of(extra, split, recipe, cache)
    if recipe.selection.select_on == "test":
        test = _test_split(recipe.data, data_root)
        say("note: the best epoch is chosen on the test images: the test accuracy of this run flatters it")
    train_indices, held_indices = chosen_indices(split, recipe)
    loader = make_loader(
        recipe.execution.loader,
        split,
        indices=train_indices,
        batch_size=recipe.optim.batch_size,
        seed=seed,
        views=ViewSpace(recipe.data.padding, recipe.data.flip, recipe.data.strong),
        device=device,
        cache_dir=cache,
        beton=beton,
        rank=ranks.rank,
        world_size=ranks.world_size,
        extra=None if pool is None else Extra(pool, recipe.data.extra_fraction, recipe.execution.extra_on),
    )
    if loader.jpeg_quality is not None:  # a teacher's answers to the copies are not its answers to the images
        split = replace(split, fingerprint=fingerprint_of([], Path(), split.fingerprint, "JPEG", loader.jpeg_quality))
    last = loader.num_images % recipe.optim.batch_size or recipe.optim.batch_size
    if recipe.optim.batch_norm == "synced" and last < ranks.world_size:
        raise UsageError(
            f"an epoch ends in a batch of {last} of {loader.num_images} images, too few for synced batch norm "
            f"on {ranks.world_size} processes: use another --batch-size"
        )
    held = None
    if len(held_indices):  # read through the loader, as a split of their own
        walked = (batch.image.cpu().numpy() for batch in loader.walk(held_indices))
        images = np.concatenate([middle(one, *split.shape[:2]) for one in walked])
        labels = split.labels[held_indices]
        held = split_of_arrays(split.name, "train", images, labels, split.classes, split.fingerprint)
    return TrainingData(split=split, loader=loader, held=held, judged=held if test is None else test, pool=pool)


def pool_of(path: Path, split: Split, recipe: Recipe, cache: Path) -> Pool:
    """Return the pool that `--extra` names, for the images of `split`.

    Args:
        cache: the folder where compressed files are unpacked, once.
    Raises:
        DataError: a file is missing or damaged, or holds other images or labels.
        UsageError: labels are missing, and the method has no teacher that could stand in for them.
    """
    pool = open_pool(path, split, cache)
    if pool.unlabelled and recipe.networks.teacher_model is None:
        none = "none has a label" if pool.unlabelled == len(pool) else f"{pool.unlabelled:,} have no label"
        raise UsageError(
            f"--extra {path}: of its {len(pool):,} images {none}, and this method has no teacher to give one: name a "
            "pool with labels, or train a method that distils"
        )
    return pool


def kept_of(recipe: Recipe, data: TrainingData, device: torch.device, folder: Path) -> Kept | None:
    """Return what the attack "pgi" keeps of the images, as it is before the first epoch; None with another attack.

    Args:
        folder: the run's, for a file that goes with this process.
    Raises:
        DataError: there is no room for that file.
    """
    chosen, plan = recipe.attack, data.loader.plan
    if chosen.kind != "pgi":
        return None
    return Kept(
        len(data.split),
        data.split.shape,
        recipe.data.padding,
        eps=chosen.eps,
        reset=chosen.pgi_reset,
        rows=plan.local_size,
        device=device,
        file=folder / f".kept.rank{plan.rank}" if recipe.execution.kept == "disk" else None,
    )


def _test_split(data: Data, data_root: Path | None) -> Split:
    """Return the test images, for a choice of the epoch that the authors made on them."""
    try:
        return load_split(data.dataset, "test", data_root, data.image_size, data.max_side)
    except DataError as error:
        raise DataError(f"{error}; the test images choose the epoch: --select-on holdout does without them") from error


def chosen_indices(split: Split, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in `split` of the images to train on and of those held out, both int64."""
    train, held = np.arange(len(split)), np.arange(0)
    if recipe.holds_out:
        per_class, place = recipe.selection.holdout_per_class, recipe.selection.holdout_from
        train, held = holdout_split(split.labels, per_class, place=place)
    if recipe.data.images_per_class is not None:
        train = _first_of_each_class(split, train, recipe.data.images_per_class)
    if recipe.data.imbalance is not None:  # what is held out stays balanced
        train = train[long_tail(split.labels[train], len(split.classes), recipe.data.imbalance)]
    _tell_sizes(split, train, recipe.data.imbalance)
    return train, held


def _tell_sizes(split: Split, train: np.ndarray, factor: float | None) -> None:
    """Say how long the tail is, if there is one, and which classes have no image to train on."""
    count_K = np.bincount(split.labels[train], minlength=len(split.classes))
    if factor is not None:
        first, last = (f"{count_K[k]:,} of {split.classes[k]}" for k in (0, -1))
        say(f"--imbalance {factor:g}: {len(train):,} training images, from {first} down to {last}")
    empty = [name for name, n in zip(split.classes, count_K, strict=True) if n == 0]
    if empty:
        more = f" and {len(empty) - 5} classes more" * (len(empty) > 5)
        say(f"warning: there is no image to train on of {', '.join(empty[:5])}{more}")


def _first_of_each_class(split: Split, index_N: np.ndarray, wanted: int) -> np.ndarray:
    """Return the first `wanted` positions of each class, in their order, and say which classes have fewer.

    Args:
        index_N: (N,) int64 positions in `split`, sorted.
    """
    members = [index_N[split.labels[index_N] == k] for k in range(len(split.classes))]
    short = [f"{name} {len(own)}" for name, own in zip(split.classes, members, strict=True) if len(own) < wanted]
    if short:
        more = f" and {len(short) - 5} classes more" * (len(short) > 5)
        say(f"note: --images-per-class {wanted}: some classes have fewer to train on: {', '.join(short[:5])}{more}")
    return np.sort(np.concatenate([own[:wanted] for own in members]))
