"""The best epoch so far, by the largest average + worst-class robust accuracy on the images that choose it."""

from dataclasses import asdict, dataclass
from typing import Any

from retemper.engine.networks.trained import header_of
from retemper.engine.networks.weights import CheckpointError, require_intact
from retemper.engine.run.run_folder import RunFolder
from retemper.loaders.errors import DataError


@dataclass(frozen=True)
class Best:
    """Its score and number; epoch 0 is none yet. The score stands in the file of the weights as well: a kill between
    that file and the state must not part the two."""

    score: float = -1.0
    epoch: int = 0

    def metadata(self) -> dict[str, str]:
        """For the header of the weights."""
        return {"score": repr(self.score)}

    def saved(self) -> dict[str, Any]:
        """For the state."""
        return asdict(self)


def newest_best(folder: RunFolder, saved: dict[str, Any]) -> Best:
    """The best epoch: of the state, or of weights that a killed process saved after it.

    Raises:
        DataError: the weights are damaged.
    """
    if not folder.best.exists():
        return Best()
    try:
        require_intact(folder.best)
    except CheckpointError as error:
        raise DataError(f"{error}, or delete it: a later epoch is then the best") from None
    header = header_of(folder.best)
    epoch = int(header.get("epoch", 0))
    return Best(float(header["score"]), epoch) if epoch > saved["epoch"] else Best(**saved)
