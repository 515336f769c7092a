"""The network that is to be evened, with the images that judge it and how it does on them now."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retemper.engine.checkpoints.external import Contiguous
from retemper.engine.checkpoints.find import Source, find_network
from retemper.engine.checkpoints.header import Facts
from retemper.engine.distributed.ranks import ALONE
from retemper.engine.evaluation.described import Described, described
from retemper.engine.even.images import EvenImages, even_images
from retemper.engine.even.tuning import Tuning, as_normalised, say_what_chooses, tuning
from retemper.engine.models import Normalised
from retemper.engine.run.data import training_split
from retemper.engine.run.job import default_cache
from retemper.engine.run.selection import judge
from retemper.errors import DataError
from retemper.loaders import Split
from retemper.options import shown_value

FREE = ("norm", "half", "bias")  # without training
FINE_TUNES = ("csr", "plain")  # in two epochs
CONTROL = "csr_control"  # the method of the second


@dataclass(frozen=True, kw_only=True)
class EvenRequest:
    """The request of `retemper even`.

    Attributes:
        target: the network, as `find_network` takes it.
        by: one of `FREE` or `FINE_TUNES`; None for the best of `FREE`.
        out: the folder of the new run; None for one beside the network's.
        data_root: where the data set lies.
        weights: which of a run's, "best" or "last".
        holdout: how many images of each class choose, for a network whose training held none out.
        eps: the radius, in pixel units; None for that of its training or, where that is not known, the usual one.
        seed: of a fine-tune; None for that of the run.
        facts: what the user says about a bare checkpoint.
    """

    target: str | Path
    by: str | None = None
    out: Path | None = None
    data_root: Path | None = None
    weights: str = "best"
    holdout: int | None = None
    eps: float | None = None
    seed: int | None = None
    device: torch.device
    facts: Facts


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network that is ready to be evened.

    Attributes:
        known: what is known of it.
        found: the fine-tune that suits it, whose images and radius all ways of evening share.
        source: how config.json names it.
        before: how it does on the images that choose, as `judge` returns it.
    """

    request: EvenRequest
    known: Described
    found: Tuning
    split: Split
    images: EvenImages
    model: nn.Module
    source: Source
    before: dict[str, Any]

    @property
    def method(self) -> str:
        """The method of the fine-tune."""
        return method_of(self.request.by)

    @property
    def name(self) -> str:
        """The network as the user named it."""
        return self.known.network.name

    @property
    def seed(self) -> int:
        """The seed of the new run: as asked, or that of the network's own."""
        asked, config = self.request.seed, self.known.config
        return asked if asked is not None else 0 if config is None else config["seed"]

    @property
    def stem(self) -> str:
        """METHOD:SETTING of the network's run; of another network, its data set."""
        config = self.known.config
        return self.split.name if config is None else f"{config['method']}:{config['setting']}"

    def judged(self, network: nn.Module) -> dict[str, Any]:
        """Return how a network does on the images that choose, as `judge` returns it."""
        return judge(network, self.found.recipe, self.images.held, self.request.device, ALONE)

    def out(self, by: str) -> Path:
        """Return the folder of the new run: as asked, or beside the network's run, named after it."""
        if self.request.out is not None:
            return self.request.out
        network, weights = self.known.network, self.known.network.weights
        if weights is None or self.known.config is None:
            stem = re.sub(r"[^\w.-]+", "-", Path(network.name).stem if weights is not None else network.name)
            return Path("runs") / f"{stem}-even-{by}"
        last = "" if weights.stem == "best" else f"-{weights.stem}"
        folder = weights.parent.resolve() if weights.parent.name in ("", "..") else weights.parent
        return folder.with_name(f"{folder.name}{last}-even-{by}")


def subject(request: EvenRequest) -> Subject:
    """Return the network of a request with all that evening it needs.

    Raises:
        UsageError, DataError: it, its data or its images cannot be used; or a class of it was never learned.
    """
    network = find_network(request.target, dataset=request.facts.dataset, which=request.weights)
    known = described(network, request.facts, request.data_root, "even")
    found = tuning(method_of(request.by), known, request.holdout, request.eps)
    split = training_split(found.recipe.data, known.data_root, None)
    known.require_classes(split)
    images = even_images(split, found.recipe)
    facts = known.facts.or_else(Facts(num_classes=len(split.classes), channels=split.shape[2]))
    model, source = network.load(facts, split.shape, request.device, default_cache())
    model = model.module if isinstance(model, Contiguous) else model
    found = as_normalised(found, network.name) if isinstance(model, Normalised) else found
    say_what_chooses(found, network.name)
    before = judge(model, found.recipe, images.held, request.device, ALONE)
    require_learned(before, found, split, network.name)
    return Subject(
        request=request,
        known=known,
        found=found,
        split=split,
        images=images,
        model=model,
        source=source,
        before=before,
    )


def method_of(by: str | None) -> str:
    """Return the method of a fine-tune; of a way without training, the one whose images and radius it shares."""
    return CONTROL if by is None or by in FREE or by == FINE_TUNES[-1] else by


def require_learned(report: dict[str, Any], found: Tuning, split: Split, whose: str) -> None:
    """Raise DataError where a class is never right under attack: nothing can be moved to it from the others."""
    never = [name for name, share in zip(split.classes, report["accuracy"], strict=True) if share == 0]
    if never:
        more = f" and {len(never) - 5} more" * (len(never) > 5)
        count = found.recipe.selection.holdout_per_class
        raise DataError(
            f"{whose} never learned {', '.join(never[:5])}{more}: of {count} held-out images of each class, none is "
            f"right under attack at eps {shown_value(found.recipe.attack.eps)}. Evening moves what a network knows "
            "between its classes, and makes it know no more: train it longer, at a smaller --eps, or by a fair method "
            "(retemper ls --all)"
        )
