"""The evaluation of a run or a checkpoint: it writes evaluation.json beside it, the protocol with the numbers."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from retemper.console import say
from retemper.engine.checkpoints.find import Network, find_network
from retemper.engine.checkpoints.header import Facts, read_header
from retemper.engine.evaluation.attacked import IDENTIFYING, Attacked, digest
from retemper.engine.evaluation.autoattack import left_out, suite_attacks
from retemper.engine.evaluation.consistency import consistency
from retemper.engine.evaluation.corrupted import add_corruptions
from retemper.engine.evaluation.cross_check import write_beaten
from retemper.engine.evaluation.curve import ledger_at, locked_curve, write_curve
from retemper.engine.evaluation.described import described
from retemper.engine.evaluation.evaluation_file import EvaluationFile
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.library import library_version
from retemper.engine.evaluation.places import beside, destination, label, weights_name
from retemper.engine.evaluation.preflight import require_room, zero_gradients
from retemper.engine.evaluation.protocols import CURVE, PROTOCOLS, STANDARD, curve_radii, radius, result_name
from retemper.engine.evaluation.request import EvaluationRequest as EvaluationRequest
from retemper.engine.evaluation.request import require_effect
from retemper.engine.evaluation.shards import require_images
from retemper.engine.predict import balanced_order, labelled_batches
from retemper.engine.run.commands import absolute
from retemper.engine.run.job import default_cache
from retemper.engine.sanity.check import IMAGES, check_evaluated
from retemper.engine.sanity.ladder import CheckRequest
from retemper.errors import DataError
from retemper.loaders import Split, load_split
from retemper.options import shown_value
from retemper.provenance import versions

PROBED = 32  # images that are tried on a CPU before the first attack


def evaluate_target(request: EvaluationRequest) -> tuple[Path, dict[str, Any]]:
    """Run the attacks on a network and write evaluation.json and evaluation.csv; of several radii, curve.json.

    Attacks found in an evaluation under the very same protocol are kept beside the new ones. Several processes share
    the images out, and the first of them writes the files.

    Returns:
        The file's path and its content.
    Raises:
        DataError, UsageError: the target or the data cannot be used.
    """
    require_effect(request)
    if request.protocol != STANDARD:
        request = replace(request, suite=PROTOCOLS[request.protocol].suite)
    ready = _prepared(request)
    return _curve(ready) if request.is_curve else _evaluation(ready)


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A request, and all that its attacks need.

    Attributes:
        path: of evaluation.json, or of curve.json.
        more: what the file says beside the protocol and the attacks.
    """

    request: EvaluationRequest
    network: Network
    attacked: Attacked
    path: Path
    data_root: Path | None

    @property
    def asked(self) -> dict[str, Any]:
        """Return how the network was named."""
        told = self.request.facts
        return {"target": absolute(self.network.name), "model": told.model, "dataset": told.dataset}

    def consistency(self) -> dict[str, Any]:
        """Return how all results of the network that lie beside this one agree with theory."""
        split = self.attacked.split
        return consistency(self.path.parent, dict(self.attacked.protocol), int(np.prod(split.shape)))


def _prepared(request: EvaluationRequest) -> _Ready:
    """Find the network and its images, and check what can be checked before the first attack."""
    network = find_network(request.target, dataset=request.facts.dataset, which=request.weights)
    facts, split, data_root = images_for(network, request.facts, request.data_root)
    order = balanced_order(split.labels, request.limit)
    if request.eps == CURVE:
        request = replace(request, eps=curve_radii(split.name, request.norm))
    eps = request.eps[0] if isinstance(request.eps, tuple) else _radius(request, network, split.name, facts.eps)
    path = _place(request, destination(network, request.out))
    radii = request.eps if isinstance(request.eps, tuple) else (eps,)
    ledgers = [_ledger_of(request, path, eps) for eps in radii]
    require_room(path.parent, len(order), [path, path.with_suffix(".csv"), *ledgers])
    if "autoattack" in request.attacks:
        _require_autoattack(request, ledgers, split, order)
    model, source = network.load(facts, split.shape, request.device, default_cache())
    attacked = Attacked(
        request=request,
        model=model,
        split=split,
        order=order,
        eps=eps,
        zero=_probe(request, network, model, split, order),
        protocol=_protocol(request, network, facts, split, order, eps, source["sha256"]),
        ledger=ledgers[0],
    )
    return _Ready(request=request, network=network, attacked=attacked, path=path, data_root=data_root)


def _evaluation(ready: _Ready) -> tuple[Path, dict[str, Any]]:
    """Run the attacks at one radius, and write evaluation.json."""
    request, attacked, first = ready.request, ready.attacked, ready.request.ranks.is_first
    protocol = dict(attacked.protocol)
    file = EvaluationFile.begin(ready.path, protocol) if first else EvaluationFile(ready.path, protocol)
    file.content["protocol"]["data_root"] = absolute(ready.data_root)
    file.content["asked"] = ready.asked
    for name in request.attacks:
        called = result_name(name, request.protocol)
        if name != "autoattack" and request.goes_on and request.ranks.any(file.is_done(called))[0]:
            say(f"{called}: done, left as it is")
            continue
        started = time.monotonic()
        found = attacked.outcomes(name)
        for outcome in found:
            file.add(outcome, attacked.split, time.monotonic() - started)
        if first and found:
            file.write()
    if request.cross_check and first and attacked.ledgers:  # of a shard that is not the last one there are none
        write_beaten(_named(ready.path, "cross-check"), _with_kept(attacked.ledger, attacked.ledgers[0]))
    if request.check and first and not (request.goes_on and "checks" in file.content):
        checked = CheckRequest(
            model=attacked.model, split=attacked.split, indices=attacked.order[:IMAGES], **attacked.options
        )
        folder = None if ready.network.weights is None else ready.network.weights.parent
        file.content["checks"] = check_evaluated(checked, folder, file.content["attacks"])
        file.write()
    if request.corruptions:
        given: dict[str, Any] = dict(device=request.device, batch_size=request.batch_size, seed=request.seed)
        add_corruptions(file, attacked.model, attacked.split, attacked.order, ranks=request.ranks, **given)
    if first and file.content["attacks"]:  # of a shard there are none
        file.content["consistency"] = ready.consistency()
        file.write()
    if first:
        file.finish()
    return file.path, file.content


def _curve(ready: _Ready) -> tuple[Path, dict[str, Any]]:
    """Run the attacks at several radii, and write curve.json."""
    if not ready.request.ranks.is_first:
        write_curve(ready.attacked, ready.path, dict(ready.attacked.protocol), {})
        return ready.path, {}
    with locked_curve(ready.path):
        protocol = dict(ready.attacked.protocol) | {"data_root": absolute(ready.data_root)}
        file = write_curve(ready.attacked, ready.path, protocol, {"asked": ready.asked})
        file.content["consistency"] = ready.consistency()
        file.write()
    return file.path, file.content


def _with_kept(main: Path, ledger: Ledger) -> list[Ledger]:
    """Return a ledger and those of the same network at `main` and beside it, the smallest radius first."""
    found = [ledger]
    for path in (main, *beside(main)):
        try:
            kept = None if path == ledger.path else Ledger.read(path)
        except DataError:
            continue
        if kept and all(kept.facts.get(name) == ledger.facts.get(name) for name in IDENTIFYING):
            found.append(kept)
    return sorted(found, key=lambda one: one.facts["eps"])


def _named(path: Path, name: str) -> Path:
    """Return the path of another CSV file of an evaluation."""
    return path.with_name(path.name.replace("evaluation", name, 1)).with_suffix(".csv")


def _place(request: EvaluationRequest, path: Path) -> Path:
    """Return where the file goes, of a network whose evaluation in L-inf goes to `path`."""
    norm = "" if request.norm == "linf" else f"-{request.norm}"
    name = path.name.replace("evaluation", "curve", 1) if request.is_curve else path.name
    return path.with_name(name.removesuffix(".json") + f"{norm}.json")


def _ledger_of(request: EvaluationRequest, path: Path, eps: float) -> Path:
    """Return the path of AutoAttack's ledger beside an evaluation; the fast suite begins the standard one's."""
    if request.is_curve:
        return ledger_at(path, request.suite, eps)
    return _named(path, "autoattack" if request.suite in ("standard", "fast") else f"autoattack-{request.suite}")


def _require_autoattack(request: EvaluationRequest, ledgers: list[Path], split: Split, order: np.ndarray) -> None:
    """Check what AutoAttack needs, and say what it leaves out. Raises UsageError or DataError as the suite would."""
    library_version()
    suite_attacks(request.suite, len(split.classes))
    number, shards = request.shard or (request.ranks.rank + 1, request.ranks.world_size)
    require_images(number, shards, len(order[: request.autoattack_limit]))
    for ledger in ledgers:
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
    stepless = all(name not in ("autoattack", "fmn") and not request.attack(name).steps for name in request.attacks)
    if not len(order) or stepless:
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
    assert not isinstance(request.eps, tuple)
    eps = radius(request.eps, dataset, trained, network.name, request.norm)
    if request.norm == "linf" and trained is not None and abs(trained - eps) > 1e-9 and request.ranks.is_first:
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
        "images_sha256": digest(split, order),
        "subset": "all" if len(order) == len(split) else "the first images of every class in turn",
        "eps": eps,
        "image_size": split.shape[0],
        **({} if facts.max_side is None else {"max_side": facts.max_side}),
        "norm": request.norm,
        "precision": "fp32",
        "seed": request.seed,
        "batch_size": request.batch_size,
        "network": label(network),
        "weights": weights_name(network),
        "weights_sha256": sha256,
        "classes": list(split.classes),
        "versions": versions(),
    }
