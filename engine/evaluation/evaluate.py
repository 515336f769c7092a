"""The evaluation of a run or a checkpoint: it writes evaluation.json beside it, the protocol with the numbers."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from retemper.console import Progress
from retemper.engine.checkpoints.find import Network, find_network
from retemper.engine.checkpoints.header import Facts, is_run, require_same_images
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.evaluation.autoattack import SuiteRequest, suite_entry
from retemper.engine.evaluation.evaluation_file import EvaluationFile, Outcome
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.shards import Shard, evaluate_suite
from retemper.engine.predict import ATTACKS, balanced_order, predictions
from retemper.engine.run.job import default_cache
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.sanity.check import IMAGES, check_evaluated, check_lines
from retemper.engine.sanity.ladder import CheckRequest
from retemper.errors import DataError, UsageError
from retemper.loaders import Split, load_split
from retemper.provenance import versions

IDENTIFYING = ("dataset", "split", "image_size", "weights_sha256")  # of the protocol: what a ledger's rows are of


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """The request of `retemper evaluate`.

    Attributes:
        target: a run's folder, a checkpoint, or another network by name (checkpoints/find.py).
        out: the folder of the files; None for the folder of the weights.
        attacks: names of `ATTACKS`, and "autoattack".
        limit, autoattack_limit: how many images, balanced over the classes; None for all.
        weights: which of a run's, "best" or "last".
        seed: of the random starts.
        ranks: the processes that evaluate together.
        facts: what the user says about a bare checkpoint.
        suite, fold, shard, budget_s: of AutoAttack, as `SuiteRequest` and `evaluate_suite` take them.
        check: whether to look for masked gradients too.
    """

    target: str | Path
    out: Path | None = None
    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd20", "cw")
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


def evaluate_target(request: EvaluationRequest) -> tuple[Path, dict[str, Any]]:
    """Run the attacks on a network and write evaluation.json and evaluation.csv.

    Attacks found in an evaluation under the very same protocol are kept beside the new ones. Several processes share
    the images out, and the first of them writes the files.

    Returns:
        The file's path and its content.
    Raises:
        DataError, UsageError: the target or the data cannot be used.
    """
    ranks = request.ranks
    network = find_network(request.target, dataset=request.facts.dataset, which=request.weights)
    facts, split, data_root = _test_images(network, request.facts, request.data_root)
    model, source = network.load(facts, split.shape, request.device, default_cache())
    order = balanced_order(split.labels, request.limit)
    eps = 8 / 255 if facts.eps is None else facts.eps
    protocol = _protocol(request, network, split, len(order), eps, source["sha256"])
    path = _destination(network, request.out)
    file = EvaluationFile.begin(path, protocol) if ranks.is_first else EvaluationFile(path, protocol)
    file.content["protocol"]["data_root"] = None if data_root is None else str(data_root)
    options: dict[str, Any] = dict(eps=eps, device=request.device, batch_size=request.batch_size, seed=request.seed)
    for name in request.attacks:
        started = time.monotonic()
        if name == "autoattack":
            suite = SuiteRequest(suite=request.suite, fold=request.fold, budget_s=request.budget_s, **options)
            images, known = order[: request.autoattack_limit], {name: protocol[name] for name in IDENTIFYING}
            csv = path.with_name(path.name.replace("evaluation", "autoattack")).with_suffix(".csv")
            pieces: dict[str, Any] = dict(path=csv, shard=request.shard, ranks=ranks)
            ledger = evaluate_suite(model, split, images, suite, known=known, **pieces)
            if ledger is None:  # a shard, and not the last one
                continue
            found = _autoattack(ledger, suite, images)
        else:
            found = _attack(name, model, split, order, options, ranks)
        file.add(found, split, time.monotonic() - started)
        if ranks.is_first:
            file.write()
    if request.check and ranks.is_first:
        checked = CheckRequest(model=model, split=split, indices=order[:IMAGES], **options)
        folder = None if network.weights is None else network.weights.parent
        file.content["checks"] = check_evaluated(checked, folder, file.content["attacks"])
        file.write()
    return path, file.content


def _attack(
    name: str, model: nn.Module, split: Split, image_N: np.ndarray, options: dict[str, Any], ranks: Ranks
) -> Outcome:
    """Run one attack of `ATTACKS`; `options` are those of `predictions`."""
    attack = ATTACKS[name]
    with Progress(name, len(image_N)) as progress:
        given_N = predictions(model, split, attack, indices=image_N, progress=progress, ranks=ranks, **options)
    return Outcome(name, attack.described(options["eps"]), image_N, given_N.numpy())


def _autoattack(ledger: Ledger, suite: SuiteRequest, image_N: np.ndarray) -> Outcome:
    """Return the outcome of a suite from its ledger."""
    name = "autoattack" if suite.suite == "standard" else f"autoattack-{suite.suite}"
    described = {fact: ledger.facts[fact] for fact in ("library", "seed", "batch_size", "fold", "eps")} | {
        "suite": suite.suite,
        "attacks": list(suite.attacks),
        "images": len(image_N),
        "shards": ledger.facts.get("shards", 1),
    }
    return Outcome(name, described, image_N, ledger.predicted_under(suite.attacks), suite_entry(ledger, suite.suite))


def _test_images(network: Network, told: Facts, data_root: Path | None) -> tuple[Facts, Split, Path | None]:
    """Return the facts about a network, the test images for it, and the folder of these images.

    What the user says, in `told` and `data_root`, comes before what the network's file and its run say.
    """
    folder = None if network.weights is None else network.weights.parent
    config = RunFolder(folder).read_config() if folder is not None and is_run(folder) else None
    if network.weights is None and told.model is not None:
        raise UsageError(f"--model {told.model}: {network.name} brings its own architecture: leave it out")
    facts = told.or_else(network.facts)
    if config is not None:
        recipe = config["recipe"]
        known = Facts(model=recipe["student"], dataset=recipe["dataset"], eps=recipe["eps"])
        facts = facts.or_else(known).or_else(Facts(image_size=recipe.get("image_size")))
        data_root = data_root or (Path(config["data_root"]) if config.get("data_root") else None)
    if facts.dataset is None:
        raise UsageError(f"{network.name} does not say what it was trained on: name the data set with --dataset")
    split = load_split(facts.dataset, "test", data_root, facts.image_size)
    require_same_images(network.name, facts, len(split.classes), split.shape[2])
    if config is not None and list(split.classes) != config["classes"]:
        raise DataError(f"the test images of {facts.dataset} have other classes than {folder} was trained on")
    known = Facts(num_classes=len(split.classes), channels=split.shape[2])
    return facts.or_else(known), split, data_root


def _protocol(
    request: EvaluationRequest, network: Network, split: Split, images: int, eps: float, sha256: str
) -> dict[str, Any]:
    """Return all that the numbers depend on beside the attacks. Under another protocol a new file is begun."""
    return {
        "dataset": split.name,
        "split": split.split,
        "images": images,
        "subset": "all" if request.limit is None else "the first images of every class in turn",
        "eps": eps,
        "image_size": split.shape[0],
        "norm": "linf",
        "precision": "fp32",
        "seed": request.seed,
        "batch_size": request.batch_size,
        "weights": network.name if network.weights is None else network.weights.name,
        "weights_sha256": sha256,
        "classes": list(split.classes),
        "versions": versions(),
    }


def _destination(network: Network, out: Path | None) -> Path:
    """Return the path of evaluation.json: in `out`, or else beside the weights.

    For weights of a run that are not its best the name is another: evaluation-last.json. Raises UsageError if no such
    folder can be made.
    """
    name, folder = "evaluation.json", out or _default_out(network.name)
    if network.weights is not None:
        folder = out or network.weights.parent
        if network.weights.name != "best.safetensors" and is_run(network.weights.parent):
            name = f"evaluation-{network.weights.stem}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}): name another folder with --out") from None
    return folder / name


def _default_out(name: str) -> Path:
    """Return the folder for the evaluation of an external network: runs/robustbench-NAME, runs/net-factory."""
    plain = re.sub(r"[^\w.-]+", "-", re.sub(r"^.*/(?=[^/]*\.py:)|\.py(?=:)", "", name))
    return Path("runs") / plain


def summary(content: dict[str, Any]) -> str:
    """Return a table of evaluation.json for the terminal, a line an attack; upper bounds are marked as such."""
    protocol = content["protocol"]
    lines, notes = [f"{'':16}{'average':>10}{'worst':>10}  {'class':16}{'worst tenth':>12}{'NSD':>8}"], []
    for name, result in content["attacks"].items():
        worst, images = protocol["classes"][result["worst_class"]], sum(result["count"])
        nsd = "-" if result["nsd"] is None else f"{result['nsd']:.3f}"
        bound = "<= " if result.get("upper_bound") else ""
        shares = [result[key] for key in ("average", "worst", "worst_tenth")]
        average, least, tenth = ("-" if share is None else f"{bound}{share:.1%}" for share in shares)
        lines.append(f"{name:16}{average:>10}{least:>10}  {worst:16}{tenth:>12}{nsd:>8}")
        if result.get("complete") is False:
            notes.append(f"{name} was interrupted: these are upper bounds, and the same command goes on")
        elif bound:
            notes.append(f"{name} leaves out attacks of the standard suite: these are upper bounds")
        notes += [f"{name}: {flag}" for flag in result.get("flags", [])]
        if images != protocol["images"]:
            notes.append(f"{name}: on the first {images} of the images, balanced over the classes")
    lines.append(f"{protocol['images']} {protocol['split']} images, L-inf eps {protocol['eps']:.4g}, fp32")
    return "\n".join(lines + notes + (check_lines(content["checks"]) if "checks" in content else []))
