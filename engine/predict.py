"""Robust accuracy by class: clean, FGSM, PGD-20 and CW-inf, always in fp32, with input gradients only.

    fgsm    one step of eps along the sign of the cross-entropy's gradient (Goodfellow et al., ICLR 2015)
    pgd20   20 steps of eps/4 on the cross-entropy, uniform start (2/255 at eps = 8/255; Madry et al., ICLR 2018)
    cw      30 steps of eps/4 on the margin with confidence 50, uniform start (Carlini & Wagner, S&P 2017)

An image counts as robust when it is classified correctly before and after: the verdicts are the network's own, the
gradients those of its twin with batch norm folded (speed/fold.py), the same function at less cost. Dimension key: B
batch, K classes, N images.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retemper.console import Progress
from retemper.engine.attack import pgd
from retemper.engine.device import exact_fp32
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.losses import Objective, cross_entropy_objective, cw_objective
from retemper.engine.speed.fold import BATCH_NORM, Folded
from retemper.kernels import augment, identity_view
from retemper.loaders import Split


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack of the evaluation. `step` is in units of eps."""

    loss: str  # cross-entropy | margin
    steps: int
    step: float
    start: str

    def described(self, eps: float) -> dict[str, Any]:
        """As evaluation.json holds it: the step in pixel units."""
        return asdict(self) | {"step": self.step * eps}

    def objective(self, label_B: Tensor) -> Objective:
        """What it raises on a batch."""
        return cross_entropy_objective(label_B) if self.loss == "cross-entropy" else cw_objective(label_B)


ATTACKS = {
    "clean": Attack(loss="cross-entropy", steps=0, step=0, start="none"),
    "fgsm": Attack(loss="cross-entropy", steps=1, step=1, start="none"),
    "pgd20": Attack(loss="cross-entropy", steps=20, step=1 / 4, start="uniform"),
    "cw": Attack(loss="margin", steps=30, step=1 / 4, start="uniform"),
}


def balanced_order(labels: np.ndarray, limit: int | None = None) -> np.ndarray:
    """Indices that take the first image of every class, then the second, ...; (min(limit, N),) int64.

    A prefix of any length is as class-balanced as can be: what `--limit` evaluates.
    """
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        rank[members] = np.arange(len(members))
    return np.lexsort((labels, rank))[:limit]


def survivors(
    model: nn.Module, split: Split, attack: Attack, *, indices: np.ndarray | None = None, **options: Any
) -> Tensor:
    """Which images are classified correctly, clean and attacked: (N,) bool on the host; as `predictions`."""
    label_N = torch.from_numpy(split.labels if indices is None else split.labels[indices])
    return predictions(model, split, attack, indices=indices, **options) == label_N


def predictions(
    model: nn.Module,
    split: Split,
    attack: Attack,
    *,
    eps: float,
    device: torch.device,
    indices: np.ndarray | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """The class that each image is given under attack, or clean where it is misclassified without: (N,) int64 on the
    host, as `indices` orders them; -1 where the logits are not finite. Several processes take turns at the batches,
    and each gets all answers; those are what one process would give."""
    chosen = np.arange(len(split)) if indices is None else indices
    label_N = torch.from_numpy(split.labels)
    given_N = torch.zeros(len(chosen), dtype=torch.int64, device=device)
    model.eval()
    twin = folded_twin(model, device) if attack.steps else None
    with exact_fp32():
        for first in range(ranks.rank * batch_size, len(chosen), ranks.world_size * batch_size):
            batch = torch.from_numpy(chosen[first : first + batch_size])
            label_B = label_N[batch].to(device)
            clean = as_float(split, batch, device)
            with torch.no_grad():
                given_B = predicted(model(clean))
            if twin is not None:
                adv = pgd(
                    twin,
                    clean,
                    objective=attack.objective(label_B),
                    steps=attack.steps,
                    step=attack.step * eps,
                    eps=eps,
                    start=attack.start,
                    seed=seed + first,
                )
                with torch.no_grad():
                    given_B = torch.where(given_B == label_B, predicted(model(adv)), given_B)
            given_N[first : first + batch_size] = given_B
            if progress is not None:
                progress.advance(min(len(batch) * ranks.world_size, len(chosen) - first))
    ranks.barrier(patiently=True)  # for a process with a batch more
    return ranks.all_reduce_(given_N.cpu())


def predicted(logits_BK: Tensor) -> Tensor:
    """(B,) int64: the class of each row's largest logit; -1 for a row that is not finite."""
    return torch.where(logits_BK.isfinite().all(1), logits_BK.argmax(1), -1)


def folded_twin(model: nn.Module, device: torch.device) -> nn.Module:
    """The same function for the attack to look at, faster where the network can be folded."""
    if not any(isinstance(module, BATCH_NORM) for module in model.modules()):
        return model
    try:
        return Folded(model, epilogue="fused" if device.type == "cuda" else "plain")
    except ValueError:
        return model


def as_float(split: Split, batch: Tensor, device: torch.device) -> Tensor:
    """The images of `split` at the host indices `batch`: (B, C, H, W) fp32, channels-last, uncropped."""
    image = torch.from_numpy(split.images[batch.numpy()]).to(device)
    view = torch.full((len(batch),), identity_view(0), device=device)
    return augment(image, view, padding=0)
