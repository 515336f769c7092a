"""The cross-checks: three attacks of other makings on the images that AutoAttack leaves standing.

    pma       our own attack on the probability margin, max_{k != y} p_k - p_y of the softmax p, in two stages (the loss
              of PMA, CVPR 2025, in the schedule of the minimally distorted attack, MD): L-inf and L2
    mt-apgd   the library's APGD on the plain margin z_t - z_y towards every other class (Gowal et al., 2019), at most
              `TARGETS`, from starts that AutoAttack did not draw
    fmn       the minimal-norm attack of foolbox (Pintor et al., NeurIPS 2021): what it finds inside the ball counts

AutoAttack ascends the cross-entropy and the DLR; these ascend other losses along other schedules. An image that one of
them breaks shows that AutoAttack's accuracy is too high by that image.

Dimension key: B batch, C H W image, K classes.
"""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.minimal_norm import MinimalNorm
from retemper.engine.evaluation.norms import SLACK, length
from retemper.files import write_atomically
from retemper.kernels import pgd_step_, random_start_

CROSS = ("pma", "mt-apgd", "fmn")
TARGETS = 20  # of mt-apgd at most: more classes than AutoAttack's nine, where there are more
STEPS = 100  # of each of an attack's runs
ANOTHER = 1_000_003  # is added to AutoAttack's seed, so that the starts are others


def cross_checks(norm: str) -> tuple[str, ...]:
    """Return the names of the cross-checks in a norm, in order; PMA's steps have no L1 version."""
    return CROSS[1:] if norm == "l1" else CROSS


def cross_attacks(
    model: nn.Module, apgd_targeted: Any, num_classes: int, eps: float, *, seed: int, norm: str
) -> dict[str, Any]:
    """Return the cross-checks' attack objects by name: each has `perturb(clean, label)`.

    Args:
        model: as AutoAttack looks at it.
        apgd_targeted: the library's attack of a suite of its own, with the radius and the norm; it is set up anew.
    """
    apgd_targeted.n_target_classes = min(TARGETS, num_classes - 1)
    apgd_targeted.seed = seed + ANOTHER
    apgd_targeted.dlr_loss_targeted = lambda logits_BK, label_B: _towards(logits_BK, label_B, apgd_targeted.y_target)
    found = {
        "pma": ProbabilityMargin(model, eps=eps, seed=seed + ANOTHER, norm=norm),
        "mt-apgd": apgd_targeted,
        "fmn": Within(MinimalNorm(model, norm), eps, norm),
    }
    return {name: found[name] for name in cross_checks(norm)}


def _towards(logits_BK: Tensor, label_B: Tensor, target_B: Tensor) -> Tensor:
    """Return by how much the target's logit leads that of the label, (B,)."""
    return (logits_BK.gather(1, target_B[:, None]) - logits_BK.gather(1, label_B[:, None])).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One step of PMA's schedule: what it ascends, and the step's size in units of eps."""

    loss: str  # "own" for -p_y, "other" for the largest p_k, "margin" for their sum
    size: float


def schedule(run: int, steps: int = STEPS) -> list[_Stage]:
    """Return the steps of one of PMA's two runs.

    The first half ascends one term of the margin, -p_y in the first run and max p_k in the second, whose first step is
    along -p_y too; the second half ascends the margin. In each half the size falls from 2 eps to 0 along a cosine.
    """
    half = steps // 2
    one_term = ["own" if run == 0 or step == 0 else "other" for step in range(half)]
    losses = one_term + ["margin"] * (steps - half)
    ends = [(step / half if step < half else (step - half) / (steps - half)) for step in range(steps)]
    return [_Stage(loss=loss, size=1 + math.cos(math.pi * end)) for loss, end in zip(losses, ends, strict=True)]


@dataclass(frozen=True)
class ProbabilityMargin:
    """PMA: two runs from random starts, of `STEPS` steps each; the first image found that is misclassified is kept."""

    model: nn.Module
    eps: float
    seed: int
    norm: str

    def perturb(self, clean: Tensor, label_B: Tensor) -> Tensor:
        """Return (B, C, H, W) images within the ball; one that no run broke is returned clean."""
        found, holds_B = clean.clone(), torch.ones_like(label_B, dtype=torch.bool)
        for run in range(2):
            adv = random_start_(torch.empty_like(clean), clean, self.eps, seed=self.seed + run, norm=self.norm)
            for stage in [*schedule(run), None]:
                adv = adv.detach().requires_grad_(stage is not None)
                with torch.set_grad_enabled(stage is not None):
                    logits_BK = self.model(adv)
                broken_B = holds_B & (logits_BK.detach().argmax(1) != label_B)
                found = torch.where(broken_B.view(-1, *[1] * (clean.dim() - 1)), adv.detach(), found)
                holds_B = holds_B & ~broken_B
                if stage is not None:
                    with torch.enable_grad():
                        raised = _margin(logits_BK, label_B, stage.loss).sum()
                    (grad,) = torch.autograd.grad(raised, adv)
                    adv = pgd_step_(adv.detach(), grad, clean, stage.size * self.eps, self.eps, norm=self.norm)
        return found


def _margin(logits_BK: Tensor, label_B: Tensor, loss: str) -> Tensor:
    """Return the terms of the probability margin that a stage ascends, (B,)."""
    chance_BK = logits_BK.softmax(1)
    own_B = chance_BK.gather(1, label_B[:, None]).squeeze(1)
    other_B = chance_BK.scatter(1, label_B[:, None], 0.0).amax(1)
    return {"own": -own_B, "other": other_B, "margin": other_B - own_B}[loss]


@dataclass(frozen=True)
class Within:
    """A minimal-norm attack, of which only what it finds within a radius counts."""

    attack: MinimalNorm
    eps: float
    norm: str

    def perturb(self, clean: Tensor, label_B: Tensor) -> Tensor:
        """Return (B, C, H, W) images within the ball: what the attack found there, else the clean image."""
        adv = self.attack.perturb(clean, label_B)
        slack = 0.0 if self.norm == "linf" else SLACK
        inside_B = length(adv - clean, self.norm) <= self.eps * (1 + slack)
        return torch.where(inside_B.view(-1, *[1] * (clean.dim() - 1)), adv, clean)


def cross_entry(ledger: Ledger, before: dict[str, Any], attacks: tuple[str, ...], classes: int) -> dict[str, Any]:
    """Return the entry of the cross-checks in evaluation.json beside the accuracies: where they beat AutoAttack.

    Args:
        before: AutoAttack's own entry.
        attacks: those of AutoAttack and the cross-checks, in order.
        classes: how many the data set has.
    """
    broken = {name: ledger.label_N[ledger.broken_by == name] for name in attacks if name in CROSS}
    beats = {
        name: {"images": len(label_N), "by_class": np.bincount(label_N, minlength=classes).tolist()}
        for name, label_N in broken.items()
    }
    complete = ledger.is_complete(attacks)
    more = {"beats_autoattack": beats, "ledger": before["ledger"], "seconds": before["seconds"]}
    return {"complete": complete, "upper_bound": not complete or before["upper_bound"], "flags": [], **more}


def write_beaten(path: Path, ledgers: Iterable[Ledger]) -> None:
    """Write the images that a cross-check broke where AutoAttack had not, a row each, to a CSV file.

    Its columns are the radius, and those of the ledger: the image's position in the split, its label, the attack, the
    class given and the margin.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("eps", "image", "label", "attack", "predicted", "margin"))
    rows = []
    for ledger in ledgers:
        for row in np.flatnonzero(np.isin(ledger.broken_by, CROSS)):
            found = (ledger.image_N[row], ledger.label_N[row], ledger.broken_by[row], ledger.predicted_N[row])
            rows.append((f"{ledger.facts['eps']:.9g}", *found, f"{ledger.margin_N[row]:.6g}"))
    writer.writerows(dict.fromkeys(rows))  # two ledgers may have the same image, of all images and of some
    write_atomically(path, text.getvalue().encode())
