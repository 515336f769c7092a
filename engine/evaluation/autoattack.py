"""AutoAttack (Croce & Hein, ICML 2020) with the attacks of the library itself (the extra `eval`), and with a ledger.

    standard   APGD-CE, then targeted APGD-DLR, targeted FAB and Square (5,000 queries), each on what still holds
    fast       the first two: its accuracies are upper bounds of the standard suite's
    fair-ard   the standard four as the library torchattacks has them since 3.3.0 (October 2022): APGD and FAB of 10
               steps in place of 100, every other class as a target, Square's schedule run through in its 5,000 queries

The DLR losses need more classes than some data sets have. On three, untargeted APGD-DLR stands in for APGD-T; on two,
both are left out. What is left out stands in the result, whose accuracies are then upper bounds.

The attacks come in the order, in the batches and with the seeds of the library's own runner, so the verdicts are its
own, image by image. After each batch the ledger is written: a run that is killed goes on from there to the same end.

Three things cost less here. Parameters ask for no gradients. On a GPU, what the attacks ask of the network is replayed
from CUDA graphs (speed/replay.py). With `fold`, they look at the network's folded twin (speed/fold.py). Both are the
same function with other rounding, and the network itself judges what was found.

Dimension key: B batch, C H W image, K classes, N images.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retemper.console import Progress, say
from retemper.engine.device import exact_fp32
from retemper.engine.evaluation.cross_check import cross_attacks, cross_checks
from retemper.engine.evaluation.ledger import UNTRIED, Ledger
from retemper.engine.evaluation.library import FULL, WEAKER, Strength, library_attacks
from retemper.engine.evaluation.norms import SLACK, length
from retemper.engine.predict import as_float, folded_twin, predicted
from retemper.engine.sanity.flags import DLR_CLASSES, SQUARE_HELPS
from retemper.engine.sanity.ladder import own_generators
from retemper.engine.speed.replay import Replayed, graphs_for
from retemper.errors import UsageError
from retemper.loaders import Split

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
SUITES = {"standard": STANDARD, "fast": STANDARD[:2], "fair-ard": STANDARD}
FORWARDS = {
    "apgd-ce": 102,
    "apgd-dlr": 102,
    "apgd-t": 919,
    "fab-t": 1829,
    "square": 5000,
    "pma": 202,
    "mt-apgd": 919,
    "fmn": 200,
}  # of an image that holds to the end
BACKWARDS = {
    "apgd-ce": 101,
    "apgd-dlr": 101,
    "apgd-t": 909,
    "fab-t": 900,
    "square": 0,
    "pma": 200,
    "mt-apgd": 909,
    "fmn": 200,
}


@dataclass(frozen=True, kw_only=True)
class SuiteRequest:
    """The request to run a suite.

    Attributes:
        suite: one of `SUITES`.
        classes: how many the data set has; the suites are the same from four on.
        eps: the radius in pixel units.
        fold: whether the attacks look at the network's folded twin.
        capture: whether, on a GPU, what the attacks ask of the network is replayed from CUDA graphs.
        budget_s: seconds after which no further batch is begun; None for no limit.
        norm: "linf", "l2" or "l1".
        cross: whether the cross-checks follow, on what the suite leaves (cross_check.py).
    """

    suite: str = "standard"
    classes: int = DLR_CLASSES
    eps: float
    device: torch.device
    batch_size: int = 256
    seed: int = 0
    fold: bool = False
    capture: bool = True
    budget_s: float | None = None
    norm: str = "linf"
    cross: bool = False

    @property
    def attacks(self) -> tuple[str, ...]:
        """Return the names of the attacks, in order: the suite's, and the cross-checks."""
        return suite_attacks(self.suite, self.classes) + (cross_checks(self.norm) if self.cross else ())

    @property
    def strength(self) -> Strength:
        """Return the strength of its attacks."""
        return WEAKER.get(self.suite, FULL)


def suite_attacks(suite: str, classes: int = DLR_CLASSES) -> tuple[str, ...]:
    """Return the names of a suite's attacks, in order, as far as their losses are defined for so many classes.

    Raises:
        UsageError: there is one class: nothing is to be told apart.
    """
    if classes < 2:
        raise UsageError("AutoAttack needs two classes or more, this data set has one: use --attacks clean")
    stand_in = {2: (), 3: ("apgd-dlr",)}.get(classes, ("apgd-t",))
    return tuple(name for one in SUITES[suite] for name in (stand_in if one == "apgd-t" else (one,)))


def left_out(suite: str, classes: int) -> str:
    """Return what a suite leaves out for want of classes, in words; "" where it is whole."""
    missing = [name for name in SUITES[suite] if name not in suite_attacks(suite, classes)]
    if not missing:
        return ""
    stand_in = "APGD-DLR stands in for it" if classes == 3 else "no attack stands in for it"
    return f"on {classes} classes without {', '.join(missing)}, whose loss needs {DLR_CLASSES}; {stand_in}"


class ChannelsLast(nn.Module):
    """A network that takes contiguous images and works channels-last. The library's APGD-T views images as flat rows.

    Each call advances `progress`: a forward counts as one, a forward and its gradient as three.
    """

    def __init__(self, model: nn.Module, progress: Progress) -> None:
        super().__init__()
        self.model, self.progress = model, progress

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, K) logits of (B, C, H, W) pixels."""
        self.progress.advance(len(image) * (3 if image.requires_grad else 1))
        return self.model(image.contiguous(memory_format=torch.channels_last))


def run_suite(model: nn.Module, split: Split, request: SuiteRequest, ledger: Ledger) -> bool:
    """Go on with `ledger` until its suite is done, or the time is over; return whether it is done.

    The ledger's file is written after each batch, and holds the flags that the library raised.

    Args:
        model: (B, C, H, W) pixels in [0, 1] to (B, K) logits, on the device of the request; put into eval mode.
    Raises:
        UsageError: there is one class, or the network cannot be folded.
    """
    request = replace(request, classes=len(split.classes))
    started, spent = time.monotonic(), ledger.notes["seconds"]
    own_draws = own_generators(request.device)  # the library seeds torch's
    with Progress("autoattack", 1) as progress, exact_fp32(), _flags(ledger), own_draws:
        runner = _Runner(model.eval(), split, request, ledger, progress)
        for rows, attack in runner.owed():
            if request.budget_s is not None and time.monotonic() - started >= request.budget_s:
                say("autoattack: its time is over; the same command goes on from here")
                break
            runner.expect(attack)
            runner.clean(rows) if attack is None else runner.attack(attack, rows)
            ledger.notes["seconds"] = spent + time.monotonic() - started
            ledger.write()
    return ledger.is_complete(request.attacks)


class _Runner:
    """One pass over the batches that a ledger lacks. A batch is given by its rows in the ledger."""

    def __init__(
        self, model: nn.Module, split: Split, request: SuiteRequest, ledger: Ledger, progress: Progress
    ) -> None:
        self.model, self.split, self.request, self.ledger, self.progress = model, split, request, ledger, progress
        looked_at = require_foldable(model, request.device) if request.fold else model
        record = graphs_for(request.device, looked_at) if request.capture else None
        replayed = Replayed(looked_at, record, request.batch_size)
        self.looked_at = ChannelsLast(replayed, progress).eval()
        asked = request.eps, request.seed, request.device, request.strength, request.norm
        self.attacks = library_attacks(self.looked_at, len(split.classes), *asked)
        if request.cross:
            targeted = library_attacks(self.looked_at, len(split.classes), *asked)["apgd-t"]
            others: dict[str, Any] = dict(seed=request.seed, norm=request.norm)
            self.attacks |= cross_attacks(self.looked_at, targeted, len(split.classes), request.eps, **others)

    def owed(self) -> Iterator[tuple[np.ndarray, str | None]]:
        """Yield (rows, attack) of every batch not done yet, None for the clean images, in the library's order."""
        ledger, attacks = self.ledger, self.request.attacks
        for rows in self._batches(np.arange(len(ledger.image_N))):
            if (ledger.clean_N[rows] == UNTRIED).any():
                yield rows, None
        for number, attack in enumerate(attacks):
            for rows in self._batches(np.flatnonzero(ledger.holds(attacks[:number]))):
                if (ledger.tried_N[rows] <= number).any():
                    yield rows, attack

    def clean(self, rows: np.ndarray) -> None:
        """Record the answers to clean images; let the library examine the network on the first batch."""
        clean, label_B = self._images(rows)
        if rows[0] == 0:
            _check(self.looked_at, clean, label_B)
        logits_BK = self._logits(clean)
        self.ledger.clean_N[rows] = (predicted(logits_BK) == label_B).cpu().numpy()
        self._note(rows, logits_BK, label_B)

    def attack(self, name: str, rows: np.ndarray) -> None:
        """Run one attack on images that hold, and record which of them it broke."""
        ledger = self.ledger
        clean, label_B = self._images(rows)
        with torch.no_grad():
            adv = self.attacks[name].perturb(clean.clone(), label_B.clone())
        logits_BK = self._logits(adv)
        broken_B = predicted(logits_BK) != label_B
        broken = rows[broken_B.cpu().numpy()]
        self._note(broken, logits_BK[broken_B], label_B[broken_B])
        ledger.broken_by[broken] = name
        ledger.tried_N[rows] = self.request.attacks.index(name) + 1
        ledger.notes["perturbation"] = max(
            ledger.notes["perturbation"], float(length(adv - clean, self.request.norm).max())
        )

    def expect(self, attack: str | None) -> None:
        """Set the total of the progress to the work that is left if all images that hold now hold to the end."""
        ledger, progress = self.ledger, self.progress
        untried = ledger.clean_N == UNTRIED
        holds = ledger.holds(self.request.attacks) | untried
        left = np.count_nonzero(untried)
        for number, name in enumerate(self.request.attacks):
            cost = FORWARDS[name] + 2 * BACKWARDS[name]  # a forward with its gradient counts as three
            if name != "square":
                cost = cost * self.request.strength.steps // FULL.steps
            left += cost * np.count_nonzero(holds & (ledger.tried_N <= number))
        progress.total = progress.done + int(left)
        if progress.bar is not None:
            progress.bar.total = progress.total
        progress.note = f"{attack or 'clean'}; {np.count_nonzero(holds):,} of {len(holds):,} images hold"

    def _batches(self, rows: np.ndarray) -> list[np.ndarray]:
        size = self.request.batch_size
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def _images(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return (B, C, H, W) contiguous pixels and (B,) labels."""
        clean = as_float(self.split, torch.from_numpy(self.ledger.image_N[rows]), self.request.device)
        return clean.contiguous(), torch.from_numpy(self.ledger.label_N[rows]).to(self.request.device)

    @torch.no_grad()
    def _logits(self, image: Tensor) -> Tensor:
        """Return the network's own answers, (B, K) float32."""
        return self.model(image.contiguous(memory_format=torch.channels_last)).float()

    def _note(self, rows: np.ndarray, logits_BK: Tensor, label_B: Tensor) -> None:
        """Record the predicted class, and by how much the logit of the label leads the others."""
        other_BK = logits_BK.scatter(1, label_B[:, None], -torch.inf)
        margin_B = logits_BK.gather(1, label_B[:, None]).squeeze(1) - other_BK.amax(1)
        self.ledger.margin_N[rows] = margin_B.double().cpu().numpy()
        self.ledger.predicted_N[rows] = predicted(logits_BK).cpu().numpy()


def is_foldable(model: nn.Module, device: torch.device) -> bool:
    """Say whether the network has a folded twin, and in a line where it has none."""
    found = folded_twin(model, device) is not model
    if not found:
        say("note: --fold: no batch norm of this network can be folded; AutoAttack looks at the network itself")
    return found


def require_foldable(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the network's folded twin. Raises UsageError where it has none."""
    twin = folded_twin(model, device)
    if twin is model:
        raise UsageError("--fold: this network has no batch norm that can be folded: leave the option out")
    return twin


def suite_entry(ledger: Ledger, suite: str, classes: int = DLR_CLASSES) -> dict[str, Any]:
    """Return the entry of a suite in evaluation.json beside the accuracies: progress, broken images, and flags.

    Args:
        classes: how many the data set has.
    """
    attacks = suite_attacks(suite, classes)
    complete = ledger.is_complete(attacks)
    broken = {name: int(np.count_nonzero(ledger.broken_by == name)) for name in attacks}
    without = left_out(suite, classes)
    flags = [*[without] * bool(without), *ledger.notes["flags"]]
    if broken.get("square", 0) > SQUARE_HELPS * len(ledger.image_N):
        flags.append(f"Square broke {broken['square']} images that the gradient attacks left: are gradients masked?")
    slack = 1e-6 + (0.0 if "norm" not in ledger.facts else SLACK * ledger.facts["eps"])
    if ledger.notes["perturbation"] > ledger.facts["eps"] + slack:
        flags.append(f"an attack left the ball: {ledger.notes['perturbation']:.6f} > {ledger.facts['eps']:.6f}")
    return {
        "complete": complete,
        "upper_bound": not complete or suite != "standard" or bool(without),
        "left_out": [name for name in SUITES["standard"] if name not in attacks],
        "broken_by": broken,
        "flags": flags,
        "ledger": ledger.path.name,
        "seconds": ledger.notes["seconds"],
    }


def _check(model: nn.Module, clean: Tensor, label_B: Tensor) -> None:
    """Let the library examine a network on one batch; it logs what it finds."""
    from pyautoattack import checks

    logger = logging.getLogger("auto-attack")
    checks.check_randomized(model, clean, label_B, bs=len(clean), logger=logger)
    checks.check_range_output(model, clean, logger=logger)


@contextmanager
def _flags(ledger: Ledger) -> Iterator[None]:
    """Collect the library's warnings in the ledger while the context lasts, each once."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in ledger.notes["flags"]:
                ledger.notes["flags"].append(text)
                say(f"autoattack: {text}")

    logger, keep = logging.getLogger("auto-attack"), Keep(level=logging.WARNING)
    before = logger.propagate
    logger.addHandler(keep)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(keep)
        logger.propagate = before
