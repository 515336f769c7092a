"""The inner maximisation of one training step: which attack it is, on what, and from where.

Dimension key: B batch, C channels, H, W, K classes.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retemper.engine.attack import ascend
from retemper.engine.attack_plan import Plan
from retemper.engine.first_order import FirstOrder
from retemper.engine.from_kept import images_from_kept
from retemper.engine.groups import STEPS, TrainingAttack, step_share
from retemper.engine.recipe import Recipe
from retemper.engine.speed.beside import Awaiting
from retemper.engine.state import State
from retemper.engine.targets import Targets

FAR = 2**62  # between the noise seeds of two attacks of a step: further than those of any two steps of a run


def begin_attack(recipe: Recipe, clean_BCHW: Tensor, targets: Targets, number: int) -> Targets:
    """Return the targets of one attack of the step, with a watcher of its own where the method has one."""
    targets = replace(targets, attack=number, watched=None)
    return replace(targets, watched=recipe.method.watcher(clean_BCHW, targets))


def attack(state: State, recipe: Recipe, attacked: nn.Module, clean_BCHW: Tensor, targets: Targets) -> Tensor:
    """Return adversarial images like `clean_BCHW`: the inner maximisation."""
    return attacked_images(state, recipe, attacked, clean_BCHW, targets)["adv"]


def attacked_images(
    state: State,
    recipe: Recipe,
    attacked: nn.Module,
    clean_BCHW: Tensor,
    targets: Targets,
    seen: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the images of the inner maximisation: "adv", and "start" where `pgi` began if the loss asks for it.

    Args:
        seen: index_B and view_B of `train_step`. Without them `pgi` begins anywhere in the ball.
    """
    if recipe.method.attacks_teacher:
        assert state.teacher is not None
        attacked = Beside(attacked, state.teacher)
    if targets.teacher_slope is not None:
        there = FirstOrder(clean_BCHW, targets.teacher, targets.teacher_slope, targets.label_B)
        attacked = Beside(attacked, there)
    chosen = state.attack_now(recipe)
    eps, step = recipe.method.margins(targets, chosen)
    plan = plan_of(
        chosen,
        eps,
        step,
        rows=state.part.ranks.rows,
        bn_mode=recipe.attack.bn_mode,
        seed=state.noise_seed + FAR * targets.attack if targets.attack else state.noise_seed,
    )
    awaits = recipe.method.attack_asks_teacher and state.beside.pending
    make = partial(recipe.method.objective, targets)
    objective = Awaiting(make, state.beside) if awaits else make()
    with state.autocast():
        if chosen.kind == "pgi" and state.prior is not None and seen is not None:
            begin = (attacked, clean_BCHW, plan, objective, targets.watched)
            images = images_from_kept(state.prior, seen, chosen, *begin)
        else:
            images = {"adv": ascend(attacked, clean_BCHW, plan, objective=objective, watch=targets.watched)}
            if chosen.kind == "pgi" and state.prior is not None and chosen.pgi_weight:
                images["start"] = images["adv"]  # a process without rows takes the forwards of the others
    state.beside.join()
    return images


def plan_of(chosen: TrainingAttack, eps: float | Tensor, step: float | Tensor, **options: Any) -> Plan:
    """Return how an attack of a recipe goes; `pgi` begins anywhere in the ball.

    Args:
        chosen: the attack as `taken` returns it.
        eps, step: its radius and its step in pixel units: numbers, or (B,).
        options: what else `Plan` takes.
    """
    if chosen.kind in STEPS:  # of the radius that is the class's own, too; and down where the method goes down
        down = isinstance(step, float) and step < 0
        step = eps * step_share(chosen.steps) * (-1 if down else 1)
    unbound = chosen.kind == "nfgsm"
    return Plan(
        steps=chosen.steps,
        step=step,
        eps=1.0 if unbound else eps,  # pixels have a range of 1: that far, nothing is projected
        start=chosen.start,
        start_eps=2 * eps if unbound else None,
        clip_start=chosen.clip_start,
        **options,
    )


class Beside(nn.Module):
    """Two networks as one whose logits stand side by side: (B, 2 K). An attack on it gets both gradients."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, 2 K) logits of (B, C, H, W) images."""
        return torch.cat([self.first(image), self.second(image)], 1)
