"""What the user is told of a network that was trained for something else than the run that builds on it."""

from math import isclose

from retemper.console import say
from retemper.engine.checkpoints.content import show
from retemper.engine.checkpoints.find import Network
from retemper.engine.checkpoints.header import is_run
from retemper.engine.groups import Data
from retemper.engine.run.data import SIDES_PX
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError
from retemper.loaders import Split


def tell_apart(whose: str, network: Network, split: Split, data: Data, eps: float | None) -> None:
    """Say in a line each what differs between a network's training and a run's, as far as the network's file tells.

    Args:
        whose: the network in words.
        split, data: the run's images.
        eps: the run's radius; None where the network's own says nothing of it, as that of a clean teacher.
    """
    facts, size = network.facts, split.shape[0]
    own_size = facts.image_size or SIDES_PX.get(str(facts.dataset))
    if own_size not in (None, size):
        say(f"note: {whose} saw images of {own_size} px, the student's have {size}")
    if facts.dataset not in (None, data.dataset):
        say(f"note: {whose} was trained on {facts.dataset}, the student is to learn {data.dataset}")
    for number, (own, wanted) in enumerate(zip(_classes(network), split.classes, strict=False)):
        if own != wanted:
            say(
                f"warning: the classes of {whose} are others: number {number} is {show(own)} there, {show(wanted)} here"
            )
            break
    if facts.eps is not None and eps is not None and not isclose(facts.eps, eps):
        say(f"note: the eps of {whose} is {facts.eps:.4g}, the student's is {eps:.4g}")


def _classes(network: Network) -> tuple[str, ...]:
    """Return the names of the classes that a run's network knows, in their order; none where they are not known."""
    if network.weights is None or not is_run(folder := network.weights.parent):
        return ()
    try:
        return tuple(map(str, RunFolder(folder).read_config()["classes"]))
    except (DataError, KeyError):  # the weights may be sound beside a damaged file
        return ()
