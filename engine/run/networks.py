"""The networks that a run builds on: its teachers, and the weights that the student begins with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from retemper.console import say
from retemper.engine.attack import module_mode
from retemper.engine.checkpoints.content import CheckpointError
from retemper.engine.checkpoints.external import build_student, require_usable
from retemper.engine.checkpoints.find import Network, Source, find_network
from retemper.engine.checkpoints.header import Facts, fitting_models, require_finite, require_same_images
from retemper.engine.checkpoints.probe import IMAGES, require_sound
from retemper.engine.checkpoints.published import Published, clean_accuracy, margin, require_stated_accuracy
from retemper.engine.checkpoints.unwrap import Pixels, by_bare_name, take
from retemper.engine.checkpoints.weights import load_state, load_with_pixels
from retemper.engine.distributed.ranks import Ranks
from retemper.engine.groups import Data
from retemper.engine.models import MODELS, Normalised, NormalisingNetwork, normalising
from retemper.engine.recipe import Recipe
from retemper.engine.run.told_apart import tell_apart
from retemper.engine.state import State
from retemper.errors import DataError, UsageError
from retemper.loaders import Loader, Split, middle

CLEAN = "the clean teacher"  # in messages


def begin_state(
    recipe: Recipe, networks: "NetworkLoader", *, seed: int, ranks: Ranks, names: Mapping[str, str | Path | None]
) -> tuple[State, dict[str, Source | None]]:
    """Return a run's state before its first step, and how config.json names its teachers and its start.

    Args:
        seed: of the weights of the student and of its peer.
        names: what the user calls the "teacher", the "clean_teacher" and the "start", as `find_network` takes it.
    Raises:
        UsageError, DataError: a network cannot be used, or an option does not fit the device.
    """
    wanted, num_classes = recipe.networks, len(networks.split.classes)
    torch.manual_seed(seed)
    student, peer = networks.fresh(wanted.student, wanted.normalise), None
    if recipe.method.trains_peer:  # its weights are drawn after the student's, and are others
        peer = networks.fresh(wanted.peer_model or wanted.student, wanted.normalise)
    if wanted.student not in MODELS:
        require_readable(wanted.student, student)
        layout = torch.channels_last if recipe.execution.channels_last else torch.contiguous_format
        require_usable(wanted.student, student, num_classes, networks.split.shape, layout)
        networks.unprobed.append((f"--student {wanted.student}", student, True))
    attacked = recipe.method.attacks_teacher or bool(recipe.method.attacks_slope())
    robust, robust_source = networks.teacher(wanted.teacher_model, names["teacher"], attacked=attacked)
    clean, clean_source = networks.teacher(wanted.clean_teacher_model, names["clean_teacher"], whose=CLEAN)
    start = networks.start(student, wanted.student, names["start"])
    try:
        recipe.execution.captures_on(networks.device)  # asked before the data is read
        state = State(recipe, student, robust, num_classes, networks.device, clean, ranks, peer)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return state, {"teacher": robust_source, "clean_teacher": clean_source, "start": start}


def require_readable(model: str, student: nn.Module) -> None:
    """Check that a file of a user's network says as it should how the network normalises its images.

    Raises:
        UsageError: its own tensors hide the mean and the deviation there.
    """
    if not isinstance(student, Normalised):
        return
    with suppress(CheckpointError):
        if take(model, student.state_dict(), by_bare_name(model, student.network.state_dict())).pixels is not None:
            return
    raise UsageError(
        f"--normalise true: in a file of {model} its own tensors would hide the mean and the deviation: let it "
        "normalise its images itself, and give --normalise false"
    )


def require_same_pixels(whose: str, pixels: Pixels | None, student: nn.Module) -> None:
    """Check that a student normalises its images as the network does whose weights it begins with.

    Args:
        whose: the network in words, to begin the message with.
        pixels: what that network does to its images first.
    Raises:
        UsageError: the student does something else.
    """
    own = Pixels(student.mean.flatten(), student.std.flatten()) if isinstance(student, Normalised) else None
    if own is None and pixels is not None:
        raise UsageError(f"{whose}: its network first takes {pixels}, the student does not: give --normalise true")
    if own is not None and pixels is None:
        raise UsageError(f"{whose}: its network takes pixels as they are, the student {own}: give --normalise false")
    if own is not None and pixels is not None and not own.agrees(pixels):
        raise UsageError(f"{whose}: its network first takes {pixels}, the student {own}: name another start")


@contextmanager
def _keeping_pixels(whose: str, student: nn.Module) -> Iterator[None]:
    """Let a student take weights inside the block, and nothing else: its own files do not say how it normalises.

    Args:
        whose: the network in words whose weights they are.
    Raises:
        UsageError: a student that normalises its images itself would do so by other values.
    """
    if not isinstance(student, NormalisingNetwork):
        yield
        return
    own = student.pixels()
    yield
    theirs = student.pixels()
    student.take_pixels(**own)
    if not (kept := Pixels(**own)).agrees(given := Pixels(**theirs)):
        raise UsageError(f"{whose}: its network first takes {given}, the student {kept}: name another start")


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

    def fresh(self, model: str, normalise: bool) -> nn.Module:
        """Return a network with fresh weights that normalises its images where it is asked to, and none does twice."""
        classes, dataset = len(self.split.classes), self.data.dataset
        side, _, channels = self.split.shape
        network = build_student(model, classes, channels=channels, dataset=dataset, side=side)
        wanted = normalise and not isinstance(network, NormalisingNetwork)
        return normalising(network, dataset) if wanted else network

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
        with _keeping_pixels(f"--start {name}", student):
            if network.weights is None:
                return self._copied(network, facts, student)
            if facts.model != model:
                raise UsageError(
                    f"--start {name}: it is a {facts.model}, the student is a {model}: give --student {facts.model}"
                )
            pixels = load_with_pixels(network.weights, _behind_normalisation(student), network.entry)
        require_same_pixels(f"--start {name}", pixels, student)
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
        walked = (batch.image.cpu().numpy() for batch in loader.walk(index))
        seen = np.concatenate([middle(one, *self.split.shape[:2]) for one in walked])  # some take no other size
        image = torch.from_numpy(seen).to(self.device).movedim(-1, 1).float() / 255
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
        load_state(f"--start {network.name}", model.state_dict(), _behind_normalisation(student))
        H, W, C = self.split.shape
        image = torch.linspace(0, 1, 2 * C * H * W).view(2, C, H, W)
        with torch.no_grad():
            theirs, ours = model(image.to(self.device, copy=True)).cpu(), student.eval()(image)
        student.train()
        if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
            raise DataError(
                f"--start {network.name}: with its weights the student answers otherwise; does it normalise its images "
                "(--normalise true)?"
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
        model = model if facts.model is not None else _recognised(whose, network, model)
        return network, facts.or_else(Facts(model=model, num_classes=num_classes, channels=channels, dataset=dataset))


def _behind_normalisation(student: nn.Module) -> nn.Module:
    """Return the network behind the layer that normalises the images; where there is none, the student itself."""
    return student.network if isinstance(student, Normalised) else student


def _recognised(whose: str, network: Network, model: str) -> str:
    """Return the architecture of a network that says none: `model`, unless its tensors are those of one other alone."""
    if network.weights is None or network.entry is not None or model not in MODELS:
        return model
    fitting = fitting_models(network.weights)
    if model in fitting or len(fitting) != 1:
        return model
    say(f"{whose} {network.name} is a {fitting[0]}, by its tensors")
    return fitting[0]
