"""Evaluates a run or a checkpoint and writes evaluation.json beside it, the protocol with the numbers."""

import argparse
import re
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from retemper.console import Progress, say
from retemper.engine.catalogue import parse_value
from retemper.engine.checkpoints.find import Network, find_network
from retemper.engine.checkpoints.header import Facts, is_run, require_same_images
from retemper.engine.class_report import by_class
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.evaluation.autoattack import SuiteRequest, suite_entry
from retemper.engine.evaluation.shards import Shard, evaluate_suite
from retemper.engine.evaluation.verdicts import Evaluated, write_verdicts
from retemper.engine.predict import ATTACKS, balanced_order, predictions
from retemper.engine.run.job import default_cache
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.sanity.check import IMAGES, check_evaluated, check_lines
from retemper.engine.sanity.ladder import Subject
from retemper.errors import DataError, UsageError
from retemper.files import read_json, write_json
from retemper.loaders import Split, load_split
from retemper.provenance import versions


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate, and how. `facts` are the user's words about a bare checkpoint, `ranks` the processes that do it
    together."""

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
    suite: str = "standard"  # of AutoAttack, as are the following
    fold: bool = False
    autoattack_limit: int | None = None
    shard: Shard | None = None
    budget_s: float | None = None
    check: bool = False

    @classmethod
    def from_words(cls, words: argparse.Namespace, ranks: Ranks, device: torch.device) -> "EvaluationRequest":
        """From the command line's options.

        Raises:
            UsageError: an unknown attack, a radius that is no number, a limit below 1.
        """
        attacks = tuple(name.strip() for name in words.attacks.split(",") if name.strip())
        if not attacks:
            raise UsageError(f"--attacks names none: choose of {', '.join(ATTACKS)}, autoattack")
        for name in attacks:
            if name not in (*ATTACKS, "autoattack"):
                raise UsageError(f"there is no attack {name!r}: choose of {', '.join(ATTACKS)}, autoattack")
        limits = ("limit", words.limit), ("batch-size", words.batch_size), ("autoattack-limit", words.autoattack_limit)
        for name, number in limits:
            if number is not None and number < 1:
                raise UsageError(f"--{name} {number}: it must be at least 1")
        try:
            eps = None if words.eps is None else parse_value(float, words.eps)
        except ValueError:
            raise UsageError(f"--eps {words.eps}: write it as 8/255 or 0.031") from None
        if eps is not None and not 0 <= eps <= 1:
            raise UsageError(f"--eps {words.eps}: a radius in [0, 1] pixels, 8/255 not 8")
        if words.shard and ranks.joined:
            raise UsageError("--shard is for separate commands: torchrun shares the images out itself")
        if words.check and words.shard:
            raise UsageError("--check is not for a shard: give it once, in a run without --shard")
        return cls(
            target=words.target,
            out=words.out,
            attacks=attacks,
            data_root=words.data_root,
            limit=words.limit,
            weights=words.weights,
            batch_size=words.batch_size,
            seed=words.seed,
            device=device,
            ranks=ranks,
            facts=Facts(model=words.model, dataset=words.dataset, eps=eps),
            suite=words.suite,
            fold=words.fold,
            autoattack_limit=words.autoattack_limit,
            shard=_shard(words.shard, attacks),
            budget_s=None if words.budget is None else 60 * _minutes(words.budget),
            check=words.check,
        )


def evaluate_target(request: EvaluationRequest) -> tuple[Path, dict[str, Any]]:
    """Run the attacks and write the file.

    Attacks found in an evaluation under the very same protocol are kept beside the new ones. Several processes share
    the images out, and the first of them writes the files.

    Returns:
        The file's path and its content.
    Raises:
        DataError, UsageError: the target or the data cannot be used.
    """
    network = find_network(request.target, dataset=request.facts.dataset, which=request.weights)
    facts, split, data_root = _subject(request, network)
    model, source = network.load(facts, split.shape, request.device, default_cache())
    order = balanced_order(split.labels, request.limit)
    eps = 8 / 255 if facts.eps is None else facts.eps
    protocol = {
        "dataset": split.name,
        "split": split.split,
        "images": len(order),
        "subset": "all" if request.limit is None else "the first images of every class in turn",
        "eps": eps,
        "image_size": split.shape[0],
        "norm": "linf",
        "precision": "fp32",
        "seed": request.seed,
        "batch_size": request.batch_size,
        "weights": network.name if network.weights is None else network.weights.name,
        "weights_sha256": source["sha256"],
        "classes": list(split.classes),
        "versions": versions(),
    }
    path = _destination(network, request.out)
    writes = request.ranks.is_first
    content = _previous(path, protocol) if writes else _empty(protocol)
    content["protocol"]["data_root"] = None if data_root is None else str(data_root)
    verdicts = _known_verdicts(path, content)
    for name in request.attacks:
        started = time.monotonic()
        if name == "autoattack":
            suite = _autoattack(model, split, order, eps, request, protocol, path)
            if suite is None:  # a shard, and not the last one
                continue
            key, images, predicted_N, entry, described = suite
        else:
            key, images, described = name, order, ATTACKS[name].described(eps)
            predicted_N, entry = _predictions(name, model, split, order, eps, request), {}
        labels = split.labels[images]
        result = by_class(predicted_N, labels, len(split.classes)) | {"seconds": time.monotonic() - started} | entry
        content["attacks"][key], content["protocol"]["attacks"][key] = result, described
        verdicts[key] = dict(
            zip(images.tolist(), zip(labels.tolist(), predicted_N == labels, strict=True), strict=True)
        )
        if writes:
            write_verdicts(path.with_suffix(".csv"), verdicts)
            write_json(path, content)
    if request.check and writes:
        content["checks"] = _checks(model, split, order[:IMAGES], eps, request, network, content["attacks"])
        write_json(path, content)
    return path, content


def _subject(request: EvaluationRequest, network: Network) -> tuple[Facts, Split, Path | None]:
    """What the network is, the test images, and where those lie."""
    folder = None if network.weights is None else network.weights.parent
    config = RunFolder(folder).read_config() if folder is not None and is_run(folder) else None
    facts, data_root = request.facts.or_else(network.facts), request.data_root
    if network.weights is None and request.facts.model is not None:
        raise UsageError(f"--model {request.facts.model}: {network.name} brings its own architecture: leave it out")
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


def _predictions(
    name: str, model: nn.Module, split: Split, order: np.ndarray, eps: float, request: EvaluationRequest
) -> np.ndarray:
    """The classes given under one attack, (N,) int64 in the order of `order`."""
    with Progress(name, len(order)) as progress:
        return predictions(
            model,
            split,
            ATTACKS[name],
            eps=eps,
            device=request.device,
            indices=order,
            batch_size=request.batch_size,
            seed=request.seed,
            progress=progress,
            ranks=request.ranks,
        ).numpy()


def _autoattack(
    model: nn.Module,
    split: Split,
    order: np.ndarray,
    eps: float,
    request: EvaluationRequest,
    protocol: dict[str, Any],
    path: Path,
) -> tuple[str, np.ndarray, np.ndarray, dict[str, Any], dict[str, Any]] | None:
    """The suite's name, its images, the classes given, what evaluation.json adds, and the description; None while
    other shards are missing."""
    order = order[: request.autoattack_limit]
    suite = SuiteRequest(
        suite=request.suite,
        eps=eps,
        device=request.device,
        batch_size=request.batch_size,
        seed=request.seed,
        fold=request.fold,
        budget_s=request.budget_s,
    )
    known = {name: protocol[name] for name in ("dataset", "split", "image_size", "weights_sha256")}
    ledger_path = path.with_name(path.name.replace("evaluation", "autoattack")).with_suffix(".csv")
    pieces: dict[str, Any] = dict(shard=request.shard, ranks=request.ranks)
    ledger = evaluate_suite(model, split, order, suite, known=known, path=ledger_path, **pieces)
    if ledger is None:
        return None
    described = {name: ledger.facts[name] for name in ("library", "seed", "batch_size", "fold", "eps")} | {
        "suite": request.suite,
        "attacks": list(suite.attacks),
        "images": len(order),
        "shards": ledger.facts.get("shards", 1),
    }
    name = "autoattack" if request.suite == "standard" else f"autoattack-{request.suite}"
    return name, order, ledger.predicted_under(suite.attacks), suite_entry(ledger, request.suite), described


def _checks(
    model: nn.Module,
    split: Split,
    order: np.ndarray,
    eps: float,
    request: EvaluationRequest,
    network: Network,
    attacks: dict[str, Any],
) -> dict[str, Any]:
    """Whether the numbers can be trusted."""
    subject = Subject(
        model=model,
        split=split,
        indices=order,
        eps=eps,
        device=request.device,
        batch_size=request.batch_size,
        seed=request.seed,
    )
    return check_evaluated(subject, None if network.weights is None else network.weights.parent, attacks)


def _known_verdicts(path: Path, content: dict[str, Any]) -> dict[str, dict[int, tuple[int, bool]]]:
    """Of the attacks that `content` keeps from before; those whose verdicts are lost are left out."""
    if not content["attacks"]:
        return {}
    try:
        known = Evaluated(path, path.stem, content).verdicts
    except DataError as error:
        say(f"the verdicts of {', '.join(content['attacks'])} are lost for comparisons: {error}")
        return {}
    return {name: of_image for name, of_image in known.items() if name in content["attacks"]}


def _shard(words: str | None, attacks: tuple[str, ...]) -> Shard | None:
    """ "2/4" as numbers."""
    if words is None:
        return None
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", words)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard {words}: write it as 1/4 to 4/4")
    if attacks != ("autoattack",):
        raise UsageError("--shard is for AutoAttack: give it with --attacks autoattack, the others in a run without it")
    return int(found[1]), int(found[2])


def _minutes(words: str) -> float:
    try:
        minutes = float(words)
    except ValueError:
        minutes = -1.0
    if not minutes > 0:
        raise UsageError(f"--budget {words}: write it in minutes, as 90")
    return minutes


def _destination(network: Network, out: Path | None) -> Path:
    """evaluation.json in `out`, or else beside the weights; another name for weights that are not a run's best.

    Raises:
        UsageError: no such folder can be made.
    """
    weights = network.weights
    plain = weights is None or weights.name == "best.safetensors" or not is_run(weights.parent)
    name = "evaluation.json" if plain else f"evaluation-{weights.stem}.json"
    folder = out or (default_evaluation_out(network.name) if weights is None else weights.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}): name another folder with --out") from None
    return folder / name


def default_evaluation_out(name: str) -> Path:
    """Where the evaluation of a network goes that has no folder: runs/robustbench-NAME, runs/net-factory."""
    plain = re.sub(r"[^\w.-]+", "-", re.sub(r"^.*/(?=[^/]*\.py:)|\.py(?=:)", "", name))
    return Path("runs") / plain


def _empty(protocol: dict[str, Any]) -> dict[str, Any]:
    return {"protocol": protocol | {"attacks": {}}, "attacks": {}}


def _previous(path: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """The evaluation to add to: the one at `path` if it was made under `protocol`, else an empty one.

    One under another protocol is kept under a name of its own.
    """
    if not path.exists():
        return _empty(protocol)
    try:
        old = read_json(path)
        was, attacks = old.get("protocol"), old.get("attacks")
        if isinstance(was, dict) and isinstance(attacks, dict) and isinstance(was.get("attacks"), dict):
            if {name: was.get(name) for name in protocol} == protocol:
                return old
    except DataError:
        pass  # kept as it is, under the other name
    kept = next(name for n in count(1) if not (name := path.with_name(f"{path.stem}.{n}.json")).exists())
    path.replace(kept)
    if path.with_suffix(".csv").exists():
        path.with_suffix(".csv").replace(kept.with_suffix(".csv"))
    say(f"{path} was made under another protocol and is now {kept}")
    return _empty(protocol)


def summary(content: dict[str, Any]) -> str:
    """A line an attack, for the terminal; upper bounds are marked as such."""
    classes = content["protocol"]["classes"]
    lines = [f"{'':16}{'average':>10}{'worst':>10}  {'class':16}{'worst tenth':>12}{'NSD':>8}"]
    notes = []
    for name, result in content["attacks"].items():
        worst = classes[result["worst_class"]]
        nsd = "-" if result["nsd"] is None else f"{result['nsd']:.3f}"
        bound = "<= " if result.get("upper_bound") else ""
        average, least, tenth = (f"{bound}{result[key]:.1%}" for key in ("average", "worst", "worst_tenth"))
        lines.append(f"{name:16}{average:>10}{least:>10}  {worst:16}{tenth:>12}{nsd:>8}")
        if result.get("complete") is False:
            notes.append(f"{name} was interrupted: these are upper bounds, and the same command goes on")
        elif bound:
            notes.append(f"{name} leaves out attacks of the standard suite: these are upper bounds")
        notes += [f"{name}: {flag}" for flag in result.get("flags", [])]
        if sum(result["count"]) != content["protocol"]["images"]:
            notes.append(f"{name}: on the first {sum(result['count'])} of the images, balanced over the classes")
    protocol = content["protocol"]
    lines.append(f"{protocol['images']} {protocol['split']} images, L-inf eps {protocol['eps']:.4g}, fp32")
    return "\n".join(lines + notes + (check_lines(content["checks"]) if "checks" in content else []))
