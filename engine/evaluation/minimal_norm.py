"""The minimal-norm attack FMN (Pintor et al., NeurIPS 2021): how near each image's nearest misclassified one is found.

One run gives the accuracy at every radius. What it finds is no smaller than the true distance, so that its accuracies
are upper bounds, as those of any attack are.

The attack is foolbox's (the extra `cross`), with two changes. foolbox 3.3.4 leaves L2 perturbations as they are where
it should project them to the ball (`min(1, norms / norms)`); here they are projected. And its radius is the estimated
distance to the boundary, which a network that is linear there meets to the last bit and never crosses; here the radius
is longer by `OVERSHOOT`.
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retemper.console import Progress
from retemper.engine.device import exact_fp32
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.evaluation.norms import length
from retemper.engine.predict import attacked_batches, folded_twin, predicted
from retemper.errors import UsageError
from retemper.loaders import Split

STEPS = 200
OVERSHOOT = 1e-4  # of the radius: far less than the 1e-3 by which FMN shrinks it in its last steps


def foolbox_version() -> str:
    """Return the library's name and version. Raises UsageError if it is not installed."""
    try:
        return f"foolbox {version('foolbox')}"
    except PackageNotFoundError:
        raise UsageError("FMN is foolbox's, which is not installed: pip install 'retemper[cross]'") from None


@cache
def _attack_class(norm: str) -> Any:
    """Return foolbox's attack of a norm, as a class."""
    from foolbox.attacks.fast_minimum_norm import L1FMNAttack, L2FMNAttack, LInfFMNAttack

    class InBall(L2FMNAttack):
        def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
            delta = x - x0
            norms = delta.flatten(1).norms.l2(axis=-1).maximum(1e-12)
            factor = (epsilon / norms).minimum(1.0)
            return x0 + delta * factor.reshape((len(factor), *[1] * (delta.ndim - 1)))

    own: Any = {"linf": LInfFMNAttack, "l2": InBall, "l1": L1FMNAttack}[norm]

    class Beyond(own):
        def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
            return super().project(x, x0, epsilon * (1 + OVERSHOOT))

    return Beyond


@dataclass(frozen=True)
class MinimalNorm:
    """FMN on a network that is in eval mode, with pixels in [0, 1]."""

    model: nn.Module
    norm: str

    def perturb(self, clean: Tensor, label_B: Tensor) -> Tensor:
        """Return the nearest misclassified image found to each of (B, C, H, W); the clean one where none was."""
        from foolbox.criteria import Misclassification
        from foolbox.models.pytorch import PyTorchModel

        model = PyTorchModel(self.model.eval(), bounds=(0, 1), device=clean.device)
        attack = _attack_class(self.norm)(steps=STEPS)
        with torch.enable_grad():
            return attack.run(model, clean.contiguous(), Misclassification(label_B)).detach()


@dataclass(frozen=True)
class Distances:
    """The distances of images, in the pixel units of a norm.

    Attributes:
        distance_N: (N,) float64: 0 for an image that is wrong without an attack, inf where nothing was found.
        clean_N, predicted_N: (N,) int64, the classes given to the clean image and to the one that was found.
    """

    distance_N: np.ndarray
    clean_N: np.ndarray
    predicted_N: np.ndarray

    def predicted_within(self, eps: float) -> np.ndarray:
        """Return the class that each image is given under the attack at a radius, (N,) int64."""
        found_N = (self.distance_N > 0) & (self.distance_N <= eps)
        return np.where(found_N, self.predicted_N, self.clean_N)


def distances(
    model: nn.Module,
    split: Split,
    order: np.ndarray,
    *,
    norm: str,
    device: torch.device,
    batch_size: int,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Distances:
    """Run FMN on images of a split; several processes take turns at the batches, and each gets all distances.

    Args:
        model: as in `predictions`.
        order: (N,) which images, in their order.
    """
    attack = MinimalNorm(folded_twin(model.eval(), device), norm)
    measured: list[Tensor] = []

    def perturb(clean: Tensor, _: Tensor, label_B: Tensor, __: int) -> Tensor:
        with exact_fp32():
            adv = attack.perturb(clean, label_B)
        measured.append(length(adv - clean, norm))
        return adv

    found = torch.zeros(3, len(order), dtype=torch.float64)
    options: dict[str, Any] = dict(device=device, indices=order, batch_size=batch_size, ranks=ranks)
    for batch in attacked_batches(model, split, perturb, **options):
        clean_B, adv_B = predicted(batch.clean_BK), predicted(batch.adv_BK)
        far_B = torch.where(adv_B == batch.label_B, torch.inf, measured.pop().double())
        far_B = torch.where(clean_B == batch.label_B, far_B, 0.0)
        found[:, batch.first : batch.first + len(far_B)] = torch.stack([far_B, clean_B, adv_B]).cpu()
        progress.advance(min(len(far_B) * ranks.world_size, len(order) - batch.first))
    distance_N, clean_N, predicted_N = ranks.all_reduce_(found).numpy()
    return Distances(distance_N, clean_N.astype(np.int64), predicted_N.astype(np.int64))
