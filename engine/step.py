"""One training step of adversarial distillation: ask the teacher, attack the student, descend.

No value is read on the host, so that the device never waits. Dimension key: B batch, C channels, H, W, K classes.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from retemper.engine.attack import module_mode
from retemper.engine.first_order import slope_at
from retemper.engine.from_kept import held_near
from retemper.engine.losses import as_label
from retemper.engine.maximise import attacked_images, begin_attack
from retemper.engine.missing_labels import stand_in
from retemper.engine.recipe import Recipe
from retemper.engine.state import State
from retemper.engine.targets import Targets
from retemper.kernels import random_start_

APART = 2**61  # between the seed of a step's attack and that of what its method draws


def train_step(
    state: State,
    recipe: Recipe,
    clean_BCHW: Tensor,
    label_B: Tensor,
    teacher_BK: Tensor | None = None,
    index_B: Tensor | None = None,
    view_B: Tensor | None = None,
) -> Tensor:
    """Train on one batch, or on this process's rows of it (`State.part`), which may be none.

    Args:
        clean_BCHW: fp32, in the networks' memory format, pixels in [0, 1], on the student's device.
        label_B: int64; -1 where there is none and `State.lacks_labels` says that there may be none.
        teacher_BK: the teacher's logits on `clean_BCHW` where they are known; it is asked otherwise.
        index_B, view_B: int64, which images these are, and how they are cropped and mirrored, as a loader gives them.
            The attack "pgi" alone asks for them.
    Returns:
        The loss of the whole batch before the step, a scalar on the device.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit. Values are not read: pixels outside [0, 1] are
            clipped by the attack.
    """
    label_B, seen = as_label(label_B), _seen(state, index_B, view_B, len(label_B))
    _require_batch(state, clean_BCHW, label_B, teacher_BK)
    state.part.idle = not len(label_B)
    if state.part.idle:  # one black image of class 0, so that this process takes part in every collective call
        clean_BCHW, label_B = clean_BCHW.new_zeros(1, *clean_BCHW.shape[1:]), label_B.new_zeros(1)
        teacher_BK = None if teacher_BK is None else teacher_BK.new_zeros(1, teacher_BK.shape[1])
        seen = None
        recipe = recipe.replace(attack_bn="eval")  # an image that counts for nothing must move no statistics
    attacked, counted_B = state.attacked(), None
    if state.lacks_labels:
        counted_B = label_B
        label_B, teacher_BK = stand_in(state, recipe, clean_BCHW, label_B, teacher_BK)
    targets = replace(observe(state, recipe, attacked, clean_BCHW, label_B, teacher_BK), counted_B=counted_B)
    images = {"clean": clean_BCHW}
    for number in range(recipe.method.attacks()):
        targets = begin_attack(recipe, clean_BCHW, targets, number) if number else targets
        images |= attacked_images(state, recipe, attacked, clean_BCHW, targets, seen)
        if targets.watched is not None:
            images |= targets.watched.images(images["adv"])
    images |= recipe.method.views(images)
    targets = observe_attacked(state, recipe, images, targets)
    return descend(state, recipe, images, targets)


def _require_batch(state: State, clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None) -> None:
    """Raise ValueError where the batch is not one of (B, C, H, W) float images with a label each."""
    if clean_BCHW.dim() != 4 or not clean_BCHW.is_floating_point():
        shape = f"{clean_BCHW.dtype} of shape {tuple(clean_BCHW.shape)}"
        raise ValueError(f"clean: {shape}; needs floats (B, C, H, W), pixels in [0, 1]")
    if len(label_B) != len(clean_BCHW):
        raise ValueError(f"label: shape {tuple(label_B.shape)}, but there are {len(clean_BCHW)} images: one for each")
    wanted = (len(label_B), state.num_classes)
    if teacher_BK is not None and teacher_BK.shape != wanted:
        raise ValueError(f"teacher: shape {tuple(teacher_BK.shape)}; needs {wanted}, a row of logits for each image")
    if {clean_BCHW.device.type, label_B.device.type} != {state.device.type}:
        raise ValueError(f"clean, label: on {clean_BCHW.device}, {label_B.device}; the student is on {state.device}")


def _seen(state: State, index_B: Tensor | None, view_B: Tensor | None, images: int) -> tuple[Tensor, Tensor] | None:
    """Return which images these are and how they are seen, where `pgi` keeps something of them."""
    if state.prior is None:
        return None
    if index_B is None or view_B is None or not index_B.shape == view_B.shape == (images,):
        raise ValueError(f"index, view: the attack pgi asks for both, ({images},) int64 as a loader gives them")
    return index_B, view_B


def observe(
    state: State, recipe: Recipe, attacked: nn.Module, clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None
) -> Targets:
    """Return what the method asks for before the attack: logits on clean images of the teachers, of the average and of
    the peer, and the student's own.

    All but the last may still be computed (`State.beside`) until `attack` has returned.
    """
    method = recipe.method
    targets = Targets(
        label_B=label_B,
        teacher_BK=teacher_BK,
        progress=state.progress if method.watches_progress else None,
        uniform_BK=uniform(state, label_B) if method.draws else None,
        label_smoothing=recipe.optim.label_smoothing,
        state=state.class_state,
        part=state.part,
    )
    with torch.no_grad(), state.autocast():
        if state.teacher is not None and (factor := method.attacks_slope()):
            logits_BK, slope = slope_at(state.teacher, clean_BCHW, label_B)
            targets = replace(targets, teacher_BK=logits_BK, teacher_slope=factor * slope)
        if state.teacher is not None and targets.teacher_BK is None and "clean" in method.shown_to_teacher():
            targets = replace(targets, teacher_BK=state.beside.run(partial(state.teacher, clean_BCHW)))
        if state.clean_teacher is not None and "clean" in method.clean_teacher_sees:
            clean_teacher_BK = state.beside.run(partial(state.clean_teacher, clean_BCHW))
            targets = replace(targets, clean_teacher_BK=clean_teacher_BK)
        state.fold_average()
        if state.averaged is not None and "clean" in state.average_sees:
            targets = replace(targets, average_BK=state.beside.run(partial(state.averaged, clean_BCHW)))
        if state.peer is not None:
            targets = replace(targets, peer_BK=state.beside.run(partial(state.peer.answer, clean_BCHW)))
        if method.needs_own_prediction:
            with module_mode(attacked, recipe.attack.bn_mode):
                targets = replace(targets, own_BK=attacked(clean_BCHW))
    return begin_attack(recipe, clean_BCHW, targets, number=0)


def uniform(state: State, label_B: Tensor) -> Tensor:
    """Return numbers uniform in [0, 1], (B, K), that follow from the step's noise seed and the rows' places in it."""
    middle_BK = torch.full((len(label_B), state.num_classes), 0.5, device=state.device, dtype=state.dtype)
    seed, rows = state.noise_seed + APART, state.part.ranks.rows
    return random_start_(torch.empty_like(middle_BK), middle_BK, 0.5, seed=seed, rows=rows)


def observe_attacked(state: State, recipe: Recipe, images: Mapping[str, Tensor], targets: Targets) -> Targets:
    """Return `targets` with the logits on what the attack has led to, of the networks that the method asks for them.

    Args:
        images: (B, C, H, W) by name: "adv", and those of `Method.views`. The teacher answers to all in one batch.
    """
    method = recipe.method
    with torch.no_grad(), state.autocast():
        asked = [name for name in method.shown_to_teacher() if name != "clean"]
        if state.teacher is not None and asked:
            shown = images[asked[0]] if len(asked) == 1 else torch.cat([images[name] for name in asked])
            views = dict(zip(asked, state.teacher(shown).chunk(len(asked)), strict=True))
            targets = replace(targets, teacher_adv_BK=views.pop("adv", None), teacher_views=views)
        if state.clean_teacher is not None and "adv" in method.clean_teacher_sees:
            targets = replace(targets, clean_teacher_adv_BK=state.clean_teacher(images["adv"]))
        if state.averaged is not None and "adv" in state.average_sees:
            targets = replace(targets, average_adv_BK=state.averaged(images["adv"]))
    return targets


def descend(state: State, recipe: Recipe, images: Mapping[str, Tensor], targets: Targets) -> Tensor:
    """Take one step of the optimizer on `images`, named as in `Method.forwards`; return the loss before it."""
    part = state.part
    state.student.train(not part.idle)
    if state.peer is not None:
        with state.autocast():
            targets = replace(targets, peer_adv_BK=state.peer.learn(images["adv"], idle=part.idle))
    if state.perturbation is not None:

        def scaled() -> Tensor:
            return state.scaler.scale(part.weigh(perturbing_loss(state, recipe, images, targets)))

        state.perturbation.move(scaled, part.ranks.all_reduced)
    logits, loss = forward(state, recipe, images, targets)
    share = part.weigh(loss)
    share = share + state.guard.poison if state.scaler.is_enabled() else share
    lowered = state.scaler.scale(share)
    lowered.backward(state.one if (lowered.dtype, lowered.shape) == (state.dtype, ()) else None)
    whole = loss.detach() if state.bucket is None else state.bucket.all_reduce(share.detach())
    if state.perturbation is not None:
        decay = recipe.optim.weight_decay if recipe.optim.awp_decay == "perturbed" else 0.0
        state.perturbation.put_back(decay, state.scaler)
    update(state, whole, 0 if part.idle else len(targets.label_B))
    with torch.no_grad(), state.autocast():
        for name in state.forwards.after:
            _logits(state, recipe, images, (name,))
    state.count(recipe.method, logits, targets)
    if state.average is not None and recipe.optim.average_every == "step":
        state.average.follow(state.student)
    return whole


def forward(
    state: State, recipe: Recipe, images: Mapping[str, Tensor], targets: Targets
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the student's logits on each of the training forwards' images, (B, K), and the loss, a scalar."""
    with state.autocast():
        names, loss = state.forwards.before, partial(recipe.method.training_loss, targets=targets)
        if "start" in images:
            names, loss = (*names, "start"), partial(held_near, loss, recipe.attack.pgi_weight)
        logits = _logits(state, recipe, images, names, loss)
        return {name: logits[name] for name in dict.fromkeys(state.forwards.before)}, loss(logits)


def perturbing_loss(state: State, recipe: Recipe, images: Mapping[str, Tensor], targets: Targets) -> Tensor:
    """Return the loss that the weights are perturbed along, a scalar; what it does to statistics is undone."""
    with state.autocast():
        names, loss = (
            tuple(dict.fromkeys(state.forwards.before)),
            partial(recipe.method.perturbing_loss, targets=targets),
        )
        return loss(_logits(state, recipe, images, names, loss, moves=False))


def _logits(
    state: State,
    recipe: Recipe,
    images: Mapping[str, Tensor],
    names: tuple[str, ...],
    loss: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    moves: bool = True,
) -> dict[str, Tensor]:
    """Return the student's logits on the images of each name, in training mode.

    Args:
        names: a name that comes again moves the running statistics once more.
        loss: of the logits, to be differentiated; None where nothing is.
        moves: False leaves the statistics alone where that costs nothing.
    """
    each = differentiated = tuple(dict.fromkeys(names))
    if state.joined is not None and loss is not None and not recipe.optim.joint:
        # a process without rows asks too: a loss may add up over all of them
        differentiated = _differentiated(state, images, names, loss, moves)
    if state.part.idle or (state.joined is None and not recipe.optim.joint):
        return _one_by_one(state.student, images, names, each)
    if state.joined is not None and differentiated != each:  # in one batch, the gradient of all would be computed
        alone = partial(state.joined, groups=1, moves=(0,) if moves else ())
        return _one_by_one(alone, images, names, differentiated)
    batch = images[names[0]] if len(each) == 1 else torch.cat([images[name] for name in each])
    if state.joined is None:
        logits = state.student(batch)
    else:
        groups = 1 if recipe.optim.joint else len(each)
        order = range(1) if recipe.optim.joint else [each.index(name) for name in names]
        logits = state.joined(batch, groups, order if moves else ())
    return dict(zip(each, logits.split([len(images[name]) for name in each]), strict=True))


def _differentiated(
    state: State,
    images: Mapping[str, Tensor],
    names: tuple[str, ...],
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    moves: bool,
) -> tuple[str, ...]:
    """Return the names whose logits the loss has a gradient at; it is asked once, in the first of such steps."""
    if (names, moves) not in state.differentiated:
        each = dict.fromkeys(names)
        logits = {name: state.one.new_zeros(len(images[name]), state.num_classes, requires_grad=True) for name in each}
        grads = torch.autograd.grad(loss(logits), [*logits.values()], allow_unused=True)
        found = tuple(name for name, grad in zip(each, grads, strict=True) if grad is not None)
        state.differentiated[names, moves] = found
    return state.differentiated[names, moves]


def _one_by_one(
    student: Callable[[Tensor], Tensor],
    images: Mapping[str, Tensor],
    names: tuple[str, ...],
    differentiated: tuple[str, ...],
) -> dict[str, Tensor]:
    """Return the student's logits on the images of each name; a name that comes again moves the statistics alone."""
    logits: dict[str, Tensor] = {}
    for name in names:
        with nullcontext() if name in differentiated and name not in logits else torch.no_grad():
            found = student(images[name])
        logits.setdefault(name, found)
    return logits


def update(state: State, loss: Tensor, rows: int = 0) -> None:
    """Take the optimizer's step, unless the loss or a gradient is not finite now or was before.

    Counts the step too: the loss of so many rows, and the noise seed, which moves on.
    """
    weights = [weight for weight in state.trained.parameters() if weight.grad is not None]
    # a scaler skips a step whose gradients overflow in half precision and lowers the scale: they are no fault
    gradients = [] if state.scaler.is_enabled() else [weight.grad for weight in weights if weight.grad is not None]
    state.guard.look(loss, gradients, state.noise_seed, state.loss_sum, rows)
    held_back = state.scaler.is_enabled() or hasattr(state.optimizer, "found_inf")
    before = [] if held_back else [weight.detach().clone() for weight in weights]
    state.scaler.step(state.optimizer)
    state.scaler.update()
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=False):  # this optimizer looks at no flag: put it back
            weight.copy_(torch.where(state.guard.found_inf > 0, value, weight))
    state.bucket.clear() if state.bucket else state.optimizer.zero_grad(set_to_none=True)
