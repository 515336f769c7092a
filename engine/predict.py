"""Which class a network gives each image of a split, clean and under attack; always in float32, without TF32.

    fgsm    one step of eps along the sign of the cross-entropy's gradient (Goodfellow et al., ICLR 2015)
    pgd20   20 steps of eps/4 on the cross-entropy, uniform start (2/255 at eps = 8/255; Madry et al., ICLR 2018)
    cw      30 steps of eps/4 on the margin with confidence 50, uniform start (Carlini & Wagner, S&P 2017)

The network itself gives the answers. The gradients are those of its twin with batch norm folded (speed/fold.py), the
same function at less cost. An image counts as robust when it is classified correctly before and after the attack;
published evaluations look at the attacked image alone (`Attack.alone`; evaluation/protocols.py has theirs).

Dimension key: B batch, C H W image, K classes, N images.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retemper.console import Progress
from retemper.engine.attack import ascend
from retemper.engine.attack_plan import Plan
from retemper.engine.device import exact_fp32
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.losses import cross_entropy_objective, cw_objective
from retemper.engine.speed.capture import Record, Recordings
from retemper.engine.speed.fold import BATCH_NORM, Folded
from retemper.engine.speed.replay import Replayed, graphs_for
from retemper.kernels import augment, identity_view
from retemper.loaders import Split

# Takes (B, C, H, W) clean images, the network's (B, K) logits on them, (B,) labels and a seed; returns attacked images.
Perturb = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack by projected gradient descent, without the network and the radius that it is used on.

    Attributes:
        loss: what it raises, "cross-entropy" or "margin".
        steps: how many steps; an attack of none is left out by `predictions`.
        step: the size of a step in units of eps.
        start: "uniform" for a random start in the ball, "normal" for 0.001 times a Gaussian, "none" for neither.
        clip_start: whether the random start is clipped to [0, 1].
        alone: whether the attacked image alone is judged: one that is wrong without an attack may then count as right.
    """

    loss: str = "cross-entropy"
    steps: int
    step: float = 1 / 4
    start: str = "uniform"
    clip_start: bool = True
    alone: bool = False

    def __post_init__(self) -> None:
        if self.loss not in ("cross-entropy", "margin") or self.steps < 0 or not 0 <= self.step <= 1:
            raise ValueError(f"{self}: the loss is cross-entropy or margin, steps >= 0, a step of 0 to 1 times eps")

    def described(self, eps: float) -> dict[str, Any]:
        """Return the attack as evaluation.json names it, the step in pixel units; what is usual is left out."""
        usual = {"clip_start": True, "alone": False}
        known = {name: value for name, value in asdict(self).items() if usual.get(name) != value}
        return known | {"step": self.step * eps}

    def on(self, network: nn.Module, eps: float, record: Record | None = None, norm: str = "linf") -> Perturb:
        """Return the function that attacks `network` within the radius `eps`, in pixel units.

        Args:
            record: what its calls are recorded by; None to run each. The network is not to change then.
            norm: "linf", or "l2", where a step goes along the gradient itself.
        """
        if not 0 <= eps or (norm == "linf" and eps > 1):
            raise ValueError(f"eps = {eps}: it must lie in 0 .. 1, in [0, 1] pixels (8/255, not 8)")
        objective = cross_entropy_objective if self.loss == "cross-entropy" else cw_objective
        recordings = None if record is None else Recordings(record, name="the attack", tuned=True)

        def attack(clean: Tensor, label_B: Tensor, seed: int | Tensor) -> Tensor:
            start: dict[str, Any] = dict(start=self.start, clip_start=self.clip_start, seed=seed)
            plan = Plan(steps=self.steps, step=self.step * eps, eps=eps, norm=norm, **start)
            return ascend(network, clean, plan, objective=objective(label_B))

        def perturb(clean: Tensor, clean_BK: Tensor, label_B: Tensor, seed: int) -> Tensor:
            if recordings is None:
                return attack(clean, label_B, seed)
            drawn = torch.full((1,), seed, device=clean.device)
            return recordings(attack, (clean, label_B, drawn))

        return perturb


ATTACKS = {
    "clean": Attack(steps=0, step=0, start="none"),
    "fgsm": Attack(steps=1, step=1, start="none"),
    "pgd20": Attack(steps=20),
    "cw": Attack(steps=30, loss="margin"),
}


def balanced_order(labels: np.ndarray, limit: int | None = None) -> np.ndarray:
    """Return indices that take the first image of every class, then the second, and so on.

    A prefix of any length is as class-balanced as can be. This is what `--limit` evaluates.

    Args:
        labels: (N,) integers.
    Returns:
        (min(limit, N),) int64.
    """
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        rank[members] = np.arange(len(members))
    return np.lexsort((labels, rank))[:limit]


def survivors(
    model: nn.Module, split: Split, attack: Attack, *, indices: np.ndarray | None = None, **options: Any
) -> Tensor:
    """Return which images are classified correctly, clean and attacked: (N,) bool on the host.

    The arguments are those of `predictions`.
    """
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
    source: nn.Module | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    capture: bool = False,
    norm: str = "linf",
) -> Tensor:
    """Return the class that each image is given under attack, or clean where that is wrong already and counts.

    Args:
        model: (B, C, H, W) float32 pixels in [0, 1] to (B, K) logits, on `device`; it is put into eval mode.
        eps: the radius in pixel units.
        indices: (N,) which images of `split`; None for all of them.
        seed: of the random starts; the batch that begins with image n of the N draws from `seed + n`.
        source: the network that the attack looks at, in eval mode; None for `model`.
        progress: is told of the images that are done.
        ranks: the processes that take turns at the batches. Each gets all answers, and they are those of one process.
        capture: whether, on a GPU, whole batches from the fourth on are replayed from CUDA graphs, with convolutions
            that are tuned: other rounding.
        norm: of the ball, "linf" or "l2".
    Returns:
        (N,) int64 on the host; -1 where the logits are not finite.
    """
    images = len(split) if indices is None else len(indices)
    given_N = torch.zeros(images, dtype=torch.int64, device=device)
    model.eval()
    looked_at = model if source is None else source
    record = graphs_for(device, model, looked_at) if capture else None
    perturb = attack.on(folded_twin(looked_at, device), eps, record, norm) if attack.steps else None
    options: dict[str, Any] = dict(indices=indices, batch_size=batch_size, seed=seed, ranks=ranks, record=record)
    for batch in attacked_batches(model, split, perturb, device=device, **options):
        size = len(batch.label_B)
        given_N[batch.first : batch.first + size] = predicted(batch.adv_BK) if attack.alone else batch.predicted_B
        if progress is not None:
            progress.advance(min(size * ranks.world_size, images - batch.first))
    return ranks.all_reduce_(given_N.cpu())


@dataclass(frozen=True, eq=False, kw_only=True)
class AttackedBatch:
    """A network's answers to one batch, clean and attacked.

    Attributes:
        first: how many of the images come before the batch.
        label_B: (B,) int64.
        clean_BK, adv_BK: (B, K) logits; one and the same tensor where there is no attack.
    """

    first: int
    label_B: Tensor
    clean_BK: Tensor
    adv_BK: Tensor

    @property
    def predicted_B(self) -> Tensor:
        """The class given under attack, or clean where that is wrong already; (B,) int64, -1 for none."""
        clean_B = predicted(self.clean_BK)
        return torch.where(clean_B == self.label_B, predicted(self.adv_BK), clean_B)


def attacked_batches(
    model: nn.Module,
    split: Split,
    perturb: Perturb | None,
    *,
    device: torch.device,
    indices: np.ndarray | None = None,
    batch_size: int = 256,
    seed: int = 0,
    ranks: Ranks = ALONE,
    record: Record | None = None,
) -> Iterator[AttackedBatch]:
    """Yield the answers of `model`, which is put into eval mode, to this process's batches, clean and attacked.

    Take all of them: after the last batch the processes wait for one another.

    Args:
        perturb: the attack; it is given `seed` plus the number of images before the batch. None for no attack.
        device, indices, batch_size, ranks: as in `predictions`.
        record: what the network's answers to whole batches are recorded by; None to run each.
    """
    answer = Replayed(model.eval(), record, batch_size, pad=False)
    for first, clean, label_B in labelled_batches(split, device, indices=indices, batch_size=batch_size, ranks=ranks):
        with exact_fp32():
            with torch.no_grad():
                clean_BK: Tensor = answer(clean)
            if clean_BK.shape != (len(clean), len(split.classes)):
                wanted = (len(clean), len(split.classes))
                raise ValueError(f"the model answers {tuple(clean_BK.shape)} on these images; needs {wanted}")
            adv_BK = clean_BK
            if perturb is not None:
                adv = perturb(clean, clean_BK, label_B, seed + first)
                with torch.no_grad():
                    adv_BK = answer(adv)
        yield AttackedBatch(first=first, label_B=label_B, clean_BK=clean_BK, adv_BK=adv_BK)
    ranks.barrier(patiently=True)  # for a process with a batch more


def labelled_batches(
    split: Split,
    device: torch.device,
    *,
    indices: np.ndarray | None = None,
    batch_size: int = 256,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield this process's batches of `split`.

    Args:
        indices: (N,) which images, in their order; None for all of them.
        ranks: the processes that take turns at the batches.
    Yields:
        How many images come before the batch; (B, C, H, W) float32 pixels, channels-last; (B,) int64 labels.
    """
    chosen = np.arange(len(split)) if indices is None else indices
    for first in range(ranks.rank * batch_size, len(chosen), ranks.world_size * batch_size):
        batch = chosen[first : first + batch_size]
        label_B = torch.from_numpy(split.labels[batch]).to(device)
        yield first, as_float(split, torch.from_numpy(batch), device), label_B


def predicted(logits_BK: Tensor) -> Tensor:
    """Return the class of each row's largest logit, -1 for a row that is not finite: (B, K) to (B,) int64."""
    return torch.where(logits_BK.isfinite().all(1), logits_BK.argmax(1), -1)


def folded_twin(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the same function for an attack to look at, faster where the network can be folded, or `model` itself."""
    if not any(isinstance(module, BATCH_NORM) for module in model.modules()):
        return model
    try:
        return Folded(model, epilogue="fused" if device.type == "cuda" else "plain")
    except ValueError:
        return model


def as_float(split: Split, batch: Tensor, device: torch.device) -> Tensor:
    """Return images of `split` as they are evaluated, uncropped and unflipped.

    Args:
        batch: (B,) int64 indices on the host.
    Returns:
        (B, C, H, W) float32 pixels in [0, 1] on `device`, channels-last.
    """
    image = torch.from_numpy(np.ascontiguousarray(split.seen(batch.numpy()))).to(device)
    view = torch.full((len(batch),), identity_view(0), device=device)
    return augment(image, view, padding=0)
