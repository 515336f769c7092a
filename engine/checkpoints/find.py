"""The networks that a run or an evaluation is given by name: checkpoints, runs, RobustBench's, and the user's own."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from retemper.engine.checkpoints.external import Foreign, Shape, foreign, load_foreign
from retemper.engine.checkpoints.header import Facts, facts_of, load_trained, weights_of
from retemper.engine.checkpoints.published import Released, released
from retemper.files import file_digest

Source = dict[str, str]  # how config.json names a network: path, model, sha256, and released where it is known


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a name means, not loaded yet.

    Attributes:
        name: as the user wrote it.
        facts: what it says of itself, or is known to be.
        weights, sha256: the checkpoint's file and its digest; None where code builds the network.
        builder: that code.
        released: what the literature says of it.
    """

    name: str
    facts: Facts
    weights: Path | None = None
    sha256: str | None = None
    builder: Foreign | None = None
    released: Released | None = None

    def load(self, facts: Facts, shape: Shape, device: torch.device, cache: Path) -> tuple[nn.Module, Source]:
        """The network, frozen, in eval mode, on `device`; and how config.json names it.

        Args:
            facts: with the number of classes, and for a checkpoint the architecture.
            shape: (H, W, C) of the images.
            cache: where downloads go.
        Raises:
            UsageError, DataError: it cannot be used.
        """
        if self.builder is None:
            assert self.weights is not None and self.sha256 is not None
            model, sha256 = load_trained(self.weights, facts, device), self.sha256
        else:
            assert facts.num_classes is not None
            model, sha256 = load_foreign(self.builder, facts.num_classes, shape, device, cache)
        source = {"path": self.name, "model": str(facts.model), "sha256": sha256}
        return model, source | ({} if self.released is None else {"released": self.released.title})


def find_network(target: str | Path, *, dataset: str | None, which: str = "best") -> Network:
    """The network that `target` means: one of the forms of foreign.py, a checkpoint, or a run's `which` weights.

    Args:
        dataset: of the images at hand, where it is known.
    Raises:
        UsageError, DataError: there is none.
    """
    name = str(target)
    if (builder := foreign(name, dataset)) is not None:
        facts = Facts(model=builder.name, dataset=builder.dataset)
        return Network(name=name, facts=facts, builder=builder, released=released(builder.name))
    weights = weights_of(Path(target), which)
    sha256 = file_digest(weights)
    known = released(sha256)
    facts = facts_of(weights).or_else(Facts() if known is None else Facts(model=known.model, dataset=known.dataset))
    return Network(name=name, facts=facts, weights=weights, sha256=sha256, released=known)
