"""The networks that a run builds on: its teachers, and the weights that the student begins with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from retemper.console import say
from retemper.engine.attack import module_mode
from retemper.engine.checkpoints.external import build_student, require_usable, users_network
from retemper.engine.checkpoints.find import Network, Source, find_network
from retemper.engine.checkpoints.header import Facts, require_finite, require_same_images
from retemper.engine.checkpoints.probe import IMAGES, require_sound
from retemper.engine.checkpoints.published import Published, clean_accuracy, margin, require_stated_accuracy
from retemper.engine.checkpoints.weights import load_checkpoint, load_state
from retemper.engine.distributed.ranks import Ranks
from retemper.engine.groups import Data
from retemper.engine.recipe import Recipe
from retemper.engine.run.told_apart import tell_apart
from retemper.engine.state import State
from retemper.errors import DataError, UsageError
from retemper.loaders import Loader, Split

CLEAN = "the clean teacher"  # in messages


def begin_state(
    recipe: Recipe, networks: "NetworkLoader", *, seed: int, ranks: Ranks, names: Mapping[str, str | Path | None]
) -> tuple[State, dict[str, Source | None]]:
    """Return a run's state before its first step, and how config.json names its teachers and its start.

    Args:
        seed: of the student's weights.
        names: what the user calls the "teacher", the "clean_teacher" and the "start", as `find_network` takes it.
    Raises:
        UsageError, DataError: a network cannot be used, or an option does not fit the device.
    """
    wanted, num_classes = recipe.networks, len(networks.split.classes)
    torch.manual_seed(seed)
    student = build_student(wanted.student, num_classes, channels=networks.split.shape[2])
    if users_network(wanted.student):
        layout = torch.channels_last if recipe.execution.channels_last else torch.contiguous_format
        require_usable(wanted.student, student, num_classes, networks.split.shape, layout)
        networks.unprobed.append((f"--student {wanted.student}", student, True))
    attacked = recipe.method.attacks_teacher
    robust, robust_source = networks.teacher(wanted.teacher_model, names["teacher"], attacked=attacked)
    clean, clean_source = networks.teacher(wanted.clean_teacher_model, names["clean_teacher"], whose=CLEAN)
    start = networks.start(student, wanted.student, names["start"])
    try:
        recipe.execution.captures_on(networks.device)  # asked before the data is read
        state = State(recipe, student, robust, num_classes, networks.device, clean, ranks)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return state, {"teacher": robust_source, "clean_teacher": clean_source, "start": start}


@dataclass(kw_only=True)
class NetworkLoader:
    """Loads networks for the images of `split`, and remembers the teachers among them.

    Networks are named as `find_network` takes it. One that cannot be used raises DataError or UsageError.

    Attributes:
        data: the recipe's options of the images.
        eps: the recipe's radius.
        cache: the folder where downloads go.
    """

    split: Split
    data: Data
    eps: float
    device: torch.device
    cache: Path
    teachers: list[tuple[nn.Module, Published | None]] = field(default_factory=list)
    unprobed: list[tuple[str, nn.Module, bool]] = field(default_factory=list)  # in words; and whether it is attacked

    def teacher(
        self, model: str | None, name: str | Path | None, *, whose: str = "the teacher", attacked: bool = False
    ) -> tuple[nn.Module | None, Source | None]:
        """Return a frozen teacher and how config.json names it; None twice where the recipe has no such teacher.

        Args:
            model: the architecture that the recipe wants.
            whose: which teacher it is, for messages.
            attacked: whether the attack goes through this teacher.
        """
        if model is None:
            return None, None
        assert name is not None
        network, facts = self._found(name, model, whose)
        teacher, source = network.load(facts, self.split.shape, self.device, self.cache)
        self.teachers.append((teacher, network.published))
        self.unprobed.append((f"{whose} {name}", teacher, attacked))
        return teacher, source

    def start(self, student: nn.Module, model: str, name: str | Path | None) -> Source | None:
        """Give the student, a `model`, the weights that it begins with; return how config.json names them."""
        if name is None:
            return None
        network, facts = self._found(name, model, "the start")
        if network.weights is None:
            return self._copied(network, facts, student)
        if facts.model != model:
            raise UsageError(f"--start {name}: it is a {facts.model}, the student is a {model}")
        load_checkpoint(network.name if network.entry else network.weights, student)
        require_finite(network.weights, student)
        return network.source(facts, student)

    def probe(self, loader: Loader) -> None:
        """Try what was loaded on a few of the loader's images, each network once (`require_sound`).

        Raises:
            DataError: a network cannot be used.
        """
        if not self.unprobed:
            return
        index = np.linspace(0, len(self.split) - 1, min(IMAGES, len(self.split))).astype(np.int64)
        image = torch.cat([batch.image for batch in loader.walk(index)]).movedim(-1, 1).float() / 255
        while self.unprobed:
            whose, network, attacked = self.unprobed.pop()
            with module_mode(network, "eval"):
                require_sound(whose, network, image, len(self.split.classes), attacked=attacked)

    def check_teachers(self, held: Split | None, *, run: str, data_root: Path | None) -> None:
        """Say how well the teachers of `run` know images that they have not learned from.

        A published teacher is held to its authors' accuracy on test images. Of another nothing is known but that chance
        is too little; it is told on the images that choose the best epoch, where there are some.

        Raises:
            DataError: a published teacher falls short.
        """
        for teacher, known in self.teachers:
            if known is not None and known.dataset == self.data.dataset and self.data.image_size is None:
                require_stated_accuracy(teacher, known, data_root, self.device)
            elif held is not None:
                accuracy, images = clean_accuracy(teacher, held, self.device)
                kind = "test" if held.split == "test" else "held-out"
                say(f"{run}: the teacher classifies {accuracy:.1%} of {images} {kind} images correctly")
                chance = 1 / len(self.split.classes)
                if accuracy < chance + margin(chance, images):
                    say("warning: that is little better than chance: mind its pixel range, classes and channels")

    def _copied(self, network: Network, facts: Facts, student: nn.Module) -> Source:
        """Copy the weights of a start that is built by other code: the same weights must then give the same answers."""
        model, source = network.load(facts, self.split.shape, self.device, self.cache)
        self.unprobed.append((f"--start {network.name}", model, False))
        load_state(f"--start {network.name}", model.state_dict(), student)
        H, W, C = self.split.shape
        image = torch.linspace(0, 1, 2 * C * H * W).view(2, C, H, W)
        with torch.no_grad():
            theirs, ours = model(image.to(self.device, copy=True)).cpu(), student.eval()(image)
        student.train()
        if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
            raise DataError(
                f"--start {network.name}: with its weights the student answers otherwise; does it normalise its images?"
            )
        return source

    def _found(self, name: str | Path, model: str, whose: str) -> tuple[Network, Facts]:
        """Return the network called `name` and what is known of it; `whose` it is, for messages."""
        network, dataset = find_network(name, dataset=self.data.dataset), self.data.dataset
        facts, channels, num_classes = network.facts, self.split.shape[2], len(self.split.classes)
        require_same_images(f"{whose} {name}", facts, num_classes, channels)
        if network.published is not None:
            say(f"{whose} {name} is {network.published.title}")
        tell_apart(whose, network, self.split, self.data, None if whose == CLEAN else self.eps)
        return network, facts.or_else(Facts(model=model, num_classes=num_classes, channels=channels, dataset=dataset))
