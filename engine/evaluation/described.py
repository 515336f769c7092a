"""All that is known of a network before its images are read: of its file, of its run, and what the user says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retemper.engine.checkpoints.find import Network, require_described
from retemper.engine.checkpoints.header import Facts, is_run, require_same_images
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError, UsageError
from retemper.loaders import Split


@dataclass(frozen=True, kw_only=True)
class Described:
    """A network with what is known of it.

    Attributes:
        facts: with the data set, and for a checkpoint the architecture.
        config: of the run that it lies in, as `RunFolder.read_config` returns it; None for one from elsewhere.
        data_root: the folder of its images.
    """

    network: Network
    facts: Facts
    config: dict[str, Any] | None
    data_root: Path | None

    def require_classes(self, split: Split) -> None:
        """Check that images have the network's classes and channels. Raises DataError."""
        require_same_images(self.network.name, self.facts, len(split.classes), split.shape[2])
        if self.config is not None and list(split.classes) != self.config["classes"]:
            assert self.network.weights is not None
            raise DataError(
                f"the {split.split} images of {split.name} have other classes than {self.network.weights.parent} was "
                "trained on"
            )


def described(network: Network, told: Facts, data_root: Path | None, verb: str = "evaluate") -> Described:
    """Return what is known of a network: what the user says comes before what its file and its run say.

    Args:
        told, data_root: what the user says.
        verb: the command that asks, for messages.
    Raises:
        UsageError: its architecture or data set is not known, or the user says what cannot be.
        DataError: its file is no checkpoint, its run is damaged, or the folder of its images is gone.
    """
    folder = None if network.weights is None else network.weights.parent
    config = RunFolder(folder).read_config() if folder is not None and is_run(folder) else None
    if network.weights is None and told.model is not None:
        raise UsageError(f"--model {told.model}: {network.name} brings its own architecture: leave it out")
    facts = told.or_else(network.facts)
    if config is not None:
        recipe = config["recipe"]
        if told.model not in (None, recipe["student"]):
            raise UsageError(f"--model {told.model}: {network.name} is a run of {recipe['student']}: leave out --model")
        known = Facts(model=recipe["student"], dataset=recipe["dataset"], eps=recipe["eps"])
        facts = facts.or_else(known).or_else(
            Facts(image_size=recipe.get("image_size"), max_side=recipe.get("max_side"))
        )
        if data_root is None and config.get("data_root") and facts.dataset != "digits":  # which has no root
            data_root = Path(config["data_root"])
            if not data_root.is_dir():
                where = f"{data_root}, which {folder}/config.json names, is not a folder"
                raise DataError(f"{where}: say with --data-root where {facts.dataset} lies now")
    require_described(network, facts, data_root, verb)
    return Described(network=network, facts=facts, config=config, data_root=data_root)
