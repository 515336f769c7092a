"""The attacks of the library pyautoattack (the extra `eval`), set up as a suite has them."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from retemper.engine.sanity.flags import DLR_CLASSES
from retemper.errors import UsageError

NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}  # of the norms, as the library writes them
L1_TARGETS = 5  # of APGD-T in L1, where the library's standard suite also restarts APGD-CE five times


@dataclass(frozen=True, kw_only=True)
class Strength:
    """The strength of the library's attacks in a suite.

    Attributes:
        steps: of APGD and FAB, each target's.
        targets: how many classes are targets at most; None for all.
        square_rescaled: whether Square's schedule, made for 10,000 queries, is run through in its 5,000.
    """

    steps: int = 100
    targets: int | None = 9
    square_rescaled: bool = False


FULL = Strength()
WEAKER = {"fair-ard": Strength(steps=10, targets=None, square_rescaled=True)}  # of the suites; the others are full


def library_version() -> str:
    """Return the library's name and version. Raises UsageError if it is not installed."""
    try:
        return f"pyautoattack {version('pyautoattack')}"
    except PackageNotFoundError:
        raise UsageError("AutoAttack is not installed: pip install 'retemper[eval]'") from None


def library_attacks(
    model: nn.Module,
    num_classes: int,
    eps: float,
    seed: int,
    device: torch.device,
    strength: Strength = FULL,
    norm: str = "linf",
) -> dict[str, Any]:
    """Return the library's attack objects, set up as its standard suite has them: each has `perturb(clean, label)`.

    Where an attack has targets, they are all classes but the label, at most nine, in L1 five of APGD-T; `strength` may
    say otherwise. In L1, APGD is the library's own of that norm: sparse steps, and a radius that shrinks to `eps`. Take
    those of `suite_attacks`: on fewer than four classes the loss of "apgd-t" is not defined, and "apgd-dlr" is there on
    three alone.
    """
    from pyautoattack import AutoAttack

    name: Any = NAMES[norm]
    suite = AutoAttack(model, eps=eps, norm=name, version="standard", seed=seed, device=str(device))
    suite.apgd.loss, suite.apgd.seed = "ce", seed
    suite.fab.targeted = True
    for targeted in (suite.apgd_targeted, suite.fab):
        targeted.n_target_classes = min(strength.targets or num_classes, num_classes - 1)
    if norm == "l1":
        suite.apgd_targeted.n_target_classes = min(L1_TARGETS, num_classes - 1)
    suite.fab.n_iter = steps = strength.steps
    for apgd in (suite.apgd, suite.apgd_targeted):  # whose step is looked at, and perhaps halved, after shares of all
        apgd.n_iter = steps
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    suite.square.rescale_schedule = strength.square_rescaled
    if norm != "linf":
        _cut_tiles(suite.square)
    found = {"apgd-ce": suite.apgd, "apgd-t": suite.apgd_targeted, "fab-t": suite.fab, "square": suite.square}
    if num_classes < DLR_CLASSES:
        found["apgd-dlr"] = copy(suite.apgd)
        found["apgd-dlr"].loss = "dlr"
    return found


def _cut_tiles(square: Any) -> None:
    """Cut the tiles of Square's start in L2 and L1 at the image's border.

    The library lays tiles of a fifth of the image's height from a margin on. Where the last of them crosses the border,
    as on 14 x 14 images, it fails. Where none does, this changes nothing.
    """
    whole, run = square.eta, square.attack_single_run

    def started(clean: Tensor, label: Tensor) -> Any:
        sizes = iter(_tile_sizes(*clean.shape[-2:]))
        square.eta = partial(_tile, whole, sizes)
        return run(clean, label)

    square.attack_single_run = started


def _tile_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return how much of each tile lies inside the image, in rows and columns, in the library's order."""
    side = height // 5
    margin = (height - 5 * side) // 2

    def within(length: int) -> list[int]:
        return [max(min(side, length - margin - side * place), 0) for place in range(length // side)]

    return [(rows, columns) for rows in within(height) for columns in within(width)]


def _tile(whole: Callable[[int], Tensor], sizes: Iterator[tuple[int, int]], side: int) -> Any:
    """Return what the library takes a view of: the next tile, cut at the border; after the start, a whole one."""
    tile = whole(side)
    rows, columns = next(sizes, (side, side))
    return SimpleNamespace(view=lambda *shape: tile.reshape(shape)[..., :rows, :columns])
