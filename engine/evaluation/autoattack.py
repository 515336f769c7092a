"""AutoAttack (Croce & Hein, ICML 2020) over the attacks of the library itself (the extra `eval`), with a ledger.

    standard   APGD-CE, then targeted APGD-DLR, targeted FAB and Square (5,000 queries), each on what still holds
    fast       the first two: its accuracies are upper bounds of the standard suite's

Attack by attack and batch by batch as the library's own runner goes, with its seeds: its verdicts, image by image.
After each batch the ledger is written, so that a run that is killed goes on from there to the same end. What costs less
here: parameters ask for no gradients; with `fold`, the attacks look at the network's folded twin (speed/fold.py), the
same function with other rounding, and the network itself judges what they found.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retemper.console import Progress, say
from retemper.engine.device import exact_fp32
from retemper.engine.evaluation.ledger import UNTRIED, Ledger
from retemper.engine.predict import as_float, folded_twin, predicted
from retemper.errors import UsageError
from retemper.loaders import Split

SUITES = {"standard": ("apgd-ce", "apgd-t", "fab-t", "square"), "fast": ("apgd-ce", "apgd-t")}
FORWARDS = {"apgd-ce": 102, "apgd-t": 919, "fab-t": 1829, "square": 5000}  # of an image that holds to the end
BACKWARDS = {"apgd-ce": 101, "apgd-t": 909, "fab-t": 900, "square": 0}
SQUARE_HELPS = 0.002  # of the images: the library's own bound


@dataclass(frozen=True, kw_only=True)
class SuiteRequest:
    """How to run a suite. `budget_s`: seconds after which no further batch is begun."""

    suite: str = "standard"
    eps: float
    device: torch.device
    batch_size: int = 256
    seed: int = 0
    fold: bool = False
    budget_s: float | None = None

    @property
    def attacks(self) -> tuple[str, ...]:
        return SUITES[self.suite]


class ChannelsLast(nn.Module):
    """`model` for a caller that must see contiguous tensors: APGD-T of the library views its input as flat rows.

    Counts what it is asked on `progress`: a forward as one, a forward and its gradient as three.
    """

    def __init__(self, model: nn.Module, progress: Progress | None = None) -> None:
        super().__init__()
        self.model, self.progress = model, progress

    def forward(self, image: Tensor) -> Tensor:
        if self.progress is not None:
            self.progress.advance(len(image) * (3 if image.requires_grad else 1))
        return self.model(image.contiguous(memory_format=torch.channels_last))


def run_suite(model: nn.Module, split: Split, request: SuiteRequest, ledger: Ledger) -> bool:
    """Go on with `ledger` until its suite is done; whether it is.

    The ledger's file is written after each batch, and holds the flags that the library raised.

    Args:
        model: images to logits in eval mode, on the device of the request.
    Raises:
        UsageError: the library is not installed; the network knows fewer than four classes, or cannot be folded.
    """
    started, spent = time.monotonic(), ledger.notes["seconds"]
    with Progress("autoattack", 1) as progress, exact_fp32(), _flags(ledger), _own_draws(request.device):
        runner = _Runner(model.eval(), split, request, ledger, progress)
        for batch, attack in runner.owed():
            if request.budget_s is not None and time.monotonic() - started >= request.budget_s:
                say("autoattack: its time is over; the same command goes on from here")
                break
            runner.expect(attack)
            runner.clean(batch) if attack is None else runner.attack(attack, batch)
            ledger.notes["seconds"] = spent + time.monotonic() - started
            ledger.write()
    return ledger.is_complete(request.attacks)


class _Runner:
    """One pass over what a ledger is owed."""

    def __init__(
        self, model: nn.Module, split: Split, request: SuiteRequest, ledger: Ledger, progress: Progress
    ) -> None:
        self.model, self.split, self.request, self.ledger, self.progress = model, split, request, ledger, progress
        looked_at = folded_twin(model, request.device) if request.fold else model
        if request.fold and looked_at is model:
            raise UsageError("--fold: this network has no batch norm that can be folded: leave the option out")
        self.looked_at = ChannelsLast(looked_at, progress)
        self.attacks = library_attacks(self.looked_at, len(split.classes), request.eps, request.seed, request.device)

    def owed(self) -> Iterator[tuple[np.ndarray, str | None]]:
        """(rows, attack) of every batch not done yet, None for the clean images, in the library's order."""
        every = np.arange(len(self.ledger.image_N))
        for batch in self._batches(every):
            if (self.ledger.clean_N[batch] == UNTRIED).any():
                yield batch, None
        for number, attack in enumerate(self.request.attacks):
            for batch in self._batches(self.ledger.alive_before(self.request.attacks[:number])):
                if (self.ledger.tried_N[batch] <= number).any():
                    yield batch, attack

    def clean(self, batch: np.ndarray) -> None:
        """Show the network the clean images; look at the first of them for what makes a suite unfit."""
        clean, label_B = self._images(batch)
        if batch[0] == 0:
            _check(self.looked_at, clean, label_B)
        logits_BK = self._logits(clean)
        self.ledger.clean_N[batch] = (predicted(logits_BK) == label_B).cpu().numpy()
        self._note(batch, logits_BK, label_B)

    def attack(self, name: str, batch: np.ndarray) -> None:
        """Let one attack at images that hold."""
        clean, label_B = self._images(batch)
        with torch.no_grad():
            adv = self.attacks[name].perturb(clean.clone(), label_B.clone())
        logits_BK = self._logits(adv)
        broken = (predicted(logits_BK) != label_B).cpu().numpy()
        self._note(batch[broken], logits_BK[torch.from_numpy(broken)], label_B[torch.from_numpy(broken)])
        self.ledger.broken_by[batch[broken]] = name
        self.ledger.tried_N[batch] = self.request.attacks.index(name) + 1
        moved = float((adv - clean).abs().max())
        self.ledger.notes["perturbation"] = max(self.ledger.notes["perturbation"], moved)

    def expect(self, attack: str | None) -> None:
        """Tell the progress how much is left if all that holds now holds to the end."""
        ledger, attacks = self.ledger, self.request.attacks
        holds = ledger.holds(attacks) | (ledger.clean_N == UNTRIED)
        left = sum(
            _cost(name) * np.count_nonzero(holds & (ledger.tried_N <= number)) for number, name in enumerate(attacks)
        )
        left += np.count_nonzero(ledger.clean_N == UNTRIED)
        self.progress.total = self.progress.done + int(left)
        if self.progress.bar is not None:
            self.progress.bar.total = self.progress.total
        self.progress.note = f"{attack or 'clean'}; {np.count_nonzero(holds):,} of {len(holds):,} images hold"

    def _batches(self, rows: np.ndarray) -> list[np.ndarray]:
        size = self.request.batch_size
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def _images(self, batch: np.ndarray) -> tuple[Tensor, Tensor]:
        clean = as_float(self.split, torch.from_numpy(self.ledger.image_N[batch]), self.request.device)
        return clean.contiguous(), torch.from_numpy(self.ledger.label_N[batch]).to(self.request.device)

    @torch.no_grad()
    def _logits(self, image: Tensor) -> Tensor:
        return self.model(image.contiguous(memory_format=torch.channels_last)).float()

    def _note(self, rows: np.ndarray, logits_BK: Tensor, label_B: Tensor) -> None:
        """What the network answers there: the class, and by how much the label leads the others."""
        other_BK = logits_BK.scatter(1, label_B[:, None], -torch.inf)
        margin_B = logits_BK.gather(1, label_B[:, None]).squeeze(1) - other_BK.amax(1)
        self.ledger.margin_N[rows] = margin_B.double().cpu().numpy()
        self.ledger.predicted_N[rows] = predicted(logits_BK).cpu().numpy()


def library_attacks(model: nn.Module, num_classes: int, eps: float, seed: int, device: torch.device) -> dict[str, Any]:
    """The library's attack objects, set up as its standard suite has them. Each: `perturb(clean, label) -> adv`.

    Raises:
        UsageError: the library is not installed; fewer than four classes, for which its losses are not defined.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise UsageError("AutoAttack is not installed: pip install 'retemper[eval]'") from None
    if num_classes < 4:
        raise UsageError(f"AutoAttack's targeted loss needs four classes, not {num_classes}: use --attacks pgd20,cw")
    suite = AutoAttack(model, eps=eps, norm="Linf", version="standard", seed=seed, device=str(device))
    suite.apgd.loss, suite.apgd.seed = "ce", seed
    suite.fab.targeted = True
    for targeted in (suite.apgd_targeted, suite.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, num_classes - 1)
    return {"apgd-ce": suite.apgd, "apgd-t": suite.apgd_targeted, "fab-t": suite.fab, "square": suite.square}


def suite_entry(ledger: Ledger, suite: str) -> dict[str, Any]:
    """What evaluation.json says of a suite beside the accuracies: how far it came, what broke what, and the flags."""
    attacks = SUITES[suite]
    complete = ledger.is_complete(attacks)
    broken = {name: int(np.count_nonzero(ledger.broken_by == name)) for name in attacks}
    flags = list(ledger.notes["flags"])
    if broken.get("square", 0) > SQUARE_HELPS * len(ledger.image_N):
        flags.append(f"Square broke {broken['square']} images that the gradient attacks left: are gradients masked?")
    if ledger.notes["perturbation"] > ledger.facts["eps"] + 1e-6:
        flags.append(f"an attack left the ball: {ledger.notes['perturbation']:.6f} > {ledger.facts['eps']:.6f}")
    return {
        "complete": complete,
        "upper_bound": not complete or suite != "standard",
        "broken_by": broken,
        "flags": flags,
        "ledger": ledger.path.name,
        "seconds": ledger.notes["seconds"],
    }


def _cost(attack: str) -> int:
    """Of an attack on an image that holds, in forwards; a forward with its gradient is counted as three."""
    return FORWARDS[attack] + 2 * BACKWARDS[attack]


def _check(model: nn.Module, clean: Tensor, label_B: Tensor) -> None:
    """The library's own look at a network; what it finds goes to its log."""
    from pyautoattack import checks

    logger = logging.getLogger("auto-attack")
    checks.check_randomized(model, clean, label_B, bs=len(clean), logger=logger)
    checks.check_range_output(model, clean, logger=logger)


def _own_draws(device: torch.device) -> AbstractContextManager[None]:
    """The library seeds torch's generators: they are put back afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _flags(ledger: Ledger) -> Iterator[None]:
    """Collect the library's warnings in the ledger, each once."""

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


def suite_facts(request: SuiteRequest, known: Mapping[str, Any], shard: Sequence[int] | None) -> dict[str, Any]:
    """What a ledger's rows depend on. `known`: of the network and the images."""
    from importlib.metadata import version

    return {
        **known,
        "eps": request.eps,
        "seed": request.seed,
        "batch_size": request.batch_size,
        "fold": request.fold,
        "library": f"pyautoattack {version('pyautoattack')}",
        **({"shard": list(shard)} if shard else {}),
    }
