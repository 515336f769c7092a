"""MTARD: a robust teacher for attacked images, a clean one for clean ones, balanced by step (Zhao et al., ECCV 2022).

min  (1 - w) L_adv + w L_clean   where   L_adv = KL(T(x') || S(x')),  L_clean = KL(C(x) || S(x))

x' = argmax CE(S(x'), y) in the eps ball. Before every step w moves towards the task that has come down less:

w <- w - rate (w - r_clean / (r_adv + r_clean))   where   r = L / the first step's L
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retemper.engine import EpochStats, LabelAttack, Recipe, Targets, at_least_float32, given, option, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.settings import JUDGED_ON_TEST, ON_DIGITS, distillation

TINY = 1e-12  # in place of a loss of 0, which no quotient stands
FLOOR = 1e-5  # is added to the teacher's probability inside its logarithm, `released`


def next_clean_weight(clean_weight: Tensor, adv_ratio: Tensor, clean_ratio: Tensor, rate: float | Tensor) -> Tensor:
    """Return w after one step of the rule above; the ratios are r_adv and r_clean, all 0-dim or (1,)."""
    return clean_weight - rate * (clean_weight - clean_ratio / (adv_ratio + clean_ratio))


def floor_cost(
    teacher_BK: Tensor, label_B: Tensor, temperature: Tensor | None = None, class_weight: Tensor | None = None
) -> Tensor:
    """Return by how much `FLOOR` raises the KL divergence that `class_temperature_kl` computes of the same arguments.

    It moves no gradient, but the ratios that weigh the tasks: by less than K * FLOOR nats of a task's KL.
    """
    logits_BK = at_least_float32(teacher_BK)
    if temperature is not None:
        logits_BK = logits_BK / temperature[label_B, None]
    p_BK = logits_BK.softmax(1)
    cost_B = (torch.xlogy(p_BK, p_BK + FLOOR) - torch.xlogy(p_BK, p_BK)).sum(1)
    return (cost_B if class_weight is None else cost_B * class_weight[label_B]).mean()


def whole_batch(targets: Targets, adv: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two losses over the batch of all processes, without gradient: what the tasks are balanced by."""
    return targets.part.mean(adv.detach()), targets.part.mean(clean.detach())


@dataclass(frozen=True, kw_only=True)
class Mtard(LabelAttack):
    # released: FLOOR, about 3e-5 of a loss; the split and the choice of the authors' script, which saves every
    # twentieth epoch, and each from 215 on, under the name of its accuracy under attack; fp32. Left out: it judges the
    # first epoch too.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {**JUDGED_ON_TEST, "select_by": "robust", "select_every": 20}
    }
    teacher_sees: ClassVar[tuple[str, ...]] = ("adv",)
    clean_teacher_sees: ClassVar[tuple[str, ...]] = ("clean",)
    kl_scale: float = option(0.1, "factor on both losses; the authors average over 10 classes", at_most=1000)
    task_rate: float = option(
        0.025, "rate of the weight between the two tasks; falls with the learning rate", at_most=100
    )

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        own = {
            "clean_task_weight": torch.full((1,), 0.5),
            "task_rate": torch.full((1,), self.task_rate, dtype=torch.float64),  # what a student in float64 learns by
            "first_adv_loss": torch.zeros(1),  # 0: no step yet
            "first_clean_loss": torch.zeros(1),
        }
        return super().class_state(num_classes, recipe) | own

    def teacher_of(self, task: str, targets: Targets) -> Tensor:
        """Return the logits, (B, K), that the task "adv" or "clean" is held against."""
        return given(targets.teacher_adv_BK if task == "adv" else targets.clean_teacher_BK)

    def by_class(self, task: str, targets: Targets) -> dict[str, Any]:
        """Return what `class_temperature_kl` is told of the classes in a task: (K,) by the name of its argument."""
        return {}

    def task_losses(self, logits: Mapping[str, Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """Return L_adv and L_clean, scalars."""

        def task_loss(task: str) -> Tensor:
            teacher_BK, by_class = self.teacher_of(task, targets), self.by_class(task, targets)
            kl = class_temperature_kl(logits[task], teacher_BK, targets.label_B, **by_class, ignore_index=None)
            if self.variant == "released":
                kl = kl + floor_cost(teacher_BK, targets.label_B, **by_class)
            return self.kl_scale * kl

        return task_loss("adv"), task_loss("clean")

    def balance(self, state: Mapping[str, Tensor], adv: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """Return the state, each (1,), that a step with these task losses is weighed by."""
        adv, clean = (loss.detach().clamp(min=TINY) for loss in (adv, clean))
        first_adv, first_clean = state["first_adv_loss"], state["first_clean_loss"]
        first_adv = torch.where(first_adv > 0, first_adv, adv)
        first_clean = torch.where(first_clean > 0, first_clean, clean)
        ratios = adv / first_adv, clean / first_clean
        return {
            "clean_task_weight": next_clean_weight(state["clean_task_weight"], *ratios, state["task_rate"]),
            "first_adv_loss": first_adv,
            "first_clean_loss": first_clean,
        }

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        adv, clean = self.task_losses(logits, targets)
        weight = self.balance(targets.state, *whole_batch(targets, adv, clean))["clean_task_weight"].squeeze()
        return (1 - weight) * adv + weight * clean

    def after_step(self, state: Mapping[str, Tensor], logits: Mapping[str, Tensor], targets: Targets) -> None:
        losses = whole_batch(targets, *self.task_losses(logits, targets))
        for name, value in self.balance(state, *losses).items():
            state[name].copy_(value)

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        rate = torch.full_like(state["task_rate"], self.task_rate * recipe.optim.decay(epoch))
        return super().next_class_state(state, stats, epoch, recipe) | {"task_rate": rate}


SHORT = dict(kl_scale=1.0)  # one or two thousand steps are too few for a tenth of the loss
SETTINGS = distillation(Mtard, status=ON_DIGITS, digits=SHORT, small=SHORT)

if __name__ == "__main__":
    run_recipe(__file__)
