"""The best epoch so far, by the largest average + worst-class robust accuracy on the images that choose it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retemper.engine.attack import pgd
from retemper.engine.checkpoints.header import header_of
from retemper.engine.checkpoints.weights import CheckpointError, require_intact
from retemper.engine.device import exact_fp32
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.epoch_stats import ClassMeans, ClassSums, HeldOut
from retemper.engine.predict import Attack, Perturb, attacked_batches
from retemper.engine.recipe import Recipe, Targets
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError
from retemper.kernels import class_sums, class_temperature_kl
from retemper.loaders import Split


@dataclass(frozen=True)
class Best:
    """Its score and number; epoch 0 is none yet. The score stands in the file of the weights as well: a kill between
    that file and the state must not part the two."""

    score: float = -1.0
    epoch: int = 0

    def metadata(self) -> dict[str, str]:
        """For the header of the weights."""
        return {"score": repr(self.score)}

    def saved(self) -> dict[str, Any]:
        """For the state."""
        return asdict(self)


def newest_best(folder: RunFolder, saved: dict[str, Any]) -> Best:
    """The best epoch: of the state, or of weights that a killed process saved after it.

    Raises:
        DataError: the weights are damaged.
    """
    if not folder.best.exists():
        return Best()
    try:
        require_intact(folder.best)
    except CheckpointError as error:
        raise DataError(f"{error}, or delete it: a later epoch is then the best") from None
    header = header_of(folder.best)
    epoch = int(header.get("epoch", 0))
    return Best(float(header["score"]), epoch) if epoch > saved["epoch"] else Best(**saved)


def validate(
    model: nn.Module,
    recipe: Recipe,
    split: Split,
    num_classes: int,
    device: torch.device,
    batch_size: int = 256,
    ranks: Ranks = ALONE,
) -> HeldOut:
    """Measure `model`, which is left in eval mode, on the images of `split`, attacked as `Recipe.validates_by` says.

    "pgd" is `select_steps` steps of eps/4 on the cross-entropy. "training attack" is the method's own before its class
    state moves anything: its objective and start, at the recipe's eps and step. Several processes take turns at the
    batches.
    """
    clean_sums, adv_sums = (ClassSums.zeros(num_classes, device) for _ in range(2))
    boundary = ClassMeans.zeros(num_classes, 1, device)
    ones_K = torch.ones(num_classes, device=device)
    if recipe.validates_by == "training attack":
        perturb = _training_attack(model, recipe, ones_K)
    else:
        attack = Attack(loss="cross-entropy", steps=recipe.select_steps, step=1 / 4, start="uniform")
        perturb = attack.on(model, recipe.eps)
    with exact_fp32():
        for batch in attacked_batches(model, split, perturb, device=device, batch_size=batch_size, ranks=ranks):
            clean_BK, adv_BK, label_B = batch.clean_BK, batch.adv_BK, batch.label_B
            clean_sums.add(*class_sums(clean_BK, label_B, num_classes))
            adv_sums.add(*class_sums(adv_BK, label_B, num_classes))
            boundary.add(class_temperature_kl(adv_BK, clean_BK, label_B, ones_K, reduction="none"), label_B)
    ranks.all_reduce_each_([value for sums in (clean_sums, adv_sums, boundary) for value in vars(sums).values()])
    return HeldOut(
        clean_accuracy_K=clean_sums.accuracy_K,
        robust_accuracy_K=adv_sums.accuracy_K,
        clean_loss_K=clean_sums.mean_loss_K,
        boundary_loss_K=boundary.mean_K,
    )


def _training_attack(model: nn.Module, recipe: Recipe, ones_K: Tensor) -> Perturb:
    """Return the method's own attack, as it is before the class state moves anything."""

    def perturb(clean: Tensor, clean_BK: Tensor, label_B: Tensor, seed: int) -> Tensor:
        return pgd(
            model,
            clean,
            objective=recipe.objective(Targets(label_B=label_B, own_BK=clean_BK, state={}, ones_K=ones_K)),
            steps=recipe.attack_steps,
            step=recipe.attack_step,
            eps=recipe.eps,
            start=recipe.attack_start,
            clip_start=recipe.clip_start,
            seed=seed,
        )

    return perturb
