"""Batches of a single image, which batch norm cannot train on where the network shrinks it to one pixel."""

from copy import deepcopy

import torch
from torch import nn

from retemper.engine.recipe import Recipe
from retemper.errors import UsageError
from retemper.loaders import Loader


def require_no_lone_image(student: nn.Module, recipe: Recipe, loader: Loader, shape: tuple[int, int, int]) -> None:
    """Check that batch norm can train the student on the smallest batch of an epoch.

    Args:
        loader: deals the images into batches.
        shape: (H, W, C) of the images.
    Raises:
        UsageError: a process has a single image of a batch, too small for batch norm; the message says what to change.
    """
    size, world = loader.plan.batch_size, loader.plan.world_size
    smallest = (loader.num_images % size or size) // world  # 0 where some processes have one image, and some none
    synced = recipe.optim.batch_norm == "synced" and world > 1
    together = recipe.optim.joint and len(recipe.method.forwards) > 1 and recipe.attack.bn_mode == "eval"
    if smallest > 1 or synced or together or _trains_on_one(student, shape):
        return
    images = f"{loader.num_images:,} images in batches of {size}" + f" on {world} processes" * (world > 1)
    raise UsageError(
        f"{images} leave a batch of one image, and batch norm in {recipe.networks.student} cannot train on one image "
        f"of {shape[0]} x {shape[1]}: use another --batch-size, or a larger --image-size"
    )


def _trains_on_one(student: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Say whether batch norm in training mode takes one image; a copy without data is asked, so no statistics move."""
    height, width, channels = shape
    try:
        deepcopy(student).to("meta").train()(torch.empty(1, channels, height, width, device="meta"))
    except Exception as error:  # other people's code may not run without data: that says nothing
        return "more than 1 value per channel" not in str(error)
    return True
