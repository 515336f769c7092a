"""The networks that a run is given: its teachers, and the weights that its student begins with."""

from pathlib import Path

from torch import nn

from retemper.engine.job import Job
from retemper.engine.trained import Facts, load_trained, require_same_images, teacher_facts
from retemper.engine.weights import load_checkpoint
from retemper.loaders import Split
from retemper.loaders.errors import UsageError
from retemper.loaders.progress import say

Source = dict[str, str]  # how config.json names a checkpoint


class Networks:
    """Checkpoints for the images of `split`."""

    def __init__(self, job: Job, split: Split) -> None:
        self.job, self.split = job, split
        self.num_classes, self.channels = len(split.classes), split.shape[2]

    def teacher(self, model: str | None, path: Path | None) -> tuple[nn.Module | None, Source | None]:
        """A frozen teacher, and how the config names it; nothing where the recipe has none.

        Raises:
            DataError, UsageError: the checkpoint cannot be used.
        """
        if model is None:
            return None, None
        assert path is not None
        weights, facts, source = self._found(path, model, "the teacher")
        return load_trained(weights, facts, self.job.device), source

    def start(self, student: nn.Module) -> Source | None:
        """Give the student the weights that it is to begin with, if any; how the config names them. Raises likewise."""
        path, model = self.job.start, self.job.recipe.student
        if path is None:
            return None
        weights, facts, source = self._found(path, model, "the start")
        if facts.model != model:
            raise UsageError(f"--start {path}: it is a {facts.model}, the student is a {model}")
        load_checkpoint(weights, student)
        return source

    def _found(self, path: Path, model: str, whose: str) -> tuple[Path, Facts, Source]:
        fallback = Facts(model=model, num_classes=self.num_classes, channels=self.channels)
        weights, facts, source = teacher_facts(path, fallback)
        require_same_images(f"{whose} {path}", facts, self.num_classes, self.channels)
        if facts.image_size not in (None, self.split.shape[0]):
            say(f"note: {whose} saw images of {facts.image_size} px, the student's have {self.split.shape[0]}")
        dataset = self.job.recipe.dataset
        if facts.dataset not in (None, dataset):
            say(f"note: {whose} was trained on {facts.dataset}, the student is to learn {dataset}")
        return weights, facts, source
