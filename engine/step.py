"""One training step of adversarial distillation: ask the teacher, attack the student, descend.

No value is read on the host, so that the device never waits. Dimension key: B batch, C channels, H, W, K classes.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from retemper.engine.attack import module_mode, pgd
from retemper.engine.optim import perturb_weights
from retemper.engine.recipe import Recipe, Targets
from retemper.engine.state import State


class Beside(nn.Module):
    """Two networks as one whose logits stand side by side: (B, 2 K). An attack on both gets both gradients."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 2 K)."""
        return torch.cat([self.first(image), self.second(image)], 1)


def observe(
    state: State, recipe: Recipe, attacked: nn.Module, clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None
) -> Targets:
    """What is known before the attack, as asked for: the teachers' logits on the clean images, the student's own."""
    own_BK = clean_teacher_BK = None
    with torch.no_grad(), state.autocast():
        if state.teacher is not None and teacher_BK is None and "clean" in recipe.teacher_sees:
            teacher_BK = state.teacher(clean_BCHW)
        if state.clean_teacher is not None and "clean" in recipe.clean_teacher_sees:
            clean_teacher_BK = state.clean_teacher(clean_BCHW)
        if recipe.needs_own_prediction:
            with module_mode(attacked, recipe.attack_bn):
                own_BK = attacked(clean_BCHW)
    targets = Targets(
        label_B=label_B,
        teacher_BK=teacher_BK,
        own_BK=own_BK,
        clean_teacher_BK=clean_teacher_BK,
        state=state.class_state,
        ones_K=state.ones_K,
        part=state.part,
    )
    return replace(targets, watched=recipe.watcher(clean_BCHW, targets))


def attack(state: State, recipe: Recipe, attacked: nn.Module, clean_BCHW: Tensor, targets: Targets) -> Tensor:
    """The inner maximisation: adversarial images like `clean_BCHW`."""
    if recipe.attacks_teacher:
        assert state.teacher is not None
        attacked = Beside(attacked, state.teacher)
    eps, step = recipe.margins(targets)
    with state.autocast():
        return pgd(
            attacked,
            clean_BCHW,
            objective=recipe.objective(targets),
            steps=recipe.attack_steps,
            step=step,
            eps=eps,
            start=recipe.attack_start,
            clip_start=recipe.clip_start,
            rows=state.part.ranks.rows,
            bn_mode=recipe.attack_bn,
            seed=state.noise_seed,
            watch=targets.watched,
        )


def observe_attacked(state: State, recipe: Recipe, adv_BCHW: Tensor, targets: Targets) -> Targets:
    """`targets` with the teachers' logits on the attacked images, as asked for."""
    with torch.no_grad(), state.autocast():
        if state.teacher is not None and "adv" in recipe.teacher_sees:
            targets = replace(targets, teacher_adv_BK=state.teacher(adv_BCHW))
        if state.clean_teacher is not None and "adv" in recipe.clean_teacher_sees:
            targets = replace(targets, clean_teacher_adv_BK=state.clean_teacher(adv_BCHW))
    return targets


def update(state: State, loss: Tensor) -> None:
    """The optimizer's step, unless the loss or a gradient is not finite now or was before."""
    weights = [weight for weight in state.student.parameters() if weight.grad is not None]
    # of gradients that overflow in half precision, a scaler skips the step and lowers the scale: they are no fault
    gradients = [] if state.scaler.is_enabled() else [weight.grad for weight in weights if weight.grad is not None]
    state.guard.look(loss, gradients, state.noise_seed)
    held_back = state.scaler.is_enabled() or hasattr(state.optimizer, "found_inf")
    before = [] if held_back else [weight.detach().clone() for weight in weights]
    state.scaler.step(state.optimizer)
    state.scaler.update()
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=False):  # of an optimizer that looks at no flag
            weight.copy_(torch.where(state.guard.found_inf > 0, value, weight))
    state.bucket.clear() if state.bucket else state.optimizer.zero_grad(set_to_none=True)


def descend(state: State, recipe: Recipe, images: Mapping[str, Tensor], targets: Targets) -> Tensor:
    """The outer minimisation: one step of the optimizer on `images`, named as in `forwards`; the loss before it."""

    def forward() -> tuple[dict[str, Tensor], Tensor]:
        with state.autocast():
            if recipe.joint:
                both = torch.cat([images[name] for name in recipe.forwards])
                split = state.student(both).split([len(images[name]) for name in recipe.forwards])
                logits = dict(zip(recipe.forwards, split, strict=True))
            else:
                logits = {name: state.student(images[name]) for name in recipe.forwards}
            return logits, recipe.loss(logits, targets)

    part = state.part
    state.student.train(not part.idle)
    before = {}
    if state.awp_gamma is not None:
        before = perturb_weights(
            state.student, state.awp_gamma, lambda: state.scaler.scale(part.weigh(forward()[1])), part.ranks.all_reduced
        )
    logits, loss = forward()
    share = part.weigh(loss)
    share = share + state.guard.poison if state.scaler.is_enabled() else share
    state.scaler.scale(share).backward()
    with torch.no_grad():
        for weight, value in before.items():
            weight.copy_(value)
    whole = loss.detach() if state.bucket is None else state.bucket.all_reduce(share.detach())
    update(state, whole)
    state.add(recipe, logits, targets, loss.detach())
    if state.average is not None and recipe.average_every == "step":
        state.average.follow(state.student)
    return whole


def stand_in(clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A black image of class 0 for a process that has none, so that it says all that the others wait to hear."""
    clean_BCHW = clean_BCHW.new_zeros((1, *clean_BCHW.shape[1:]))
    return (
        clean_BCHW,
        label_B.new_zeros(1),
        None if teacher_BK is None else teacher_BK.new_zeros(1, teacher_BK.shape[1]),
    )


def train_step(
    state: State, recipe: Recipe, clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None = None
) -> Tensor:
    """One step on one batch, or on this process's rows of it (`State.part`), which may be none.

    Args:
        clean_BCHW: fp32, in the networks' memory format, pixels in [0, 1], on the student's device.
        label_B: int64.
        teacher_BK: the teacher's logits on `clean_BCHW` where they are known; it is asked otherwise.
    Returns:
        The loss of the whole batch, a scalar on the device.
    """
    state.part.idle = not len(label_B)
    if state.part.idle:
        clean_BCHW, label_B, teacher_BK = stand_in(clean_BCHW, label_B, teacher_BK)
        recipe = replace(recipe, attack_bn="eval")  # whatever has no rows must move no statistics
    attacked = state.attacked()
    targets = observe(state, recipe, attacked, clean_BCHW, label_B, teacher_BK)
    adv_BCHW = attack(state, recipe, attacked, clean_BCHW, targets)
    targets = observe_attacked(state, recipe, adv_BCHW, targets)
    loss = descend(state, recipe, recipe.images(clean_BCHW, adv_BCHW, targets), targets)
    state.noise_seed += 1
    return loss
