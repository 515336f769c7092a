"""The request of `retemper evaluate`, and what in it cannot be."""

from dataclasses import dataclass
from pathlib import Path

import torch

from retemper.engine.checkpoints.header import Facts
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.evaluation.minimal_norm import foolbox_version
from retemper.engine.evaluation.norms import require_radii
from retemper.engine.evaluation.protocols import CURVE, PROTOCOLS, STANDARD
from retemper.engine.evaluation.shards import Shard
from retemper.engine.predict import Attack
from retemper.errors import UsageError

WITHOUT_STEPS = ("clean", "fmn", "autoattack")  # the attacks that need no step of ours, which L1 has none of


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """The request of `retemper evaluate`.

    Attributes:
        target: a run's folder, a checkpoint, or another network by name (checkpoints/find.py).
        out: the folder of the files; None for the folder of the weights.
        protocol: one of `PROTOCOLS`.
        attacks: names of the protocol's attacks, "autoattack", and "fmn".
        norm: "linf", "l2" or "l1".
        eps: the radius in pixel units; "trained" for that of the network's training, None for the data set's usual one;
            several, the smallest first, for a curve; "curve" for `curve_radii`.
        limit, autoattack_limit: how many images, balanced over the classes; None for all.
        weights: which of a run's, "best" or "last".
        seed: of the random starts.
        ranks: the processes that evaluate together.
        facts: what the user says about a bare checkpoint.
        suite, fold, shard, budget_s: of AutoAttack, as `SuiteRequest` and `evaluate_suite` take them.
        cross_check: whether other attacks try what AutoAttack leaves.
        check: whether to look for masked gradients too.
        corruptions: whether to ask about corrupted images too.
        goes_on: whether attacks that are done under the very same protocol are left as they are; of a curve, they are
            in any case.
        capture: "auto" to replay on a GPU what comes again from CUDA graphs, with other rounding; or "off".
    """

    target: str | Path
    out: Path | None = None
    protocol: str = STANDARD
    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd20", "cw")
    norm: str = "linf"
    eps: float | str | tuple[float, ...] | None = None
    data_root: Path | None = None
    limit: int | None = None
    weights: str = "best"
    batch_size: int = 256
    seed: int = 0
    device: torch.device
    ranks: Ranks = ALONE
    facts: Facts
    suite: str = "standard"
    fold: bool = False
    autoattack_limit: int | None = None
    shard: Shard | None = None
    budget_s: float | None = None
    cross_check: bool = False
    check: bool = False
    corruptions: bool = False
    goes_on: bool = False
    capture: str = "auto"

    def attack(self, name: str) -> Attack:
        """Return an attack of the protocol by projected gradient descent. AutoAttack and FMN are none of them."""
        return PROTOCOLS[self.protocol].attacks[name]

    @property
    def is_curve(self) -> bool:
        """Say whether there are several radii."""
        return isinstance(self.eps, tuple) or self.eps == CURVE


def require_effect(request: EvaluationRequest) -> None:
    """Raise UsageError for an option that would change nothing, or options that exclude one another."""
    of_suite = {
        "--suite fast": request.suite != "standard",
        "--fold": request.fold,
        "--autoattack-limit": request.autoattack_limit is not None,
        "--budget": request.budget_s is not None,
        "--cross-check": request.cross_check,
    }
    if "autoattack" not in request.attacks and (given := [option for option, is_given in of_suite.items() if is_given]):
        raise UsageError(f"{given[0]} is for AutoAttack: name it in --attacks too, or leave out {given[0]}")
    if request.suite != "standard" and request.protocol != STANDARD:
        raise UsageError(f"--suite {request.suite}: --protocol {request.protocol} has a suite of its own, leave it out")
    if request.weights != "best" and Path(request.target).is_file():
        raise UsageError(
            f"--weights {request.weights} chooses among a run's: {request.target} is one file, leave it out"
        )
    if request.cross_check and (request.suite != "standard" or request.protocol != STANDARD):
        raise UsageError("--cross-check tries what the whole standard suite leaves: leave out --suite and --protocol")
    if request.is_curve and request.shard:
        raise UsageError("--shard is for one radius: torchrun shares the images of a curve out itself")
    if request.is_curve and request.check:
        raise UsageError("--check is for one radius: its ladder has radii of its own")
    if request.is_curve and request.corruptions:
        raise UsageError("--corruptions know no radius: give one --eps, or leave out --corruptions")
    _require_norm(request)


def _require_norm(request: EvaluationRequest) -> None:
    """Raise UsageError where the attacks or the radii do not fit the norm, or FMN's library is missing."""
    if isinstance(request.eps, float | tuple):
        require_radii(request.eps if isinstance(request.eps, tuple) else (request.eps,), request.norm)
    if request.norm != "linf":
        for option, value, usual in (("protocol", request.protocol, STANDARD), ("check", request.check, False)):
            if value != usual:
                raise UsageError(f"--{option} is of L-inf alone: leave it out with --norm {request.norm}")
        if request.eps == "trained":
            raise UsageError(f"--eps trained is a radius in L-inf: name one in {request.norm}, or leave it out")
    if request.norm == "l1" and (none := [name for name in request.attacks if name not in WITHOUT_STEPS]):
        raise UsageError(f"{none[0]} has no L1 version: --norm l1 takes --attacks {','.join(WITHOUT_STEPS)}")
    if "fmn" in request.attacks or request.cross_check:
        foolbox_version()
