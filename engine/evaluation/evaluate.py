"""The evaluation of a run or a checkpoint: it writes evaluation.json beside it, the protocol with the numbers."""

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from retemper.console import Progress, say
from retemper.engine.checkpoints.find import Network, find_network
from retemper.engine.checkpoints.header import Facts, read_header
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.evaluation.autoattack import (
    SuiteRequest,
    left_out,
    suite_attacks,
    suite_entry,
)
from retemper.engine.evaluation.corrupted import add_corruptions
from retemper.engine.evaluation.described import described
from retemper.engine.evaluation.evaluation_file import EvaluationFile, Outcome
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.library import FULL, library_version
from retemper.engine.evaluation.places import destination, label, weights_name
from retemper.engine.evaluation.preflight import gradient_flags, require_room, zero_gradients
from retemper.engine.evaluation.protocols import PROTOCOLS, STANDARD, radius, result_name
from retemper.engine.evaluation.shards import Shard, evaluate_suite, require_images
from retemper.engine.predict import Attack, balanced_order, labelled_batches, predictions
from retemper.engine.run.commands import absolute
from retemper.engine.run.job import default_cache
from retemper.engine.sanity.check import IMAGES, check_evaluated
from retemper.engine.sanity.ladder import CheckRequest
from retemper.errors import UsageError
from retemper.loaders import Split, load_split
from retemper.options import shown_value
from retemper.provenance import versions

TOGETHER = 256  # images that are read at once
PROBED = 32  # images that are tried on a CPU before the first attack
IDENTIFYING = ("dataset", "split", "image_size", "weights_sha256")  # of the protocol: what a ledger's rows are of


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """The request of `retemper evaluate`.

    Attributes:
        target: a run's folder, a checkpoint, or another network by name (checkpoints/find.py).
        out: the folder of the files; None for the folder of the weights.
        protocol: one of `PROTOCOLS`.
        attacks: names of the protocol's attacks, and "autoattack".
        eps: the radius in pixel units; "trained" for that of the network's training, None for the data set's usual one.
        limit, autoattack_limit: how many images, balanced over the classes; None for all.
        weights: which of a run's, "best" or "last".
        seed: of the random starts.
        ranks: the processes that evaluate together.
        facts: what the user says about a bare checkpoint.
        suite, fold, shard, budget_s: of AutoAttack, as `SuiteRequest` and `evaluate_suite` take them.
        check: whether to look for masked gradients too.
        corruptions: whether to ask about corrupted images too.
        capture: "auto" to replay on a GPU what comes again from CUDA graphs, with other rounding; or "off".
    """

    target: str | Path
    out: Path | None = None
    protocol: str = STANDARD
    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd20", "cw")
    eps: float | str | None = None
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
    check: bool = False
    corruptions: bool = False
    capture: str = "auto"

    def attack(self, name: str) -> Attack:
        """Return an attack of the protocol. AutoAttack is none of them."""
        return PROTOCOLS[self.protocol].attacks[name]


def evaluate_target(request: EvaluationRequest) -> tuple[Path, dict[str, Any]]:
    """Run the attacks on a network and write evaluation.json and evaluation.csv.

    Attacks found in an evaluation under the very same protocol are kept beside the new ones. Several processes share
    the images out, and the first of them writes the files.

    Returns:
        The file's path and its content.
    Raises:
        DataError, UsageError: the target or the data cannot be used.
    """
    _require_effect(request)
    if request.protocol != STANDARD:
        request = replace(request, suite=PROTOCOLS[request.protocol].suite)
    network = find_network(request.target, dataset=request.facts.dataset, which=request.weights)
    facts, split, data_root = images_for(network, request.facts, request.data_root)
    order = balanced_order(split.labels, request.limit)
    eps = _radius(request, network, split.name, facts.eps)
    path = destination(network, request.out)
    require_room(path.parent, len(order), [path, path.with_suffix(".csv"), _ledger_path(path, request.suite)])
    if "autoattack" in request.attacks:
        _require_autoattack(request, path, split, order)
    model, source = network.load(facts, split.shape, request.device, default_cache())
    evaluation = _Evaluation(
        request=request,
        model=model,
        split=split,
        order=order,
        eps=eps,
        zero=_probe(request, network, model, split, order),
    )
    protocol = _protocol(request, network, facts, split, order, eps, source["sha256"])
    first = request.ranks.is_first
    file = EvaluationFile.begin(path, protocol) if first else EvaluationFile(path, protocol)
    file.content["protocol"]["data_root"] = absolute(data_root)
    told = {"model": request.facts.model, "dataset": request.facts.dataset}
    file.content["asked"] = {"target": absolute(network.name), **told}
    for name in request.attacks:
        started = time.monotonic()
        found = evaluation.outcome(name, file)
        if found is None:  # a shard, and not the last one
            continue
        file.add(found, split, time.monotonic() - started)
        if first:
            file.write()
    if request.check and first:
        checked = CheckRequest(model=model, split=split, indices=order[:IMAGES], **evaluation.options)
        folder = None if network.weights is None else network.weights.parent
        file.content["checks"] = check_evaluated(checked, folder, file.content["attacks"])
        file.write()
    if request.corruptions:
        chosen: dict[str, Any] = dict(device=request.device, batch_size=request.batch_size, seed=request.seed)
        add_corruptions(file, model, split, order, ranks=request.ranks, **chosen)
    if first:
        file.finish()
    return file.path, file.content


def _require_effect(request: EvaluationRequest) -> None:
    """Raise UsageError for an option that would change nothing."""
    of_suite = {
        "--suite fast": request.suite != "standard",
        "--fold": request.fold,
        "--autoattack-limit": request.autoattack_limit is not None,
        "--budget": request.budget_s is not None,
    }
    if "autoattack" not in request.attacks and (given := [option for option, is_given in of_suite.items() if is_given]):
        raise UsageError(f"{given[0]} is for AutoAttack: name it in --attacks too, or leave out {given[0]}")
    if request.suite != "standard" and request.protocol != STANDARD:
        raise UsageError(f"--suite {request.suite}: --protocol {request.protocol} has a suite of its own, leave it out")
    if request.weights != "best" and Path(request.target).is_file():
        raise UsageError(
            f"--weights {request.weights} chooses among a run's: {request.target} is one file, leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """A network that is ready to be attacked.

    Attributes:
        order: (N,) int64, which images of the split, in order.
        zero: by loss, the share of probed images whose gradient is zero.
    """

    request: EvaluationRequest
    model: nn.Module
    split: Split
    order: np.ndarray
    eps: float
    zero: dict[str, float]

    @property
    def options(self) -> dict[str, Any]:
        """Return what all attacks are given."""
        asked = self.request
        return dict(eps=self.eps, device=asked.device, batch_size=asked.batch_size, seed=asked.seed)

    def outcome(self, name: str, file: EvaluationFile) -> Outcome | None:
        """Run one attack of the request; None for a shard that is not the last one."""
        return self._autoattack(file) if name == "autoattack" else self._attack(name)

    def _attack(self, name: str) -> Outcome:
        """Run one attack of the protocol."""
        attack, order, ranks = self.request.attack(name), self.order, self.request.ranks
        called = result_name(name, self.request.protocol)
        chosen: dict[str, Any] = dict(indices=order, ranks=ranks, capture=self.request.capture == "auto") | self.options
        with Progress(called, len(order)) as progress:
            given_N = predictions(self.model, self.split, attack, progress=progress, **chosen)
        flags = gradient_flags(attack.loss, self.zero) if attack.steps else []
        if lost := int((given_N < 0).sum()):
            flags.append(f"the network's answers to {lost:,} images are not finite: they count as wrong")
        more: dict[str, Any] = {"flags": flags} if flags else {}
        described = attack.described(self.eps)
        if called != name:
            described, more = described | {"protocol": self.request.protocol}, more | {"upper_bound": True}
        return Outcome(called, described, order, given_N.numpy(), more)

    def _autoattack(self, file: EvaluationFile) -> Outcome | None:
        """Run AutoAttack, or the shard of it that is asked for."""
        asked, classes = self.request, len(self.split.classes)
        chosen: dict[str, Any] = dict(suite=asked.suite, fold=asked.fold, budget_s=asked.budget_s) | self.options
        suite = SuiteRequest(classes=classes, capture=asked.capture == "auto", **chosen)
        images = self.order[: asked.autoattack_limit]
        known = {name: file.content["protocol"][name] for name in IDENTIFYING}
        known["images_sha256"] = _digest(self.split, images)
        pieces: dict[str, Any] = dict(path=_ledger_path(file.main, suite.suite), shard=asked.shard, ranks=asked.ranks)
        ledger = evaluate_suite(self.model, self.split, images, suite, known=known, **pieces)
        if ledger is None:
            return None
        name = "autoattack" if suite.suite == "standard" else f"autoattack-{suite.suite}"
        described = {fact: ledger.facts[fact] for fact in ("library", "seed", "batch_size", "fold", "eps")} | {
            "suite": suite.suite,
            "attacks": list(suite.attacks),
            "images": len(images),
            "shards": ledger.facts.get("shards", 1),
            **({"protocol": asked.protocol, **asdict(suite.strength)} if suite.strength != FULL else {}),
        }
        entry = suite_entry(ledger, suite.suite, classes)
        return Outcome(name, described, images, ledger.predicted_under(suite.attacks), entry)


def _ledger_path(path: Path, suite: str) -> Path:
    """Return the path of AutoAttack's ledger beside an evaluation; the fast suite begins the standard one's."""
    name = "autoattack" if suite in ("standard", "fast") else f"autoattack-{suite}"
    return path.with_name(path.name.replace("evaluation", name, 1)).with_suffix(".csv")


def _require_autoattack(request: EvaluationRequest, path: Path, split: Split, order: np.ndarray) -> None:
    """Check what AutoAttack needs, and say what it leaves out. Raises UsageError or DataError as the suite would."""
    library_version()
    suite_attacks(request.suite, len(split.classes))
    number, shards = request.shard or (request.ranks.rank + 1, request.ranks.world_size)
    require_images(number, shards, len(order[: request.autoattack_limit]))
    ledger = _ledger_path(path, request.suite)
    if ledger.exists():
        Ledger.read(ledger)
    if request.ranks.is_first and (without := left_out(request.suite, len(split.classes))):
        say(f"autoattack: {without}")


def _probe(
    request: EvaluationRequest, network: Network, model: nn.Module, split: Split, order: np.ndarray
) -> dict[str, float]:
    """Try the network as the attacks will use it; return by loss the share of images whose gradient is zero.

    A GPU is tried with a whole batch, so that one that does not fit is told at once.
    """
    if not len(order) or not any(name == "autoattack" or request.attack(name).steps for name in request.attacks):
        return {}
    indices = order[: request.batch_size if request.device.type == "cuda" else min(PROBED, request.batch_size)]
    _, image, label_B = next(labelled_batches(split, request.device, indices=indices, batch_size=len(indices)))
    return zero_gradients(network.name, model, image, label_B)


def images_for(
    network: Network, told: Facts, data_root: Path | None, *, verb: str = "evaluate", which: str = "test"
) -> tuple[Facts, Split, Path | None]:
    """Return the facts about a network, the images for it, and the folder of these images.

    Args:
        told, data_root, verb: as `described` takes them.
        which: "test", or "train" for the training images.
    """
    known = described(network, told, data_root, verb)
    facts = known.facts
    assert facts.dataset is not None
    split = load_split(facts.dataset, which, known.data_root, facts.image_size, facts.max_side)
    known.require_classes(split)
    return facts.or_else(Facts(num_classes=len(split.classes), channels=split.shape[2])), split, known.data_root


def _radius(request: EvaluationRequest, network: Network, dataset: str, trained: float | None) -> float:
    """Return the radius of the evaluation; say so where the network was trained at another one."""
    eps = radius(request.eps, dataset, trained, network.name)
    if trained is not None and abs(trained - eps) > 1e-9 and request.ranks.is_first:
        hint = " (--eps trained: at its own)" if request.eps is None else ""
        say(f"note: {label(network)} was trained at eps {shown_value(trained)}, evaluated at {shown_value(eps)}{hint}")
    return eps


def _protocol(
    request: EvaluationRequest, network: Network, facts: Facts, split: Split, order: np.ndarray, eps: float, sha256: str
) -> dict[str, Any]:
    """Return all that the numbers depend on beside the attacks. Under another protocol a new file is begun."""
    cut = None if network.weights is None else read_header(network.weights).get("cut")
    return {
        **({} if cut is None else {"training_cut": cut}),
        "dataset": split.name,
        "split": split.split,
        "images": len(order),
        "images_sha256": _digest(split, order),
        "subset": "all" if len(order) == len(split) else "the first images of every class in turn",
        "eps": eps,
        "image_size": split.shape[0],
        **({} if facts.max_side is None else {"max_side": facts.max_side}),
        "norm": "linf",
        "precision": "fp32",
        "seed": request.seed,
        "batch_size": request.batch_size,
        "network": label(network),
        "weights": weights_name(network),
        "weights_sha256": sha256,
        "classes": list(split.classes),
        "versions": versions(),
    }


def _digest(split: Split, order: np.ndarray) -> str:
    """Return the SHA-256 of the pixels of some images, 64 hexadecimal digits; a damaged image is found here."""
    digest = hashlib.sha256()
    for first in range(0, len(order), TOGETHER):
        digest.update(split.seen(order[first : first + TOGETHER]).tobytes())
    return digest.hexdigest()
