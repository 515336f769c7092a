"""Find the networks that a run or an evaluation names: checkpoints, runs, RobustBench's, and the user's own."""

import hashlib
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from retemper.engine.checkpoints.external import ExternalNetwork, Shape, external_network, load_external
from retemper.engine.checkpoints.header import Facts, find_weights, fitting_models, load_network, read_facts
from retemper.engine.checkpoints.published import Published, published
from retemper.engine.checkpoints.weights import require_intact, split_entry, state_digest
from retemper.engine.models import MODELS
from retemper.errors import DataError, UsageError
from retemper.files import file_digest
from retemper.loaders import DATASETS

# how config.json names a network: path, model, sha256 (of the file, with the name in it where the user chose one; of an
# external network its own digest), tensors (`state_digest`, of a checkpoint), and "released" if it is a published one
Source = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that a user has named, not loaded yet.

    Attributes:
        name: as the user wrote it.
        facts: what its file says or what is published about it.
        weights, sha256: the checkpoint file and its digest; None for an external network.
        entry: the name of the weights in that file, where the user chose it, as in checkpoint.pt:state_dict.
        external: the code that builds it; None for a checkpoint.
        published: what the literature says about it, if it is in the list.
    """

    name: str
    facts: Facts
    weights: Path | None = None
    sha256: str | None = None
    entry: str | None = None
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
            facts = self._sized(facts, shape)
            model = load_network(self.weights, facts, device, self.entry)
            source = self.source(facts, model)
        else:
            assert facts.num_classes is not None
            model, sha256 = load_external(self.external, facts.num_classes, shape, device, cache)
            source = {"path": self.name, "model": str(facts.model), "sha256": sha256}
        return model, source | ({} if self.published is None else {"released": self.published.title})

    def _sized(self, facts: Facts, shape: Shape) -> Facts:
        """Return the facts with the side of the images. Raises DataError where the network takes none of that side."""
        H, W, _ = shape
        if facts.side not in (None, H):
            one = f"{facts.side} x {facts.side}"
            raise DataError(
                f"{self.name} takes images of {one} alone, not of {H} x {W}: give --image-size {facts.side}"
            )
        return replace(facts, side=H)

    def source(self, facts: Facts, model: nn.Module) -> Source:
        """Return how config.json names a checkpoint whose weights `model` has."""
        return {
            "path": self.name,
            "model": str(facts.model),
            "sha256": str(self.sha256),
            "tensors": state_digest(model),
        }


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
    file, entry = split_entry(target)
    weights = find_weights(file, which)
    sha256 = file_digest(weights)
    known = published(sha256)
    facts = read_facts(weights).or_else(Facts() if known is None else Facts(model=known.model, dataset=known.dataset))
    if entry is not None:  # another network than the one that the file's digest stands for
        sha256 = hashlib.sha256(f"{sha256}:{entry}".encode()).hexdigest()
    return Network(name=name, facts=facts, weights=weights, sha256=sha256, entry=entry, published=known)


def require_described(network: Network, facts: Facts, data_root: Path | None = None, verb: str = "evaluate") -> None:
    """Check that the architecture and the data set of a network are known, before it is looked at.

    Args:
        facts: all that is known of it.
        data_root: the folder of the images, if the user named it.
        verb: the command that looks at it.
    Raises:
        DataError: the file is no checkpoint.
        UsageError: they are not known; the message has the whole command.
    """
    built = network.weights is None or facts.model is not None
    if built and facts.dataset is not None:
        return
    model = facts.model
    if network.weights is not None:
        require_intact(network.weights)  # what the file is comes first
        model = model or "|".join(fitting_models(network.weights)) or "NAME"
    words = ["retemper", verb, shlex.quote(network.name)]
    words += [] if network.weights is None else ["--model", str(model)]
    words += ["--dataset", facts.dataset or "NAME"]
    words += [] if facts.dataset == "digits" else ["--data-root", shlex.quote(str(data_root or "DIR"))]
    lacking = [*["its architecture"] * (not built), *["its data set"] * (facts.dataset is None)]
    known = [*[f"architectures: {', '.join(MODELS)}"] * (model == "NAME" and not built)]
    known += [f"data sets: {', '.join(DATASETS)}"] * (facts.dataset is None)
    hint = f" ({'; '.join(known)})" if known else ""
    raise UsageError(f"{network.name} does not say {' and '.join(lacking)}: {' '.join(words)}{hint}")


def same_network(one: Source, other: Source) -> bool:
    """Say whether two runs name the same network: the same file, or the same tensors in whatever file.

    Runs of earlier versions name the file alone.
    """
    return one.get("sha256") == other.get("sha256") or one.get("tensors", "none") == other.get("tensors")
