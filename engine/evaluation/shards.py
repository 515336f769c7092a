"""An AutoAttack suite on a network's images, the ledger beside its evaluation; in one piece, or in shards."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from retemper.console import say
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.evaluation.autoattack import SuiteRequest, is_foldable, run_suite
from retemper.engine.evaluation.ledger import Ledger, lock_on
from retemper.engine.evaluation.library import FULL, library_version
from retemper.errors import UsageError
from retemper.loaders import Split

Shard = tuple[int, int]  # number, from 1, and how many


def evaluate_suite(
    model: nn.Module,
    split: Split,
    order: np.ndarray,
    request: SuiteRequest,
    *,
    known: Mapping[str, Any],
    path: Path,
    shard: Shard | None = None,
    ranks: Ranks = ALONE,
) -> Ledger | None:
    """Run a suite, or one shard of it; go on where the ledger at `path`, or the shard's beside it, ends.

    A shard is a suite on its own images, batched among themselves: its random draws are those of a run on them alone.
    The shard that finishes last writes the whole ledger. Where several processes have a shard each, they wait for one
    another, and the first of them writes it. A whole ledger that is finished is taken as it is.

    Args:
        order: (N,) indices into `split`, class-balanced in every prefix; a shard takes a piece of it.
        known: what identifies the network and the images.
    Returns:
        The ledger of all images, finished or not; None where shards are missing.
    Raises:
        UsageError, DataError: as `run_suite` and `Ledger.begin`.
    """
    number, shards = shard or (ranks.rank + 1, ranks.world_size)
    if shard:
        require_images(number, shards, len(order))
    request = replace(request, classes=len(split.classes), fold=request.fold and is_foldable(model, request.device))
    part = np.array_split(order, shards)[number - 1]
    facts = {
        **known,
        "images": hashlib.sha256(np.ascontiguousarray(order, dtype=np.int64).tobytes()).hexdigest(),
        "eps": request.eps,
        "seed": request.seed,
        "batch_size": request.batch_size,
        "fold": request.fold,
        "library": library_version(),
        **({"norm": request.norm} if request.norm != "linf" else {}),
        **({"strength": asdict(request.strength)} if request.strength != FULL else {}),
        **({"shard": [number, shards]} if shard or shards > 1 else {}),
    }
    of_whole = {name: fact for name, fact in facts.items() if name != "shard"}
    if shards > 1:
        there = Ledger.found(path, of_whole, order, split.labels[order])
        if not ranks.any(there is None or not there.is_complete(request.attacks))[0]:
            return there
    own = _shard_path(path, number, shards)
    with lock_on(own):
        ledger = Ledger.begin(own, facts, part, split.labels[part])
        complete = run_suite(model, split, request, ledger)
        if not len(part):
            ledger.write()  # which nothing else does for a process without images
    ranks.barrier(patiently=True)
    if shards == 1:
        return ledger
    paths = [_shard_path(path, one, shards) for one in range(1, shards + 1)]
    parts = [Ledger.read(one) for one in paths if one.exists()] if complete else []
    missing = shards - sum(one.is_complete(request.attacks) for one in parts)
    if missing:
        say(f"shard {number} of {shards}: {'done' if complete else 'not finished'}; {missing} are missing")
        return None
    whole = Ledger.merged(path, parts)
    if ranks.is_first:
        with lock_on(path, wait=True):
            whole.path = Ledger.begin(path, of_whole, order, split.labels[order]).path
            whole.write()
    return whole


def require_images(number: int, shards: int, images: int) -> None:
    """Raise UsageError where there are more shards than images."""
    if shards > max(1, images):
        raise UsageError(f"--shard {number}/{shards}: there are only {images} images")


def _shard_path(path: Path, number: int, shards: int) -> Path:
    """Return the path of one shard's ledger."""
    return path if shards == 1 else path.with_name(f"{path.stem}-{number}-of-{shards}{path.suffix}")
