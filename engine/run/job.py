"""A job: a recipe with its name, where and on what it runs, and what to try where memory runs out."""

import os
import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from retemper.engine.checkpoints.external import source_digest
from retemper.engine.checkpoints.find import Source
from retemper.engine.checkpoints.header import Facts
from retemper.engine.device import (
    cpu_threads,
    device_name,
    exact_fp32,
    is_out_of_memory,
    repeatable,
    tuned_convolutions,
)
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.models import one_side
from retemper.engine.recipe import Recipe
from retemper.engine.run.commands import absolute
from retemper.engine.run.data import TrainingData
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import UsageError
from retemper.interrupts import undisturbed
from retemper.loaders import Split
from retemper.provenance import commit, versions

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Job:
    """The request of `retemper train`.

    Attributes:
        out: the run's folder.
        data_root, beton: where the data set lies, and a converted training set to read in place of it.
        extra: the files of a pool, of which each batch holds the recipe's `extra_fraction`; None for none.
        teacher, clean_teacher, start: what the user calls these networks, as `find_network` takes it.
        cache: the folder of converted data sets and of the teachers' answers.
        save_every: seconds of training after which the state is saved within an epoch.
        max_steps: how many steps are taken in all before the run is cut, to be gone on with; None for all of them.
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
    extra: Path | None = None
    device: torch.device
    tensorboard: bool = False
    save_every: float = 600.0
    max_steps: int | None = None
    deterministic: bool = False
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        """Raise UsageError where one of --extra and --extra-fraction comes without the other."""
        fraction = self.recipe.data.extra_fraction
        if self.extra is None and fraction:
            raise UsageError(f"--extra-fraction {fraction:g} of which images? Name their .npz with --extra")
        if self.extra is not None and not fraction:
            raise UsageError(f"--extra {self.extra}: say with --extra-fraction, as 0.7, how much of a batch is from it")

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
        try:
            with wait, lock, cpu_threads(execution.cpu_threads), convolutions, products:
                yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UsageError(_advice(self.recipe, self.device, str(error))) from None

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
            max_side=self.recipe.data.max_side,
            dataset=self.recipe.data.dataset,
            eps=self.recipe.attack.eps,
            side=one_side(self.recipe.networks.student, split.shape[0]),
            source=source_digest(self.recipe.networks.student),
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
            "out": absolute(self.out),
            "data_root": absolute(self.data_root),
            **{what: source and source | {"path": str(absolute(source["path"]))} for what, source in sources.items()},
            "student_source": source_digest(self.recipe.networks.student),
            "loader": data.loader.description,
            **({} if data.loader.jpeg_quality is None else {"jpeg_quality": data.loader.jpeg_quality}),
            **({} if data.pool is None else {"extra": data.pool.describe()}),
            "versions": versions(),
            "device": device_name(self.device),
            "processes": self.ranks.world_size,
            "commit": commit(),
            "started": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


def default_out(method: str, setting: str, seed: int, preset: str = "paper") -> Path:
    """Return the folder of a run that is given no --out."""
    trained = setting if preset == "paper" else f"{setting}-{preset}"
    return Path("runs") / f"{method}-{trained}-seed{seed}"


def default_cache() -> Path:
    """Return the folder of converted data and teachers' answers where no --cache is given."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "retemper"


def _advice(recipe: Recipe, device: torch.device, words: str) -> str:
    """Say in numbers that memory ran out, and what to try, in place of an allocator's complaint, `words`."""
    size, batch_size, execution = recipe.data.image_size, recipe.optim.batch_size, recipe.execution
    wanted = re.search(r"(?:[Tt]ried to allocate|allocate) ([\d.]+ ?[KMGT]?i?[Bb]\w*)", words)
    images = f"batch size {batch_size}" + (f", images of {size} px" if size else f", {recipe.data.dataset}")
    tries = [f"--batch-size {max(1, batch_size // 2)}"]
    if device.type == "cuda":
        tries += ["--precision bf16"] * (execution.dtype_on(device) is torch.float32)
        tries += ["--teacher-ahead 1"] * (execution.teacher_ahead > 1)
    tries += ["--extra-on disk"] * (recipe.data.extra_fraction > 0 and execution.extra_on != "disk")
    tries += ["--loader ffcv (resident keeps all images in memory)"] * (execution.loader != "ffcv")
    asked = f" for {wanted.group(1)}" if wanted else ""
    return f"out of memory{asked} at {images}, {recipe.networks.student}; {_taken(device)}: try {', '.join(tries)}"


def _taken(device: torch.device) -> str:
    """Say how full the memory is."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours, taken = torch.cuda.memory_allocated(device) / GIB, (total - free) / GIB
        return f"{ours:.1f} GiB of {total / GIB:.1f} GiB on {device} are this run's, {taken:.1f} GiB taken in all"
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(facts[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    limited = f", and this process may have {limit / GIB:.1f} GiB (ulimit -v)" * (limit != resource.RLIM_INFINITY)
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"{ours:.1f} GiB are this run's at most, {free:.1f} GiB of {total:.1f} GiB are free{limited}"
