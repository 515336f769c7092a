"""A network that is ready to be attacked, and the outcomes of the attacks of one request."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from retemper.console import Progress
from retemper.engine.evaluation.autoattack import SuiteRequest, suite_entry
from retemper.engine.evaluation.cross_check import cross_entry
from retemper.engine.evaluation.evaluation_file import Outcome
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.library import FULL
from retemper.engine.evaluation.minimal_norm import STEPS, Distances, distances, foolbox_version
from retemper.engine.evaluation.preflight import gradient_flags
from retemper.engine.evaluation.protocols import result_name
from retemper.engine.evaluation.request import EvaluationRequest
from retemper.engine.evaluation.shards import evaluate_suite
from retemper.engine.predict import predictions
from retemper.loaders import Split

TOGETHER = 256  # images that are read at once
IDENTIFYING = ("dataset", "split", "image_size", "weights_sha256")  # of the protocol: what a ledger's rows are of


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """A network that is ready to be attacked, at one radius.

    Attributes:
        order: (N,) int64, which images of the split, in order.
        zero: by loss, the share of probed images whose gradient is zero.
        protocol: of the evaluation.
        ledger: the path of AutoAttack's.
        after: the smaller radii of a curve, whose survivors the images are.
        ledgers: AutoAttack's, once they are there.
    """

    request: EvaluationRequest
    model: nn.Module
    split: Split
    order: np.ndarray
    eps: float
    zero: dict[str, float]
    protocol: Mapping[str, Any]
    ledger: Path
    after: tuple[float, ...] = ()
    ledgers: list[Ledger] = field(default_factory=list)

    def at(self, eps: float, order: np.ndarray, after: tuple[float, ...], ledger: Path) -> "Attacked":
        """Return the same network at a larger radius, on the images that held at the smaller ones."""
        return replace(self, eps=eps, order=order, after=after, ledger=ledger, ledgers=[])

    def misclassified(self) -> frozenset[int]:
        """Return the images that are wrong without an attack, by their indices."""
        attack, label_N = self.request.attack("clean"), self.split.labels[self.order]
        given_N = predictions(
            self.model, self.split, attack, indices=self.order, ranks=self.request.ranks, **self.options
        )
        return frozenset(self.order[given_N.numpy() != label_N].tolist())

    @property
    def options(self) -> dict[str, Any]:
        """Return what all attacks are given."""
        asked = self.request
        return dict(eps=self.eps, device=asked.device, batch_size=asked.batch_size, seed=asked.seed)

    def outcomes(self, name: str) -> list[Outcome]:
        """Run one attack of the request. AutoAttack's cross-checks are an outcome of their own.

        Returns:
            None of a shard that is not the last one.
        """
        if name == "autoattack":
            return self._autoattack()
        return [self.minimal_norm(self.distances())] if name == "fmn" else [self._attack(name)]

    def _attack(self, name: str) -> Outcome:
        """Run one attack of the protocol."""
        attack, order, ranks = self.request.attack(name), self.order, self.request.ranks
        called = result_name(name, self.request.protocol)
        chosen: dict[str, Any] = dict(indices=order, ranks=ranks, capture=self.request.capture == "auto") | self.options
        with Progress(called, len(order)) as progress:
            chosen |= dict(progress=progress, norm=self.request.norm if attack.steps else "linf")
            given_N = predictions(self.model, self.split, attack, **chosen)
        flags = gradient_flags(attack.loss, self.zero) if attack.steps else []
        if lost := int((given_N < 0).sum()):
            flags.append(f"the network's answers to {lost:,} images are not finite: they count as wrong")
        more: dict[str, Any] = {"flags": flags} if flags else {}
        described = attack.described(self.eps)
        if called != name:
            described, more = described | {"protocol": self.request.protocol}, more | {"upper_bound": True}
        return Outcome(called, described, order, given_N.numpy(), more)

    def distances(self) -> Distances:
        """Return how far FMN finds the nearest misclassified image of each, at no radius in particular."""
        asked = self.request
        chosen: dict[str, Any] = dict(norm=asked.norm, device=asked.device, batch_size=asked.batch_size)
        with Progress("fmn", len(self.order)) as progress:
            return distances(self.model, self.split, self.order, progress=progress, ranks=asked.ranks, **chosen)

    def minimal_norm(self, found: Distances) -> Outcome:
        """Return what FMN's distances say at this radius, and the median distance of each class."""
        label_N = self.split.labels[self.order]
        classes = range(len(self.split.classes))
        medians = [float(np.median(found.distance_N[label_N == k])) if (label_N == k).any() else None for k in classes]
        more = {"median_distance": [None if k is None or not np.isfinite(k) else k for k in medians]}
        described = {"library": foolbox_version(), "steps": STEPS, "eps": self.eps}
        return Outcome("fmn", described, self.order, found.predicted_within(self.eps), more)

    def _autoattack(self) -> list[Outcome]:
        """Run AutoAttack, or the shard of it that is asked for, and the cross-checks on what it leaves."""
        asked, classes = self.request, len(self.split.classes)
        chosen: dict[str, Any] = dict(suite=asked.suite, fold=asked.fold, budget_s=asked.budget_s) | self.options
        chosen |= dict(norm=asked.norm, cross=asked.cross_check)
        suite = SuiteRequest(classes=classes, capture=asked.capture == "auto", **chosen)
        images = self.order if self.after else self.order[: asked.autoattack_limit]
        known = {name: self.protocol[name] for name in IDENTIFYING} | {"images_sha256": digest(self.split, images)}
        known |= {"after": list(self.after)} if self.after else {}
        pieces: dict[str, Any] = dict(path=self.ledger, shard=asked.shard, ranks=asked.ranks)
        ledger = evaluate_suite(self.model, self.split, images, suite, known=known, **pieces)
        if ledger is None:
            return []
        self.ledgers.append(ledger)
        name = "autoattack" if suite.suite == "standard" else f"autoattack-{suite.suite}"
        own = replace(suite, cross=False).attacks
        described = {fact: ledger.facts[fact] for fact in ("library", "seed", "batch_size", "fold", "eps")} | {
            "suite": suite.suite,
            "attacks": list(own),
            "images": len(images),
            "shards": ledger.facts.get("shards", 1),
            **({"protocol": asked.protocol, **asdict(suite.strength)} if suite.strength != FULL else {}),
        }
        entry = suite_entry(ledger, suite.suite, classes)
        found = [Outcome(name, described, images, ledger.predicted_under(own), entry)]
        if asked.cross_check:
            described = described | {"attacks": list(suite.attacks), "cross_check": foolbox_version()}
            entry = cross_entry(ledger, entry, suite.attacks, classes)
            found.append(Outcome("cross-check", described, images, ledger.predicted_under(suite.attacks), entry))
        return found


def digest(split: Split, order: np.ndarray) -> str:
    """Return the SHA-256 of the pixels of some images, 64 hexadecimal digits; a damaged image is found here."""
    found = hashlib.sha256()
    for first in range(0, len(order), TOGETHER):
        found.update(split.seen(order[first : first + TOGETHER]).tobytes())
    return found.hexdigest()
