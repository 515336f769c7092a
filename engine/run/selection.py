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
from retemper.engine.losses import cross_entropy_objective
from retemper.engine.predict import Attack, as_float, predictions
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
    attack, label_N = recipe.attack, torch.from_numpy(split.labels)
    model.eval()
    with exact_fp32():
        for batch in torch.arange(len(split)).split(batch_size)[ranks.rank :: ranks.world_size]:
            label_B, clean = label_N[batch].to(device), as_float(split, batch, device)
            with torch.no_grad():
                clean_BK: Tensor = model(clean)
            objective = cross_entropy_objective(label_B)
            steps, step, start, clip_start = recipe.selection.select_steps, attack.eps / 4, "uniform", True
            if recipe.method.validates_by == "training attack":
                objective = recipe.method.objective(Targets(label_B=label_B, own_BK=clean_BK, state={}))
                steps, step, start, clip_start = attack.steps, attack.step, attack.start, attack.clip_start
            adv = pgd(
                model,
                clean,
                objective=objective,
                steps=steps,
                step=step,
                eps=attack.eps,
                start=start,
                clip_start=clip_start,
                seed=int(batch[0]),
            )
            with torch.no_grad():
                adv_BK: Tensor = model(adv)
            clean_sums.add(*class_sums(clean_BK, label_B, num_classes))
            adv_sums.add(*class_sums(adv_BK, label_B, num_classes))
            boundary.add(class_temperature_kl(adv_BK, clean_BK, label_B, reduction="none"), label_B)
    ranks.barrier(patiently=True)  # for a process with a batch more
    ranks.all_reduce_each_([value for sums in (clean_sums, adv_sums, boundary) for value in vars(sums).values()])
    return HeldOut(
        clean_accuracy_K=clean_sums.accuracy_K,
        robust_accuracy_K=adv_sums.accuracy_K,
        clean_loss_K=clean_sums.mean_loss_K,
        boundary_loss_K=boundary.mean_K,
    )
