"""A ladder of attacks whose order of strength is known beforehand: a rung out of order is evidence against the attack.

The rungs are those of Carlini et al. (arXiv 1902.06705). The radius grows up to 1, where nothing can be robust. Steps
and restarts grow. One step, noise, another network's images and a search without gradients are no stronger than PGD.

Dimension key: B batch, N images that are checked.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retemper.console import Progress
from retemper.engine.predict import ATTACKS, Attack, attacked_batches, folded_twin, labelled_batches, predictions
from retemper.engine.speed.replay import Replayed, graphs_for
from retemper.loaders import Split

TIMES_EPS = (0.0, 0.5, 1.0, 2.0, 4.0)  # the radii, besides 1.0
SQUARE_QUERIES = 200  # of the 5,000 in AutoAttack: an honest network's PGD leaves no easy prey, a masked one's does
APART = 2**23  # between the seeds of restarts: `survivors` counts seeds up by images


def _pgd(steps: int) -> Attack:
    """Return PGD whose steps add up to 2.5 times the radius (Madry et al., ICLR 2018), each at most the radius."""
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
class CheckRequest:
    """The request to check a network: images, radius, and seed of the attacks.

    Attributes:
        model: (B, C, H, W) pixels in [0, 1] to (B, K) logits, on `device`.
        indices: (N,) which images of `split`; a prefix of `balanced_order` is balanced.
        eps: in pixel units.
    """

    model: nn.Module
    split: Split
    indices: np.ndarray
    eps: float
    device: torch.device
    batch_size: int = 256
    seed: int = 0

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield how many images come before a batch, its (B, C, H, W) pixels, and its (B,) labels."""
        return labelled_batches(self.split, self.device, indices=self.indices, batch_size=self.batch_size)


@dataclass(frozen=True)
class Ladder:
    """The images that stayed correctly classified, (N,) bool on the host, on every rung.

    Attributes:
        attack: "pgd20" and those of `RUNGS`; where they could be run "transfer", and "square" on what `white_box` left.
        radius: under PGD-20, by eps in pixel units, ascending.
        not_finite: the images whose logits were not finite, on the rungs where there are some.
    """

    attack: dict[str, Tensor] = field(default_factory=dict)
    radius: dict[float, Tensor] = field(default_factory=dict)
    not_finite: dict[str, Tensor] = field(default_factory=dict)

    def accuracy(self, rung: str) -> float:
        """Return the fraction of images that stayed correct."""
        return fraction(self.attack[rung])

    @property
    def white_box(self) -> Tensor:
        """Return the images that all attacks by gradients at the request's radius left correct, (N,) bool."""
        return torch.stack([left for name, left in self.attack.items() if name not in ("transfer", "square")]).all(0)


def climb(request: CheckRequest, teacher: nn.Module | None = None) -> Ladder:
    """Attack the network on every rung. The images of the transfer are made on `teacher`, which is in eval mode."""
    ladder, images = Ladder(), len(request.indices)
    radii = sorted({min(1.0, times * request.eps) for times in TIMES_EPS} | {1.0})
    rungs = len(radii) + len(RUNGS) + (teacher is not None) + 1
    with Progress("checks", images * rungs) as progress:
        chosen: dict[str, Any] = dict(device=request.device, indices=request.indices, batch_size=request.batch_size)
        label_N = torch.from_numpy(request.split.labels[request.indices])

        def left(name: str, attack: Attack, **options: Any) -> Tensor:
            given_N = predictions(request.model, request.split, attack, progress=progress, **chosen, **options)
            if (given_N < 0).any():
                ladder.not_finite[name] = given_N < 0
            return given_N == label_N

        for eps in radii:
            ladder.radius[eps] = left(f"radius {eps:.4g}", ATTACKS["pgd20"], eps=eps, seed=request.seed)
        ladder.attack["pgd20"] = ladder.radius[request.eps]
        for name, attack in RUNGS.items():
            apart = APART * STARTS.index(name) if name in STARTS else 0
            ladder.attack[name] = left(name, attack, eps=request.eps, seed=request.seed + apart)
        if teacher is not None:
            ladder.attack["transfer"] = left(
                "transfer", ATTACKS["pgd20"], eps=request.eps, seed=request.seed, source=teacher
            )
        square = square_survivors(request, ladder.white_box)
        if square is not None:
            ladder.attack["square"] = square
        progress.advance(images)
    return ladder


def square_survivors(request: CheckRequest, left: Tensor, queries: int = SQUARE_QUERIES) -> Tensor | None:
    """Return which images withstand Square too, a search without gradients (Andriushchenko et al., ECCV 2020).

    Args:
        left: (N,) bool on the host: the images that it is tried on.
    Returns:
        (N,) bool on the host, those that are left then; None where the library is not installed (the extra `eval`).
    """
    try:
        from pyautoattack.square import SquareAttack
    except ImportError:
        return None
    record = graphs_for(request.device, request.model)
    twin = Replayed(folded_twin(request.model, request.device), record, request.batch_size)

    def search(clean: Tensor, clean_BK: Tensor, label_B: Tensor, seed: int) -> Tensor:
        square = SquareAttack(twin, eps=request.eps, n_queries=queries, seed=seed)
        with torch.no_grad():
            return square.perturb(clean.contiguous(), label_B)  # it views images as flat rows

    tried, verdicts = left.nonzero().squeeze(1), []
    with own_generators(request.device):  # the library seeds torch's
        chosen: dict[str, Any] = dict(indices=request.indices[tried.numpy()], batch_size=request.batch_size)
        chosen |= dict(device=request.device, seed=request.seed)
        for batch in attacked_batches(request.model, request.split, search, **chosen):
            verdicts.append((batch.predicted_B == batch.label_B).cpu())
    left = left.clone()
    left[tried] = torch.cat([*verdicts, torch.zeros(0, dtype=torch.bool)])
    return left


def own_generators(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that puts torch's random generators, of the CPU and of `device`, back at its end."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def fraction(verdict_N: Tensor) -> float:
    """Return the share of true entries in (N,) bool; NaN of none."""
    return float(verdict_N.double().mean())
