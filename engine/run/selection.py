"""After an epoch: how the student does on images that it has not learned from, and how good the epoch is by that.

Dimension key: B batch, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retemper.engine.attack import ascend
from retemper.engine.attack_plan import Plan
from retemper.engine.checkpoints.header import read_header
from retemper.engine.checkpoints.weights import CheckpointError, require_intact
from retemper.engine.class_report import by_class
from retemper.engine.device import exact_fp32
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.epoch_stats import ClassMeans, ClassSums, HeldOut
from retemper.engine.optim import wide_dtype
from retemper.engine.predict import Attack, attacked_batches, predictions
from retemper.engine.recipe import Recipe
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.targets import Targets
from retemper.errors import DataError
from retemper.kernels import class_temperature_kl
from retemper.loaders import Split


@dataclass(frozen=True)
class Best:
    """The best epoch so far: the one with the largest score (`score`).

    The score stands in the file of the weights as well: a kill between that file and the state must not part the two.

    Attributes:
        score: -1 before any epoch.
        epoch: from 1; 0 before any.
    """

    score: float = -1.0
    epoch: int = 0


def newest_best(folder: RunFolder, state: dict[str, Any] | None) -> Best:
    """Return the best epoch: that of the saved state, or of weights that a killed process wrote after it.

    Weights of a run that was cut (`Saver.save_cut`) are no epoch's, so they do not count.

    Raises:
        DataError: the weights are damaged.
    """
    if state is None or not folder.best.exists():
        return Best()
    try:
        require_intact(folder.best)
    except CheckpointError as error:
        raise DataError(f"{error}, or delete it: a later epoch is then the best") from None
    header, saved = read_header(folder.best), Best(**state["best"])
    if "cut" in header:
        return saved
    epoch = int(header.get("epoch", 0))
    return Best(float(header["score"]), epoch) if epoch > saved.epoch else saved


def judging_attack(recipe: Recipe) -> Attack:
    """Return the attack that judges: PGD on the cross-entropy, from a uniform start clipped to [0, 1].

    On test images the attacked image alone is judged, as in the authors' scripts.
    """
    chosen = recipe.selection
    return Attack(steps=chosen.select_steps, step=chosen.select_step, alone=chosen.select_on == "test")


def judge(network: nn.Module, recipe: Recipe, images: Split, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Return the report by class of `network` on `images` under `judging_attack`.

    Where the clean accuracy takes part in the choice, it is in the report as "clean_average".
    """

    def answers(attack: Attack) -> np.ndarray:
        eps = recipe.attack.eps
        return predictions(network, images, attack, eps=eps, device=device, ranks=ranks).numpy()

    report = by_class(answers(judging_attack(recipe)), images.labels, len(images.classes), report_alone=True)
    kept = {name: value for name, value in report.items() if name != "count"}
    if recipe.selection.select_by == "clean+robust":
        kept["clean_average"] = float((answers(Attack(steps=0)) == images.labels).mean())
    return kept


def score(report: Mapping[str, Any], recipe: Recipe) -> float:
    """Return by how much an epoch is chosen, from what `judge` returned: a sum of fractions, or one of them."""
    parts = {
        "robust+worst": ("average", "worst"),
        "robust": ("average",),
        "worst": ("worst",),
        "clean+robust": ("average", "clean_average"),
    }
    return sum(report[part] for part in parts[recipe.selection.select_by])


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

    `Method.validates_by` says which attack. "pgd" is the one that judges. "training attack" is the method's own before
    its class state moves anything: its objective and start, at the recipe's eps and step. Several processes take turns
    at the batches.
    """
    attack = recipe.attack

    def trained(clean: Tensor, clean_BK: Tensor, label_B: Tensor, seed: int) -> Tensor:
        objective = recipe.method.objective(Targets(label_B=label_B, own_BK=clean_BK, state={}))
        return ascend(model, clean, Plan(**attack.own_steps, seed=seed), objective=objective)

    judging = judging_attack(recipe).on(model, attack.eps)
    perturb = trained if recipe.method.validates_by == "training attack" else judging
    dtype = wide_dtype(next(model.parameters()))
    clean_sums, adv_sums = (ClassSums.zeros(num_classes, device, dtype) for _ in range(2))
    boundary = ClassMeans.zeros(num_classes, 1, device, dtype)
    with exact_fp32():
        for batch in attacked_batches(model, split, perturb, device=device, batch_size=batch_size, ranks=ranks):
            clean_sums.add(batch.clean_BK, batch.label_B)
            adv_sums.add(batch.adv_BK, batch.label_B)
            boundary_B = class_temperature_kl(batch.adv_BK, batch.clean_BK, reduction="none")
            boundary.add(boundary_B, batch.label_B)
    ranks.all_reduce_each_([value for sums in (clean_sums, adv_sums, boundary) for value in vars(sums).values()])
    return HeldOut(
        clean_accuracy_K=clean_sums.accuracy_K,
        robust_accuracy_K=adv_sums.accuracy_K,
        clean_loss_K=clean_sums.mean_loss_K,
        boundary_loss_K=boundary.mean_K,
    )
