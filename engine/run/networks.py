"""The networks that a run builds on, for its images."""

from pathlib import Path

import torch
from torch import nn

from retemper.console import say
from retemper.engine.checkpoints.find import Network, Source, find_network
from retemper.engine.checkpoints.header import Facts, require_same_images
from retemper.engine.checkpoints.published import Published, clean_accuracy, margin, require_stated_accuracy
from retemper.engine.checkpoints.weights import load_checkpoint, load_state
from retemper.engine.run.job import Job
from retemper.errors import DataError, UsageError
from retemper.loaders import Split


class Networks:
    """Networks for the images of `split`."""

    def __init__(self, job: Job, split: Split) -> None:
        self.job, self.split = job, split
        self.num_classes, self.channels = len(split.classes), split.shape[2]
        self.teachers: list[tuple[nn.Module, Published | None]] = []

    def teacher(self, model: str | None, name: str | Path | None) -> tuple[nn.Module | None, Source | None]:
        """A frozen teacher, and how the config names it; nothing where the recipe has none.

        Raises:
            DataError, UsageError: the network cannot be used.
        """
        if model is None:
            return None, None
        assert name is not None
        network, facts = self._found(name, model, "the teacher")
        teacher, source = self._loaded(network, facts)
        self.teachers.append((teacher, network.published))
        return teacher, source

    def check(self, held: Split | None) -> None:
        """Say how well the teachers know images that they have not learned from.

        A released one is held to its authors' accuracy, on test images. Of another nothing is known but that chance is
        too little: it is told on the held-out images, where there are some.

        Raises:
            DataError: a released teacher falls short.
        """
        job = self.job
        for teacher, known in self.teachers:
            if known is not None and known.dataset == job.recipe.dataset and job.recipe.image_size is None:
                require_stated_accuracy(teacher, known, job.data_root, job.device)
            elif held is not None:
                accuracy, images = clean_accuracy(teacher, held, job.device)
                say(f"{job.name}: the teacher classifies {accuracy:.1%} of {images} held-out images correctly")
                chance = 1 / self.num_classes
                if accuracy < chance + margin(chance, images):
                    say("warning: that is little better than chance: mind its pixel range, classes and channels")

    def start(self, student: nn.Module) -> Source | None:
        """Give the student the weights that it is to begin with, if any; how the config names them. Raises likewise."""
        name, model = self.job.start, self.job.recipe.student
        if name is None:
            return None
        network, facts = self._found(name, model, "the start")
        if network.weights is None:
            return self._copied(network, facts, student)
        if facts.model != model:
            raise UsageError(f"--start {name}: it is a {facts.model}, the student is a {model}")
        load_checkpoint(network.weights, student)
        return {"path": network.name, "model": model, "sha256": str(network.sha256)}

    def _copied(self, network: Network, facts: Facts, student: nn.Module) -> Source:
        """The start where it is built by other code: the same weights must then give the same answers."""
        model, source = self._loaded(network, facts)
        load_state(f"--start {network.name}", model.state_dict(), student)
        H, W, C = self.split.shape
        image = torch.linspace(0, 1, 2 * C * H * W).view(2, C, H, W)
        with torch.no_grad():
            theirs, ours = model(image.to(self.job.device)).cpu(), student.eval()(image)
        student.train()
        if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
            raise DataError(
                f"--start {network.name}: with its weights the student answers otherwise; does it normalise its images?"
            )
        return source

    def _loaded(self, network: Network, facts: Facts) -> tuple[nn.Module, Source]:
        return network.load(facts, self.split.shape, self.job.device, self.job.cache)

    def _found(self, name: str | Path, model: str, whose: str) -> tuple[Network, Facts]:
        dataset = self.job.recipe.dataset
        network = find_network(name, dataset=dataset)
        facts = network.facts
        require_same_images(f"{whose} {name}", facts, self.num_classes, self.channels)
        if network.published is not None:
            say(f"{whose} {name} is {network.published.title}")
        if facts.image_size not in (None, self.split.shape[0]):
            say(f"note: {whose} saw images of {facts.image_size} px, the student's have {self.split.shape[0]}")
        if facts.dataset not in (None, dataset):
            say(f"note: {whose} was trained on {facts.dataset}, the student is to learn {dataset}")
        known = Facts(model=model, num_classes=self.num_classes, channels=self.channels, dataset=dataset)
        return network, facts.or_else(known)
