"""A job: a recipe with its name, and where and on what it runs."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from retemper.engine.checkpoints.find import Source
from retemper.engine.checkpoints.header import Facts
from retemper.engine.device import cpu_threads, device_name, exact_fp32, repeatable, tuned_convolutions
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.recipe import Recipe
from retemper.engine.run.data import TrainingData
from retemper.engine.run.interrupts import undisturbed
from retemper.engine.run.memory import memory_advice
from retemper.engine.run.run_folder import RunFolder
from retemper.loaders import Split
from retemper.provenance import commit, versions


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the user asked `retemper train` for.

    Attributes:
        out: the run's folder.
        data_root, beton: where the data set lies, and a converted training set to read in place of it.
        teacher, clean_teacher, start: what the user calls these networks, as `find_network` takes it.
        cache: the folder of converted data sets and of the teachers' answers.
        save_every: seconds of training after which the state is saved within an epoch.
        deterministic: whether a GPU is to give the same bits every time.
        ranks: the processes that run the job together.
    """

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
    save_every: float = 600.0
    deterministic: bool = False
    ranks: Ranks = ALONE

    @property
    def name(self) -> str:
        """METHOD:SETTING."""
        return f"{self.method}:{self.setting}"

    @contextmanager
    def surroundings(self, folder: RunFolder) -> Iterator[None]:
        """Hold the folder, and compute as the recipe says, inside the block.

        Raises:
            UsageError: another process holds the folder; or memory ran out, and the message says what to try.
        """
        execution, ranks = self.recipe.execution, self.ranks
        wait = undisturbed() if ranks.joined else nullcontext()  # no process leaves while the others wait for it
        lock = folder.locked() if ranks.is_first else nullcontext()
        convolutions = repeatable() if self.deterministic else tuned_convolutions()
        products = exact_fp32() if execution.precision == "fp32" else nullcontext()
        with wait, lock, cpu_threads(execution.cpu_threads), convolutions, products:
            with memory_advice(self.recipe, self.device):
                yield

    def place(self) -> str:
        """Say what it runs on."""
        processes = f"{self.ranks.world_size} processes, each on " if self.ranks.joined else ""
        return f"{processes}{device_name(self.device)}"

    def header(self, split: Split) -> dict[str, str]:
        """Return what the header of every file of weights says of the network."""
        facts = Facts(
            model=self.recipe.networks.student,
            num_classes=len(split.classes),
            channels=split.shape[2],
            image_size=self.recipe.data.image_size,
            dataset=self.recipe.data.dataset,
            eps=self.recipe.attack.eps,
        )
        return facts.as_metadata() | {"method": self.method, "setting": self.setting}

    def config(self, data: TrainingData, sources: Mapping[str, Source | None]) -> dict[str, Any]:
        """Return what config.json holds."""
        return {
            "method": self.method,
            "setting": self.setting,
            "recipe": self.recipe.grouped(),
            "seed": self.seed,
            "classes": list(data.split.classes),
            "channels": data.split.shape[2],
            "out": str(self.out),
            "data_root": None if self.data_root is None else str(self.data_root),
            **sources,
            "loader": data.loader.description,
            "versions": versions(),
            "device": device_name(self.device),
            "processes": self.ranks.world_size,
            "commit": commit(),
            "started": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


def default_out(method: str, setting: str, seed: int) -> Path:
    """Return the folder of a run that is given no --out."""
    return Path("runs") / f"{method}-{setting}-seed{seed}"


def default_cache() -> Path:
    """Return the folder of converted data and teachers' answers where no --cache is given."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "retemper"
