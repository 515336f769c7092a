"""Evaluates a run or a checkpoint and writes evaluation.json beside it, the protocol with the numbers."""

import argparse
import json
import re
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from retemper.engine.catalogue import parse_value
from retemper.engine.evaluation.autoattack import autoattack_survivors
from retemper.engine.evaluation.evaluate import ATTACKS, balanced_order, by_class, survivors
from retemper.engine.job import default_cache, pick_device
from retemper.engine.networks import Network, find_network
from retemper.engine.run_folder import RunFolder, read_json, versions
from retemper.engine.trained import Facts, is_run, require_same_images
from retemper.engine.weights import write_atomically
from retemper.loaders import Split, load_split
from retemper.loaders.errors import DataError, UsageError
from retemper.loaders.progress import Progress, say


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate, and how. `facts` are the user's words about a bare checkpoint."""

    target: str | Path
    out: Path | None = None
    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd20", "cw")
    data_root: Path | None = None
    limit: int | None = None
    weights: str = "best"
    batch_size: int = 256
    seed: int = 0
    device: torch.device
    facts: Facts

    @classmethod
    def from_words(cls, words: argparse.Namespace) -> "EvaluationRequest":
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
        for name, number in (("limit", words.limit), ("batch-size", words.batch_size)):
            if number is not None and number < 1:
                raise UsageError(f"--{name} {number}: it must be at least 1")
        try:
            eps = None if words.eps is None else parse_value(float, words.eps)
        except ValueError:
            raise UsageError(f"--eps {words.eps}: write it as 8/255 or 0.031") from None
        if eps is not None and not 0 <= eps <= 1:
            raise UsageError(f"--eps {words.eps}: a radius in [0, 1] pixels, 8/255 not 8")
        return cls(
            target=words.target,
            out=words.out,
            attacks=attacks,
            data_root=words.data_root,
            limit=words.limit,
            weights=words.weights,
            batch_size=words.batch_size,
            seed=words.seed,
            device=pick_device(words.device),
            facts=Facts(model=words.model, dataset=words.dataset, eps=eps),
        )


def evaluate_target(request: EvaluationRequest) -> tuple[Path, dict[str, Any]]:
    """Run the attacks and write the file.

    Attacks found in an evaluation under the very same protocol are kept beside the new ones.

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
    content = _previous(path, protocol)
    content["protocol"]["data_root"] = None if data_root is None else str(data_root)
    for name in request.attacks:
        started = time.monotonic()
        correct = _survivors(name, model, split, order, eps, request)
        result = by_class(correct, split.labels[order], len(split.classes))
        content["attacks"][name] = result | {"seconds": time.monotonic() - started}
        content["protocol"]["attacks"][name] = (
            ATTACKS[name].described(eps) if name in ATTACKS else {"suite": "standard"}
        )
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
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


def _survivors(
    name: str, model: nn.Module, split: Split, order: np.ndarray, eps: float, request: EvaluationRequest
) -> torch.Tensor:
    """Per-image verdicts of one attack, (N,) bool in the order of `order`."""
    if name == "autoattack":
        return autoattack_survivors(
            model,
            split,
            eps=eps,
            indices=order,
            device=request.device,
            batch_size=request.batch_size,
            seed=request.seed,
        )
    with Progress(name, len(order)) as progress:
        return survivors(
            model,
            split,
            ATTACKS[name],
            eps=eps,
            device=request.device,
            indices=order,
            batch_size=request.batch_size,
            seed=request.seed,
            progress=progress,
        )


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


def _previous(path: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """The evaluation to add to: the one at `path` if it was made under `protocol`, else an empty one.

    One under another protocol is kept under a name of its own.
    """
    empty: dict[str, Any] = {"protocol": protocol | {"attacks": {}}, "attacks": {}}
    if not path.exists():
        return empty
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
    say(f"{path} was made under another protocol and is now {kept}")
    return empty


def summary(content: dict[str, Any]) -> str:
    """A line an attack, for the terminal."""
    classes = content["protocol"]["classes"]
    lines = [f"{'':12}{'average':>10}{'worst':>10}  {'class':16}{'worst tenth':>12}{'NSD':>8}"]
    for name, result in content["attacks"].items():
        worst = classes[result["worst_class"]]
        nsd = "-" if result["nsd"] is None else f"{result['nsd']:.3f}"
        average, least, tenth = (f"{result[key]:.1%}" for key in ("average", "worst", "worst_tenth"))
        lines.append(f"{name:12}{average:>10}{least:>10}  {worst:16}{tenth:>12}{nsd:>8}")
    protocol = content["protocol"]
    lines.append(f"{protocol['images']} {protocol['split']} images, L-inf eps {protocol['eps']:.4g}, fp32")
    return "\n".join(lines)
