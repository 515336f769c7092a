"""The held-out images after an epoch: how the student does on them, and whether the epoch is the best so far.

Dimension key: B batch, K classes.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retemper.engine.attack import pgd
from retemper.engine.checkpoints.header import read_header
from retemper.engine.checkpoints.weights import CheckpointError, require_intact
from retemper.engine.class_report import by_class
from retemper.engine.device import exact_fp32
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.epoch_stats import ClassMeans, ClassSums, HeldOut
from retemper.engine.predict import Attack, Perturb, attacked_batches, predictions
from retemper.engine.recipe import Recipe, Targets
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError
from retemper.kernels import class_sums, class_temperature_kl
from retemper.loaders import Split


@dataclass(frozen=True)
class Best:
    """The best epoch so far: the one with the largest average + worst-class robust accuracy.

    The score stands in the file of the weights as well: a kill between that file and the state must not part the two.

    Attributes:
        score: average + worst-class accuracy, fractions; -1 before any epoch.
        epoch: from 1; 0 before any.
    """

    score: float = -1.0
    epoch: int = 0

    def metadata(self) -> dict[str, str]:
        """Return what the header of the weights holds of it."""
        return {"score": repr(self.score)}

    def saved(self) -> dict[str, Any]:
        """Return what the state holds of it."""
        return asdict(self)


def newest_best(folder: RunFolder, saved: dict[str, Any]) -> Best:
    """Return the best epoch: the state's, or that of weights that a killed process saved after the state.

    Raises:
        DataError: the weights are damaged.
    """
    if not folder.best.exists():
        return Best()
    try:
        require_intact(folder.best)
    except CheckpointError as error:
        raise DataError(f"{error}, or delete it: a later epoch is then the best") from None
    header = read_header(folder.best)
    epoch = int(header.get("epoch", 0))
    return Best(float(header["score"]), epoch) if epoch > saved["epoch"] else Best(**saved)


def judge(
    network: nn.Module, held: Split, *, eps: float, steps: int, device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    """Return the report by class of `network` on the held-out images under PGD on the cross-entropy.

    Args:
        eps: the radius, in [0, 1] pixels.
        steps: how many steps of eps/4; 0 judges clean images.
    """
    attack = Attack(loss="cross-entropy", steps=steps, step=1 / 4, start="uniform")
    given = predictions(network, held, attack, eps=eps, device=device, ranks=ranks)
    report = by_class(given.numpy(), held.labels, len(held.classes))
    return {name: value for name, value in report.items() if name not in ("count", "interval", "confusion")}


def validate(
    model: nn.Module,
    recipe: Recipe,
    split: Split,
    num_classes: int,
    device: torch.device,
    batch_size: int = 256,
    ranks: Ranks = ALONE,
) -> HeldOut:
    """Return how `model`, left in eval mode, does on the images of `split`, clean and attacked.

    `Method.validates_by` says which attack. "pgd" takes `select_steps` steps of eps/4 on the cross-entropy. "training
    attack" is the method's own before its class state moves anything: its objective and start, at the recipe's eps and
    step. Several processes take turns at the batches.
    """
    clean_sums, adv_sums = (ClassSums.zeros(num_classes, device) for _ in range(2))
    boundary = ClassMeans.zeros(num_classes, 1, device)
    if recipe.method.validates_by == "training attack":
        perturb = _training_attack(model, recipe)
    else:
        attack = Attack(loss="cross-entropy", steps=recipe.selection.select_steps, step=1 / 4, start="uniform")
        perturb = attack.on(model, recipe.attack.eps)
    with exact_fp32():
        for batch in attacked_batches(model, split, perturb, device=device, batch_size=batch_size, ranks=ranks):
            clean_sums.add(*class_sums(batch.clean_BK, batch.label_B, num_classes))
            adv_sums.add(*class_sums(batch.adv_BK, batch.label_B, num_classes))
            boundary_B = class_temperature_kl(batch.adv_BK, batch.clean_BK, batch.label_B, reduction="none")
            boundary.add(boundary_B, batch.label_B)
    ranks.all_reduce_each_([value for sums in (clean_sums, adv_sums, boundary) for value in vars(sums).values()])
    return HeldOut(
        clean_accuracy_K=clean_sums.accuracy_K,
        robust_accuracy_K=adv_sums.accuracy_K,
        clean_loss_K=clean_sums.mean_loss_K,
        boundary_loss_K=boundary.mean_K,
    )


def _training_attack(model: nn.Module, recipe: Recipe) -> Perturb:
    """Return the method's own attack, as it is before the class state moves anything."""

    def perturb(clean: Tensor, clean_BK: Tensor, label_B: Tensor, seed: int) -> Tensor:
        return pgd(
            model,
            clean,
            objective=recipe.method.objective(Targets(label_B=label_B, own_BK=clean_BK, state={})),
            steps=recipe.attack.steps,
            step=recipe.attack.step,
            eps=recipe.attack.eps,
            start=recipe.attack.start,
            clip_start=recipe.attack.clip_start,
            seed=seed,
        )

    return perturb
