"""Find the networks that a run or an evaluation names: checkpoints, runs, RobustBench's, and the user's own."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from retemper.engine.checkpoints.external import ExternalNetwork, Shape, external_network, load_external
from retemper.engine.checkpoints.header import Facts, find_weights, load_network, read_facts
from retemper.engine.checkpoints.published import Published, published
from retemper.files import file_digest

Source = dict[str, str]  # how config.json names a network: path, model, sha256, and "released" if it is a published one


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that a user has named, not loaded yet.

    Attributes:
        name: as the user wrote it.
        facts: what its file says or what is published about it.
        weights, sha256: the checkpoint file and its digest; None for an external network.
        external: the code that builds it; None for a checkpoint.
        published: what the literature says about it, if it is in the list.
    """

    name: str
    facts: Facts
    weights: Path | None = None
    sha256: str | None = None
    external: ExternalNetwork | None = None
    published: Published | None = None

    def load(self, facts: Facts, shape: Shape, device: torch.device, cache: Path) -> tuple[nn.Module, Source]:
        """Load the network, frozen and in eval mode, on `device`.

        Args:
            facts: with the number of classes, and for a checkpoint the architecture.
            shape: (H, W, C) of the images.
            cache: the folder for downloads.
        Returns:
            The network, from (B, C, H, W) pixels to (B, K) logits; and how config.json names it.
        Raises:
            UsageError, DataError: it cannot be used.
        """
        if self.external is None:
            assert self.weights is not None and self.sha256 is not None
            model, sha256 = load_network(self.weights, facts, device), self.sha256
        else:
            assert facts.num_classes is not None
            model, sha256 = load_external(self.external, facts.num_classes, shape, device, cache)
        source = {"path": self.name, "model": str(facts.model), "sha256": sha256}
        return model, source | ({} if self.published is None else {"released": self.published.title})


def find_network(target: str | Path, *, dataset: str | None, which: str = "best") -> Network:
    """Find the network that `target` means: an external one, a checkpoint file, or the `which` weights of a run.

    Args:
        dataset: that of the images at hand, if it is known.
    Raises:
        UsageError, DataError: there is none.
    """
    name = str(target)
    if (external := external_network(name, dataset)) is not None:
        facts = Facts(model=external.name, dataset=external.dataset)
        return Network(name=name, facts=facts, external=external, published=published(external.name))
    weights = find_weights(Path(target), which)
    sha256 = file_digest(weights)
    known = published(sha256)
    facts = read_facts(weights).or_else(Facts() if known is None else Facts(model=known.model, dataset=known.dataset))
    return Network(name=name, facts=facts, weights=weights, sha256=sha256, published=known)
