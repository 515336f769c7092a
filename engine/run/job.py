"""A job: a recipe with its name, and where and on what it runs."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe with its name, and where and on what it runs. Its networks are named as in networks/find.py."""

    method: str
    setting: str
    recipe: Recipe
    out: Path
    seed: int = 0
    data_root: Path | None = None
    teacher: str | Path | None = None
    clean_teacher: str | Path | None = None
    start: str | Path | None = None
    cache: Path
    beton: Path | None = None
    device: torch.device
    tensorboard: bool = False
    save_every: float = 600.0  # seconds of training after which the state is saved within an epoch
    deterministic: bool = False
    ranks: Ranks = ALONE  # the processes that do it together

    @property
    def name(self) -> str:
        return f"{self.method}:{self.setting}"


def default_out(method: str, setting: str, seed: int) -> Path:
    """Where a run goes that is given no --out."""
    return Path("runs") / f"{method}-{setting}-seed{seed}"


def default_cache() -> Path:
    """Where converted data and teachers' answers go that are given no --cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "retemper"
