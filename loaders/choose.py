"""The choice of the backend that serves a split."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from retemper.errors import DataError, UsageError
from retemper.loaders.beton import cached
from retemper.loaders.ffcv_backend import FfcvLoader
from retemper.loaders.ffcv_library import INSTALL, ffcv_problem
from retemper.loaders.loader import Loader, Plan
from retemper.loaders.mixed import Extra, MixedLoader, MixedPlan
from retemper.loaders.resident import ResidentLoader
from retemper.loaders.split import Split
from retemper.loaders.views import ViewSpace

LoaderKind = Literal["auto", "ffcv", "resident"]


def make_loader(
    kind: LoaderKind,
    split: Split,
    *,
    batch_size: int,
    seed: int,
    views: ViewSpace,
    device: torch.device,
    indices: np.ndarray | None = None,
    cache_dir: str | Path | None = None,
    beton: str | Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    extra: Extra | None = None,
) -> Loader:
    """Return a loader of `split`; its `description` is one line for the user.

    Args:
        kind: "auto" takes FFCV where it is installed and a converted file exists or can be written, else "resident".
        batch_size: images in a batch of all processes together.
        seed: decides the order of the images and their views.
        views: the crops and flips to draw from.
        device: where the batches are wanted.
        indices: (M,) int64 positions in the split, the part to train on; None for all.
        cache_dir: the folder of converted files; None for none.
        beton: a converted file to read, whatever `cache_dir` holds.
        rank, world_size: decide which rows of each batch this process takes; see `Plan`.
        extra: a pool that a share of each batch is drawn from, whatever backend serves the split; None for none.

    Raises:
        UsageError: FFCV was asked for and is not installed, or a number is impossible.
        DataError: the data or the converted file is damaged.
    """
    chosen = np.arange(len(split)) if indices is None else np.asarray(indices, dtype=np.int64)
    if extra is not None:
        mixed = MixedPlan(
            chosen, batch_size, seed, views, rank, world_size, pool_images=len(extra.pool), fraction=extra.fraction
        )
        real = Plan(chosen, mixed.local_real_rows, seed, views)
        return MixedLoader(_backend(kind, split, real, device, cache_dir, beton), mixed, extra, device)
    return _backend(kind, split, Plan(chosen, batch_size, seed, views, rank, world_size), device, cache_dir, beton)


def _backend(
    kind: LoaderKind,
    split: Split,
    plan: Plan,
    device: torch.device,
    cache_dir: str | Path | None,
    beton: str | Path | None,
) -> Loader:
    """Return the loader of `split` by the backend that `kind` and the machine ask for."""
    if beton is not None and kind == "resident":
        raise UsageError(f"{beton} is read by FFCV: use --loader ffcv, or leave out --beton")
    if kind == "resident":
        return ResidentLoader(split, plan, device, "as asked")
    if kind not in ("auto", "ffcv"):
        raise UsageError(f"no loader {kind!r}; there are auto, ffcv, resident")

    reason = ffcv_problem()
    if reason and (kind == "ffcv" or beton is not None):
        raise UsageError(f"{reason}: run `{INSTALL}`, or use --loader resident")
    if not reason and beton is None and cache_dir is None:
        reason = "there is no folder for a converted file"
        if kind == "ffcv":
            raise UsageError(f"{reason}: run `retemper convert` and name its file, or use --loader resident")
    if not reason:
        why = "as asked" if kind == "ffcv" else "it is installed and the set is converted"
        if beton is not None:
            return FfcvLoader(split, beton, plan, device, why)
        assert cache_dir is not None
        try:
            return FfcvLoader(split, cached(split, cache_dir), plan, device, why)
        except DataError as error:
            if kind == "ffcv":
                raise
            reason = f"ffcv cannot serve it: {error}"
    return ResidentLoader(split, plan, device, reason)
