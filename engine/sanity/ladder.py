"""A ladder of attacks whose order of strength is known beforehand: a rung out of order is evidence against the attack.

The rungs are those of Carlini et al. (arXiv 1902.06705): the radius grows up to 1, where nothing can be robust; steps
and restarts grow; one step, noise, another network's images and a search without gradients are no stronger than PGD.
Dimension key: B batch, N images of the subject.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from retemper.console import Progress
from retemper.engine.attack import pgd, predicts
from retemper.engine.device import exact_fp32
from retemper.engine.predict import ATTACKS, Attack, as_float, folded_twin, survivors
from retemper.loaders import Split

TIMES_EPS = (0.0, 0.5, 1.0, 2.0, 4.0)  # the radii, besides 1.0
SQUARE_QUERIES = 200  # of the 5,000 in AutoAttack: an honest network's PGD leaves no easy prey, a masked one's does
APART = 2**23  # between the seeds of restarts: `survivors` counts seeds up by images


def _pgd(steps: int) -> Attack:
    """Steps that add up to 2.5 times the radius (Madry et al., ICLR 2018), each at most the radius."""
    return Attack(loss="cross-entropy", steps=steps, step=min(1.0, 2.5 / steps), start="uniform")


RUNGS = {
    "clean": ATTACKS["clean"],
    "noise": Attack(loss="cross-entropy", steps=1, step=0.0, start="uniform"),  # a step of 0 leaves the random start
    "fgsm": ATTACKS["fgsm"],
    "pgd1": _pgd(1),
    "pgd10": _pgd(10),
    "pgd10, 2nd start": _pgd(10),
    "pgd10, 3rd start": _pgd(10),
    "pgd50": _pgd(50),
    "cw": ATTACKS["cw"],
}
STARTS = ("pgd10", "pgd10, 2nd start", "pgd10, 3rd start")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network and the images it is checked on, with the radius and the seed of the attacks.

    Attributes:
        model: (B, C, H, W) pixels in [0, 1] to (B, K) logits, on `device`.
        indices: which images of `split`; a prefix of `balanced_order` is balanced.
        eps: in pixel units.
    """

    model: nn.Module
    split: Split
    indices: np.ndarray
    eps: float
    device: torch.device
    batch_size: int = 256
    seed: int = 0

    def batches(self, chosen: Tensor | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The images in turn: how many came before, (B, C, H, W) pixels, (B,) labels.

        Args:
            chosen: positions among the subject's images; None: all.
        """
        indices = torch.from_numpy(self.indices if chosen is None else self.indices[chosen.numpy()])
        labels = torch.from_numpy(self.split.labels)
        for first in range(0, len(indices), self.batch_size):
            batch = indices[first : first + self.batch_size]
            yield first, as_float(self.split, batch, self.device), labels[batch].to(self.device)


@dataclass(frozen=True)
class Ladder:
    """Which images stayed correctly classified, (N,) bool on the host, on every rung.

    Attributes:
        attack: "pgd20" and those of `RUNGS`; where they could be run "transfer", and "square" on what `white_box` left.
        radius: under PGD-20, by eps in pixel units, ascending.
    """

    attack: dict[str, Tensor] = field(default_factory=dict)
    radius: dict[float, Tensor] = field(default_factory=dict)

    def accuracy(self, rung: str) -> float:
        """The fraction of images that stayed correct."""
        return fraction(self.attack[rung])

    @property
    def white_box(self) -> Tensor:
        """(N,) bool: what all attacks by gradients at the subject's radius left correct."""
        return torch.stack([left for name, left in self.attack.items() if name not in ("transfer", "square")]).all(0)


def climb(subject: Subject, teacher: nn.Module | None = None) -> Ladder:
    """Attack the subject on every rung; `teacher` is what the images of the transfer are made on."""
    ladder, images = Ladder(), len(subject.indices)
    radii = sorted({min(1.0, times * subject.eps) for times in TIMES_EPS} | {1.0})
    with Progress("checks", images * (len(radii) + len(RUNGS) + 2)) as progress:
        for eps in radii:
            ladder.radius[eps] = _survivors(subject, ATTACKS["pgd20"], eps, 0, progress)
        ladder.attack["pgd20"] = ladder.radius[subject.eps]
        for name, attack in RUNGS.items():
            seed = APART * STARTS.index(name) if name in STARTS else 0
            ladder.attack[name] = _survivors(subject, attack, subject.eps, seed, progress)
        if teacher is not None:
            ladder.attack["transfer"] = transfer_survivors(subject, teacher)
        progress.advance(images)
        left = square_survivors(subject, ladder.white_box)
        if left is not None:
            ladder.attack["square"] = left
        progress.advance(images)
    return ladder


def transfer_survivors(subject: Subject, source: nn.Module) -> Tensor:
    """Which images stay correctly classified, clean and under PGD-20 on `source`: (N,) bool on the host."""
    twin, attack, verdicts = folded_twin(source, subject.device), ATTACKS["pgd20"], []
    with exact_fp32():
        for first, clean, label_B in subject.batches():
            adv = pgd(
                twin,
                clean,
                objective=attack.objective(label_B),
                steps=attack.steps,
                step=attack.step * subject.eps,
                eps=subject.eps,
                start=attack.start,
                seed=subject.seed + first,
            )
            with torch.no_grad():
                verdicts.append(predicts(subject.model(clean), label_B) & predicts(subject.model(adv), label_B))
    return torch.cat(verdicts).cpu()


def square_survivors(subject: Subject, left: Tensor, queries: int = SQUARE_QUERIES) -> Tensor | None:
    """Which images withstand Square as well, a search without gradients (Andriushchenko et al., ECCV 2020).

    Args:
        left: (N,) bool on the host: those that it is tried on.
    Returns:
        Likewise, those that are left then; None where the library is not installed (the extra `eval`).
    """
    try:
        from pyautoattack.square import SquareAttack
    except ImportError:
        return None
    left, verdicts = left.clone(), []
    twin = folded_twin(subject.model, subject.device)
    devices = [subject.device] if subject.device.type == "cuda" else []
    with exact_fp32(), torch.random.fork_rng(devices), torch.no_grad():  # it seeds torch's generators
        for first, clean, label_B in subject.batches(left.nonzero().squeeze(1)):
            square = SquareAttack(twin, eps=subject.eps, n_queries=queries, seed=subject.seed + first)
            adv = square.perturb(clean.contiguous(), label_B)  # it views images as flat rows
            verdicts.append(predicts(subject.model(adv), label_B).cpu())
    if verdicts:
        left[left.clone()] = torch.cat(verdicts)
    return left


def fraction(verdict_N: Tensor) -> float:
    """Of true entries; NaN of none."""
    return float(verdict_N.double().mean())


def _survivors(subject: Subject, attack: Attack, eps: float, seed: int, progress: Progress) -> Tensor:
    return survivors(
        subject.model,
        subject.split,
        attack,
        eps=eps,
        device=subject.device,
        indices=subject.indices,
        batch_size=subject.batch_size,
        seed=subject.seed + seed,
        progress=progress,
    )
